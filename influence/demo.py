"""The demo: letters of five designers, a small model fine-tuned on them, and whose letters made what it generates."""

import contextlib
import importlib.resources
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence import attribution, datasets, figure, finetuning, models, pipeline, training, typefaces
from influence.errors import OptionError
from influence.finetuning import FineTune
from influence.progress import Message, Progress, silent
from influence.spreadsheet import csv_bytes

RECIPE = FineTune(epochs=98, batch_size=32, learning_rate=5e-4, stratified=False)
GENERATED = 6
BASE = "demo_base"


def demo(
    out: str | os.PathLike[str] = "influence-demo",
    *,
    progress: Progress = silent,
    message: Message = silent,
) -> dict[str, Any]:
    """Render a data set, fine-tune, generate, build a store, attribute, and draw the answer.

    Nothing is fetched: the fonts come with the extra `demo`, the base model with the package.

    Args:
        out: Folder to make.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        What lies where in the folder, and how long each stage took.

    Raises:
        OptionError: The folder exists and is not empty.
        DatasetError: The fonts are not installed.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is not empty; choose another --out folder, or remove it")
    seconds: dict[str, float] = {}
    dataset, model, store = folder / "dataset", folder / "model", folder / "store"
    base = Path(str(importlib.resources.files("influence") / BASE))
    channels, height, width = models.load_denoiser(base).image_size

    with _timed(seconds, "render letters"):
        faces = typefaces.render(dataset, typefaces.demo_fonts(), size=height)
    for face in faces:
        message(f"{face.name}: {face.creator} ({face.licence})")

    with _timed(seconds, "fine-tune"):
        items = datasets.read_dataset(dataset).items
        pixels = [datasets.load(item, height=height, width=width, channels=channels) for item in items]
        _fine_tune(base, model, torch.from_numpy(np.stack(pixels)), progress)

    with _timed(seconds, "generate"):
        queries = _generate(model, folder / "generated")

    with _timed(seconds, "build"):
        pipeline.build(dataset, model=model, base=base, store=store, progress=progress, message=message)

    with _timed(seconds, "attribute"):
        table = attribution.attribute(queries, store, progress=progress, message=message)
        (folder / "attributions.csv").write_bytes(csv_bytes(table))
        figure.draw(table, dataset, folder / "attributions.png")

    return {
        "data set": str(dataset),
        "model": str(model),
        "generated": str(folder / "generated"),
        "store": str(store),
        "table": str(folder / "attributions.csv"),
        "picture": str(folder / "attributions.png"),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the seconds of a stage."""
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _fine_tune(base: Path, out: Path, x0: torch.Tensor, progress: Callable[[str, int, int], Any]) -> None:
    """Train all weights of the base on the letters, and save the pipeline."""
    denoiser, steps = finetuning.start(base, RECIPE), RECIPE.steps(len(x0))
    finetuning.fine_tune(
        denoiser, RECIPE, x0, None, seed=0, progress=lambda step, _: progress("fine-tune", step, steps)
    )
    finetuning.save(denoiser, RECIPE, out, base=base)


def _generate(model: Path, out: Path) -> list[Path]:
    """Sample pictures from the fine-tuned model."""
    denoiser = models.load_denoiser(model)
    images = training.generate(
        denoiser.network, denoiser.schedule, count=GENERATED, shape=denoiser.sample_shape, seed=0
    )
    out.mkdir()
    paths = []
    for i, image in enumerate(images):
        path = out / f"generated-{i}.png"
        path.write_bytes(datasets.to_png(image.numpy()))
        paths.append(path)
    return paths
