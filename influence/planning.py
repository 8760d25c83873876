"""What a build would cost: all forwards that it contains are counted, the commonest of each kind is measured."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from influence import diffusion, features, horizon, loading, pipeline, shards, taking
from influence import items as tables
from influence.features import Recipe
from influence.memory import peak
from influence.progress import Message, Progress, silent
from influence.scoring import METHODS
from influence.waypoints import base_is_known, default_method

Shape = tuple[int, int, int]
"""Of a forward: how many curvature rows each draw gives, its rows of φ, and the draws of each."""

_SHARDS = 8  # of which forwards are counted; the others are like them
_FILES, _ROW = 4000, 100  # bytes of a shard's HDF5 structures and record, and of an image in the table


def forwards(recipe: Recipe, ids: Sequence[str], per_shard: int) -> tuple[dict[Shape, float], dict[Shape, np.ndarray]]:
    """Rows (image, draw) in forwards of each shape that a build over images takes, and the draws of the first of each.

    Args:
        recipe: What is taken of an image.
        ids: The images' ids, sorted.
        per_shard: Images of a shard.
    """
    firsts = range(0, len(ids), per_shard * -(-len(ids) // (per_shard * _SHARDS)))
    counted = [ids[first : first + per_shard] for first in firsts]
    whole = len(ids) / sum(map(len, counted))
    counts: Counter[Shape] = Counter()
    draws: dict[Shape, np.ndarray] = {}
    for shard in counted:
        for first in range(0, len(shard), recipe.batch_size):  # as `taking.take` takes them
            for _, which, num_probes in features.forwards(recipe, shard[first : first + recipe.batch_size]):
                shape = (num_probes, *which.shape)
                draws.setdefault(shape, which)
                counts[shape] += which.size
    return {shape: whole * count for shape, count in counts.items()}, draws


def plan(
    dataset: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    lora: str | os.PathLike[str] | None = None,
    curvature_rows: int | None = None,
    controls: str | os.PathLike[str] | None = None,
    creator_column: str | None = None,
    memory: str | None = None,
    progress: Progress = silent,
    message: Message = silent,
    **options: Any,
) -> dict[str, Any]:
    """Say what a build in one process would cost; takes the options of `build` and writes nothing.

    Returns:
        Images, controls, draws, curvature rows, batch size, parameters, engine, device, and bytes on disk, bytes of
        memory at the highest, seconds.

    Raises:
        InfluenceError: An input cannot be used.
    """
    recipe_file = options.pop("recipe", None)
    base, half = options.pop("base", None), options.pop("half", None)
    for name in ("store", "workers"):
        options.pop(name, None)
    start = time.perf_counter()
    metric = options.pop("metric", None) or "adamw"
    chosen = loading.BuildOptions(str(dataset), str(model), None if lora is None else str(lora), **options)
    denoiser = loading.network(chosen)
    data = pipeline.read(dataset, denoiser, creator_column, progress, message)
    chosen = loading.with_dim(chosen, denoiser, len({item.item_id for item in data.items}))
    loaded = loading.prepared(denoiser, chosen, message)
    others = None
    if controls is not None:
        members = {name for item in data.items for name in (item.item_id, item.picture_id)}
        others = pipeline.read_controls(controls, denoiser, creator_column, members, message)
    _, rate = pipeline.curvature_budget(chosen, data, curvature_rows)
    setup = time.perf_counter() - start
    source = pipeline.source_of(chosen, base, half, creator_column, denoiser)
    kept = pipeline.COPIES * pipeline.shard_bytes(loaded, chosen, data, rate)
    kept += pipeline.waypoint_bytes(source, denoiser)
    if memory is not None:
        loaded, chosen = loading.within_memory(loaded, chosen, memory, kept, message)
    k = loaded.spec.dim
    recipe = replace(loaded.recipe, curvature_rate=rate)

    rows: dict[Shape, float] = {}
    draws: dict[Shape, np.ndarray] = {}
    disk, sizes, batches = 0, [], diffusion.num_batches(chosen.draws)
    for part, part_rate in ((data, rate), (others, 0.0)):
        ids = [] if part is None else sorted({item.item_id for item in part.items})
        sizes.append(len(ids))
        if not ids:
            continue
        per_shard = tables.images_per_shard(len(ids), k, part_rate, batches)
        found, which = forwards(replace(recipe, curvature_rate=part_rate), ids, per_shard)
        draws = which | draws
        rows |= {shape: rows.get(shape, 0.0) + count for shape, count in found.items()}
        psi_rows = round(sum(count for shape, count in found.items() if shape[0]))
        disk += _ROW * len(ids)
        families = [psi_rows]
        if METHODS[default_method(source)].elsewhere:  # those under the second model have no curvature rows
            found, which = forwards(replace(recipe, curvature_rate=0.0), ids, per_shard)
            draws = which | draws
            rows |= {shape: rows.get(shape, 0.0) + count for shape, count in found.items()}
            families.append(0)
        for family_rows in families:
            layout = shards.layout(len(ids), family_rows, k, batches)
            disk += shards.size(layout) + _FILES * -(-len(ids) // per_shard)
    commonest = {shape[0]: shape for shape in sorted(rows, key=rows.__getitem__)}
    measured = metric == "adamw" or pipeline.own_recipe(chosen, recipe_file) is not None
    if measured and 0 not in commonest:  # every draw gives a curvature row, and the passes of the metric have none
        like = max(commonest.values(), key=rows.__getitem__)
        commonest[0] = (0, *like[1:])
        draws[commonest[0]] = draws[like]

    items = sorted({item.item_id: item for item in data.items}.values(), key=lambda item: item.item_id)
    sample = items[: max(shape[1] for shape in commonest.values())]
    ids, captions = [item.item_id for item in sample], [item.caption for item in sample]
    start = time.perf_counter()
    x0, cond = taking.encoded(denoiser, taking.decode(denoiser, sample), captions)
    seconds = setup + (time.perf_counter() - start) * sum(sizes) / len(sample)
    highest = 0
    for num_probes, shape in commonest.items():
        images = np.arange(shape[1]) % len(sample)

        def work(images: np.ndarray = images, shape: Shape = shape) -> None:
            for result in features.forward(denoiser.network, recipe, ids, x0, cond, images, draws[shape], shape[0]):
                result.features.cpu()

        highest = max(highest, peak(work, x0.device))  # the first pays for allocations and kernels …
        start = time.perf_counter()
        work()  # … and the second is the price
        per_row = (time.perf_counter() - start) / (shape[1] * shape[2])
        seconds += per_row * sum(count for s, count in rows.items() if s[0] == num_probes)
        if num_probes and metric == "adamw":
            seconds += per_row * len(pipeline.pilots(chosen, data)) * chosen.draws
        if not num_probes and measured:
            points = 3 if base_is_known(source) else 1
            seconds += per_row * points * horizon.BATCHES * horizon.ROWS  # about: a plain pass, without features
    if measured:
        highest = max(highest, horizon.held(denoiser, x0, cond, points=3 if base_is_known(source) else 1))
    return {
        "images": sizes[0],
        "controls": sizes[1],
        "files": len(data.items),
        "refused": len(data.refused),
        "draws": chosen.draws,
        "curvature_rows": round(sum(count for shape, count in rows.items() if shape[0])),
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters.values()),
        "dim": k,
        "engine": recipe.engine,
        "device": str(x0.device),
        "batch_size": recipe.batch_size,
        "disk_bytes": disk,
        "memory_bytes": highest + kept,
        "seconds": seconds,
    }
