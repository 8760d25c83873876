"""What is derived of a store once and kept beside it: factors of H + λI, leverages, what images do for themselves."""

import hashlib
import weakref
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from influence import curvature as curvatures
from influence import scanning, scoring
from influence.curvature import Curvature
from influence.scoring import Groups, Method
from influence.shards import ShardContent
from influence.store import Store

DAMPING = 0.1
"""λ in units of tr(H)/k, where nothing is known of the fine-tune's steps."""
_LAST: weakref.WeakKeyDictionary[Store, tuple[str, Curvature]] = weakref.WeakKeyDictionary()
"""The name and the factor that an open store used last."""
_VERSION = 2
"""Of how all this is computed: what an earlier version kept is made again."""


def _weights(made: Store) -> pd.Series:
    """Files of each image."""
    return made.items["item_id"].value_counts().astype(float)


def _damping(made: Store, method: Method, damping: float | None) -> tuple[float, bool]:
    """The damping to use, and whether it is λ itself."""
    if damping is None and method.curvature == "psi" and made.source.get("damping") is not None:
        return method.steps * float(made.source["damping"]), True
    return method.steps * (DAMPING if damping is None else float(damping)), False


def _name(made: Store, what: str, method: Method, damping: float | None, *more: str) -> str:
    """Named by all that it depends on, `more` of it beside the store and the method."""
    weights = _weights(made)
    several = sorted(weights[weights > 1].items())  # the others weigh 1 each
    key = (
        _VERSION,
        made.family_hash(method.family),
        method.curvature,
        repr(_damping(made, method, damping)),
        repr(several),
        *more,
    )
    return f"{what}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"


def solver(made: Store, method: Method, damping: float | None) -> Curvature:
    """Factor H + λI, or read it back if it was factored before; `damping` as for `attribute`.

    A store that stays open keeps the last one in memory: the file of k = 8192 has half a gigabyte.
    """
    value, absolute = _damping(made, method, damping)
    weights = _weights(made)
    name = _name(made, "curvature", method, damping)
    last, found = _LAST.get(made, ("", None))
    if found is not None and last == name:
        return found
    num_rows = made.num_rows(method.family)[method.curvature == "psi"]

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for content in made.blocks(method.family):
            w = weights[content.item_ids].to_numpy()
            if method.curvature == "psi":
                yield content.psi, w[content.psi_item]
            else:
                yield content.phi, w

    kept = made.read_derived(name)
    if kept is not None:
        factor, (lam, total, unit) = torch.from_numpy(kept["factor"]), map(float, kept["facts"])
        psi = None
        if len(factor) != made.spec.dim or num_rows < made.spec.dim:
            psi = curvatures.stack(rows(), rows=total, damping=lam)
        found = Curvature(factor, lam, total, unit, psi)
        _LAST[made] = name, found
        return found
    made_now = curvatures.curvature(rows(), dim=made.spec.dim, damping=value, num_rows=num_rows, absolute=absolute)
    facts = np.array([made_now.damping, made_now.rows, made_now.unit])
    made.write_derived(name, {"factor": made_now.factor.numpy(), "facts": facts})
    _LAST[made] = name, made_now
    return made_now


_Content = TypeVar("_Content", ShardContent, scanning.Features)
_TOGETHER = 256  # images: each solve of the dual reads Ψ twice


def _together(blocks: Iterator[_Content]) -> Iterator[list[_Content]]:
    """Shards in groups of some hundred images."""
    group: list[_Content] = []
    for content in blocks:
        group.append(content)
        if sum(len(one.item_ids) for one in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group


def leverages(
    made: Store, method: Method, damping: float | None, factored: Curvature | None, groups: Groups
) -> Float64[np.ndarray, " images"]:
    """H of every image, in the order of `groups.ids`; 0 for methods without curvature, which say nothing of it."""
    if factored is None or method.along:
        return np.zeros(len(groups.ids))
    name = _name(made, "leverage", method, damping)
    kept = made.read_derived(name)
    if kept is not None:
        return kept["h"]
    h = np.full(len(groups.ids), np.nan)
    own = curvatures.own_parts(factored) if method.curvature == "psi" else None
    weight, seen = _weights(made), 0
    for contents in _together(made.blocks(method.family)):
        phi = torch.from_numpy(np.concatenate([content.phi for content in contents]))
        if method.curvature == "phi":
            ids = [item_id for content in contents for item_id in content.item_ids]
            h[groups.places(ids)] = curvatures.feature_leverage(factored, phi).numpy()
            continue
        solved = curvatures.solve(factored, phi).split([len(content.phi) for content in contents])
        for content, own_solved in zip(contents, solved, strict=True):
            psi, item = torch.tensor(content.psi), torch.tensor(content.psi_item).long()
            parts = None if own is None else own[seen : seen + len(psi)]  # rows of Ψ are those of the shards, in order
            seen += len(psi)
            w = torch.tensor(weight[content.item_ids].to_numpy())[item]
            found = curvatures.leverage(
                factored, torch.tensor(content.phi), own_solved, psi, item, w, float(groups.files.sum()), parts
            )
            h[groups.places(content.item_ids)] = found.numpy()
    h = np.where(np.isnan(h), np.nanmean(h), h)  # images without curvature rows
    weights = np.asarray(groups.files.sum(1)).ravel()
    h = np.minimum(h * weights, curvatures.MAX_LEVERAGE)
    made.write_derived(name, {"h": h})
    return h


def own_influence(
    made: Store,
    part: Store,
    method: Method,
    damping: float | None,
    factored: Curvature | None,
    groups: Groups,
    num_train: float,
) -> Float64[np.ndarray, " images"]:
    """τ(i, i) of the images of the store, or of its controls (`part`), in the order of `groups.ids`."""
    families = (method.family, *method.elsewhere)
    formula = (method.formula, *map(part.family_hash, families), repr(num_train))
    name = _name(made, "own", method, damping, *formula)
    kept = made.read_derived(name)
    if kept is not None:
        return kept["own"]
    found = np.zeros(len(groups.ids))
    for contents in _together(scanning.blocks(part, method)):
        phi = np.concatenate([np.concatenate(content.phi, axis=1) for content in contents])
        ids = [item_id for content in contents for item_id in content.item_ids]
        found[groups.places(ids)] = scoring.own(method, torch.from_numpy(phi), factored, num_train).numpy()
    made.write_derived(name, {"own": found})
    return found
