"""Damped solves (H + λI)⁻¹ v with H = (1/R) Σ_r w_r ψ_r ψ_rᵀ.

H is the Gauss–Newton matrix in feature space when ψ are curvature rows (Martens, 2020), and the empirical Fisher matrix
of TRAK (Park et al., 2023) when they are the features φ themselves. R = Σ w_r. Products of float32 rows are taken in
float32 over blocks of 2048, those of H and those of a solve alike, and added up in float64; factors and substitutions
are float64. In the dual, where rows may be long beside √(Rλ) (few rows, as TRAK has), all products are float64 then:
the error of scores is about 10⁻⁸ max_r ‖ψ_r‖² / (Rλ) of the largest one otherwise. The primal has 10⁻⁶ at worst.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from scipy.linalg import lapack
from torch import Tensor

from influence.errors import OptionError

Blocks = Iterable[tuple[Float32[np.ndarray, "_ _"], Float64[np.ndarray, "_"]]]
"""Rows `[rows, k]` and their weights `[rows]`, one block after the other."""

_BLOCK = 2048
_LONG = 100.0
"""‖ψ_r‖² / (Rλ) of a row in the dual from which on its products are float64."""


@dataclass(frozen=True)
class Curvature:
    """A factored H + λI. Primal: its Cholesky factor. Dual (R < k): that of ΨΨᵀ + RλI, and Ψ (weights inside)."""

    factor: Float64[Tensor, "n n"]
    damping: float
    """λ itself."""
    rows: float
    """R."""
    unit: float
    """tr(H)/k."""
    psi: Float[Tensor, "rows k"] | None = None
    """Ψ in the dual, in the precision that its products take, `None` in the primal."""


def curvature(blocks: Blocks, *, dim: int, damping: float, num_rows: int, absolute: bool = False) -> Curvature:
    """Stream the rows once and factor.

    Args:
        blocks: ψ and w.
        dim: k.
        damping: λ in units of tr(H)/k, or λ itself.
        num_rows: How many rows the blocks hold: decides between primal and dual.
        absolute: Whether `damping` is λ itself.

    Raises:
        OptionError: The damping is not positive, or there are no rows.
    """
    if not damping > 0 or not np.isfinite(damping):
        raise OptionError(f"damping is {damping}; expected a number above 0")
    if num_rows < 1:
        raise OptionError("there are no curvature rows; build the store with more, or use --method grad-dot")
    return (_dual if num_rows < dim else _primal)(blocks, dim, damping, absolute)


def _weighted(blocks: Blocks) -> Iterator[tuple[np.ndarray, float]]:
    """Rows scaled by √w, and Σ w, in blocks of a fixed number of rows at most."""
    for psi, weights in blocks:
        for start in range(0, len(psi), _BLOCK):
            w, rows = weights[start : start + _BLOCK], np.asarray(psi[start : start + _BLOCK])
            yield (rows if (w == 1).all() else rows * np.sqrt(w).astype(np.float32)[:, None]), float(w.sum())


def _primal(blocks: Blocks, dim: int, damping: float, absolute: bool) -> Curvature:
    h = np.zeros((dim, dim))
    total = 0.0
    for rows, weight in _weighted(blocks):
        h += rows.T @ rows  # numpy sees the symmetry: half the work; float32 over ≤ 2048 rows, added in float64
        total += weight
    h /= total
    unit = float(h.trace()) / dim
    lam = damping if absolute else damping * unit
    h[np.diag_indices(dim)] += lam
    return Curvature(_cholesky(h, unit, lam), lam, total, unit)


def _dual(blocks: Blocks, dim: int, damping: float, absolute: bool) -> Curvature:
    parts = list(_weighted(blocks))
    psi, total = np.concatenate([rows for rows, _ in parts]), sum(weight for _, weight in parts)
    unit = float(_squares(psi).sum()) / total / dim
    lam = damping if absolute else damping * unit
    psi = _precise(psi, total * lam)
    m = np.zeros((len(psi), len(psi)))
    for start in range(0, dim, _BLOCK):
        columns = np.ascontiguousarray(psi[:, start : start + _BLOCK])
        m += columns @ columns.T
    m[np.diag_indices(len(psi))] += total * lam
    return Curvature(_cholesky(m, unit, lam), lam, total, unit, torch.from_numpy(psi))


def _squares(psi: Float32[np.ndarray, "rows k"]) -> Float64[np.ndarray, " rows"]:
    """‖ψ_r‖²."""
    return np.einsum("ij,ij->i", psi, psi, dtype=np.float64)


def _precise(psi: Float32[np.ndarray, "rows k"], added: float) -> Float[np.ndarray, "rows k"]:
    """Ψ as float64 if a row is long beside Rλ, as it is otherwise."""
    return psi.astype(np.float64) if _squares(psi).max() > _LONG * added else psi


def _cholesky(matrix: Float64[np.ndarray, "n n"], unit: float, lam: float) -> Float64[Tensor, "n n"]:
    if not unit > 0:
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
        return _substituted(curvature.factor, v.T).T
    alpha = _substituted(curvature.factor, _inner(curvature.psi, v)).to(curvature.psi.dtype).numpy()  # [R, rows]
    psi, result = curvature.psi.numpy(), v.clone()
    for start in range(0, len(psi), _BLOCK):
        part = slice(start, start + _BLOCK)
        result -= torch.from_numpy(alpha[part].T @ psi[part])
    return result.div_(curvature.damping)


def _inner(psi: Float[Tensor, "rows k"], v: Float64[Tensor, "n k"]) -> Float64[Tensor, "rows n"]:
    """Ψ vᵀ."""
    rows, columns = psi.numpy(), np.ascontiguousarray(v.to(psi.dtype).numpy().T)
    result = np.zeros((len(psi), len(v)))
    for start in range(0, len(columns), _BLOCK):
        part = slice(start, start + _BLOCK)
        result += rows[:, part] @ columns[part]
    return torch.from_numpy(result)


def _substituted(factor: Float64[Tensor, "n n"], columns: Float64[Tensor, "n m"]) -> Float64[Tensor, "n m"]:
    """(L Lᵀ)⁻¹ of each column. Not torch.cholesky_solve, which copies L into another order: n = 8192 takes 0.5 s."""
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True)


def quadratic(curvature: Curvature, rows: Float[Tensor, "rows k"]) -> Float64[Tensor, " rows"]:
    """rᵀ (H + λI)⁻¹ r of each row r, at half the cost of `solve`."""
    rows = rows.double()
    if curvature.psi is None:
        return torch.linalg.solve_triangular(curvature.factor, rows.T, upper=False).square().sum(0)
    inner = torch.linalg.solve_triangular(curvature.factor, _inner(curvature.psi, rows), upper=False)
    return (rows.square().sum(1) - inner.square().sum(0)) / curvature.damping


def own_parts(curvature: Curvature) -> Float64[Tensor, " rows"] | None:
    """w_r ψ_rᵀ (H + λI)⁻¹ ψ_r / R of every row of H in the dual: 1 − Rλ [(ΨΨᵀ + RλI)⁻¹]_rr; `None` in the primal."""
    if curvature.psi is None:
        return None
    inverse, info = lapack.dtrtri(curvature.factor.numpy(), lower=1)
    assert info == 0
    return 1 - curvature.rows * curvature.damping * torch.from_numpy(np.einsum("ij,ij->j", inverse, inverse))


MAX_LEVERAGE = 0.9


def leverage(
    curvature: Curvature,
    phi: Float[Tensor, "images k"],
    solved: Float64[Tensor, "images k"],
    psi: Float[Tensor, "rows k"],
    psi_item: Int[Tensor, " rows"],
    weights: Float64[Tensor, " rows"],
    num_train: float,
    own: Float64[Tensor, " rows"] | None = None,
) -> Float64[Tensor, " images"]:
    """h: by which part a training image's score is smaller than if the model had not been trained on it.

    `solved` is (H + λI)⁻¹ φ_i of each, as `solve` gives it.

    Let G = E[ψψᵀ] be the curvature of image i alone, 1/N of which is in H. Training without it ends, to second order,
    at a point where its gradient is (I − G (H + λI)⁻¹ / N)⁻¹ φ_i (Woodbury). Of this operator h takes the part along
    φ_i itself, in the metric of the score,

        h_i = φ_iᵀ H_λ⁻¹ G H_λ⁻¹ φ_i / (N φ_iᵀ H_λ⁻¹ φ_i) = (1/N) mean_r (ψ_rᵀ H_λ⁻¹ φ_i)² / (φ_iᵀ H_λ⁻¹ φ_i),

    over the image's own curvature rows, each of which is itself in H and is left out of it: ψ_rᵀ H_λ⁻¹ φ_i is divided
    by 1 − w_r ψ_rᵀ H_λ⁻¹ ψ_r / R, of which `own` has the second part if it is known (`own_parts`), `weights` w_r. The
    score of the image left out is then τ / (1 − h). An image without curvature rows has NaN: the caller gives it the
    mean. No h is taken above 0.9: an image that the model hangs on is beyond second order.

    Where H is made of the features themselves (TRAK) there is a closed form, φ_iᵀ (ΦᵀΦ + λI)⁻¹ φ_i: `feature_leverage`.
    """
    score = (phi.double() * solved).sum(1)
    inside = 1 - (weights * quadratic(curvature, psi) / curvature.rows if own is None else own)
    inside = inside.clamp(min=1 - MAX_LEVERAGE)
    along = ((psi.double() * solved[psi_item]).sum(1) / inside).square()
    count = torch.zeros(len(phi), dtype=torch.float64).index_add_(0, psi_item, torch.ones_like(along))
    total = torch.zeros(len(phi), dtype=torch.float64).index_add_(0, psi_item, along)
    h = torch.where(score > 0, total / count / score / num_train, 0.0)
    return h.clamp(max=MAX_LEVERAGE)


def feature_leverage(curvature: Curvature, phi: Float[Tensor, "images k"]) -> Float64[Tensor, " images"]:
    """H of images whose features are the rows of H (the hat matrix of a ridge regression)."""
    return (quadratic(curvature, phi) / curvature.rows).clamp(max=MAX_LEVERAGE)


def stack(blocks: Blocks, *, rows: float, damping: float) -> Float[Tensor, "rows k"]:
    """Ψ of the dual, weights inside, for a factor that was kept with R and λ."""
    return torch.from_numpy(_precise(np.concatenate([part for part, _ in _weighted(blocks)]), rows * damping))
