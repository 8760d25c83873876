"""What a build would cost: all forwards that it contains are counted, the commonest of each kind is measured."""

import os
import time
from collections import Counter
from typing import Any

import numpy as np

from influence import diffusion, features, pipeline, shards
from influence import items as tables
from influence.horizon import BATCHES, ROWS
from influence.memory import peak
from influence.pipeline import Message, Progress, silent

Shape = tuple[bool, int, int]
"""Of a forward: whether it gives curvature rows, its rows of φ, and the draws of each."""

_SHARDS = 8  # of which forwards are counted; the others are like them
_FILES, _ROW = 4000, 100  # bytes of a shard's HDF5 structures and record, and of an image in the table


def plan(
    dataset: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    lora: str | os.PathLike[str] | None = None,
    curvature_rows: int | None = None,
    creator_column: str | None = None,
    memory: str | None = None,
    progress: Progress = silent,
    message: Message = silent,
    **options: Any,
) -> dict[str, Any]:
    """Say what a build in one process would cost, without controls; takes the options of `build` and writes nothing.

    Returns:
        Images, draws, curvature rows, batch size, parameters, engine, device, and bytes on disk, bytes of memory at the
        highest, seconds.

    Raises:
        InfluenceError: An input cannot be used.
    """
    recipe_file = options.pop("recipe", None)
    for name in ("store", "workers", "controls", "base"):
        options.pop(name, None)
    start = time.perf_counter()
    chosen = pipeline.BuildOptions(str(dataset), str(model), None if lora is None else str(lora), **options)
    loaded = pipeline.load(chosen, message)
    data = pipeline.read(dataset, loaded.denoiser, creator_column, progress, message)
    _, rate = pipeline.curvature_budget(loaded, chosen, data, curvature_rows)
    setup = time.perf_counter() - start
    kept = pipeline.COPIES * pipeline.shard_bytes(loaded, chosen, data, rate)
    if memory is not None:
        loaded, chosen = pipeline.within_memory(loaded, chosen, memory, kept, message)
    items = sorted({item.item_id: item for item in data.items}.values(), key=lambda item: item.item_id)
    n, k, denoiser = len(items), loaded.spec.dim, loaded.denoiser
    recipe = pipeline.with_changes(loaded.recipe, curvature_rate=rate)

    per_shard = tables.images_per_shard(n, k, rate)
    firsts = range(0, n, per_shard * -(-n // (per_shard * _SHARDS)))
    counted = [[item.item_id for item in items[first : first + per_shard]] for first in firsts]
    draws: dict[Shape, np.ndarray] = {}
    counts: Counter[Shape] = Counter()
    for ids in counted:
        for first in range(0, len(ids), recipe.batch_size):  # as `pipeline.take` takes them
            for _, which, curvature in features.forwards(recipe, ids[first : first + recipe.batch_size]):
                shape = (curvature, *which.shape)
                draws.setdefault(shape, which)
                counts[shape] += 1
    whole = n / sum(map(len, counted))
    commonest = {shape[0]: shape for shape in sorted(counts, key=lambda shape: counts[shape] * shape[1] * shape[2])}

    sample = items[: max(shape[1] for shape in commonest.values())]
    ids, captions = [item.item_id for item in sample], [item.caption for item in sample]
    start = time.perf_counter()
    x0, cond = pipeline.encoded(denoiser, pipeline.decode(denoiser, sample), captions)
    seconds = setup + (time.perf_counter() - start) * n / len(sample)
    highest = 0
    for curvature, shape in commonest.items():
        images = np.arange(shape[1]) % len(sample)

        def work(images: np.ndarray = images, shape: Shape = shape) -> None:
            for result in features.forward(denoiser.network, recipe, ids, x0, cond, images, draws[shape], shape[0]):
                result.features.cpu()

        highest = max(highest, peak(work, x0.device))  # the first pays for allocations and kernels …
        start = time.perf_counter()
        work()  # … and the second is the price
        per_row = (time.perf_counter() - start) / (shape[1] * shape[2])
        seconds += whole * per_row * sum(count * s[1] * s[2] for s, count in counts.items() if s[0] == curvature)
        if not curvature and pipeline.own_recipe(chosen, recipe_file) is not None:
            seconds += per_row * BATCHES * ROWS  # at least: a plain pass, without features
    psi_rows = whole * sum(count * s[1] * s[2] for s, count in counts.items() if s[0])
    layout = shards.layout(n, round(psi_rows), k, diffusion.num_batches(chosen.draws))
    return {
        "images": n,
        "files": len(data.items),
        "refused": len(data.refused),
        "draws": chosen.draws,
        "curvature_rows": round(psi_rows),
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters.values()),
        "dim": k,
        "engine": recipe.engine,
        "device": str(x0.device),
        "batch_size": recipe.batch_size,
        "disk_bytes": shards.size(layout) + _FILES * -(-n // per_shard) + _ROW * n,
        "memory_bytes": highest + kept,
        "seconds": seconds,
    }
