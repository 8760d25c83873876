"""Pictures and captions → x₀ and c → features: decoded and encoded once, a batch at a time in memory."""

from collections.abc import Sequence

import numpy as np
import torch

from influence import datasets
from influence.devices import exact
from influence.features import Features, Recipe, features, joined
from influence.models import Denoiser


def take(denoiser: Denoiser, recipe: Recipe, items: Sequence[datasets.Item]) -> Features:
    """Load images, and take their features; pictures of one batch at a time are in memory."""
    parts = []
    for start in range(0, max(len(items), 1), recipe.batch_size):
        part = items[start : start + recipe.batch_size]
        ids, captions = [item.item_id for item in part], [item.caption for item in part]
        parts.append(take_arrays(denoiser, recipe, ids, decode(denoiser, part), captions))
    return joined(parts)


def decode(denoiser: Denoiser, items: Sequence[datasets.Item]) -> list[np.ndarray]:
    """Pixels of images, as the model takes them."""
    channels, height, width = denoiser.image_size
    return [datasets.load(item, height=height, width=width, channels=channels) for item in items]


def take_arrays(
    denoiser: Denoiser,
    recipe: Recipe,
    item_ids: Sequence[str],
    pixels: Sequence[np.ndarray],
    captions: Sequence[str | None],
) -> Features:
    """Encode pictures and their captions once, and take their features."""
    return features(denoiser.network, recipe, item_ids, *encoded(denoiser, pixels, captions))


@exact()
def encoded(
    denoiser: Denoiser, pixels: Sequence[np.ndarray], captions: Sequence[str | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x₀ and c of pictures, on the network's device."""
    device = next(iter(denoiser.parameters.values())).device
    if not pixels:
        return torch.empty(0, *denoiser.sample_shape, device=device), None
    x0 = torch.cat([denoiser.encode_images(torch.from_numpy(image)[None].to(device)) for image in pixels])
    if not denoiser.conditional:
        return x0, None
    return x0, torch.cat([denoiser.encode_captions([caption or ""]) for caption in captions])
