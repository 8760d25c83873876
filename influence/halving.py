"""A fine-tune done again for half of its epochs, whose gradients `build` takes beside those of the whole one."""

import os
from dataclasses import replace
from pathlib import Path

from influence import datasets, finetuning, retraining
from influence.devices import chosen
from influence.progress import Message, Progress, silent


def halve(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    resolution: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> Path:
    """Fine-tune the base on the data set as a recipe says, for half of its epochs, and save what came of it.

    A picture of which there are several files is trained on as often, as in the whole fine-tune and as `build` counts.
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
        message: Called with assumptions, refusals and warnings, one line each.

    Returns:
        `out`.

    Raises:
        InfluenceError: An input cannot be used, or there is a model in `out` already.
    """
    whole = finetuning.read_recipe(recipe)
    half = replace(whole, epochs=whole.epochs / 2)
    finetuning.require_absent(out, half)
    denoiser = finetuning.start(base, half, resolution=resolution, device=chosen(device))
    data = datasets.read_dataset(dataset, captions_required=denoiser.conditional, shape=denoiser.image_size[1:])
    for line in [*denoiser.notes, *data.notes, *(f"refused {r.file_name}: {r.reason}" for r in data.refused)]:
        message(line)
    items = retraining.in_order(data.items)
    x0, cond = retraining.encode_items(denoiser, items)
    steps = half.steps(len(items))
    finetuning.fine_tune(
        denoiser, half, x0, cond, seed=seed, progress=lambda step, _: progress("fine-tune", step, steps)
    )
    finetuning.save(denoiser, half, out, base=base)
    return Path(out)
