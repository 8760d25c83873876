"""Repair a store: drop the shards that are damaged, and build those again, no others."""

import os
from pathlib import Path

from influence import store as stores
from influence.errors import StoreError
from influence.pipeline import DEFAULT_BATCH, Message, Progress, load_for, read, run_shards, silent
from influence.verification import Problem, drop, verify


def repair(
    store: str | os.PathLike[str],
    *,
    dataset: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
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
        if problem.shard is None and not problem.file.startswith("derived/"):
            raise StoreError(f"{problem.file} cannot be built again, restore it from a copy: {problem.found}")
    if not problems:
        return []
    made = stores.open_damaged(store)
    lost = {family: {p.shard for p in problems if p.family == family and p.item_ids} for family in ("loss", "square")}
    if any(lost.values()):
        loaded, options = load_for(
            made, model=model, lora=lora, draws=1, engine=engine, batch_size=batch_size, memory=memory, device=device,
            message=message,
        )  # fmt: skip
        where = made.source["dataset"] if dataset is None else str(Path(dataset).absolute())
        data = read(where, loaded.denoiser, made.source["creator_column"], progress, message)
        wanted = {item_id for problem in problems for item_id in problem.item_ids} - made.excluded
        absent = sorted(wanted - {item.item_id for item in data.items})
        if absent:
            raise StoreError(
                f"{where} lacks {len(absent)} of {len(wanted)} images whose features are damaged, {absent[0]} first; "
                "nothing was dropped: put them back, or exclude them"
            )
    drop(made.path, problems)
    for family, numbers in lost.items():
        if numbers:
            run_shards(made, family, loaded, options, data, 1, progress, message, only=numbers)
    return problems
