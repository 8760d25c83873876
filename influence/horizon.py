"""The damping that a fine-tune has of its own: AdamW took so many steps, and no more.

AdamW moves a parameter by η/√v for each unit of its gradient, v being the second moment of the batch gradient. Steps of
sizes η_t fit a direction of curvature σ by a part of 1 − exp(−σ Σ η_t/√v); what was not fitted is as if it were damped
by Λ = √v / Σ η_t, since σ/(σ + Λ) is nearly that part (Bae et al., 2024, for plain gradient descent). Features are in
the metric of the plain gradient, which has one λ for all parameters: that of Λ along the gradients themselves,

    λ = E[gᵀ Λ g] / E[gᵀ g] = Σ_j v_j^(3/2) / (Σ_t η_t · Σ_j v_j).

Nothing is chosen here by looking at how well scores do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from influence import diffusion, keys
from influence.errors import GradientError
from influence.finetuning import FineTune
from influence.models import Denoiser

BATCHES, ROWS = 64, 8


def horizon_damping(
    denoiser: Denoiser, recipe: FineTune, batches: Iterable[tuple[Tensor, Tensor | None]], *, images: int, seed: int
) -> float:
    """λ of a fine-tune, in units of curvature.

    v of a batch of B rows is taken as b/B times that of the batches given, of b rows each: around a minimum the
    gradient of a batch is nearly all noise. It is taken where the fine-tune ended.

    Args:
        denoiser: The fine-tuned model.
        recipe: How it was trained.
        batches: Encoded images and captions `(x₀, c)` of random training images, batch by batch.
        images: N, which gives the number of steps.
        seed: Key of the timesteps and the noise.

    Raises:
        GradientError: A gradient is not finite, or all are zero.
    """
    parameters = list(denoiser.parameters.values())
    asked = [parameter.requires_grad for parameter in parameters]
    v = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number, (x0, cond) in enumerate(batches):
            for total, gradient in zip(v, _gradient(denoiser, x0, cond, (seed, number)), strict=True):
                total += gradient.float().square() * (len(x0) / recipe.batch_size)
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
    count = number + 1
    first = sum(float((part / count).double().sum()) for part in v)
    weighted = sum(float((part / count).double().pow(1.5).sum()) for part in v)
    if not 0 < first < float("inf"):
        raise GradientError(
            f"the squared gradients of {count} batches sum to {first}; expected a finite number above 0"
        )
    return weighted / first / recipe.total_learning_rate(images)


def _gradient(denoiser: Denoiser, x0: Tensor, cond: Tensor | None, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Of the mean loss of a batch, one random draw for each image."""
    schedule = denoiser.schedule
    u = keys.uniform(("horizon", *key, "timesteps"), len(x0))
    t = torch.from_numpy(u * schedule.num_timesteps).long().to(x0.device)
    eps = torch.from_numpy(keys.normal(("horizon", *key, "noise"), tuple(x0.shape))).to(x0.device)
    with torch.enable_grad():
        prediction = denoiser.network(diffusion.noised(schedule, x0, t, eps), t, cond)
        loss = diffusion.losses(schedule, prediction, x0, t, eps).mean()
        return torch.autograd.grad(loss, list(denoiser.parameters.values()))
