"""Pictures that are asked about: their features, and how much better the fine-tune predicts them than its base did."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from influence import datasets, features, models
from influence.errors import GradientError, OptionError
from influence.features import Recipe
from influence.models import Denoiser
from influence.pipeline import Loaded, Message, Progress, encoded, take_arrays, with_changes
from influence.store import Store


@dataclass(frozen=True)
class Queries:
    """Pictures, in the order given."""

    paths: list[str]
    prompts: list[str | None]
    item_ids: list[str]
    """Hash of pixels and prompt, as for training images."""
    phi: Float32[np.ndarray, "queries k"]
    phi_batch: Float32[np.ndarray, "queries batches k"]
    loss: Float32[np.ndarray, "queries batches"]
    """Training loss under the fine-tuned model, by batch of draws; one batch if they cannot be divided."""
    loss_base: Float32[np.ndarray, "queries batches"] | None
    """Under the base, on the same draws; `None` if the base is not known."""


def load_base(made: Store, base: str | os.PathLike[str] | None, device: str) -> Denoiser | None:
    """The model before the fine-tune: what a LoRA was put on, or what was named; `None` if nothing says which it is.

    Args:
        made: The store of the fine-tuned model.
        base: Where its base is; by default as the store says.
        device: Where to put it.

    Raises:
        ModelError: It is not there, or cannot be loaded.
        OptionError: It predicts something else than the fine-tuned model.
    """
    source = made.source
    path = source.get("base") if base is None else str(Path(base).absolute())
    if path is None:
        path = source["model"] if source["lora"] is not None else None
    if path is None:
        return None
    found = models.load_denoiser(Path(path), resolution=source["resolution"], device=device)
    here = (found.identity["schedule"], found.schedule.prediction, tuple(found.sample_shape), found.conditional)
    spec = made.spec
    there = (spec.schedule, spec.prediction, tuple(spec.sample_shape), spec.conditional)
    for name, a, b in zip(("schedule", "prediction", "sample shape", "captions"), here, there, strict=True):
        if a != b:
            raise OptionError(
                f"the base at {path} has another {name} ({a}) than the fine-tuned model ({b}); pass the pipeline that "
                "the fine-tune started from"
            )
    return found


def read_queries(
    loaded: Loaded,
    family: str,
    paths: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str | None],
    progress: Progress,
    message: Message,
    base: Denoiser | None = None,
) -> Queries:
    """Take the features of pictures, from draws of their own.

    Args:
        loaded: The model, and how features are taken.
        family: Output that is differentiated: `loss` or `square`.
        paths: Picture files.
        prompts: One for each; `None` if the model reads none.
        progress: Called as work gets done.
        message: Called with remarks on pictures.
        base: The model before the fine-tune.

    Raises:
        DatasetError: A picture cannot be read.
        GradientError: A loss or gradient is not finite.
    """
    channels, height, width = loaded.denoiser.image_size
    recipe = with_changes(loaded.recipe, role="query", output=family, curvature_rate=0.0)
    ids, taken, losses, losses_base = [], [], [], []
    for done, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        progress("queries", done, len(paths))
        image, notes = datasets.decode(Path(path))
        for note in notes:
            message(f"{Path(path).name}: {note}")
        pixels = datasets.to_array(image, height=height, width=width, channels=channels)
        ids.append(datasets.item_id(image, prompt))
        found = take_arrays(loaded.denoiser, recipe, ids[-1:], [pixels], [prompt])
        if not np.isfinite(found.phi).all():
            raise GradientError(f"{path}: its loss or gradient is not finite under this model")
        taken.append(found)
        if family == "loss":
            losses.append(found.loss_batch if found.loss_batch.size else found.loss[:, None])
        else:
            losses.append(_losses(loaded.denoiser, recipe, ids[-1], pixels, prompt))
        if base is not None:
            losses_base.append(_losses(base, recipe, ids[-1], pixels, prompt))
    progress("queries", len(paths), len(paths))
    return Queries(
        paths=[str(path) for path in paths],
        prompts=list(prompts),
        item_ids=ids,
        phi=np.concatenate([found.phi for found in taken]),
        phi_batch=np.concatenate([found.phi_batch for found in taken]),
        loss=np.concatenate(losses),
        loss_base=np.concatenate(losses_base) if base is not None else None,
    )


def _losses(model: Denoiser, recipe: Recipe, item_id: str, pixels: np.ndarray, prompt: str | None) -> np.ndarray:
    return features.losses(model.network, recipe, [item_id], *encoded(model, [pixels], [prompt]))
