"""How curvature rows are divided among the timesteps: as often as they are long.

H is a mean over draws, and is estimated from some of them. Rows of early timesteps are many times longer than those of
late ones; if all are drawn equally often, few rows are most of H. Drawn in proportion to E‖ψ_t‖², and divided by the
root of it so that E[ψψᵀ] stays what it is, all are about equally long (importance sampling of a sum of matrices,
Drineas, Kannan & Mahoney, 2006), and as many rows hold about twice as much.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from influence.errors import GradientError
from influence.features import Recipe, features

IMAGES = 8
_LEAST = 1e-2  # of the mean: a draw whose rows are nearly zero is still looked at


def density(
    network: nn.Module, recipe: Recipe, item_ids: Sequence[str], x0: Tensor, cond: Tensor | None
) -> tuple[float, ...]:
    """Mean ‖ψ‖² of each of the S draws over some images, in units of their mean.

    Rounded to quarters of a power of two, so that two builders at once come to the same on any two processors.

    Args:
        network: Called as `network(x_t, t, cond)`.
        recipe: How features are taken.
        item_ids: Identity of each image; its draws here are others than those of its features.
        x0: Clean images or latents, on the network's device.
        cond: Encoded captions, or `None`.

    Raises:
        GradientError: No curvature row is finite, or all are zero.
    """
    every = replace(recipe, role="allocation", curvature_rate=float(recipe.num_draws), density=None)
    found = features(network, every, item_ids, x0, cond)
    length = np.square(found.psi, dtype=np.float64).sum(1).reshape(len(item_ids), recipe.num_draws)
    length = length[np.isfinite(length).all(1)]
    if not length.sum() > 0:
        raise GradientError("no training image has curvature rows that are finite and not all zero")
    p = np.maximum(length.mean(0) / length.mean(), _LEAST)
    return tuple(2.0 ** (round(4 * math.log2(value)) / 4) for value in p)
