"""How much of what retraining does could any score foretell that adds up over images? Retrains complements of halves.

    python paper/ground_truth.py emoji --pictures emoji16 --work work/emoji
    python paper/additive.py emoji --work work/emoji --workers 2

The loss f(S) of a query under the model of a half S has a part that changes its sign when S and its complement change
places, in which all that adds up over images is, and one that stays the same, of pairs of images. With O and E their
variances over halves, and independent training seeds, corr(f(S), f(S)) = (O + E) / V and corr(f(S), −f(S̄)) =
(O − E) / V, so that O / (O + E) = (1 + ρ) / 2 with ρ the ratio of the two. The ceiling of an additive score is that of
any score times √(O / (O + E)); what three images do together counts as foretellable here, so that it is still an upper
bound. Complements are retrained with one seed and compared with halves of the other. Writes
`paper/results/<truth>-additive.md`.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from comparison import Subject, halves
from ground_truth import PAPER

from influence import evaluation, metrics
from influence.retraining import Run


def main() -> None:
    """Retrain what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth")
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    parser.add_argument("--subsets", type=int, default=64, help="complements to retrain (default: 64)")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(options.truth, options.work)
    masks, by_seed, kinds = halves(subject.truth)
    runs = [Run(f"complement-{i:03d}", ~mask, 0) for i, mask in enumerate(masks[: options.subsets])]
    complements = evaluation.outcomes(
        subject.truth, runs, options.workers,
        lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr, flush=True),
    )  # fmt: skip
    shutil.copy(subject.truth.folder / "runs.jsonl", PAPER / "truth" / options.truth / "runs.jsonl")
    compared = by_seed[1, : len(runs)]
    rows = []
    for kind in dict.fromkeys(kinds):
        here = kinds == kind
        reliability = metrics.reliability(by_seed[:, :, here])
        opposite = metrics.correlations(compared[:, here], -complements[:, here])
        drawn = np.random.Generator(np.random.Philox(0)).integers(len(runs), size=(200, len(runs)))
        again = [metrics.correlations(compared[d][:, here], -complements[d][:, here]).mean() for d in drawn]
        share = (1 + np.clip(np.array([opposite.mean(), *again]) / reliability.split_seed, -1, 1)) / 2
        low, high = np.quantile(share[1:], (0.025, 0.975))
        rows.append((
            kind, reliability.split_seed, opposite.mean(), f"{share[0]:.2f} ({low:.2f} … {high:.2f})",
            100 * reliability.ceiling, 100 * reliability.ceiling * share[0] ** 0.5,
        ))  # fmt: skip
    columns = ["queries", "seed with seed", "half with complement", "odd part (95 %)", "ceiling", "of additive scores"]
    table = pd.DataFrame(rows, columns=columns).to_markdown(index=False, floatfmt=("", ".2f", ".2f", "", ".1f", ".1f"))
    text = f"{len(runs)} complements.\n\n{table}\n"
    (PAPER / "results" / f"{options.truth}-additive.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
