"""Creators' totals and shares against exact Shapley values, of owner coalitions that were retrained.

    python paper/calibration.py emoji --work work/emoji --pictures emoji1015 people
    python paper/owners.py emoji --work work/emoji
    python paper/calibration.py letters --work work/letters
    python paper/owners.py letters --work work/letters

Works on the store that calibration.py made. Totals are those of the whole way from the base; with what the works of
each owner do alone in them (`influence solo`); and the sums of scores at the end. Writes
`paper/results/<truth>-owners.md`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from calibration import DRAWS, KINDS, PAPER, queries, say
from scipy import stats

import influence
from influence import answers, attribution, metrics, nearcopies
from influence.evaluation import kept_shapley
from influence.royalties import BASE_MODEL, DEFAULT_ESTIMATOR
from influence.scored import Scored

FARTHER = "farther, all (95 %)"
SEEDS = (1000, 1001, 1002)
"""Of fine-tunes of each owner alone; the truth has others."""


def alone(name: str, work: Path) -> list[Path]:
    """Fine-tunes of each owner alone, with other seeds than those of the truth have."""
    base = PAPER / "truth" / name / "base"
    return [
        influence.solo(work / "dataset", work / f"solo-{seed}", base=base, recipe=work / "model", seed=seed)
        for seed in SEEDS
    ]


def distances(made: influence.Answers, name: str, asked: pd.DataFrame) -> pd.DataFrame:
    """Total variation between the shares of each estimator and exact Shapley shares, by kind of query and over all.

    Beside it how much farther an estimator is than the default, over all queries, with the interval of the difference
    that a bootstrap over queries gives.

    Exact Shapley values add up to what the fine-tune gained on the picture, retrained: where that is not above 0 there
    is nothing to divide, and the exact share of the base model is all.
    """
    ids, exact = kept_shapley(PAPER / "truth" / name)
    shares = made.shares.merge(made.contributors[["contributor_id", "name"]], on="contributor_id")
    kinds = dict(zip(made.queries["query_id"], asked["kind"], strict=True))
    found = []
    for (query, estimator), part in shares[shares["query_id"] != "ALL"].groupby(["query_id", "estimator"]):
        mine = part.set_index("name")["share"]
        values = pd.Series({owner: value[ids.index(query)] for owner, value in exact.items()})
        target = pd.Series({BASE_MODEL: 1.0})
        if values.sum() > 0:
            target = values.clip(lower=0) / values.clip(lower=0).sum()
        everyone = sorted(set(mine.index) | set(target.index))
        gap = (mine.reindex(everyone).fillna(0) - target.reindex(everyone).fillna(0)).abs().sum() / 2
        found.append((query, estimator, gap))
    each = pd.DataFrame(found, columns=["query", "estimator", "gap"]).pivot(
        index="query", columns="estimator", values="gap"
    )
    table = each.groupby(kinds).mean().T[list(KINDS)].assign(all=each.mean())
    for estimator in table.index:
        farther = each[estimator] - each[DEFAULT_ESTIMATOR]
        if farther.any():
            drawn = stats.bootstrap((farther,), np.mean, method="percentile", rng=np.random.default_rng(0))
            low, high = drawn.confidence_interval
            table.loc[estimator, FARTHER] = f"{farther.mean():.4f} ({low:.4f} … {high:.4f})"
    return table


def owners(made: influence.Answers, order: list[str], name: str, asked: pd.DataFrame) -> pd.DataFrame:
    """Owners' totals against exact Shapley values."""
    ids, exact = kept_shapley(PAPER / "truth" / name)
    place = [ids.index(item_id) for item_id in made.queries["query_id"]]
    measured = np.stack([exact[owner][place] for owner in order])
    names = made.contributors.set_index("contributor_id")["name"]
    shares = made.shares[(made.shares["estimator"] == "group_sum") & (made.shares["query_id"] != "ALL")]
    way = shares.assign(name=shares["contributor_id"].map(names)).pivot(
        index="name", columns="query_id", values="group_score"
    )
    predicted = way.loc[order, made.queries["query_id"]].to_numpy()
    gain = made.queries["finetune_gain"].to_numpy()
    rows = []
    for kind in KINDS:
        here = np.flatnonzero(asked["kind"] == kind)
        each = [np.corrcoef(measured[:, q], predicted[:, q])[0, 1] for q in here]
        distance = metrics.total_variation(measured[:, here], predicted[:, here]).mean()
        slope = metrics.slope(measured[:, here], predicted[:, here])
        follows = np.corrcoef(gain[here], predicted[:, here].sum(0))[0, 1]
        rows.append((made.facts["totals"], kind, np.mean(each), distance, slope, follows))
    columns = ["totals", "queries", "Pearson", "total variation", "slope", "sum follows gain (r)"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    """Score, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", choices=("emoji", "letters"))
    parser.add_argument("--work", type=Path, required=True, help="folder of calibration.py")
    options = parser.parse_args()
    name, work = options.truth, options.work
    made = influence.open_store(work / "store")
    asked = queries(name, work)
    clusters = nearcopies.duplicate_clusters(made)
    far, rows = [], []

    def compare(scored: Scored) -> None:
        said = answers.of_scored(scored, clusters, usage=np.ones(len(asked)), truth=PAPER / "truth" / name, message=say)
        far.append(distances(said, name, asked).assign(totals=said.facts["totals"]))
        rows.append(owners(said, scored.creators.names, name, asked))
        apart = pd.concat(far).set_index("totals", append=True).reset_index().fillna("").round(3)
        text = [
            "Total variation of shares from exact Shapley shares:", "", apart.to_markdown(index=False), "",
            "Owners' totals against exact Shapley values, both cut at 0 for the total variation:", "",
            pd.concat(rows).round(3).to_markdown(index=False), "",
        ]  # fmt: skip
        (PAPER / "results" / f"{name}-owners.md").write_text("\n".join(text), encoding="utf-8")

    for solo in (alone(name, work), None):
        scored = attribution.score(
            asked["path"].tolist(), made, k=None, method=None, damping=None, draws=DRAWS,
            prompt=asked["caption"].fillna("").tolist() if made.spec.conditional else None, intervals=True, model=None,
            lora=None, base=None, half=None, engine="auto", batch_size=64, memory=None, device="cpu",
            progress=lambda *_: None, message=say, clusters=clusters, path=True, solo=solo,
        )  # fmt: skip
        compare(scored)
    compare(replace(scored, whole=None))
    print((PAPER / "results" / f"{name}-owners.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
