"""Damped solves (H + λI)⁻¹ v with H = (1/R) Σ_r w_r ψ_r ψ_rᵀ, λ = damping · tr(H)/k.

H is the Gauss–Newton matrix in feature space when ψ are curvature rows (Martens, 2020), and the empirical Fisher matrix
of TRAK (Park et al., 2023) when they are the features φ themselves. R = Σ w_r. Products of float32 rows are taken in
blocks and added up in float64; factors and solves are float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from influence.errors import OptionError

Blocks = Iterable[tuple[Float32[np.ndarray, "_ _"], Float64[np.ndarray, "_"]]]
"""Rows `[rows, k]` and their weights `[rows]`, one block after the other."""

_BLOCK = 2048


@dataclass(frozen=True)
class Curvature:
    """A factored H + λI. Primal: its Cholesky factor. Dual (R < k): that of ΨΨᵀ + RλI, and Ψ (weights inside)."""

    factor: Float64[Tensor, "n n"]
    damping: float
    """λ itself."""
    rows: float
    """R."""
    psi: Float32[Tensor, "rows k"] | None = None
    """Ψ in the dual, `None` in the primal."""


def curvature(blocks: Blocks, *, dim: int, damping: float, num_rows: int) -> Curvature:
    """Stream the rows once and factor.

    Args:
        blocks: ψ and w.
        dim: k.
        damping: λ in units of tr(H)/k.
        num_rows: How many rows the blocks hold: decides between primal and dual.

    Raises:
        OptionError: The damping is not positive, or there are no rows.
    """
    if not damping > 0 or not np.isfinite(damping):
        raise OptionError(f"damping is {damping}; expected a number above 0")
    if num_rows < 1:
        raise OptionError("there are no curvature rows; build the store with more, or use --method grad-dot")
    return _dual(blocks, dim, damping) if num_rows < dim else _primal(blocks, dim, damping)


def _weighted(blocks: Blocks) -> Iterator[tuple[np.ndarray, float]]:
    """Rows scaled by √w, and Σ w, in blocks of a fixed number of rows at most."""
    for psi, weights in blocks:
        for start in range(0, len(psi), _BLOCK):
            w, rows = weights[start : start + _BLOCK], np.asarray(psi[start : start + _BLOCK])
            yield (rows if (w == 1).all() else rows * np.sqrt(w).astype(np.float32)[:, None]), float(w.sum())


def _primal(blocks: Blocks, dim: int, damping: float) -> Curvature:
    h = np.zeros((dim, dim))
    total = 0.0
    for rows, weight in _weighted(blocks):
        h += rows.T @ rows  # numpy sees the symmetry: half the work; float32 over ≤ 2048 rows, added in float64
        total += weight
    h /= total
    lam = damping * float(h.trace()) / dim
    h[np.diag_indices(dim)] += lam
    return Curvature(_cholesky(h, lam), lam, total)


def _dual(blocks: Blocks, dim: int, damping: float) -> Curvature:
    parts = list(_weighted(blocks))
    psi, total = np.concatenate([rows for rows, _ in parts]), sum(weight for _, weight in parts)
    m = np.zeros((len(psi), len(psi)))
    for start in range(0, dim, _BLOCK):
        columns = psi[:, start : start + _BLOCK]
        m += columns @ columns.T
    lam = damping * float(m.trace()) / total / dim
    m[np.diag_indices(len(psi))] += total * lam
    return Curvature(_cholesky(m, lam), lam, total, torch.from_numpy(psi))


def _cholesky(matrix: Float64[np.ndarray, "n n"], lam: float) -> Float64[Tensor, "n n"]:
    if not lam > 0:
        raise OptionError("all curvature rows are zero: the model's prediction does not depend on the parameters")
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if int(info):
        raise OptionError(f"the curvature matrix is not positive definite at λ = {lam:.3g}; use a larger --damping")
    return factor


def solve(curvature: Curvature, v: Float[Tensor, "rows k"]) -> Float64[Tensor, "rows k"]:
    """(H + λI)⁻¹ v for each row.

    In the dual, by Woodbury: (v − Ψᵀ (ΨΨᵀ + RλI)⁻¹ Ψ v) / λ.
    """
    v = v.double()
    if curvature.psi is None:
        return torch.cholesky_solve(v.T, curvature.factor).T
    psi = curvature.psi.double()
    alpha = torch.cholesky_solve(psi @ v.T, curvature.factor)  # [R, rows]
    return (v - alpha.T @ psi) / curvature.damping


def stack(blocks: Blocks) -> Float32[Tensor, "rows k"]:
    """Ψ of the dual, weights inside, for a factor that was kept."""
    return torch.from_numpy(np.concatenate([rows for rows, _ in _weighted(blocks)]))
