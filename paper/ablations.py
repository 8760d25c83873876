"""What each choice of the estimator is worth on a ground truth: one choice changed at a time, all else the default.

    python paper/comparison.py emoji --work work/emoji
    python paper/ablations.py emoji --work work/emoji

Works on the features that comparison.py kept. A sketch of k/2 entries is the sum of the halves of one of k, since its
buckets are (j + o) mod k. λ and H are the default's in every line but those on them. Checkpoints are the weights at a
part of the fine-tune's steps, from the same fine-tune done again; other lengths are fine-tunes of fewer epochs, on all
images; features under all of these have 20 draws of an image and 64 of a query. Lines on the length are of `two-length`
with another model in the place of that of half the length.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comparison import (
    DIM,
    DRAWS,
    TIMES,
    Side,
    Subject,
    at_end,
    curvature_rows,
    halves,
    inverses,
    products,
    two_lengths_as_built,
    two_points,
    under_half,
)
from ground_truth import PAPER

from influence import diffusion, finetuning, keys, metrics
from influence.curvature import Curvature, curvature, solve
from influence.gradients import Inputs, Output
from influence.horizon import FLOOR, mean_along_gradients
from influence.projection import Projection

Line = tuple[str, str, np.ndarray]
CHECKPOINTS = (0.5, 0.75)
LENGTHS = {
    "a quarter of the epochs": (0.25, 0, False),
    "half of the epochs": (0.5, 0, False),
    "half of the epochs, another seed": (0.5, 1, False),
    "three quarters of the epochs": (0.75, 0, False),
    "all epochs, another seed": (1.0, 1, False),
    "all epochs on half of the images": (1.0, 0, True),
}
"""Part of the epochs, seed, and whether on the first of the truth's halves alone."""


def folded(rows: np.ndarray, dim: int) -> np.ndarray:
    """The sketch of fewer entries, of the same vectors."""
    return np.asarray(rows).reshape(len(rows), -1, dim).sum(1)


def inverse(psi: np.ndarray, lam: float, gram: torch.Tensor | None = None) -> Curvature:
    """H + λI of curvature rows, factored."""
    if len(psi) < psi.shape[1]:
        return next(inverses(psi, [lam], gram))
    blocks = [
        (psi[first : first + 2000], np.ones(len(psi[first : first + 2000]))) for first in range(0, len(psi), 2000)
    ]
    return curvature(blocks, dim=psi.shape[1], damping=lam, num_rows=len(psi), absolute=True)


def scores(query: np.ndarray, train: np.ndarray, factored: Curvature) -> np.ndarray:
    """φ_qᵀ (H + λI)⁻¹ φ_i / N."""
    return solve(factored, torch.tensor(query)).numpy() @ train.T.astype(np.float64) / len(train)


def independent(subject: Subject, side: Side, draws: int) -> np.ndarray:
    """φ of draws that are neither stratified nor antithetic."""
    schedule, shape = subject.denoiser.schedule, tuple(side.x0.shape[1:])
    rows = []
    for image, item in enumerate(side.ids):
        u = keys.uniform(("independent", side.role, item, "t"), draws)
        t = torch.from_numpy(u * schedule.num_timesteps).long()
        eps = torch.from_numpy(keys.normal(("independent", side.role, item, "eps"), (draws, *shape)))
        clean = side.x0[image : image + 1].expand_as(eps)
        cond = None if side.cond is None else side.cond[image : image + 1].expand(draws, -1, -1)
        inputs = Inputs(diffusion.noised(schedule, clean, t, eps), t, cond)
        output = Output(
            lambda prediction, y, w: w * (prediction - y).flatten(1).square().mean(1) / draws,
            (diffusion.target(schedule, clean, t, eps), diffusion.weight(schedule, t)),
            draws,
        )
        rows.append(subject.projected(inputs, output, subject.metric)[0].numpy())
    return np.stack(rows)


def plain(subject: Subject) -> np.ndarray:
    """Scores of gradients as they are: D is one number for all parameters."""

    def rows() -> np.ndarray:
        return subject.phi(subject.train, "loss", 0, subject.sketch, float(DRAWS), psi="plain-psi")

    train = subject.kept("plain-train", rows)
    psi = np.load(subject.folder / "plain-psi.npy", mmap_mode="r")
    lam = mean_along_gradients(subject.second_moments()) * subject.lam
    return scores(subject.mean_phi(subject.query, "loss"), np.asarray(train), inverse(psi, lam))


def by_entry(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Scores of `gauss-newton`, and of `two-length` as built, in a metric that has a D for each entry: D = √v."""
    v = subject.second_moments()
    least = FLOOR * mean_along_gradients(v)
    weights = {name: value.sqrt().clamp(min=least).rsqrt().flatten() for name, value in v.items()}
    metric = Projection(DIM, lambda out, name, grads: subject.sketch.add(out, name, grads * weights[name]))

    def rows() -> np.ndarray:
        return subject.phi(subject.train, "loss", 0, metric, float(DRAWS), "entry-psi", subject.density(metric))

    train = np.asarray(subject.kept("entry-train", rows))
    asked = replace(subject.query, draws=2 * subject.query.draws)
    query = np.asarray(subject.kept("entry-query", lambda: subject.phi(asked, "loss", 0, metric)))
    half = under_half(subject, asked.draws, subject.train.draws, "entry", metric)
    psi = np.load(subject.folder / "entry-psi.npy")
    gram = products(psi)
    one = scores(query, train, inverse(psi, subject.lam, gram))
    twice = inverse(psi, 2 * subject.lam, gram)
    return one, scores(query, train, twice) + scores(*half, twice)


def end_query(subject: Subject, factored: Curvature) -> np.ndarray:
    """`two-point` with the query's gradient of the end in both steps."""
    asked, half, _, half_late = two_points(subject)
    once = solve(factored, torch.tensor(asked))
    tau = once.numpy() @ half.T.astype(float)
    return (tau + factored.damping * solve(factored, once).numpy() @ half_late.T.astype(float)) / len(half)


def slopes(subject: Subject, tau: np.ndarray, masks: np.ndarray, outcome: np.ndarray) -> tuple[float, float]:
    """Of trained queries: outcome on the scores of the other images, and on the picture's own; medians over queries."""
    names = [Path(item.file_name).name for item in subject.truth.items]
    found = []
    for q, query in enumerate(subject.truth.queries):
        if query.kind != "trained":
            continue
        own = names.index(Path(query.path).name)
        member = masks[:, own].astype(float)
        others = masks.astype(float) @ tau[q] - member * tau[q, own]
        columns = np.stack([others, member * tau[q, own]], 1)
        found.append(np.linalg.lstsq(columns - columns.mean(0), outcome[:, q] - outcome[:, q].mean(), rcond=None)[0])
    others, own = np.median(found, 0)
    return float(others), float(own)


def at_length(subject: Subject, name: str, masks: np.ndarray) -> list[np.ndarray]:
    """φ of queries and images under a fine-tune of another length."""
    sides = (replace(subject.query, draws=64), replace(subject.train, draws=20))
    files = [f"length-{side.role}-{name.replace(' ', '-')}" for side in sides]
    if not all((subject.folder / f"{file}.npy").exists() for file in files):
        part, seed, half = LENGTHS[name]
        recipe = replace(subject.truth.recipe, epochs=part * subject.truth.recipe.epochs)
        other = finetuning.start(subject.truth.base, recipe)
        x0, cond = subject.train.x0, subject.train.cond
        finetuning.fine_tune(other, recipe, x0, cond, seed=seed, members=masks[0] if half else None)
        end = finetuning.weights(subject.denoiser)
        finetuning.set_weights(subject.denoiser, finetuning.weights(other))
        for file, side in zip(files, sides, strict=True):
            subject.kept(file, lambda side=side: subject.phi(side, "loss", 3, subject.metric))
        finetuning.set_weights(subject.denoiser, end)
    return [np.load(subject.folder / f"{file}.npy") for file in files]


def checkpoints(subject: Subject) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """φ of queries and images under the weights at parts of the fine-tune's steps.

    Raises:
        SystemExit: The fine-tune, done again, does not end at the same weights.
    """
    sides = (replace(subject.query, draws=64), replace(subject.train, draws=20))
    named = {part: [f"checkpoint-{side.role}-{part:g}" for side in sides] for part in CHECKPOINTS}
    if not all((subject.folder / f"{name}.npy").exists() for names in named.values() for name in names):
        end = finetuning.weights(subject.denoiser)
        again = finetuning.start(subject.truth.base, subject.truth.recipe)
        steps = subject.truth.recipe.steps(len(subject.train.ids))
        reached = {round(part * steps): part for part in CHECKPOINTS}
        kept: dict[float, dict[str, torch.Tensor]] = {}

        def progress(step: int, _: float) -> None:
            if step in reached:
                kept[reached[step]] = finetuning.weights(again)

        x0, cond = subject.train.x0, subject.train.cond
        finetuning.fine_tune(again, subject.truth.recipe, x0, cond, seed=0, progress=progress)
        differ = max(float((p - end[name]).abs().max()) for name, p in finetuning.weights(again).items())
        if differ > 1e-3:
            raise SystemExit(
                f"the fine-tune, done again, ends {differ:.2g} from the model's weights; expected the same"
            )
        for part, names in named.items():
            finetuning.set_weights(subject.denoiser, kept[part])
            for name, side in zip(names, sides, strict=True):
                subject.kept(name, lambda side=side: subject.phi(side, "loss", 3, subject.metric))
        finetuning.set_weights(subject.denoiser, end)
    query, train = ([np.load(subject.folder / f"{names[i]}.npy") for names in named.values()] for i in (0, 1))
    return dict(zip(named, zip(query, train, strict=True), strict=True))


def lines(subject: Subject, masks: np.ndarray) -> Iterator[Line]:
    """What is changed, to what, and the scores."""
    n, draws = len(subject.train.ids), DRAWS
    train, psi = curvature_rows(subject)
    train, item = np.asarray(train), np.repeat(np.arange(n), draws)
    query = [np.asarray(at_end(subject, seed)) for seed in (0, 1)]
    mean, lam = (query[0] + query[1]) / 2, subject.lam
    entry, entry_two_lengths = by_entry(subject)
    in_plain = plain(subject)  # before anything else is factored: each factor and its rows are some GB
    psi = np.asarray(psi)
    gram = products(psi)
    unit = float(gram.trace()) / len(psi) / DIM
    h = inverse(psi, lam, gram)
    yield "default", f"k = {DIM}, {len(psi)} rows, λ = {lam / unit:.2g} tr(H)/k", scores(mean, train, h)
    twice = inverse(psi, 2 * lam, gram)
    query_end, train_end, query_half, train_half = two_lengths_as_built(subject)
    both = scores(query_end, train_end, twice)
    half = scores(query_half, train_half, twice)
    two_steps = np.load(subject.folder / "scores-two-point.npy")[TIMES.index(1.0)]
    yield "length", "two lengths, as built", both + half
    yield "length", "… of which half the length alone", half
    yield "length", "½ (H + λI)⁻¹ of the end in place of C⁻¹", scores(query_end, train_end, h) / 2 + half
    yield "length", "½ of two steps in place of C⁻¹ of the end", two_steps / 2 + half
    yield "length", "mean features of both", scores(query_end + query_half, train_end + train_half, twice)
    for name in LENGTHS:
        yield "length", name, both + scores(*at_length(subject, name, masks), twice)
    yield "way", "two steps", two_steps
    yield "way", "two steps, the query's gradient of the end in both", end_query(subject, twice)
    del twice
    yield "metric", "plain, with a λ of its own", in_plain
    yield "metric", "a D for each entry", entry
    yield "metric", "a D for each entry, two lengths as built", entry_two_lengths
    for dim in (DIM // 2, DIM // 4, DIM // 8):
        yield "k", str(dim), scores(folded(mean, dim), folded(train, dim), inverse(folded(psi, dim), lam))
    for every in (2, 4, 10, 40):
        kept = np.flatnonzero(np.arange(len(psi)) % draws % every == (item % every))
        few = inverse(psi[kept], lam, gram[kept][:, kept])
        yield "curvature rows of an image", str(draws // every), scores(mean, train, few)
    equal = np.asarray(curvature_rows(subject, divided=False)[1])
    yield (
        "curvature rows of an image",
        f"{draws}, of all timesteps equally often",
        scores(mean, train, inverse(equal, lam)),
    )
    averaged = equal.reshape(n, draws, -1).mean(1) * draws**0.5
    yield "curvature rows of an image", f"{draws} averaged into 1", scores(mean, train, inverse(averaged, lam))
    del equal, averaged
    for name, what in (("gauss-newton", "λ"), ("two-point", "λ, two steps"), ("as-built", "λ, two lengths")):
        for times, tau in zip(TIMES, np.load(subject.folder / f"scores-{name}.npy"), strict=True):
            if times != 1:
                yield what, f"{times:g} × the default", tau
    late = checkpoints(subject)
    each = [scores(mean, train, h), *(scores(*features, h) for features in late.values())]
    yield "checkpoints", "scores at ½, ¾ and the end, averaged", sum(each) / len(each)
    query_mean, train_mean = (sum(side) / len(side) for side in zip((mean, train), *late.values(), strict=True))
    yield "checkpoints", "features at ½, ¾ and the end, averaged", scores(query_mean, train_mean, h)
    for part, tau in zip(late, each[1:], strict=True):
        yield "checkpoints", f"at {part:g} of the steps alone", tau
    again = subject.kept("metric-train-1", lambda: subject.phi(subject.train, "loss", 1, subject.metric))
    more = (train + np.asarray(again)) / 2
    yield "draws of an image", str(2 * draws), scores(mean, more, h)
    yield "draws of a query", "128", scores(query[0], train, h)
    loose = subject.kept("independent-query", lambda: independent(subject, subject.query, subject.query.draws))
    yield "draws of a query", "128, not stratified, not antithetic", scores(np.asarray(loose), train, h)
    loose = subject.kept("independent-train", lambda: independent(subject, subject.train, draws))
    yield "draws of an image", f"{draws}, not stratified, not antithetic", scores(mean, np.asarray(loose), h)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth")
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(options.truth, options.work)
    masks, by_seed, kinds = halves(subject.truth)
    outcome = by_seed.mean(0)
    named = list(dict.fromkeys(kinds))
    text = [
        "| changed | to | " + " | ".join(named) + " | slope: other images, the picture itself |",
        "|" + "---|" * (3 + len(named)),
    ]
    print(*text, sep="\n", flush=True)
    for what, value, tau in lines(subject, masks):
        each = metrics.correlations(metrics.predictions(tau, masks), outcome)
        slope = " / ".join(f"{value:.2f}" for value in slopes(subject, tau, masks, outcome))
        cells = " | ".join(f"{100 * each[kinds == k].mean():.1f}" for k in named)
        text.append(f"| {what} | {value} | {cells} | {slope} |")
        print(text[-1], flush=True)
    (PAPER / "results" / f"{options.truth}-ablations.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
