"""Looks, not influence: how similar pictures are, which are near duplicates, and when a picture is a near copy.

A similarity needs no model and knows nothing of training: a picture that no model ever saw can be as similar as one
that was trained on. All inputs are arrays of equal shape, so that the same functions serve pixels and latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from influence import keys
from influence.errors import OptionError

SIDE = 32
"""Pixels of a side of the pictures that are compared: enough to recognise a scene (Torralba et al., 2008)."""
SHIFT = 1 / 8
"""Largest shift, as a fraction of a side."""
DUPLICATE = 0.985
"""Similarity of near duplicates; see `duplicates`."""
QUANTILE = 0.999
RATIO = 0.5
RATIO_QUANTILE = 0.01
NEIGHBOURS = 50
SAMPLE = 128
_BLOCK = 256  # works whose crops stay in the cache


@dataclass(frozen=True)
class Background:
    """How similar different works of one training set are, by one metric: what a near copy must exceed."""

    threshold: float
    """The 99.9 % quantile of the similarity of two different works; NaN if there are not two."""
    ratio_limit: float
    """1 % of the works are nearer to another one than this, as a neighbour ratio; at most 0.5."""
    pairs: int
    """Pairs that the threshold is estimated from."""


@dataclass(frozen=True)
class Nearest:
    """The work nearest to a query by one metric."""

    index: int
    """Which of the works."""
    similarity: float
    ratio: float
    """Distance to it, divided by the mean distance to the next different ones; NaN if there are none."""
    near_copy: bool


def similarity(
    queries: Float[Tensor, "queries _ _ _"], works: Float[Tensor, "works channels height width"]
) -> Float[np.ndarray, "queries works"]:
    """Zero-mean normalised cross-correlation, the largest over small shifts and the mirror image.

    Each channel of what two pictures have in common has its mean removed; the correlation is over all channels. So
    brightness, contrast and colour cast do not count. Shifts are whole pixels up to an eighth of a side; one that
    leaves less than half of a picture's variance in common counts 0, as does a picture without any variance.

    Returns:
        −1 … 1, in practice above 0; 1 for the same picture up to shift, mirroring, brightness and contrast.

    Raises:
        OptionError: The shapes differ or a value is not finite.
    """
    if queries.shape[1:] != works.shape[1:]:
        sizes = [" × ".join(map(str, x.shape[1:])) for x in (queries, works)]
        found = f"queries are {sizes[0]} and works {sizes[1]}"
        raise OptionError(f"{found}; expected the same; resize them alike")
    if not bool(torch.isfinite(queries).all() and torch.isfinite(works).all()):
        raise OptionError("a picture holds NaN or infinity; expected finite values; check what made it")
    both = torch.cat([queries, queries.flip(-1)]).float()
    best = torch.full((len(both), len(works)), -1.0)
    height, width = works.shape[-2:]
    shifts = [
        (dy, dx)
        for dy in range(-int(height * SHIFT), int(height * SHIFT) + 1)
        for dx in range(-int(width * SHIFT), int(width * SHIFT) + 1)
    ]
    least, works_least = _energy(both) / 2, _energy(works.float()) / 2
    for dy, dx in shifts:
        u = _unit(_crop(both, dy, dx), least)
        for first in range(0, len(works), _BLOCK):
            part = slice(first, first + _BLOCK)
            v = _unit(_crop(works[part].float(), -dy, -dx), works_least[part])
            best[:, part] = torch.maximum(best[:, part], u @ v.T)
    return best.reshape(2, len(queries), len(works)).amax(0).clamp(-1, 1).numpy()


def cosine(
    queries: Float[np.ndarray, "queries _"], works: Float[np.ndarray, "works width"]
) -> Float[np.ndarray, "queries works"]:
    """Cosine of embeddings: −1 … 1, 0 if one of them is zero.

    Raises:
        OptionError: The widths differ or a value is not finite.
    """
    if queries.shape[1] != works.shape[1]:
        found = f"embeddings have {queries.shape[1]} and {works.shape[1]} entries"
        raise OptionError(f"{found}; expected as many for all pictures; make them with one model")
    if not (np.isfinite(queries).all() and np.isfinite(works).all()):
        raise OptionError("an embedding holds NaN or infinity; expected finite values; check what made it")
    norms = [np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, works)]
    a, b = (x / np.where(norm > 0, norm, 1) for x, norm in zip((queries, works), norms, strict=True))
    return np.clip(a @ b.T, -1, 1)


def duplicates(
    queries: Float[Tensor, "queries channels height width"], works: Float[Tensor, "works channels height width"]
) -> Bool[np.ndarray, "queries works"]:
    """Which pictures are near duplicates: their similarity at half of the side, 16 pixels or more, is at least 0.985.

    That leaves at most 3 % of the variance of one picture unexplained by the other. Saving again as JPEG, a shift or
    5 % more brightness leave less; two works that draw the same thing leave more. The cut is in units of the pictures'
    own contrast, so that it needs no tuning; at half of the side little is left of what compression does. Queries are
    halved from sixteen origins, half a pixel apart, so that a shift by any fraction of a pixel is found too, except in
    pictures of thin lines. Pictures smaller than 32 pixels are compared as they are.
    """
    if min(works.shape[-2:]) < SIDE:
        return similarity(queries, works) >= DUPLICATE
    height, width = (2 * side for side in queries.shape[-2:])
    doubled = queries.float().repeat_interleave(2, -2).repeat_interleave(2, -1)
    doubled = torch.nn.functional.pad(doubled, (0, 3, 0, 3), mode="replicate")
    halved = _pooled(works.float(), 2)
    found = np.zeros((len(queries), len(works)), dtype=bool)
    for dy in range(4):
        for dx in range(4):
            moved = _pooled(doubled[..., dy : dy + height, dx : dx + width], 4)
            found |= similarity(moved, halved) >= DUPLICATE
    return found


def clusters(works: Float[Tensor, "works channels height width"]) -> Int[np.ndarray, " works"]:
    """Near-duplicate cluster of each work: the connected components of `duplicates`, numbered by their first work.

    All pairs are compared: about 5 s for 500 works of 32 pixels on one core, 20 min for 10,000.
    """
    rows, columns = [], []
    for first in range(0, len(works), _BLOCK):
        found = np.nonzero(duplicates(works[first : first + _BLOCK], works[first:]))
        rows.append(found[0] + first)
        columns.append(found[1] + first)
    i, j = np.concatenate(rows), np.concatenate(columns)
    labels = connected_components(csr_array((np.ones(len(i)), (i, j)), shape=(len(works),) * 2), directed=False)[1]
    _, first_of, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_of))[inverse]


def sample(ids: Sequence[str]) -> Int[np.ndarray, " sample"]:
    """Which works to take the background from: all, or a keyed choice of 128 that depends on the ids alone."""
    return np.array(sorted(range(len(ids)), key=lambda i: keys.digest("background", ids[i]))[:SAMPLE])


def background(
    similarities: Float[np.ndarray, "sample works"], duplicate: Bool[np.ndarray, "sample works"]
) -> Background:
    """How similar different works of the training set are.

    Args:
        similarities: Of a sample of the works to all works.
        duplicate: Which of these pairs are the same work or near duplicates: they are left out.
    """
    values = similarities[~duplicate]
    ratios = [
        ratio
        for row, same in zip(similarities, duplicate, strict=True)
        if (~same).sum() > 1 and not np.isnan(ratio := _ratio(row[~same]))
    ]
    return Background(
        threshold=float(np.quantile(values, QUANTILE)) if values.size else float("nan"),
        ratio_limit=min(RATIO, float(np.quantile(ratios, RATIO_QUANTILE, method="lower"))) if ratios else RATIO,
        pairs=int(values.size),
    )


def nearest(
    similarities: Float[np.ndarray, " works"], duplicate: Bool[np.ndarray, " works"], null: Background
) -> Nearest:
    """The nearest work, and whether the query is a near copy of it.

    A near copy is more similar to it than 99.9 % of the pairs of different works are, *and* its neighbour ratio is
    below 0.5 and below what 99 % of the works have to another work. The ratio is that of Carlini et al. (2023, §5.1):
    distance / mean distance to the 50 nearest, with α = 0.5. Here the distance is √(2 − 2 · similarity), which is the
    ℓ2 distance of standardised pictures; near duplicates of the nearest are no neighbours, or a picture that was
    trained on often would hide itself; and the limit of the training set's own works is added.

    Args:
        similarities: Of the query to all works.
        duplicate: Which works are the nearest one or near duplicates of it.
        null: The same training set's background by the same metric.
    """
    index = int(np.argmax(similarities))
    others = similarities[~duplicate]
    ratio = _ratio(np.concatenate([[similarities[index]], others])) if others.size else float("nan")
    value = float(similarities[index])
    return Nearest(index, value, ratio, bool(value > null.threshold and ratio < null.ratio_limit))


def _ratio(similarities: np.ndarray) -> float:
    """Distance to the nearest / mean distance to the next ones."""
    distances = np.sqrt(np.maximum(2 - 2 * np.sort(similarities)[::-1], 0))
    mean = distances[1 : 1 + NEIGHBOURS].mean()
    return float(distances[0] / mean) if mean > 0 else float("nan")


def _crop(x: Tensor, dy: int, dx: int) -> Tensor:
    """What of the pictures remains in common with others that are shifted, `[pictures, channels, height · width]`."""
    height, width = x.shape[-2:]
    return x[..., max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)].flatten(2)


def _unit(x: Tensor, least: Tensor) -> Tensor:
    """Pictures without their channels' means, of norm 1; 0 where less than `least` energy is left."""
    x = (x - x.mean(-1, keepdim=True)).flatten(1)
    energy = (x * x).sum(1)
    scale = torch.where(energy >= least, energy.clamp_min(1e-30).rsqrt(), 0.0)
    return x * scale[:, None]


def _energy(x: Tensor) -> Tensor:
    """Sum of squares about the channels' means; infinite for a picture that is constant up to rounding."""
    flat = x.flatten(2)
    energy = (flat - flat.mean(-1, keepdim=True)).square().sum((1, 2))
    return torch.where(energy > 1e-9 * flat.square().sum((1, 2)), energy, torch.inf)


def _pooled(x: Tensor, size: int) -> Tensor:
    """Means over squares of that size."""
    return torch.nn.functional.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
