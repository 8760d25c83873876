"""Builds the shards of a store that are not there yet: takes features, and commits the rows that are finite."""

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence import datasets, executors, spec, store
from influence.errors import DatasetError
from influence.features import Features
from influence.loading import BuildOptions, Loaded, load
from influence.progress import Message, Progress, silent
from influence.store import ShardContent, Store
from influence.taking import take
from influence.waypoints import model_of

_NOT_FINITE = "its loss or gradient is not finite"
_GONE = "it is excluded, and was not in the data set when its shard was built"


def run_shards(
    made: Store,
    family: str,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    workers: int,
    progress: Progress,
    message: Message,
    only: Collection[int] | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Build the shards of one family, of the model `loaded`, that are not there yet: all, or `only` some.

    Workers load the model themselves, from where `source` has it: by default where it was when the store was made.
    """
    todo = [shard for shard in made.missing(family) if only is None or shard in only]
    finished = len(made.records(family))
    total = finished + len(todo)

    def done(shard: int) -> None:
        nonlocal finished
        finished += 1
        progress("gradients", finished, total)

    progress("gradients", finished, total)
    if workers == 1:
        executors.run_here(_shard_work(made, family, loaded, data), todo, done)
    elif todo:
        prepare = functools.partial(_prepare_worker, made.path, family, options, data, source or made.source)
        executors.run_processes(prepare, todo, workers, done)
    refused = made.refused(family)
    names = made.items.drop_duplicates("item_id").set_index("item_id")["file_name"]
    for item_id, reason in refused.items():
        message(f"refused {names[item_id]} ({item_id}): {reason}")
    if refused:
        message(f"{len(refused)} images have no features, {made.num_rows(family)[0]} have")


def _prepare_worker(
    path: Path,
    family: str,
    options: BuildOptions,
    data: datasets.Dataset,
    source: Mapping[str, Any],
    workers: int,
) -> executors.Work:
    """In a worker process: load everything again."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers)))
    loaded, made = load(options, silent), store.open_store(path)
    return _shard_work(made, family, model_of(family, source, loaded), data)


def _shard_work(made: Store, family: str, loaded: Loaded, data: datasets.Dataset) -> executors.Work:
    """Work that builds and commits one shard."""
    spec.check_equal(
        loaded.spec.to_json(),
        made.spec.to_json(),
        what="the model given",
        where=f"store {made.path.name}",
        advice="Use the model that the store was made with, or another --store folder.",
    )
    rate = made.build["curvature_rate"] if family == "loss" else 0.0
    output = "square" if family == "square" else "loss"
    recipe = replace(
        loaded.recipe,
        output=output,
        num_draws=made.build["draws"],
        curvature_rate=rate,
        density=made.source.get("curvature_density"),
    )
    by_id = {item.item_id: item for item in data.items}

    def work(shard: int) -> int:
        ids = made.shard_items(shard)
        refused = dict.fromkeys([i for i in ids if i not in by_id and i in made.excluded], _GONE)
        ids = [item_id for item_id in ids if item_id not in refused]
        absent = [item_id for item_id in ids if item_id not in by_id]
        if absent:
            raise DatasetError(
                f"{len(absent)} images of the store are not in the data set any more, {absent[0]} first; "
                "build needs them to go on: put them back, or build another --store"
            )
        taken = take(loaded.denoiser, recipe, [by_id[item_id] for item_id in ids])
        made.commit(_content(family, shard, ids, taken, refused))
        return shard

    return work


def _content(
    family: str, shard: int, ids: Sequence[str], taken: Features, refused: dict[str, str] | None = None
) -> ShardContent:
    """What is committed: rows that are finite throughout; the other images are refused by name."""
    bad_psi = set(taken.psi_item[~np.isfinite(taken.psi).all(1)].tolist())
    good = np.isfinite(taken.phi).all(1) & np.isfinite(taken.loss)
    good &= ~np.isin(np.arange(len(ids)), list(bad_psi))
    index = np.cumsum(good) - 1
    keep = good[taken.psi_item]
    scale = np.abs(taken.phi_batch[good]).max(2, initial=0)
    half = (taken.phi_batch[good] / np.where(scale > 0, scale, 1)[:, :, None]).astype(np.float16)
    return ShardContent(
        family=family,
        shard=shard,
        item_ids=[item_id for item_id, ok in zip(ids, good, strict=True) if ok],
        phi=taken.phi[good],
        phi_batch=half,
        phi_scale=scale,
        loss=taken.loss[good],
        psi=taken.psi[keep],
        psi_item=index[taken.psi_item[keep]].astype(np.int32),
        psi_draw=taken.psi_draw[keep],
        refused={i: _NOT_FINITE for i, ok in zip(ids, good, strict=True) if not ok} | (refused or {}),
    )
