"""What is known of a fine-tune from its own steps: the metric in which AdamW moved, and how far it could go.

AdamW moves a parameter by η/√v for each unit of its gradient, v being the second moment of the batch gradient. So
after steps of sizes η_t a direction with gradient g has moved by (Σ η_t) D⁻¹ g, D = diag √v, and what a curvature H
leaves unfitted after them is as if H + D/Σ η_t were inverted, where training to the end would invert H (Bae et al.,
2024, for plain gradient descent, whose D = I). With features in the metric of D,

    φ = P D^(−1/2) g,  H in the same features,  λ = 1 / Σ_t η_t:  gᵀ (H + λD)⁻¹ g′ = φᵀ (H + λI)⁻¹ φ′.

D is one number for each parameter tensor, its mean along the gradients, Σ_j v_j^(3/2) / Σ_j v_j; v is the mean over the
way of the fine-tune. In the plain metric D is one number for all: φ = P g and λ = D / Σ_t η_t. Nothing is chosen here
by looking at how well scores do.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from influence import diffusion, gradients, keys
from influence.devices import exact
from influence.errors import GradientError
from influence.memory import peak
from influence.models import Denoiser

BATCHES, ROWS = 64, 8
METRICS = ("adamw", "plain")
Batches = Sequence[tuple[Tensor, Tensor | None]]


def second_moments(
    points: Iterable[tuple[float, Denoiser]], batches: Batches, *, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Second moments v of each parameter, by entry: the mean square of a batch's gradient over the way.

    That of a batch of B rows is taken as b/B times that of the batches given, of b rows each: the gradient of a batch
    is nearly all noise.

    Args:
        points: Models on the way and the part of its steps that each stands for.
        batches: Encoded images and captions `(x₀, c)` of random training images, batch by batch.
        batch_size: B.
        seed: Key of the timesteps and the noise.

    Raises:
        GradientError: No batch has finite gradients, or a parameter plays no part in the prediction.
    """
    v: dict[str, Tensor] = {}
    for part, denoiser in points:
        for name, mean in _mean_squares(denoiser, batches, batch_size, seed).items():
            v[name] = v[name].add_(mean, alpha=part) if name in v else mean.mul_(part)
    return v


def _mean_squares(denoiser: Denoiser, batches: Batches, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Of the gradients of batches at one point; those with an image that has no finite gradient do not count."""
    parameters, total, count = denoiser.parameters, {}, 0
    asked = [parameter.requires_grad for parameter in parameters.values()]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for number, (x0, cond) in enumerate(batches):
            found = _gradient(denoiser, x0, cond, (seed, number))
            if not all(bool(gradient.float().square().sum().isfinite()) for gradient in found):
                continue  # the image is refused by name when its own features are taken
            count += 1
            for name, gradient in zip(parameters, found, strict=True):
                square = gradient.float().square().mul_(len(x0) / batch_size)
                total[name] = total[name].add_(square) if name in total else square
            del found  # as large as the weights, and the next ones would be made beside it
    finally:
        for parameter, before in zip(parameters.values(), asked, strict=True):
            parameter.requires_grad_(before)
    if not count:
        raise GradientError("no batch of training images has finite gradients; expected finite weights and pictures")
    return {name: value.div_(count) for name, value in total.items()}


def held(denoiser: Denoiser, x0: Tensor, cond: Tensor | None, *, points: int) -> int:
    """Bytes that `second_moments` holds at the highest, measured with two batches of `ROWS` copies of an image."""
    batch = x0[:1].expand(ROWS, *x0.shape[1:]), None if cond is None else cond[:1].expand(ROWS, *cond.shape[1:])
    highest = peak(lambda: _mean_squares(denoiser, [batch] * 2, ROWS, 0), x0.device)
    kept = sum(4 * parameter.numel() for parameter in denoiser.parameters.values())
    return highest + kept * (points > 1)


FLOOR = 1e-3
"""No D is taken below this part of that of the plain metric."""


def tensor_scales(v: Mapping[str, Tensor]) -> dict[str, float]:
    """W = D^(−1/2) of each parameter, by name.

    No D is taken below `FLOOR` of that of the plain metric: gradients which are so small are rounding, as those of
    a key's bias, which a softmax ignores, and AdamW's ε bounds what they do. W is rounded to eighths of a power of two,
    so that two builders at once come to the same on any two processors.

    Raises:
        GradientError: No parameter has a gradient.
    """
    least = FLOOR * mean_along_gradients(v)
    sums = {name: _sums(value) for name, value in v.items()}
    d = {name: max(weighted / first if first > 0 else 0.0, least) for name, (weighted, first) in sums.items()}
    return {name: 2.0 ** (round(-4 * math.log2(value)) / 8) for name, value in d.items()}


def mean_along_gradients(v: Mapping[str, Tensor]) -> float:
    """D of the plain metric: one number for all parameters.

    Raises:
        GradientError: No parameter has a gradient.
    """
    weighted, first = (sum(part) for part in zip(*map(_sums, v.values()), strict=True))
    if not first > 0:
        raise GradientError("all gradients are zero: the model's loss does not depend on its parameters")
    return weighted / first


def fingerprint(scales: Mapping[str, float] | None) -> str:
    """What identifies W; `plain` for none."""
    if scales is None:
        return "plain"
    return hashlib.sha256(json.dumps(dict(scales), sort_keys=True).encode()).hexdigest()


def _sums(v: Tensor) -> tuple[float, float]:
    """Σ v^(3/2) and Σ v."""
    exact = v.double()
    return float(exact.pow(1.5).sum()), float(exact.sum())


@exact()
def _gradient(denoiser: Denoiser, x0: Tensor, cond: Tensor | None, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Of the mean loss of a batch, one random draw for each image."""
    schedule = denoiser.schedule
    u = keys.uniform(("horizon", *key, "timesteps"), len(x0))
    t = torch.from_numpy(u * schedule.num_timesteps).long().to(x0.device)
    eps = torch.from_numpy(keys.normal(("horizon", *key, "noise"), tuple(x0.shape))).to(x0.device)
    with torch.enable_grad():
        prediction = denoiser.network(diffusion.noised(schedule, x0, t, eps), t, cond)
        loss = diffusion.losses(schedule, prediction, x0, t, eps).mean()
        found = torch.autograd.grad(loss, list(denoiser.parameters.values()), allow_unused=True)
    gradients.refuse_missing([n for n, grad in zip(denoiser.parameters, found, strict=True) if grad is None])
    return found
