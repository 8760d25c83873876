"""Scores τ [query, train] from features. τ > 0: training on this image lowered the query's loss.

The query is preconditioned once, v = C⁻¹ φ_q, and τ(q, i) = v · φ_i for every training image: the store is read once,
block by block, and stays as it was written. N is the number of training images, φ their features.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Float64, Int
from scipy import sparse
from torch import Tensor

from influence.curvature import Curvature, quadratic, solve
from influence.errors import OptionError


@dataclass(frozen=True)
class Method:
    """One way to score: which features, what the query is preconditioned with, and the formula."""

    formula: str
    family: str = "loss"
    """Which features of the store: of the `loss`, or of the `square` output."""
    beside: str | None = None
    """A second family: `late` or `half`."""
    along: Mapping[str, float] = field(default_factory=dict)
    """Weights of families, if the mean of their features along the way is taken."""
    curvature: str | None = None
    """Rows that make H: `psi` (curvature rows), `phi` (the features themselves), or `None` for no H."""
    steps: int = 1
    """Into how many implicit steps the fine-tune is divided: each has that many times the λ of all."""
    cosine: bool = False
    """Whether features are scaled to unit length."""

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Families that it reads besides its own: features under other models of the way."""
        return tuple(f for f in (*self.along, self.beside) if f not in (self.family, None))


METHODS: dict[str, Method] = {
    # Gauss–Newton influence in the projected space; DESIGN of the estimator in ARCHITECTURE.md.
    "gauss-newton": Method("τ = (1/N) φ_qᵀ (H + λI)⁻¹ φ_i,  H = (1/R) Σ ψψᵀ", curvature="psi"),
    # The way from the base to the fine-tune, integrated; see ARCHITECTURE.md.
    "path": Method(
        "τ = (1/N) φ̄_qᵀ (H + 2λI)⁻¹ φ̄_i,  φ̄ = (φ of the base + 4 φ of the middle of the way + φ) / 6",
        curvature="psi",
        along={"base": 1 / 6, "middle": 4 / 6, "loss": 1 / 6},  # Simpson's rule
        steps=2,  # its totals stand beside those of `two-point`: they share a factor
    ),
    # Two implicit Euler steps of the fine-tune in place of one; see ARCHITECTURE.md.
    "two-point": Method(
        "τ = (1/N) (φ_qᵀ C⁻¹ φ_i + 2λ φ′_qᵀ C⁻² φ′_i),  C = H + 2λI,  φ′ of weights ¼ base + ¾ fine-tune",
        curvature="psi",
        beside="late",
        steps=2,
    ),
    # The mean over trainings of the whole length and of half of it; see ARCHITECTURE.md.
    "two-length": Method(
        "τ = (1/N) (φ_qᵀ C⁻¹ φ_i + φ″_qᵀ C⁻¹ φ″_i),  C = H + 2λI,  φ″ of a fine-tune of half the epochs",
        curvature="psi",
        beside="half",
        steps=2,
    ),
    # Park et al. (2023), one checkpoint, without the loss weights Q.
    "trak": Method("τ = φ_qᵀ (ΦᵀΦ + λI)⁻¹ φ_i", curvature="phi"),
    # Zheng et al. (2024): TRAK on the gradient of the mean square of the prediction.
    "d-trak": Method("τ = φ_qᵀ (ΦᵀΦ + λI)⁻¹ φ_i,  φ of mean f²", family="square", curvature="phi"),
    # Charpiat et al. (2019); TracIn (Pruthi et al., 2020) at one checkpoint.
    "grad-dot": Method("τ = φ_q · φ_i"),
    "grad-cos": Method("τ = φ_q · φ_i / (‖φ_q‖ ‖φ_i‖)", cosine=True),
}


def precondition(
    method: Method,
    phi_q: Float[Tensor, "query k"],
    curvature: Curvature | None,
    num_train: float,
) -> Float64[Tensor, "query k"]:
    """v, so that τ = v · φ_i (for cosines: v · φ_i / ‖φ_i‖); features of two points stand one behind the other.

    For TRAK (ΦᵀΦ + λ′I)⁻¹ = (1/N) (H + λI)⁻¹ with H = ΦᵀΦ/N and λ′ = Nλ: both kinds share the factor 1/N.

    Raises:
        OptionError: The cosine of a query without gradient is wanted.
    """
    if curvature is not None and method.beside is not None:
        end, other = solve(curvature, torch.cat(phi_q.chunk(2, dim=1))).chunk(2)
        if method.beside == "late":
            other = curvature.damping * solve(curvature, other)
        return torch.cat([end, other], dim=1) / num_train
    if curvature is not None:
        return solve(curvature, phi_q) / num_train
    v = phi_q.double()
    if method.cosine:
        norm = v.norm(dim=1, keepdim=True)
        if not bool((norm > 0).all()):
            raise OptionError("grad-cos is undefined for a picture whose gradient is zero; use --method gauss-newton")
        v = v / norm
    return v


def own(
    method: Method,
    phi: Float[Tensor, "images k"],
    curvature: Curvature | None,
    num_train: float,
) -> Float64[Tensor, " images"]:
    """τ(i, i) of each image: what training on it does for itself; features as for `precondition`."""
    if method.cosine:
        return torch.ones(len(phi), dtype=torch.float64)
    if curvature is None or method.beside == "late":
        return (precondition(method, phi, curvature, num_train) * phi).sum(1)
    parts = (phi,) if method.beside is None else phi.chunk(2, dim=1)
    return torch.stack([quadratic(curvature, part) for part in parts]).sum(0) / num_train


def relative(tau: Float64[np.ndarray, "*query images"], own: Float64[np.ndarray, " images"]) -> np.ndarray:
    """τ(q, i) / √τ(i, i), ℓ-relative influence (Barshan et al., 2020); 0 for an image that does nothing for itself.

    What an image does for the query, of what it does at all: a long gradient alone does not make it large. So images
    of which the model has learnt much can be compared with images that it never saw, whose gradients are longer.
    """
    return np.divide(tau, np.sqrt(np.maximum(own, 0)), out=np.zeros_like(tau), where=own > 0)


Rows = Float32[np.ndarray, "_ _"]
Block = tuple[Sequence[str], Rows | tuple[Rows, ...]]
"""Item ids and their features, which may stand in several arrays side by side."""

_ROWS = 1024  # in one product: the rows that are read and the scores that are written stay in the cache


def scores(
    method: Method, v: Float64[Tensor, "query k"], blocks: Iterable[Block]
) -> Iterator[tuple[Sequence[str], Float64[np.ndarray, "_ _"]]]:
    """Score block by block: item ids `[train]` and τ `[query, train]`; rows are multiplied where they lie, uncopied.

    Raises:
        OptionError: The cosine with a training image without gradient is wanted.
    """
    columns = np.ascontiguousarray(v.float().numpy().T)
    for ids, phi in blocks:
        first, *more = parts = phi if isinstance(phi, tuple) else (phi,)
        sides = np.split(columns, np.cumsum([part.shape[1] for part in parts])[:-1])
        tau = np.empty((len(ids), len(v)), np.float32)
        norm = np.empty(len(ids))
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            np.matmul(first[rows], sides[0], out=tau[rows])
            for part, side in zip(more, sides[1:], strict=True):
                tau[rows] += part[rows] @ side
            if method.cosine:
                norm[rows] = np.linalg.norm(first[rows], axis=1)
        if method.cosine:
            if not (norm > 0).all():
                zero = ids[int(np.argmin(norm))]
                raise OptionError(f"grad-cos is undefined: the gradient of image {zero} is zero; use another --method")
            yield ids, tau.T / norm
        else:
            yield ids, tau.T.astype(np.float64)


Ranked = list[tuple[float, str]]


def top(best: Ranked, ids: Sequence[str], tau: Float64[np.ndarray, "_"], k: int) -> Ranked:
    """Merge new scores into the best k so far, highest first; ties in the order of ids. Associative."""
    near = np.flatnonzero(tau >= (best[-1][0] if len(best) == k else -np.inf))  # few, once the best are good
    if len(near) > k:
        near = near[tau[near] >= np.partition(tau[near], -k)[-k]]
    merged = best + [(float(tau[i]), ids[i]) for i in near]
    return sorted(merged, key=lambda pair: (-pair[0], pair[1]))[:k]


@dataclass(frozen=True)
class Groups:
    """How many files of each group every image is."""

    ids: pd.Index
    """Images, sorted."""
    names: list[str]
    """Groups, in order."""
    files: sparse.csr_array
    """`[images, groups]`."""
    work: Int[np.ndarray, " images"]
    """Number of the work that each image is; every image is its own unless near duplicates are one work."""
    parts: sparse.csr_array
    """`[works, groups]`: how much of each work's mean score counts for a group."""

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """`ids`, which are ASCII, and an end, in one array: searched in order, it is quicker than a hash table."""
        return np.array([*self.ids.tolist(), ""], np.bytes_)

    def places(self, ids: Sequence[str]) -> Int[np.ndarray, "_"]:
        """Where in `ids` these images are; −1 for those that are not there."""
        asked = np.array(ids, np.bytes_)
        found = np.searchsorted(self._keys[:-1], asked)
        return np.where(self._keys[found] == asked, found, -1)


def groups(ids: pd.Series, names: pd.Series) -> Groups:
    """Count files, of which each is given by its image and its group."""
    image, group = pd.Categorical(ids), pd.Categorical(names)
    shape = (len(image.categories), len(group.categories))
    files = sparse.coo_array((np.ones(len(image)), (image.codes, group.codes)), shape=shape).tocsr()
    return Groups(image.categories, list(group.categories), files, np.arange(shape[0]), files)


def shared(groups: Groups, clusters: Mapping[str, str]) -> Groups:
    """Groups in which a cluster of near duplicates counts as one work, whoever sent in how many copies of it.

    Its credit is the mean score of its images, divided among the groups by files. So a work gains nothing by copies:
    they are in H as well, and lower the score of each.

    Args:
        groups: As `groups` makes them.
        clusters: Name of the cluster of each image.
    """
    codes = pd.Categorical([clusters[item_id] for item_id in groups.ids]).codes
    count = len(groups.ids)
    member = sparse.coo_array((np.ones(count), (np.arange(count), codes)), shape=(count, codes.max() + 1)).tocsr()
    together = member.T @ groups.files  # files of the whole cluster, by group
    parts = (sparse.diags_array(1 / together.sum(1)) @ together).tocsr()
    files = (member @ sparse.diags_array(1 / member.sum(0)) @ parts).tocsr()
    return Groups(groups.ids, groups.names, files, codes.astype(np.int64), parts)


def group_totals(
    groups: Groups, places: Int[np.ndarray, " train"], tau: Float64[np.ndarray, "query train"]
) -> Float64[np.ndarray, "query groups"]:
    """Signed sums of the scores of images at these places over the files of each group; blocks of images add up."""
    return (groups.files[places].T @ tau.T).T
