"""A fine-tune done again for half of its epochs, whose gradients `build` takes beside those of the whole one."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence import datasets, finetuning, retraining
from influence.devices import chosen


def halve(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    resolution: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> Path:
    """Fine-tune the base on the data set as a recipe says, for half of its epochs, and save what came of it.

    The learning rate falls to its end within these epochs, as it would in a fine-tune on half of the images. Whoever
    trains with another tool does the same there.

    Args:
        dataset: The fine-tune data set.
        out: Folder to write: a pipeline, or a folder with the LoRA.
        base: The pipeline that the fine-tune started from.
        recipe: `finetune.json` of the whole fine-tune, or a folder that holds it.
        resolution: Pixels of a side; the model's own by default.
        seed: Key of the order of the images, the timesteps and the noise.
        device: Where to train: `auto`, `cpu`, `cuda` …
        progress: Called with `fine-tune`, steps done and steps in all.

    Returns:
        `out`.

    Raises:
        InfluenceError: An input cannot be used, or there is a model in `out` already.
    """
    whole = finetuning.read_recipe(recipe)
    half = replace(whole, epochs=whole.epochs / 2)
    finetuning.require_absent(out, half)
    denoiser = finetuning.start(base, half, resolution=resolution, device=chosen(device))
    found = datasets.read_dataset(dataset, captions_required=denoiser.conditional).items
    items = sorted({item.item_id: item for item in found}.values(), key=lambda item: item.item_id)
    x0, cond = retraining.encode(denoiser, [item.path for item in items], [item.caption for item in items])
    steps = half.steps(len(items))
    finetuning.fine_tune(
        denoiser, half, x0, cond, seed=seed, progress=lambda step, _: progress("fine-tune", step, steps)
    )
    finetuning.save(denoiser, half, out, base=base)
    return Path(out)
