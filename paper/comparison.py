"""Compares methods on a ground truth, at equal numbers of backward passes, and writes one table.

    python paper/comparison.py emoji --work work/emoji

Features are kept in the work folder (about 3 GB). Every method has 80 backward passes for each training image and 256
for each query; all that project have the same k. `two-length` counts those that train the fine-tune of half the length,
one for each epoch, among its 80. `as built` is the default with the draws that the library has by itself, 40 of an
image and 256 of a query under both models beside the curvature rows: 120 passes, the training of half the length, and
512. `trak, two lengths` is what the same idea does for TRAK: the mean of its scores under both models. LDS ×100 is
given at the method's own best damping on all halves (an oracle), and at the damping that is best on one half of the
masks, scored on the other, both ways round. The defaults have neither: their metric and damping are those of the
fine-tune's own steps (`influence/horizon.py`).
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ekfac import Ekfac
from ground_truth import PAPER, prepare

from influence import (
    allocation,
    diffusion,
    evaluation,
    features,
    finetuning,
    gradients,
    horizon,
    keys,
    metrics,
    models,
    retraining,
)
from influence.curvature import Curvature, curvature, solve
from influence.features import Recipe
from influence.gradients import Inputs, Output
from influence.halving import halve
from influence.models import Denoiser
from influence.projection import PROJECTIONS, Projection
from influence.waypoints import LATE

DIM, DRAWS, QUERY_DRAWS = 32768, 40, 128
TIMES = (0.1, 0.3, 1.0, 3.0, 10.0)  # λ of our own methods, in units of the default
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
RHOS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
DEFAULT, TWO_POINT, TWO_LENGTH = "gauss-newton, default", "two-point, default", "two-length, default"
AS_BUILT = "two-length, as built"
Scores = np.ndarray


@dataclass(frozen=True)
class Side:
    """Training images or queries."""

    role: str
    ids: list[str]
    x0: torch.Tensor
    cond: torch.Tensor | None
    draws: int


class Subject:
    """A fine-tuned model with the pictures of its truth, and features kept in a folder."""

    def __init__(self, name: str, work: Path) -> None:
        """Load."""
        self.truth = truth = prepare(name, work, None)
        adapted = truth.recipe.lora_rank is not None
        model = truth.base if adapted else work / "model"
        self.denoiser = models.load_denoiser(model, lora=work / "model" if adapted else None)
        encoded = retraining.encode(self.denoiser, [i.path for i in truth.items], [i.caption for i in truth.items])
        asked = retraining.encode(self.denoiser, [q.path for q in truth.queries], [q.caption for q in truth.queries])
        self.train = Side("train", [item.item_id for item in truth.items], *encoded, DRAWS)
        self.query = Side("query", truth.query_ids, *asked, QUERY_DRAWS)
        self.work, self.folder = work, work / "features"
        self.folder.mkdir(exist_ok=True)
        self.shapes = {name: tuple(p.shape) for name, p in self.denoiser.parameters.items()}
        self.size = sum(p.numel() for p in self.denoiser.parameters.values())
        self.sketch = PROJECTIONS["countsketch"](self.shapes, dim=DIM, seed=0, device=torch.device("cpu"))
        self.identity = PROJECTIONS["identity"](self.shapes, dim=self.size, seed=0, device=torch.device("cpu"))

        self.scales = self._scales()
        self.metric = PROJECTIONS["countsketch"](
            self.shapes, dim=DIM, seed=0, device=torch.device("cpu"), scales=self.scales
        )
        self.lam = 1 / truth.recipe.total_learning_rate(len(truth.items))

    def second_moments(self) -> dict[str, torch.Tensor]:
        """Of the gradients along the fine-tune, as a build takes them."""
        train = self.train
        rows = keys.integers(("horizon", 0), horizon.BATCHES * horizon.ROWS, len(train.ids))
        batches = [
            (train.x0[part], None if train.cond is None else train.cond[part])
            for part in rows.reshape(horizon.BATCHES, horizon.ROWS)
        ]
        size = self.truth.recipe.batch_size
        return horizon.second_moments(self._way(), batches, batch_size=size, seed=0)

    def _scales(self) -> dict[str, float]:
        """The metric of the fine-tune's own steps."""

        def make() -> np.ndarray:
            return np.array(list(horizon.tensor_scales(self.second_moments()).values()))

        return dict(zip(self.shapes, self.kept("scales", make).tolist(), strict=True))

    def _way(self) -> Iterator[tuple[float, Denoiser]]:
        for part, s in ((0.25, 0.0), (0.5, LATE), (0.25, 1.0)):
            with moved(self, s):
                yield part, self.denoiser

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array of the folder, made if it is missing."""
        file = self.folder / f"{name}.npy"
        if not file.exists():
            np.save(file.with_suffix(".part.npy"), make())
            file.with_suffix(".part.npy").rename(file)
            print(f"{name} taken", flush=True)
        return np.load(file, mmap_mode="r")

    def rows(self, side: Side, image: int, draws: int, seed: int) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
        """Draws of one image as inputs of the network; its clean picture and the noise."""
        t, eps = diffusion.draws(
            seed, side.role, side.ids[image], draws, self.denoiser.schedule.num_timesteps, tuple(side.x0.shape[1:])
        )
        clean = side.x0[image : image + 1].expand_as(eps)
        cond = None if side.cond is None else side.cond[image : image + 1].expand(draws, -1, -1)
        return Inputs(diffusion.noised(self.denoiser.schedule, clean, t, eps), t, cond), clean, eps

    def projected(self, inputs: Inputs, output: Output, projection: Projection) -> torch.Tensor:
        """Gradients of one output."""
        return gradients.per_sample_gradients(
            self.denoiser.network, self.denoiser.parameters, inputs, [output], projection, engine="hooks"
        )[0].features

    def recipe(self, side: Side, output: str, seed: int, projection: Projection, rate: float = 0.0) -> Recipe:
        """How features of a side are taken."""
        return Recipe(
            self.denoiser.schedule, self.denoiser.parameters, projection, seed, side.role, side.draws, rate,
            output, bf16=False, engine="hooks", batch_size=64,
        )  # fmt: skip

    def density(self, projection: Projection) -> tuple[float, ...]:
        """How often each draw gives a curvature row, as a build measures it."""
        train = self.train
        chosen = np.unique(keys.integers(("allocation", 0), allocation.IMAGES, len(train.ids)))
        cond = None if train.cond is None else train.cond[chosen]
        recipe = self.recipe(train, "loss", 0, projection)
        ids = [train.ids[i] for i in chosen]
        return allocation.density(self.denoiser.network, recipe, ids, train.x0[chosen], cond)

    def phi(
        self,
        side: Side,
        output: str,
        seed: int,
        projection: Projection,
        rate: float = 0.0,
        psi: str | None = None,
        density: tuple[float, ...] | None = None,
    ) -> np.ndarray:
        """φ of all images as the library takes them; curvature rows go to an array of the folder."""
        recipe = replace(self.recipe(side, output, seed, projection, rate), density=density)
        count = len(side.ids) * side.draws if psi is not None else 0
        rows = (
            np.lib.format.open_memmap(self.folder / f"{psi}.npy", "w+", np.float32, (count, projection.dim))
            if count
            else None
        )
        phi, done = [], 0
        for first in range(0, len(side.ids), 8):
            part = slice(first, first + 8)
            cond = None if side.cond is None else side.cond[part]
            taken = features.features(self.denoiser.network, recipe, side.ids[part], side.x0[part], cond)
            phi.append(taken.phi)
            if rows is not None:
                rows[done : done + len(taken.psi)] = taken.psi
                done += len(taken.psi)
        if done != count:
            raise SystemExit(f"there are {done} curvature rows; expected {count}")
        return np.concatenate(phi)

    def plain_phi(self, side: Side, output: str, seed: int) -> np.ndarray:
        """φ in the plain metric, of the draws of one seed."""
        return self.kept(f"{output}-{side.role}-{seed}", lambda: self.phi(side, output, seed, self.sketch))

    def mean_phi(self, side: Side, output: str) -> np.ndarray:
        """Mean over the draws of two seeds."""
        return (self.plain_phi(side, output, 0) + self.plain_phi(side, output, 1)) / 2

    def mean_raw(self, side: Side) -> np.ndarray:
        """Mean gradient over the draws of two seeds, not projected."""
        total = self.phi(side, "loss", 0, self.identity)
        total += self.phi(side, "loss", 1, self.identity)
        return total / 2


@contextlib.contextmanager
def moved(subject: Subject, s: float) -> Iterator[None]:
    """The weights at a point of the way."""
    end = finetuning.weights(subject.denoiser)
    base = finetuning.weights(finetuning.start(subject.truth.base, subject.truth.recipe))
    lora = subject.truth.recipe.lora_rank is not None
    start = {name: (value if "lora_A" in name else 0 * value) if lora else base[name] for name, value in end.items()}
    finetuning.set_weights(subject.denoiser, {name: (1 - s) * start[name] + s * value for name, value in end.items()})
    yield
    finetuning.set_weights(subject.denoiser, end)


@contextlib.contextmanager
def half_as_long(subject: Subject) -> Iterator[None]:
    """The weights of the fine-tune of half the epochs."""
    truth, folder = subject.truth, subject.work / "half"
    if not folder.exists():
        halve(truth.dataset, folder, base=truth.base, recipe=subject.work / "model")
    adapted = truth.recipe.lora_rank is not None
    half = models.load_denoiser(truth.base if adapted else folder, lora=folder if adapted else None)
    end = finetuning.weights(subject.denoiser)
    finetuning.set_weights(subject.denoiser, finetuning.weights(half))
    yield
    finetuning.set_weights(subject.denoiser, end)


def halves(truth: retraining.Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of the exact halves, −loss by seed, half and query, and the kinds of the queries."""
    runs = evaluation.half_runs(truth, 64, 2)
    by_seed = evaluation.outcomes(truth, runs, 1, lambda *_: None).reshape(64, 2, -1).transpose(1, 0, 2)
    masks = np.stack([run.members for run in runs[::2]])
    return masks, by_seed, np.array([query.kind for query in truth.queries])


def preconditioned(query: np.ndarray, train: np.ndarray) -> dict[float, Scores]:
    """φ_qᵀ (H + λI)⁻¹ φ_i / N with H of the training features themselves, at every damping."""
    q, t = torch.tensor(query).double(), torch.tensor(train).double()
    blocks = [(np.array(train), np.ones(len(train)))]
    result = {}
    for damping in DAMPINGS:
        factored = curvature(blocks, dim=DIM, damping=damping, num_rows=len(train))
        result[damping] = (solve(factored, q) @ t.T).numpy() / len(train)
    return result


def products(psi: np.ndarray) -> torch.Tensor:
    """ΨΨᵀ."""
    rows = torch.tensor(np.asarray(psi))
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], 4096):
        columns = rows[:, start : start + 4096]
        gram += columns @ columns.T
    return gram


def inverses(psi: np.ndarray, dampings: Sequence[float], gram: torch.Tensor | None = None) -> Iterator[Curvature]:
    """H + λI of curvature rows, factored, for every λ; ΨΨᵀ is summed once, or given."""
    rows = torch.tensor(np.asarray(psi))
    gram = products(psi) if gram is None else gram
    unit = float(gram.trace()) / len(rows) / rows.shape[1]
    for lam in dampings:
        damped = gram.clone()
        damped.diagonal().add_(len(rows) * lam)
        yield Curvature(torch.linalg.cholesky(damped), lam, len(rows), unit, rows)


def curvature_rows(subject: Subject, divided: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """φ of 40 draws of each image in the metric, and ψ, as many rows, of draws as often as rows are long; or equally.

    The file of φ is the last that is made, and says that ψ is whole.
    """
    name = "metric" if divided else "equal"

    def make() -> np.ndarray:
        density = subject.density(subject.metric) if divided else None
        return subject.phi(subject.train, "loss", 0, subject.metric, float(DRAWS), f"{name}-psi", density)

    phi = subject.kept(f"{name}-train", make)
    return phi, np.load(subject.folder / f"{name}-psi.npy", mmap_mode="r")


def at_end(subject: Subject, seed: int) -> np.ndarray:
    """φ of the queries at the end, in the metric."""
    name = f"metric-query-{seed}"
    return subject.kept(name, lambda: subject.phi(subject.query, "loss", seed, subject.metric))


def late(subject: Subject, seed: int) -> list[np.ndarray]:
    """φ of queries and images at ¾ of the way: 128 draws of a query, 20 of an image."""
    sides = (subject.query, replace(subject.train, draws=DRAWS // 2))
    names = [f"metric-late-{side.role}-{seed}" for side in sides]
    if not all((subject.folder / f"{name}.npy").exists() for name in names):
        with moved(subject, LATE):
            for name, side in zip(names, sides, strict=True):
                subject.kept(name, lambda s=side: subject.phi(s, "loss", seed, subject.metric))
    return [np.load(subject.folder / f"{name}.npy") for name in names]


def at_the_end(subject: Subject) -> list[np.ndarray]:
    """φ of queries and images at the end: 40 draws of an image and 256 of a query."""
    return [(at_end(subject, 0) + at_end(subject, 1)) / 2, curvature_rows(subject)[0]]


def two_points(subject: Subject) -> list[np.ndarray]:
    """φ of queries and images at the end and at ¾ of the way: 20 draws of an image and 128 of a query at each."""
    half = replace(subject.train, draws=DRAWS // 2)
    end = subject.kept("metric-half", lambda: subject.phi(half, "loss", 0, subject.metric))
    return [at_end(subject, 0), end, *late(subject, 1)]


def under_half(
    subject: Subject, query_draws: int, draws: int, name: str = "metric", projection: Projection | None = None
) -> list[np.ndarray]:
    """φ of queries and images under the fine-tune of half the length, in the metric or in a projection of that name."""
    projection = subject.metric if projection is None else projection
    sides = (replace(subject.query, draws=query_draws), replace(subject.train, draws=draws))
    names = [f"{name}-length-{side.role}-{side.draws}" for side in sides]
    if not all((subject.folder / f"{name}.npy").exists() for name in names):
        with half_as_long(subject):
            for file, side in zip(names, sides, strict=True):
                subject.kept(file, lambda s=side: subject.phi(s, "loss", 4, projection))
    return [np.load(subject.folder / f"{file}.npy") for file in names]


def two_lengths(subject: Subject) -> list[np.ndarray]:
    """φ under both fine-tunes; each epoch of the training of half the length costs a draw of an image."""
    draws = int(DRAWS - subject.truth.recipe.epochs / 2) // 2
    side = replace(subject.train, draws=draws)
    end = subject.kept(f"metric-end-{draws}", lambda: subject.phi(side, "loss", 0, subject.metric))
    return [at_end(subject, 0), end, *under_half(subject, QUERY_DRAWS, draws)]


def two_lengths_as_built(subject: Subject) -> list[np.ndarray]:
    """The same with 40 draws of an image and 256 of a query under each."""
    phi, _ = curvature_rows(subject)
    return [(at_end(subject, 0) + at_end(subject, 1)) / 2, phi, *under_half(subject, 2 * QUERY_DRAWS, DRAWS)]


OURS: dict[str, Callable[[Subject], list[np.ndarray]]] = {
    "gauss-newton": at_the_end,
    "two-point": two_points,
    "two-length": two_lengths,
    "as-built": two_lengths_as_built,
}


def ours(subject: Subject, names: Sequence[str]) -> dict[str, dict[float, Scores]]:
    """Our methods at multiples of their default λ, as `influence/scoring.py` has them."""
    _, psi = curvature_rows(subject)
    points = {name: OURS[name](subject) for name in names}
    found: dict[str, dict[float, Scores]] = {name: {} for name in names}
    for steps in (1, 2):
        those = [name for name in names if (steps == 1) == (name == "gauss-newton")]
        if not those:
            continue
        for times, factored in zip(TIMES, inverses(psi, [steps * t * subject.lam for t in TIMES]), strict=True):
            for name in those:
                query, train, *more = points[name]
                tau = solve(factored, torch.tensor(query)).numpy() @ train.T.astype(float)
                if more:
                    second = solve(factored, torch.tensor(more[0]))
                    if name == "two-point":
                        second = factored.damping * solve(factored, second)
                    tau += second.numpy() @ more[1].T.astype(float)
                found[name][times] = tau / len(train)
    return found


def trak(subject: Subject) -> dict[float, Scores]:
    """Park et al. (2023), 80 draws."""
    train = subject.mean_phi(subject.train, "loss")
    return preconditioned(subject.mean_phi(subject.query, "loss"), train)


def trak_two_lengths(subject: Subject) -> dict[float, Scores]:
    """The mean of TRAK's scores under the fine-tune and that of half the length; 40 draws and 128 under each."""
    end = preconditioned(*(subject.plain_phi(side, "loss", 0) for side in (subject.query, subject.train)))
    half = preconditioned(*under_half(subject, QUERY_DRAWS, DRAWS, "sketch", subject.sketch))
    return {damping: (tau + half[damping]) / 2 for damping, tau in end.items()}


def d_trak(subject: Subject) -> dict[float, Scores]:
    """Zheng et al. (2024), 80 draws."""
    train = subject.mean_phi(subject.train, "square")
    return preconditioned(subject.mean_phi(subject.query, "square"), train)


def das(subject: Subject) -> dict[float, Scores]:
    """Lin et al. (2025), before its square: unit gradients of mean |f|, the residual's size, 1/(1 − leverage)."""

    def take(side: Side, draws: int) -> np.ndarray:
        rows = []
        for image in range(len(side.ids)):
            inputs, _, _ = subject.rows(side, image, draws, 0)
            output = Output(lambda prediction: prediction.abs().flatten(1).mean(1), (), 1)
            each = subject.projected(inputs, output, subject.sketch)
            rows.append(torch.nn.functional.normalize(each).mean(0).numpy())
        return np.stack(rows)

    def size(side: Side) -> np.ndarray:
        found = retraining.losses(subject.denoiser, side.x0, side.cond, side.ids, 2 * DRAWS)
        return np.sqrt(found)

    train = subject.kept("das-train", lambda: take(subject.train, 2 * DRAWS))
    query = subject.kept("das-query", lambda: take(subject.query, 2 * QUERY_DRAWS))
    residual = subject.kept("das-residual", lambda: size(subject.train))
    leverage = {damping: np.diag(own) for damping, own in preconditioned(train, train).items()}
    found = preconditioned(query, train)
    return {damping: tau * residual / (1 - leverage[damping]) for damping, tau in found.items()}


def ekfac(subject: Subject) -> dict[float, Scores]:
    """Unprojected EK-FAC: 8 draws for the bases, 32 for the eigenvalues, 40 for the gradients."""
    shape, train = tuple(subject.train.x0.shape[1:]), subject.train
    scale = (2 / np.prod(shape)) ** 0.5

    def probes(image: int, draws: int, seed: int) -> torch.Tensor:
        return scale * diffusion.probes(seed, train.ids[image], np.arange(draws), shape)

    def bases() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        for image in range(len(train.ids)):
            inputs, _, _ = subject.rows(train, image, 8, 11)
            yield inputs.x_t, inputs.t, inputs.cond, probes(image, 8, 11)

    def pseudo() -> Iterator[torch.Tensor]:
        output = Output(lambda f, xi: (f * xi).flatten(1).sum(1), (), 1)
        for image in range(len(train.ids)):
            inputs, _, _ = subject.rows(train, image, 32, 12)
            one = Output(output.value, (probes(image, 32, 12),), 1)
            yield subject.projected(inputs, one, subject.identity)

    def make() -> np.ndarray:
        fitted = Ekfac(subject.denoiser.network, subject.denoiser.parameters)
        fitted.fit_bases(bases())
        fitted.fit_eigenvalues(pseudo())
        queries = torch.tensor(subject.mean_raw(subject.query))
        scores = fitted.scorer(queries, torch.tensor(subject.phi(train, "loss", 0, subject.identity)))
        return np.stack([scores(rho).numpy() for rho in RHOS])

    return dict(zip(RHOS, subject.kept("scores-ek-fac", make), strict=True))


def datainf(subject: Subject) -> dict[float, Scores]:
    """Kwon et al. (2024): the mean of rank-one inverses, layer by layer; λ_l = damping · mean of squared entries.

    80 draws of an image: it has no other passes.
    """
    g, q = (
        torch.tensor(subject.kept(f"raw-mean-{side.role}", lambda side=side: subject.mean_raw(side)))
        for side in (subject.train, subject.query)
    )
    result, start = {damping: torch.zeros(len(q), len(g)) for damping in DAMPINGS}, 0
    for shape in subject.shapes.values():
        part = slice(start, start + int(np.prod(shape)))
        start = part.stop
        own, asked = g[:, part], q[:, part]
        inner, squared = asked @ own.T, own.square().sum(1)
        for damping, total in result.items():
            lam = damping * own.square().mean()
            weight = inner / (lam + squared)  # [query, j]
            total += (inner - weight @ (own @ own.T) / len(g)) / lam
    return {damping: (total / len(g)).numpy() for damping, total in result.items()}


def cosines(subject: Subject) -> dict[str, Scores]:
    """Methods without damping."""
    query, train = subject.mean_phi(subject.query, "loss"), subject.mean_phi(subject.train, "loss")
    shape = (len(query), len(train))
    u = (
        torch.nn.functional.normalize(subject.query.x0.flatten(1)),
        torch.nn.functional.normalize(subject.train.x0.flatten(1)),
    )
    dot = query @ train.T
    norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(train, axis=1)
    return {
        "random": np.random.Generator(np.random.Philox(0)).normal(size=shape),
        "constant": np.ones(shape),
        "pixel cosine": evaluation.similarity(subject.truth),
        "latent cosine": (u[0] @ u[1].T).numpy(),
        "grad-dot": dot,
        "grad-cos": dot / norms,
    }


def all_scores(subject: Subject) -> dict[str, dict[float, Scores]]:
    """Each method at each damping."""
    found = {name: {0.0: tau} for name, tau in cosines(subject).items()}
    others = {"trak": trak, "trak, two lengths": trak_two_lengths, "d-trak": d_trak, "das": das}
    for name, method in others.items():
        kept = subject.kept(f"scores-{name}", lambda m=method: np.stack(list(m(subject).values())))
        found[name] = dict(zip(DAMPINGS, kept, strict=True))
    missing = [name for name in OURS if not (subject.folder / f"scores-{name}.npy").exists()]
    for name, at in (ours(subject, missing) if missing else {}).items():
        subject.kept(f"scores-{name}", lambda at=at: np.stack(list(at.values())))
    for name, default in zip(OURS, (DEFAULT, TWO_POINT, TWO_LENGTH, AS_BUILT), strict=True):
        at = dict(zip(TIMES, np.load(subject.folder / f"scores-{name}.npy"), strict=True))
        if default != AS_BUILT:
            found[name] = at
        found[default] = {1.0: at[1.0]}
    found["ek-fac"] = ekfac(subject)
    if subject.truth.recipe.lora_rank is not None:
        found["datainf"] = datainf(subject)
    return found


READOUTS: dict[str, Callable[[Scores], Scores]] = {"raw": lambda tau: tau, "signed square": lambda tau: tau * abs(tau)}


def compare(subject: Subject, out: Path) -> pd.DataFrame:
    """The table: method, readout, kind of query; LDS at the best damping and chosen blindly; ours in units of λ."""
    masks, by_seed, kinds = halves(subject.truth)
    outcome = by_seed.mean(0)
    rows: list[list[object]] = []
    scores = all_scores(subject)
    foretold = {
        (name, readout): {d: metrics.predictions(change(tau), masks) for d, tau in dampings.items()}
        for name, dampings in scores.items()
        for readout, change in READOUTS.items()
    }
    for kind in dict.fromkeys(kinds):
        chosen = kinds == kind
        ceiling = metrics.reliability(by_seed[:, :, chosen]).ceiling
        best = {}
        for key, dampings in foretold.items():
            each = {d: metrics.correlations(p[:, chosen], outcome[:, chosen]).mean() for d, p in dampings.items()}
            best[key] = max(each, key=each.__getitem__)
            blind = blind_choice({d: p[:, chosen] for d, p in dampings.items()}, outcome[:, chosen])
            rows.append([kind, *key, best[key], each[best[key]], blind, ceiling])
        ours = [next(iter(foretold[name, "raw"].values()))[:, chosen] for name in (DEFAULT, TWO_POINT, TWO_LENGTH)]
        stack = np.stack([*ours, *(foretold[key][best[key]][:, chosen] for key in foretold)])
        repeats = metrics.bootstrap(stack, outcome[:, chosen])
        for row, column in zip(rows[-len(foretold) :], range(len(ours), len(stack)), strict=True):
            row += np.quantile(repeats[:, column], [0.025, 0.975]).tolist()
            for own in range(len(ours)):
                row += np.quantile(repeats[:, own] - repeats[:, column], [0.025, 0.975]).tolist()
    names = ["kind", "method", "readout", "best_damping", "lds_best", "lds_blind", "ceiling"]
    differences = [f"{name}_minus_{end}" for name in ("default", "two_point", "two_length") for end in ("low", "high")]
    table = pd.DataFrame(rows, columns=[*names, "low", "high", *differences])
    table.to_csv(out, index=False, float_format="%.4f", lineterminator="\n")
    return table


def summary(table: pd.DataFrame) -> str:
    """Markdown: LDS × 100 of each method for each kind of query, chosen blindly / at its own best damping."""
    kinds = list(dict.fromkeys(table["kind"]))
    lines = ["| method | readout | " + " | ".join(kinds) + " |", "|" + "---|" * (2 + len(kinds))]
    for (method, readout), rows in table.groupby(["method", "readout"], sort=False):
        of = rows.set_index("kind")
        cells = [f"{100 * of.loc[kind, 'lds_blind']:.1f} / {100 * of.loc[kind, 'lds_best']:.1f}" for kind in kinds]
        lines.append(f"| {method} | {readout} | " + " | ".join(cells) + " |")
    ceilings = table.drop_duplicates("kind").set_index("kind")["ceiling"]
    ceiling = " | ".join(f"{100 * ceilings[kind]:.1f}" for kind in kinds)
    lines.append(f"| ceiling | | {ceiling} |")
    lines += ["", "Each method at its own best damping and readout for each kind; the defaults raw.", ""]
    lines += ["| method | " + " | ".join(kinds) + " |", "|" + "---|" * (1 + len(kinds))]
    for method, rows in table.groupby("method", sort=False):
        ours = rows[rows["readout"] == "raw"] if method in (DEFAULT, TWO_POINT, TWO_LENGTH, AS_BUILT) else rows
        best = ours.groupby("kind")["lds_best"].max()
        lines.append(f"| {method} | " + " | ".join(f"{100 * best[kind]:.1f}" for kind in kinds) + " |")
    return "\n".join([*lines, f"| ceiling | {ceiling} |"]) + "\n"


def blind_choice(dampings: dict[float, np.ndarray], outcome: np.ndarray) -> float:
    """LDS at the damping that is best on the other half of the masks, mean of both ways."""
    found = []
    for here, there in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        each = {d: metrics.correlations(p[there], outcome[there]).mean() for d, p in dampings.items()}
        damping = max(each, key=each.__getitem__)
        found.append(metrics.correlations(dampings[damping][here], outcome[here]).mean())
    return float(np.mean(found))


def main() -> None:
    """Take what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth")
    parser.add_argument("--work", type=Path, required=True, help="folder that ground_truth.py made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = PAPER / "results"
    out.mkdir(exist_ok=True)
    table = compare(Subject(options.truth, options.work), out / f"{options.truth}-comparison.csv")
    text = summary(table)
    (out / f"{options.truth}-comparison.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
