"""Owners' totals by features at the end of a fine-tune, at its base, and on the way, against exact Shapley values.

    python paper/comparison.py letters --work work/letters
    python paper/ways.py letters --work work/letters

A point s of the way has the weights (1 − s) base + s fine-tune; of a LoRA, lora_B is scaled by s. Beside the features
that comparison.py kept it takes those at s = 0 and ½, of 20 draws of an image and 64 of a query. `path` is by the rule
of the library, Simpson's over 0, ½ and 1; `trapezoidal` over 0 and 1; `parabola` over 0, ¾ and 1; `two points` over 0
and ¾. `whole way` is what shares are made of (`influence/wholeway.py`), with each query's gain on those 64 draws.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comparison import Subject, curvature_rows, halves, inverses, moved, two_lengths_as_built, two_points
from ground_truth import PAPER
from scipy import sparse

from influence import evaluation, features, metrics
from influence.curvature import solve
from influence.evaluation import kept_shapley
from influence.features import Recipe
from influence.scored import Creators
from influence.scoring import METHODS
from influence.wholeway import whole_way

QUERY_DRAWS, DRAWS, SEED = 64, 20, 3
SEEDS = 3  # of training, of each coalition


def at(subject: Subject, s: float) -> tuple[np.ndarray, np.ndarray]:
    """φ of queries and images at a point of the way."""
    names = [f"way-{side}-{s:g}" for side in ("query", "train")]
    if not all((subject.folder / f"{name}.npy").exists() for name in names):
        query, train = replace(subject.query, draws=QUERY_DRAWS), replace(subject.train, draws=DRAWS)
        with moved(subject, s):
            for name, side in zip(names, (query, train), strict=True):
                subject.kept(name, lambda side=side: subject.phi(side, "loss", SEED, subject.metric))
    query, train = (np.load(subject.folder / f"{name}.npy").astype(float) for name in names)
    return query, train


def gain(subject: Subject) -> np.ndarray:
    """Loss of the queries under the base, less that under the fine-tune, on the same draws."""
    recipe = Recipe(
        subject.denoiser.schedule, subject.denoiser.parameters, subject.metric, SEED, "query", QUERY_DRAWS, 0.0,
        "loss", bf16=False, engine="hooks", batch_size=64,
    )  # fmt: skip

    def losses() -> np.ndarray:
        found, _ = features.losses(
            subject.denoiser.network, recipe, subject.query.ids, subject.query.x0, subject.query.cond
        )
        return found.mean(1)

    def make() -> np.ndarray:
        with moved(subject, 0.0):
            before = losses()
        return before - losses()

    return np.asarray(subject.kept("way-gain", make)).astype(float)


def by_seed_of_training(subject: Subject) -> list[np.ndarray]:
    """Exact Shapley values `[owners, queries]` of each training seed alone."""
    plan = evaluation.coalition_runs(subject.truth, SEEDS)
    runs = [run for each in plan.values() for run in each]
    found = evaluation.outcomes(subject.truth, runs, 1, lambda *_: None).reshape(len(plan), SEEDS, -1)
    return [
        np.stack(list(metrics.shapley(dict(zip(plan, found[:, seed], strict=True))).values())) for seed in range(SEEDS)
    ]


def creators(scores: np.ndarray, owner: np.ndarray, names: list[str]) -> Creators:
    """Totals of scores `[query, images]` as answers have them, of which no error is known."""
    mine = [owner == name for name in names]
    totals = np.stack([scores[:, here].sum(1) for here in mine], 1)
    zero, parts, none = np.zeros(totals.shape), sparse.csr_array(np.eye(len(names))), np.empty((0, *totals.shape))
    works, magnitude = np.array([float(here.sum()) for here in mine]), np.abs(scores).sum(1)
    return Creators(names, works, totals, zero, magnitude, np.full(len(totals), np.nan), none, zero, None, parts)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth")
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(options.truth, options.work)
    n = len(subject.train.ids)
    start, middle = at(subject, 0.0), at(subject, 0.5)
    asked, half, asked_late, half_late = two_points(subject)
    end = asked.astype(float), half.astype(float)
    _, psi = curvature_rows(subject)
    (inverse,) = inverses(psi, [2 * subject.lam])

    def tau(q: np.ndarray, t: np.ndarray) -> np.ndarray:
        return solve(inverse, torch.tensor(q)).numpy() @ t.T / n

    half_length = tau(*(part.astype(float) for part in two_lengths_as_built(subject)[2:]))
    late = solve(inverse, torch.tensor(asked_late)) * inverse.damping
    weights, later = METHODS["path"].along, (asked_late.astype(float), half_late.astype(float))
    points = {"base": start, "middle": middle, "loss": end}
    path = tuple(sum(weights[family] * points[family][side] for family in points) for side in (0, 1))
    two = tuple((a + 2 * b) / 3 for a, b in zip(start, later, strict=True))
    trapezoid = tuple((a + b) / 2 for a, b in zip(start, end, strict=True))
    parabola = tuple(5 / 18 * a + 8 / 9 * b - 1 / 6 * c for a, b, c in zip(start, later, end, strict=True))
    scores = {
        "end": tau(*end),
        "two-point": tau(*end) + tau(late.numpy(), half_late.astype(float)),
        "two-length": tau(*end) + half_length,
        "path": tau(*path),
        "trapezoidal": tau(*trapezoid),
        "parabola": tau(*parabola),
        "base alone": tau(*start),
        "two points": tau(*two),
        "equal per work": np.ones((len(subject.query.ids), n)),
    }
    masks, by_seed, kinds = halves(subject.truth)
    outcome = by_seed.mean(0)
    _, exact = kept_shapley(PAPER / "truth" / options.truth)
    measured = np.stack(list(exact.values()))
    owner = np.array([item.creator for item in subject.truth.items])
    totals = {name: np.stack([each[:, owner == g].sum(1) for g in exact]) for name, each in scores.items()}
    gained, names = gain(subject)[:, None], list(exact)
    ends, steps = (creators(scores[name], owner, names) for name in ("two-length", "two-point"))
    for along in ("path", "trapezoidal", "parabola", "two points"):
        name = "whole way" if along == "path" else f"whole, {along}"
        totals[name] = whole_way(ends, creators(scores[along], owner, names), gained).totals.T
    totals["whole, two-point"] = whole_way(steps, creators(scores["path"], owner, names), gained).totals.T
    text = [f"{' / '.join(dict.fromkeys(kinds))}", "", "| totals | Pearson | total variation | slope | LDS ×100 | "
            "sum, gain (r) |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, predicted in totals.items():
        lds = None
        if name in scores:
            lds = metrics.correlations(metrics.predictions(scores[name], masks), outcome)
        cells: list[list[float]] = [[], [], [], [], []]
        for kind in dict.fromkeys(kinds):
            here = np.flatnonzero(kinds == kind)
            with np.errstate(invalid="ignore"):
                cells[0].append(np.mean([np.corrcoef(measured[:, q], predicted[:, q])[0, 1] for q in here]))
                cells[4].append(np.corrcoef(measured[:, here].sum(0), predicted[:, here].sum(0))[0, 1])
            cells[1].append(metrics.total_variation(measured[:, here], predicted[:, here]).mean())
            cells[2].append(metrics.slope(measured[:, here], predicted[:, here]))
            cells[3].append(np.nan if lds is None else 100 * lds[here].mean())
        digits = (2, 2, 2, 0, 2)
        joined = (
            " / ".join("–" if np.isnan(x) else f"{x:.{d}f}" for x in cell)
            for cell, d in zip(cells, digits, strict=True)
        )
        text.append(f"| {name} | " + " | ".join(joined) + " |")
    pairs = list(itertools.combinations(by_seed_of_training(subject), 2))
    agree: list[list[float]] = [[], []]
    for kind in dict.fromkeys(kinds):
        here = np.flatnonzero(kinds == kind)
        agree[0].append(np.mean([np.corrcoef(a[:, q], b[:, q])[0, 1] for a, b in pairs for q in here]))
        agree[1].append(np.mean([metrics.total_variation(a[:, here], b[:, here]).mean() for a, b in pairs]))
    cells = [" / ".join(f"{x:.2f}" for x in cell) for cell in agree]
    text.append(f"| one training seed, of another | {cells[0]} | {cells[1]} | – | – | – |")
    print(*text, sep="\n", flush=True)
    (PAPER / "results" / f"{options.truth}-ways.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
