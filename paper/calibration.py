"""Are the p-values, verdicts and intervals of answers right? On a ground truth, with controls never trained on.

    python data/emoji.py --out emoji1015 --size 16 --count 1015
    python data/emoji.py --out people --size 16 --count 164 --people
    python paper/ground_truth.py emoji --pictures emoji16 --work work/emoji
    python paper/calibration.py emoji --work work/emoji --pictures emoji1015 people
    python paper/ground_truth.py letters --work work/letters
    python paper/calibration.py letters --work work/letters

Controls of `emoji` are people, and all concepts that are in neither the data set nor the queries; those of `letters`
the held-out characters, and the letters of other families. The store and the features are kept in the work folder.
Writes `paper/results/<truth>-calibration.md`.
"""

import argparse
import csv
import itertools
import shutil
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

import influence
from influence import (
    answers,
    attribution,
    derived,
    keys,
    nearcopies,
    pipeline,
    scoring,
    significance,
    taking,
    typefaces,
    waypoints,
)
from influence.queries import read_queries
from influence.scored import Scored

PAPER = Path(__file__).parent
DRAWS = 256
PERMUTATIONS = 8  # of labels, for each query
MORE = 20  # times as many draws, for the value that an interval should cover
FONTS = """
    amiri==1.2 archivo==2.1 asap==3.2 cairo==3.130 catamaran==2.0 chivo==2.2 domine==2.0 figtree==2.2 heebo==3.100
    hind==2.1 inconsolata==3.1 inter==4.1.post1 jost==3.710 kanit==2.0 karla==2.4 lexend==1.7 libre-baskerville==2.5
    libre-franklin==3.0 maven-pro==2.103 mulish==3.603 nunito-sans==3.101 open-sans==3.3 outfit==1.100 overpass==4.0
    prompt==1.1 pt-sans==2.3 raleway==4.26 roboto==3.15 rubik==2.300 sarabun==1.0 signika==2.3 sora==2.0 spectral==2.5
    tajawal==1.700 teko==2.0 titillium-web==1.2 urbanist==1.303 vollkorn==5.1 work-sans==2.12 cabin==3.1 exo-2==2.10
    bitter==3.21
"""
"""PyPI packages `fontpkg-…` of families that neither the data set nor the base model has seen."""
KINDS = ("generated", "trained", "unseen")


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


# Store and controls ---------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    """Of metadata.csv."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fonts(folder: Path) -> list[Path]:
    """Install the font packages into a folder of their own, unless it is there; one upright file of each family."""
    if not folder.exists():
        packages = [f"fontpkg-{font}" for font in FONTS.split()]
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *packages], check=True)
    found: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*.ttf"), key=lambda path: ("Regular" not in path.name, "Italic" in path.name)):
        found.setdefault(path.parent, path)
    return sorted(found.values(), key=lambda path: path.name)


def controls(name: str, work: Path, pictures: list[Path]) -> Path:
    """All pictures of the same kind that are in neither the data set nor the queries."""
    out = work / "strangers"
    if (out / "metadata.csv").exists():
        return out
    if name == "emoji":
        used = {row["concept"] for part in ("dataset", "unseen") for row in rows(work / part)}
        chosen = [(folder, row) for folder in pictures for row in rows(folder) if row["concept"] not in used]
    else:
        trained = {row["creator"] for row in rows(work / "dataset")}
        letters = string.ascii_uppercase + string.ascii_lowercase + string.digits
        typefaces.render(work / "others", fonts(work / "fonts"), letters, size=32)
        chosen = [(work / "others", row) for row in rows(work / "others") if row["creator"] not in trained]
        columns = list(chosen[0][1])
        chosen += [(work / "controls", {key: row[key] for key in columns}) for row in rows(work / "controls")]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for source, row in chosen:
        (out / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row["file_name"], out / row["file_name"])
    with (out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0][1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in chosen)
    return out


def build(name: str, work: Path, pictures: list[Path]) -> influence.Store:
    """The store of the fine-tune, with its controls."""
    base = PAPER / "truth" / name / "base"
    adapted = name == "letters"
    if not (work / "half").exists():
        influence.halve(work / "dataset", work / "half", base=base, recipe=work / "model")
    return influence.build(
        work / "dataset", model=base if adapted else work / "model", lora=work / "model" if adapted else None,
        store=work / "store", controls=controls(name, work, pictures), base=base,
        half=work / "half", message=say,
    )  # fmt: skip


def queries(name: str, work: Path) -> pd.DataFrame:
    """The queries of the truth: kind, path, caption."""
    import json

    facts = json.loads((PAPER / "truth" / name / "truth.json").read_text(encoding="utf-8"))["queries"]
    folder = {"generated": work / "generated", "trained": work / "dataset" / "images",
              "unseen": work / "unseen" / "images"}  # fmt: skip
    return pd.DataFrame([
        {"kind": query["kind"], "path": str(folder[query["kind"]] / query["file_name"]), "caption": query["caption"]}
        for query in facts
    ])  # fmt: skip


# Checks ---------------------------------------------------------------------------------------------------------------


def strangers(scored: Scored, chosen: np.ndarray) -> tuple[float, float, int, tuple[int, int, int]]:
    """p-values of controls against other controls: KS p, rate at 5 %, n, and its binomial bounds."""
    p = []
    for q in chosen:
        values = scored.controls.relative_of(int(q))
        order = np.argsort(keys.uniform(("calibration", int(q)), len(values)))
        candidates, others = order[:24], order[24:]
        above = significance.exceedances(values[candidates], values[others])
        p += significance.p_values(above, len(others)).tolist()
    hits = int((np.array(p) <= 0.05).sum())
    low, high = stats.binom.interval(0.95, len(p), 0.05)
    return float(stats.kstest(p, "uniform").pvalue), hits / len(p), len(p), (hits, int(low), int(high))


def members(scored: Scored, chosen: np.ndarray, adjusted: pd.DataFrame) -> dict[str, float]:
    """p-values of training images for queries that none of them is: at 5 %, and in the middle."""
    found, controls = {}, scored.controls
    for column, of in (("score_adj", controls.of), ("score_rel", controls.relative_of)):
        p = []
        for q in chosen:
            values = np.sort(of(int(q)))
            mine = adjusted.loc[adjusted["number"] == q, column].to_numpy()
            p += significance.p_values(significance.exceedances(mine, values), len(values)).tolist()
        picked = np.array(p)[keys.integers(("pairs", column), 600, len(p))]
        found |= {f"{column} at 5 %": float((np.array(p) <= 0.05).mean()),
                  f"{column} KS p (600 pairs)": float(stats.kstest(picked, "uniform").pvalue)}  # fmt: skip
    return found


def permuted(scored: Scored, chosen: np.ndarray, adjusted: pd.DataFrame) -> float:
    """How often no creator is credited when labels are permuted between trained and controls."""
    sizes = scored.creators.images
    silent = []
    for q, again in itertools.product(chosen, range(PERMUTATIONS)):
        mine = adjusted.loc[adjusted["number"] == q, "score_adj"].to_numpy()
        pool = np.concatenate([mine, scored.controls.of(int(q))])
        pool = pool[np.argsort(keys.uniform(("permuted", int(q), again), len(pool)))]
        ends = np.cumsum(sizes).astype(int)
        parts = np.split(pool[: ends[-1]], ends[:-1])
        nulls = [significance.group_null(part, np.ones(len(part)), pool[ends[-1] :]) for part in parts]
        totals = np.array([part.sum() for part in parts])
        fdr = significance.false_discovery_rates(significance.group_p_values(totals, nulls))
        silent.append(not (fdr <= significance.Q_VALUE).any())
    return float(np.mean(silent))


def coverage(made: influence.Store, asked: pd.DataFrame, scored: Scored, count: int, images: int) -> tuple[float, int]:
    """How often 95 % intervals of scores hold the value from 20 times as many draws, of both pictures."""
    loaded, name = scored.loaded, scored.table.attrs["method"]
    method = influence.METHODS[name]
    points = [waypoints.model_of(family, made.source, loaded) for family in (method.family, *method.elsewhere)]
    picked = asked.iloc[np.linspace(0, len(asked) - 1, count).round().astype(int)]
    paths, prompts = picked["path"].tolist(), picked["caption"].tolist()
    data = pipeline.read(made.source["dataset"], loaded.denoiser, None, lambda *_: None, lambda *_: None)
    items = sorted({item.item_id: item for item in data.items}.values(), key=lambda item: item.item_id)
    items = [items[i] for i in np.linspace(0, len(items) - 1, images).round().astype(int)]
    exact, phi = [], []
    for point in points:
        more = replace(point, recipe=replace(point.recipe, num_draws=MORE * DRAWS))
        exact.append(read_queries(more, "loss", paths, prompts, lambda *_: None, say).phi)
        train = replace(point.recipe, role="train", num_draws=MORE * made.build["draws"], curvature_rate=0.0)
        phi.append(np.concatenate([taking.take(point.denoiser, train, [item]).phi for item in items]))
    factored = derived.solver(made, method, None)
    asked_exactly, phi = torch.from_numpy(np.concatenate(exact, 1)), np.concatenate(phi, 1)
    v = scoring.precondition(method, asked_exactly, factored, float(len(made.items))).numpy()
    values = pd.DataFrame(v @ phi.astype(float).T, index=picked["path"], columns=[item.item_id for item in items])
    table = scored.table[scored.table["query"].isin(picked["path"]) & scored.table["item_id"].isin(values.columns)]
    true = np.array([values.loc[row.query, row.item_id] for row in table.itertuples()])
    inside = (table["score_low"].to_numpy() <= true) & (true <= table["score_high"].to_numpy())
    return float(inside.mean()), len(inside)


def finds_itself(made: influence.Store, work: Path) -> tuple[float, int]:
    """How often a training picture, asked about, has q ≤ 0.1 itself; of all training pictures."""
    files = made.items.drop_duplicates("item_id")
    paths = [str(work / "dataset" / name) for name in files["file_name"]]
    prompts = files["caption"].fillna("").tolist() if made.spec.conditional else None
    table = influence.attribute(paths, made, k=None, draws=DRAWS, prompt=prompts, intervals=False, message=say)
    own = table[table["item_id"] == table["query"].map(dict(zip(paths, files["item_id"], strict=True)))]
    return float((own["q_value"] <= 0.1).mean()), len(own)


def main() -> None:
    """Check, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", choices=("emoji", "letters"))
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    parser.add_argument("--pictures", type=Path, nargs="+", default=[], help="what data/emoji.py made")
    parser.add_argument("--pairs", type=int, nargs=2, default=(10, 40), help="queries and images for coverage")
    parser.add_argument("--every", action="store_true", help="ask about all training pictures")
    options = parser.parse_args()
    name, work = options.truth, options.work
    made = build(name, work, options.pictures)
    asked = queries(name, work)
    prompts = asked["caption"].fillna("").tolist() if made.spec.conditional else None
    clusters = nearcopies.duplicate_clusters(made)
    scored = attribution.score(
        asked["path"].tolist(), made, k=None, method=None, damping=None, draws=DRAWS, prompt=prompts,
        intervals=True, model=None, lora=None, base=None, half=None, engine="auto", batch_size=64, memory=None,
        device="cpu", progress=lambda *_: None, message=say, clusters=clusters,
    )  # fmt: skip
    table = scored.table.assign(number=scored.table["query"].map({path: q for q, path in enumerate(asked["path"])}))
    by_kind = {kind: np.flatnonzero(asked["kind"] == kind) for kind in KINDS}
    count = len(scored.controls.item_ids)
    lines: list[str] = []

    def show(*found: str) -> None:
        print(*found, sep="\n", flush=True)
        lines.extend(found)
        (PAPER / "results" / f"{name}-calibration.md").write_text("\n".join(lines), encoding="utf-8")

    show(f"Controls: {count}; training images: {table['item_id'].nunique()}; queries: {len(asked)}.", "")

    ks, rate, n, bounds = strangers(scored, by_kind["unseen"])
    show("| check | value |", "|---|---|")
    show(f"| never trained on, unseen queries: KS p of p-values (n = {n}) | {ks:.3f} |")
    show(f"| … at 5 % (binomial 95 %: {bounds[1]} to {bounds[2]}) | {rate:.1%} ({bounds[0]}) |")
    for what, value in members(scored, by_kind["unseen"], table).items():
        show(f"| trained, unseen queries: {what} | {value:.3f} |")
    for kind in KINDS:
        silent = permuted(scored, by_kind[kind], table)
        show(f"| labels permuted {PERMUTATIONS} times, {kind}: nobody credited | {silent:.0%} |")
    names = table["file_name"].map(lambda name: Path(name).name)
    own = [table[(table["number"] == q) & (names == Path(asked["path"][q]).name)].iloc[0] for q in by_kind["trained"]]
    smallest = len(made.items) / (1 + count)
    show(f"| trained queries: above all controls | {np.mean([r.p_value <= 1.5 / (1 + count) for r in own]):.0%} |")
    show(
        f"| trained queries: the picture itself has q ≤ 0.1 (a single image can reach {smallest:.3f}) | "
        f"{np.mean([row.q_value <= 0.1 for row in own]):.0%} |"
    )
    answered = answers.of_scored(scored, clusters, usage=np.ones(len(asked)), message=say)
    words = answered.queries.assign(kind=asked["kind"]).groupby(["kind", "verdict"]).size().unstack(fill_value=0)
    show("", "Verdicts:", "", words.to_markdown(), "")
    value, n = coverage(made, asked, scored, *options.pairs)
    show(f"95 % intervals of scores hold the value from {MORE} × the draws in {value:.1%} of {n} pairs.", "")
    if options.every:
        found, n = finds_itself(made, work)
        show(f"Of all {n} training pictures, asked about, {found:.1%} have q ≤ 0.1 themselves.", "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
