"""Features of images: their draws through the network, the gradients of each, projected. Pure: no order, no batch.

An image has S draws. Its gradient feature φ = P · (1/S) Σ_s ∇_θ ℓ_s sums over all of them; each draw chosen for
curvature also gives a row ψ = P · sqrt(2w/D) J_θᵀ ξ of its own, out of the same forward, with E[ψψᵀ] = P G Pᵀ for the
Gauss–Newton matrix G of the draw's loss (Schraudolph, 2002; ξ ~ N(0, I) at the D entries of the prediction).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from influence import diffusion, gradients
from influence.devices import exact, onto, passes
from influence.diffusion import NoiseSchedule
from influence.projection import Projection


@dataclass(frozen=True)
class Recipe:
    """How features are taken; engine and batch_size change only what they cost."""

    schedule: NoiseSchedule
    parameters: Mapping[str, nn.Parameter]
    projection: Projection
    seed: int
    role: str
    """`train` or `query`: which stream of draws."""
    num_draws: int
    """S."""
    curvature_rate: float
    """Curvature rows for each image, on average."""
    output: str
    """`loss`, or `square` for the mean of f² (D-TRAK: Zheng et al., 2024)."""
    bf16: bool
    engine: str
    batch_size: int
    """Rows (image, draw) in one forward."""
    density: Sequence[float] | None = None
    """How often each of the S draws gives a curvature row, in proportion (`allocation`); `None`: all equally often."""


@dataclass(frozen=True)
class Features:
    """Of n images, in the order given."""

    phi: Float32[np.ndarray, "images k"]
    phi_batch: Float32[np.ndarray, "images batches k"]
    """φ of disjoint batches of the image's draws (`diffusion.batch_of`); no batches if they cannot be divided."""
    loss: Float32[np.ndarray, " images"]
    """Mean of the output over the image's draws."""
    loss_batch: Float32[np.ndarray, "images batches"]
    psi: Float32[np.ndarray, "rows k"]
    psi_item: Int32[np.ndarray, " rows"]
    """Index of the image that a curvature row is of."""
    psi_draw: Int32[np.ndarray, " rows"]
    """Its draw s; a draw with several probes has as many rows."""


def features(
    network: nn.Module,
    recipe: Recipe,
    item_ids: Sequence[str],
    x0: Float[Tensor, "images *shape"],
    cond: Float[Tensor, "images tokens width"] | None,
) -> Features:
    """Take the features of images.

    Args:
        network: Called as `network(x_t, t, cond)`.
        recipe: How.
        item_ids: Identity of each image: the key of its draws.
        x0: Clean images or latents, on the network's device.
        cond: Encoded captions, or `None` for an unconditional network.

    Raises:
        GradientError: The engine cannot take a gradient, by name.
    """
    n, k = len(item_ids), recipe.projection.dim
    batches = diffusion.num_batches(recipe.num_draws)
    part = max(batches, 1)
    phi = torch.zeros(n * part, k, device=x0.device)
    total = torch.zeros(n * part, device=x0.device)
    counts = _probe_counts(recipe, item_ids)
    item, draw = np.nonzero(counts)
    item, draw = (np.repeat(index, counts[counts > 0]) for index in (item, draw))
    place = np.cumsum(counts).reshape(counts.shape) - counts  # where the first curvature row of each draw belongs
    psi = torch.empty(len(item), k, device=x0.device)
    for rows, which, num_probes in forwards(recipe, item_ids):
        images = rows // part
        results = forward(network, recipe, item_ids, x0, cond, images, which, num_probes)
        index = onto(x0.device, torch.from_numpy(rows))
        phi.index_add_(0, index, results[0].features)
        total.index_add_(0, index, results[0].values.float().unflatten(0, (len(images), -1)).sum(1))
        first = onto(x0.device, torch.from_numpy(place[images[:, None], which].reshape(-1)))
        for number, result in enumerate(results[1:]):
            psi[first + number] = result.features
    phi, total = phi.unflatten(0, (n, part)), total.unflatten(0, (n, part))
    return Features(
        phi=phi.sum(1).cpu().numpy(),
        phi_batch=(phi[:, :batches] * batches).cpu().numpy(),
        loss=total.sum(1).cpu().numpy(),
        loss_batch=(total[:, :batches] * batches).cpu().numpy(),
        psi=psi.cpu().numpy(),
        psi_item=item.astype(np.int32),
        psi_draw=draw.astype(np.int32),
    )


@torch.no_grad()
@exact()
def losses(
    network: nn.Module,
    recipe: Recipe,
    item_ids: Sequence[str],
    x0: Float[Tensor, "images *shape"],
    cond: Float[Tensor, "images tokens width"] | None,
) -> tuple[Float32[np.ndarray, "images draws"], Int64[np.ndarray, "images draws"]]:
    """Training loss of images and t, for each of the draws that their features have: forwards alone.

    Two networks that are given the same draws can be compared draw by draw.
    """
    found = np.empty((len(item_ids), recipe.num_draws), np.float32)
    steps = np.empty((len(item_ids), recipe.num_draws), np.int64)
    for i in range(len(item_ids)):
        for start in range(0, recipe.num_draws, recipe.batch_size):
            which = np.arange(start, min(start + recipe.batch_size, recipe.num_draws))
            clean, t, eps, condition = _rows(recipe, item_ids, x0, cond, np.array([i]), which[None])
            with passes(x0.device, recipe.bf16):
                prediction = network(diffusion.noised(recipe.schedule, clean, t, eps), t, condition)
            found[i, which] = diffusion.losses(recipe.schedule, prediction, clean, t, eps).cpu().numpy()
            steps[i, which] = t.cpu().numpy()
    return found, steps


def by_batch(values: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " parts"]:
    """Means over the batches of draws (`diffusion.batch_of`); one batch if they cannot be divided."""
    batch = diffusion.batch_of(len(values))
    return np.array([values[batch == b].mean() for b in range(batch.max() + 1)], values.dtype)


def _rows(
    recipe: Recipe, item_ids: Sequence[str], x0: Tensor, cond: Tensor | None, images: np.ndarray, which: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x₀, t, ε and c of (image, draw) rows."""
    shape, device = tuple(x0.shape[1:]), x0.device
    drawn = [
        diffusion.draws(
            recipe.seed, recipe.role, item_ids[i], recipe.num_draws, recipe.schedule.num_timesteps, shape, which=chosen
        )
        for i, chosen in zip(images, which, strict=True)
    ]
    t = onto(device, torch.cat([t for t, _ in drawn]))
    eps = onto(device, torch.cat([eps for _, eps in drawn]))
    index = onto(device, torch.from_numpy(np.repeat(images, which.shape[1])))
    return x0[index], t, eps, None if cond is None else cond[index]


def joined(parts: Sequence[Features]) -> Features:
    """Features of images that were taken in parts, in order."""
    firsts = np.cumsum([0, *(len(part.phi) for part in parts)])
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    columns["psi_item"] = np.concatenate(
        [part.psi_item + np.int32(first) for part, first in zip(parts, firsts, strict=False)]
    )
    return Features(**columns)


def forwards(recipe: Recipe, item_ids: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Split the (image, draw) rows into forwards with equally many draws per row of φ.

    A row of φ is of one image and one batch of its draws. Draws with equally many curvature rows are together: each of
    these is a backward of its own.

    Yields:
        Indices of rows of φ `[rows]`, their draws `[rows, draws]`, and how many curvature rows each draw gives.
    """
    batch = diffusion.batch_of(recipe.num_draws)
    parts = [np.flatnonzero(batch == b) for b in range(batch.max() + 1)]
    counts = _probe_counts(recipe, item_ids)
    for num_probes in range(counts.max(initial=0), -1, -1):
        lists = [part[own[part] == num_probes] for own in counts for part in parts]
        for count in sorted({len(draws) for draws in lists} - {0}):
            images = np.array([i for i, draws in enumerate(lists) if len(draws) == count])
            step = max(1, recipe.batch_size // count)
            step -= step % len(parts) if step > len(parts) else 0  # whole images, whatever stands beside them
            for first in range(0, len(images), step):
                part = images[first : first + step]
                which = np.stack([lists[i] for i in part])
                for start in range(0, count, recipe.batch_size):
                    yield part, which[:, start : start + recipe.batch_size], num_probes


def _probe_counts(recipe: Recipe, item_ids: Sequence[str]) -> Int64[np.ndarray, "images draws"]:
    """How many curvature rows each draw of each image gives."""
    seed, num_draws, rate, density = recipe.seed, recipe.num_draws, recipe.curvature_rate, recipe.density
    counts = [
        np.bincount(diffusion.curvature_draws(seed, item_id, num_draws, rate, density), minlength=num_draws)
        for item_id in item_ids
    ]
    return np.array(counts, np.int64).reshape(len(item_ids), num_draws)


def forward(
    network: nn.Module,
    recipe: Recipe,
    item_ids: Sequence[str],
    x0: Tensor,
    cond: Tensor | None,
    images: np.ndarray,
    which: np.ndarray,
    num_probes: int,
) -> list[gradients.Result]:
    """Take the gradients of one of the `forwards`: of the output, summed over the draws of each row; of the probes."""
    inputs, outputs = _prepare(recipe, item_ids, x0, cond, images, which, num_probes)
    return gradients.per_sample_gradients(
        network, recipe.parameters, inputs, outputs, recipe.projection, engine=recipe.engine, bf16=recipe.bf16
    )


def _prepare(
    recipe: Recipe,
    item_ids: Sequence[str],
    x0: Tensor,
    cond: Tensor | None,
    images: np.ndarray,
    which: np.ndarray,
    num_probes: int,
) -> tuple[gradients.Inputs, list[gradients.Output]]:
    """Make the rows of a batch and the scalars whose gradients are wanted."""
    schedule, count = recipe.schedule, which.shape[1]
    clean, t, eps, condition = _rows(recipe, item_ids, x0, cond, images, which)
    inputs = gradients.Inputs(diffusion.noised(schedule, clean, t, eps), t, condition)

    if recipe.output == "square":
        outputs = [gradients.Output(lambda f: f.float().flatten(1).square().mean(1) / recipe.num_draws, (), count)]
    else:

        def loss(prediction: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return diffusion.weighted_errors(prediction, y, w) / recipe.num_draws

        y, w = diffusion.target(schedule, clean, t, eps), diffusion.weight(schedule, t)
        outputs = [gradients.Output(loss, (y, w), count)]
    if num_probes:
        # Each row stands for those that the draw would give if all gave equally many: E[ψψᵀ] stays what it is.
        p = np.ones(recipe.num_draws) if recipe.density is None else np.asarray(recipe.density)
        more = torch.from_numpy((p.mean() / p[which.reshape(-1)]).astype(np.float32))
        scale = (2 * diffusion.weight(schedule, t) / eps[0].numel() * onto(x0.device, more)).sqrt()
    for number in range(num_probes):
        xi = torch.cat(
            [
                diffusion.probes(recipe.seed, item_ids[i], draws, tuple(x0.shape[1:]), number)
                for i, draws in zip(images, which, strict=True)
            ]
        )
        outputs.append(gradients.Output(_probed, (scale, onto(x0.device, xi)), 1))
    return inputs, outputs


def _probed(prediction: Tensor, scale: Tensor, xi: Tensor) -> Tensor:
    """sqrt(2w/D) · ξᵀ f of each row; its gradient is the curvature row."""
    return scale * (prediction.float() * xi).flatten(1).sum(1)
