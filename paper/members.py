"""Are training images compared fairly with controls? Where only chance decided which is which.

    python paper/ground_truth.py letters --work work/letters
    python paper/members.py letters --work work/letters

The fine-tune is done again on one random half of the data set (`influence split --holdout 0.5`), by the same recipe,
and the other half are the controls. Pictures that neither has are the queries, and every third training image. As
nothing but chance tells the halves apart, what is left between their scores is what training on an image does to its
own gradient, so far as it is not corrected. Three statistics: the score, the corrected score score_adj, and the
relative score score_rel, by which p-values of images go (Barshan et al., 2020), in which what is along φᵢ cancels.

Parts, models and store are kept in `work/…/members`; writes `paper/results/<truth>-members.md`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from calibration import DRAWS, PAPER, queries, say
from scipy import stats

import influence
from influence import attribution, finetuning, significance
from influence.scored import Scored

METHOD = "two-length"
EVERY = 3


def trained_again(name: str, work: Path) -> influence.Store:
    """The store of a model of one half of the images, with the others as controls."""
    out, base = work / "members", PAPER / "truth" / name / "base"
    train, controls = out / "parts" / "train", out / "parts" / "controls"
    if not train.exists():
        influence.hold_out(work / "dataset", out / "parts", fraction=0.5)
    recipe = json.loads((work / "model" / finetuning.RECIPE_FILE).read_text(encoding="utf-8"))
    for folder, times in ((out / "model", 2), (out / "half", 1)):  # `halve` trains for half of the epochs
        if not (folder / finetuning.RECIPE_FILE).exists():
            told = out / f"recipe-{folder.name}.json"
            told.write_text(json.dumps(recipe | {"epochs": times * recipe["epochs"]}), encoding="utf-8")
            influence.halve(train, folder, base=base, recipe=told, message=say)
    lora = recipe["lora_rank"] is not None
    of = {"model": base, "lora": out / "model"} if lora else {"model": out / "model", "base": base}
    return influence.build(
        train, store=out / "store", half=out / "half", controls=controls, recipe=out / "model", message=say, **of
    )


def statistics(scored: Scored) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """By name: what training images have `[query, train]`, what controls have, and the ids of the former."""
    controls = scored.controls
    assert controls is not None
    found = {}
    for name, theirs in (("score", controls.scores), ("score_adj", controls.scores), ("score_rel", controls.relative)):
        mine = scored.table.pivot_table(index="query", columns="item_id", values=name).loc[scored.queries.paths]
        found[name] = mine.to_numpy(), theirs, mine.columns.tolist()
    return found


def compared(mine: np.ndarray, theirs: np.ndarray, ids: list[str], asked: list[str | None]) -> dict[str, float]:
    """How p-values of training images are distributed, and how often one that is asked about is above all controls."""
    p: list[float] = []
    found, sizes = [], []
    for row, strangers, query in zip(mine, theirs, asked, strict=True):
        null = strangers[~np.isnan(strangers)]
        above = significance.exceedances(row, null)
        itself = np.array(ids) == query
        found += (above[itself] == 0).tolist()
        p += significance.p_values(above[~itself], len(null)).tolist()
        sizes.append(np.mean(np.square(row[~itself])) / np.mean(np.square(null)))
    values = np.array(p)
    return {
        "size": float(np.sqrt(np.mean(sizes))),
        "p ≤ 0.01": (values <= 0.01).mean(),
        "p ≤ 0.05": (values <= 0.05).mean(),
        "p ≤ 0.5": (values <= 0.5).mean(),
        "p ≥ 0.95": (values >= 0.95).mean(),
        "KS": float(stats.kstest(values, "uniform").statistic),
        "finds itself": float(np.mean(found)) if found else float("nan"),
    }


def main() -> None:
    """Train, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("emoji", "letters"))
    parser.add_argument("--work", type=Path, required=True, help="folder of ground_truth.py")
    options = parser.parse_args()
    name, work = options.name, options.work
    made = trained_again(name, work)
    others = made.controls()
    assert others is not None
    unseen = queries(name, work).query("kind == 'unseen'")
    members = made.items.drop_duplicates("item_id").iloc[::EVERY]
    paths = [*unseen["path"], *(str(work / "members" / "parts" / "train" / file) for file in members["file_name"])]
    captions = [*unseen["caption"], *members["caption"]]
    scored = attribution.score(
        paths, made, k=None, method=METHOD, damping=None, draws=DRAWS,
        prompt=captions if made.spec.conditional else None, intervals=False, model=None, lora=None, base=None,
        half=None, engine="auto", batch_size=influence.DEFAULT_BATCH, memory=None, device="auto",
        progress=lambda *_: None, message=say, clusters=None, path=False,
    )  # fmt: skip
    rows = []
    itself = [*[None] * len(unseen), *members["item_id"]]  # a query's own id has its prompt in it
    for statistic, (mine, theirs, ids) in statistics(scored).items():
        for kind, part in (("unseen", slice(0, len(unseen))), ("trained", slice(len(unseen), None))):
            found = compared(mine[part], theirs[part], ids, itself[part])
            rows.append({"statistic": statistic, "queries": kind} | found)
    text = pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3f")
    head = f"{len(made.items)} images trained on, {len(others.items)} controls; {len(unseen)} unseen queries, "
    (PAPER / "results" / f"{name}-members.md").write_text(f"{head}{len(members)} trained.\n\n{text}\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
