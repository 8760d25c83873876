"""Scores τ [query, train] from features. τ > 0: training on this image lowered the query's loss.

The query is preconditioned once, v = C⁻¹ φ_q, and τ(q, i) = v · φ_i for every training image: the store is read once,
block by block, and stays as it was written. N is the number of training images, φ their features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from influence.curvature import Curvature, solve
from influence.errors import OptionError


@dataclass(frozen=True)
class Method:
    """One way to score: which features, what the query is preconditioned with, and the formula."""

    formula: str
    family: str = "loss"
    """Which features of the store: of the `loss`, or of the `square` output."""
    curvature: str | None = None
    """Rows that make H: `psi` (curvature rows), `phi` (the features themselves), or `None` for no H."""
    cosine: bool = False
    """Whether features are scaled to unit length."""


METHODS: dict[str, Method] = {
    # Gauss–Newton influence in the projected space; DESIGN of the estimator in ARCHITECTURE.md.
    "gauss-newton": Method("τ = (1/N) φ_qᵀ (H + λI)⁻¹ φ_i,  H = (1/R) Σ ψψᵀ", curvature="psi"),
    # Park et al. (2023), one checkpoint, without the loss weights Q.
    "trak": Method("τ = φ_qᵀ (ΦᵀΦ + λI)⁻¹ φ_i", curvature="phi"),
    # Zheng et al. (2024): TRAK on the gradient of the mean square of the prediction.
    "d-trak": Method("τ = φ_qᵀ (ΦᵀΦ + λI)⁻¹ φ_i,  φ of mean f²", family="square", curvature="phi"),
    # Charpiat et al. (2019); TracIn (Pruthi et al., 2020) at one checkpoint.
    "grad-dot": Method("τ = φ_q · φ_i"),
    "grad-cos": Method("τ = φ_q · φ_i / (‖φ_q‖ ‖φ_i‖)", cosine=True),
}


def precondition(
    method: Method, phi_q: Float[Tensor, "query k"], curvature: Curvature | None, num_train: float
) -> Float64[Tensor, "query k"]:
    """v, so that τ = v · φ_i (for cosines: v · φ_i / ‖φ_i‖).

    For TRAK (ΦᵀΦ + λ′I)⁻¹ = (1/N) (H + λI)⁻¹ with H = ΦᵀΦ/N and λ′ = Nλ: both kinds share the factor 1/N.

    Raises:
        OptionError: The cosine of a query without gradient is wanted.
    """
    if curvature is not None:
        return solve(curvature, phi_q) / num_train
    v = phi_q.double()
    if method.cosine:
        norm = v.norm(dim=1, keepdim=True)
        if not bool((norm > 0).all()):
            raise OptionError("grad-cos is undefined for a picture whose gradient is zero; use --method gauss-newton")
        v = v / norm
    return v


Block = tuple[Sequence[str], Float32[np.ndarray, "_ _"]]


def scores(
    method: Method, v: Float64[Tensor, "query k"], blocks: Iterable[Block]
) -> Iterator[tuple[Sequence[str], Float64[np.ndarray, "_ _"]]]:
    """Score block by block: item ids `[train]` and τ `[query, train]`.

    Raises:
        OptionError: The cosine with a training image without gradient is wanted.
    """
    v32 = v.float()
    for ids, phi in blocks:
        rows = torch.tensor(phi)
        tau = (v32 @ rows.T).double()
        if method.cosine:
            norm = rows.norm(dim=1).double()
            if not bool((norm > 0).all()):
                zero = ids[int((norm == 0).nonzero()[0, 0])]
                raise OptionError(f"grad-cos is undefined: the gradient of image {zero} is zero; use another --method")
            tau = tau / norm
        yield ids, tau.numpy()


Ranked = list[tuple[float, str]]


def top(best: Ranked, ids: Iterable[str], tau: Iterable[float], k: int) -> Ranked:
    """Merge new scores into the best k so far, highest first; ties in the order of ids. Associative."""
    merged = best + [(float(score), item_id) for item_id, score in zip(ids, tau, strict=True)]
    return sorted(merged, key=lambda pair: (-pair[0], pair[1]))[:k]


def group_totals(
    totals: dict[str, float], ids: Iterable[str], tau: Iterable[float], groups: Mapping[str, Mapping[str, int]]
) -> None:
    """Add signed scores to their groups, in place; `groups` says how many files of each group an image is."""
    for item_id, score in zip(ids, tau, strict=True):
        for group, files in groups[item_id].items():
            totals[group] = totals.get(group, 0.0) + files * float(score)
