"""Repair a store: drop the shards that are damaged, and build those again, no others."""

import os
from pathlib import Path

from influence import store as stores
from influence.building import run_shards
from influence.errors import StoreError
from influence.loading import DEFAULT_BATCH, load_for
from influence.pipeline import read
from influence.progress import Message, Progress, silent
from influence.shards import FAMILIES
from influence.verification import Problem, drop, verify
from influence.waypoints import model_of, where_now


def repair(
    store: str | os.PathLike[str],
    *,
    dataset: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    half: str | os.PathLike[str] | None = None,
    controls: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    memory: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> list[Problem]:
    """Verify a store, drop what is damaged and build it again.

    Nothing is dropped before it is sure that the model and the pictures it was made of are there.

    Args:
        store: The store's folder.
        dataset: Where the data set is now, if it was moved since the store was built.
        model: Where the model is now.
        lora: Where the LoRA is now.
        base: Where the pipeline before the fine-tune is now.
        half: Where the model of half the length is now.
        controls: Where the control images are now.
        engine: As for `build`.
        batch_size: As for `build`.
        memory: As for `build`.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        What was found, and is repaired.

    Raises:
        StoreError: Something is damaged that cannot be built again, or pictures are not there any more.
        InfluenceError: The model or data set cannot be used.
    """
    problems = verify(store, progress)
    for problem in problems:
        if problem.shard is None and Path(problem.file).parent.name != "derived":
            raise StoreError(f"{problem.file} cannot be built again, restore it from a copy: {problem.found}")
    if not problems:
        return []
    folder, inside = stores.found(store), f"{stores.CONTROLS}/"
    todo = []
    for prefix in ("", inside):
        damaged = [
            problem for problem in problems if problem.item_ids and problem.file.startswith(inside) == bool(prefix)
        ]
        if not damaged:
            continue
        made = stores.open_damaged(folder / prefix)
        loaded, options = load_for(
            made, model=model, lora=lora, draws=1, engine=engine, batch_size=batch_size, memory=memory, device=device,
            message=message,
        )  # fmt: skip
        now = controls if prefix else dataset
        where = made.source["dataset"] if now is None else str(Path(now).absolute())
        data = read(where, loaded.denoiser, made.source["creator_column"], progress, message)
        wanted = {item_id for problem in damaged for item_id in problem.item_ids} - made.excluded
        absent = sorted(wanted - {item.item_id for item in data.items})
        if absent:
            raise StoreError(
                f"{where} lacks {len(absent)} of {len(wanted)} images whose features are damaged, {absent[0]} first; "
                "nothing was dropped: put them back, or exclude them"
            )
        for family in FAMILIES:
            numbers = {problem.shard for problem in damaged if problem.family == family and problem.shard is not None}
            if numbers:
                of = model_of(family, where_now(made.source, model=model, lora=lora, base=base, half=half), loaded)
                todo.append((made, family, numbers, of, options, data))
    drop(folder, problems)
    for made, family, numbers, loaded, options, data in todo:
        run_shards(made, family, loaded, options, data, 1, progress, message, only=numbers)
    return problems
