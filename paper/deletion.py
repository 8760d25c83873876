"""Whose removal hurts a picture most? Retrains without each method's top 5 % on a ground truth, and writes a table.

    python paper/comparison.py emoji --work work/emoji
    python paper/deletion.py emoji --work work/emoji --workers 2
    python paper/comparison.py letters --work work/letters
    python paper/deletion.py letters --work work/letters --workers 2 --queries 3

Every method ranks at its own best damping (of its LDS, for that kind of query), ours at their default one; a readout
that keeps the sign and the order of scores, as the signed square does, removes the same images. Retrained models are
kept in the work folder; those that `paper/truth/` holds are not retrained.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from comparison import DEFAULT, TWO_LENGTH, TWO_POINT, Subject, all_scores
from ground_truth import PAPER

from influence import evaluation
from influence.metrics import interval

OURS = {"two-length": TWO_LENGTH, "two-point": TWO_POINT, "gauss-newton": DEFAULT}  # defaults, by what is known
OTHERS = ("ek-fac", "trak", "d-trak", "das", "datainf")
NEAREST = ("ek-fac", "trak")  # the others that come nearest by LDS
FRACTION = 0.05


def chosen_scores(subject: Subject, name: str, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """τ of each method: ours at the default damping, the others at their best one for the kind of query."""
    best = pd.read_csv(PAPER / "results" / f"{name}-comparison.csv").query("readout == 'raw'")
    damping = best.set_index(["method", "kind"])["best_damping"]
    kinds = [query.kind for query in subject.truth.queries]
    found = all_scores(subject)
    return {name: next(iter(found[key].values())) for name, key in OURS.items()} | {
        method: np.stack([found[method][float(damping[method, kind])][q] for q, kind in enumerate(kinds)])
        for method in methods
    }


def summary(table: pd.DataFrame) -> str:
    """Markdown: mean rise of the loss in percent of the loss, and on how many queries ours raises it most."""
    means = table.groupby(["kind", "query", "method"], sort=False)["rise"].mean().unstack()
    others = [name for name in means.columns if name not in OURS]
    lines = [
        f"Rise of a query's loss (×10⁻³) when {FRACTION:.0%} of the training images are removed and the model is",
        f"retrained; mean of {table['query'].nunique()} queries and {table['seed'].nunique()} seeds.",
        "",
        "| removed: top of | " + " | ".join(means.index.unique("kind")) + " |",
        "|" + "---|" * (1 + means.index.unique("kind").size),
    ]
    by_kind = means.groupby("kind", sort=False).mean()
    for method in means.columns:
        lines.append(f"| {method} | " + " | ".join(f"{1e3 * value:.2f}" for value in by_kind[method]) + " |")
    for ours in OURS:
        wins = {other: means[ours] > means[other] for other in others}
        lines += ["", f"| `{ours}` raises it more than | of queries | mean difference ×10⁻³ (95 % over queries) |"]
        lines += ["|---|---|---|"]
        for other, won in wins.items():
            difference = (means[ours] - means[other]).to_numpy()
            rng = np.random.Generator(np.random.Philox(0))
            repeats = rng.choice(difference, (10_000, len(difference))).mean(1)
            found = interval(1e3 * float(difference.mean()), 1e3 * repeats)
            lines.append(f"| {other} | {won.mean():.0%} | {found.value:.2f} ({found.low:.2f} … {found.high:.2f}) |")
        most = np.logical_and.reduce(list(wins.values()))
        lines += ["", f"More than every other method: {most.mean():.0%} of queries."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Retrain what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth")
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    parser.add_argument(
        "--methods", nargs="+", choices=OTHERS, default=NEAREST, help="besides ours, likeness and chance"
    )
    parser.add_argument("--queries", type=int, default=4, help="of each kind")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(options.truth, options.work)
    table = evaluation.evaluate_deletion(
        subject.truth,
        chosen_scores(subject, options.truth, options.methods),
        limit=options.queries,
        fractions=(FRACTION,),
        seeds=options.seeds,
        workers=options.workers,
        progress=lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr, flush=True),
    )
    shutil.copy(subject.truth.folder / "runs.jsonl", PAPER / "truth" / options.truth / "runs.jsonl")
    text = summary(table)
    (PAPER / "results" / f"{options.truth}-deletion.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
