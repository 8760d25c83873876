"""Pictures that are asked about: their features, and how much better the fine-tune predicts them than its base did."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from influence import datasets, diffusion, features, models
from influence.errors import DatasetError, GradientError, OptionError
from influence.features import Recipe
from influence.loading import Loaded
from influence.models import Denoiser
from influence.progress import Message, Progress
from influence.store import Store
from influence.taking import decode, encoded, take_arrays

LATE = 0.75
"""The second point of `two-point`, as a part of the way from the base to the fine-tune."""


@dataclass(frozen=True)
class Queries:
    """Pictures, in the order given."""

    paths: list[str]
    prompts: list[str | None]
    item_ids: list[str]
    """Hash of pixels and prompt, as for training images."""
    phi: Float32[np.ndarray, "queries k"]
    phi_batch: Float32[np.ndarray, "queries batches k"]
    loss: Float32[np.ndarray, "queries parts"]
    """Training loss under the fine-tuned model, by batch of draws; one batch if they cannot be divided."""
    loss_base: Float32[np.ndarray, "queries parts"] | None
    """Under the base, on the same draws; `None` if the base is not known."""
    bits: Float64[np.ndarray, "queries parts"] | None = None
    """What the fine-tune gained, in bits per dimension of the evidence bound; `None` if the base is not known."""
    phi_beside: Float32[np.ndarray, "queries k"] | None = None
    """Features under a second model, if they were wanted: the base, or one on the way from it."""
    phi_beside_batch: Float32[np.ndarray, "queries batches k"] | None = None

    def with_beside(self, beside: str | None) -> "Queries":
        """Features as methods read them: the mean with those under the `base`, or those of `late` behind the end's."""
        if beside is None:
            return self
        assert self.phi_beside is not None and self.phi_beside_batch is not None
        pairs = (self.phi, self.phi_beside), (self.phi_batch, self.phi_beside_batch)
        phi, batch = ((a + b) / 2 if beside == "base" else np.concatenate([a, b], axis=-1) for a, b in pairs)
        return replace(self, phi=phi, phi_batch=batch, phi_beside=None, phi_beside_batch=None)


def load_base(
    made: Store,
    base: str | os.PathLike[str] | None,
    device: str,
    *,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> Denoiser | None:
    """The model before the fine-tune, `None` if nothing says which it is.

    That of a LoRA is the same network with an adapter that does nothing (lora_B = 0), so that it has gradients of the
    same parameters.

    Args:
        made: The store of the fine-tuned model.
        base: Where its base is; by default as the store says.
        device: Where to put it.
        model: Where the model that a LoRA was put on is now, if it was moved.
        lora: Where the LoRA is now.

    Raises:
        ModelError: It is not there, or cannot be loaded.
        OptionError: It is another than at build, or predicts something else than the fine-tuned model.
    """
    source = made.source
    path = source.get("base") if base is None else str(Path(base).absolute())
    options = {"parameters": source["parameters"], "resolution": source["resolution"], "device": device}
    if source["lora"] is not None:
        found = models.load_denoiser(
            Path(source["model"] if path is None else path) if model is None else Path(model),
            lora=Path(source["lora"] if lora is None else lora), **options,
        )  # fmt: skip
        models.silence_lora(found)
    elif path is not None:
        found = models.load_denoiser(Path(path), **options)
    else:
        return None
    known = made.spec.model if source["lora"] is not None else source.get("base_model")
    if known is not None and found.identity["model"] != known:
        raise OptionError(f"the base at {path or source['model']} is not the one that the store was built with")
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


def under_base(made: Store, loaded: Loaded, before: Denoiser | None) -> Loaded | None:
    """The base with the recipe of the fine-tune's features; `None` if the store does not know which base it was.

    A base whose parameters are others than the fine-tune's has no such features either.
    """
    known = made.source["lora"] is not None or made.source.get("base_model") is not None
    if before is None or not known:
        return None
    shapes = [{name: p.shape for name, p in each.parameters.items()} for each in (before, loaded.denoiser)]
    if shapes[0] != shapes[1]:
        return None
    return Loaded(before, loaded.spec, replace(loaded.recipe, parameters=before.parameters))


def under_late(loaded: Loaded, start: Loaded) -> Loaded:
    """The model at `LATE` of the way from the base to the fine-tune.

    Raises:
        ModelError: The two have other weights.
    """
    found = models.between(start.denoiser, loaded.denoiser, LATE)
    return Loaded(found, loaded.spec, replace(loaded.recipe, parameters=found.parameters))


def read_queries(
    loaded: Loaded,
    family: str,
    paths: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str | None],
    progress: Progress,
    message: Message,
    base: Denoiser | None = None,
    beside: Loaded | None = None,
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
        beside: A second model to take features under.

    Raises:
        DatasetError: A picture cannot be read.
        GradientError: A loss or gradient is not finite.
    """
    channels, height, width = loaded.denoiser.image_size
    recipe = replace(loaded.recipe, role="query", output=family, curvature_rate=0.0)
    ids, taken, losses, losses_base, bits, taken_beside = [], [], [], [], [], []
    of_base = None if base is None else replace(recipe, parameters=base.parameters)
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
        if base is None and family == "loss":
            losses.append(found.loss_batch[0] if found.loss_batch.size else found.loss)
        else:
            after, t = _losses(loaded.denoiser, recipe, ids[-1], pixels, prompt)
            losses.append(features.by_batch(after))
        if base is not None:
            start, _ = _losses(base, of_base, ids[-1], pixels, prompt)
            losses_base.append(features.by_batch(start))
            unit = diffusion.bits(recipe.schedule, torch.from_numpy(t)).numpy()
            bits.append(features.by_batch(unit * (start.astype(np.float64) - after)))
        if beside is not None:
            of_beside = replace(recipe, parameters=beside.denoiser.parameters)
            taken_beside.append(take_arrays(beside.denoiser, of_beside, ids[-1:], [pixels], [prompt]))
    progress("queries", len(paths), len(paths))
    return Queries(
        paths=[str(path) for path in paths],
        prompts=list(prompts),
        item_ids=ids,
        phi=np.concatenate([found.phi for found in taken]),
        phi_batch=np.concatenate([found.phi_batch for found in taken]),
        loss=np.stack(losses),
        loss_base=np.stack(losses_base) if base is not None else None,
        bits=np.stack(bits) if base is not None else None,
        phi_beside=np.concatenate([found.phi for found in taken_beside]) if taken_beside else None,
        phi_beside_batch=np.concatenate([found.phi_batch for found in taken_beside]) if taken_beside else None,
    )


def _losses(
    model: Denoiser, recipe: Recipe, item_id: str, pixels: np.ndarray, prompt: str | None
) -> tuple[Float32[np.ndarray, " draws"], Int64[np.ndarray, " draws"]]:
    """Training loss and t of each draw of a picture."""
    found, t = features.losses(model.network, recipe, [item_id], *encoded(model, [pixels], [prompt]))
    return found[0], t[0]


@dataclass(frozen=True)
class ControlLosses:
    """Training losses of control images, in the order of `item_ids`."""

    item_ids: list[str]
    finetuned: np.ndarray
    base: np.ndarray | None


def control_losses(
    controls: Store, loaded: Loaded, base: Denoiser | None, progress: Progress, message: Message
) -> ControlLosses:
    """Losses of the controls under both models, on the draws that their features have; those of the base once.

    Raises:
        DatasetError: The controls' pictures are needed and not there any more.
    """
    parts = [(content.item_ids, content.loss) for content in controls.blocks("loss")]
    ids = [item_id for part, _ in parts for item_id in part]
    finetuned = np.concatenate([loss for _, loss in parts]) if parts else np.empty(0, np.float32)
    if base is None:
        return ControlLosses(ids, finetuned, None)
    key = repr((controls.family_hash("loss"), sorted(base.identity.items())))
    name = f"base-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    kept = controls.read_derived(name)
    if kept is not None:
        return ControlLosses(ids, finetuned, kept["loss"])
    message(f"taking the losses of {len(ids)} controls under the base once, kept in the store")
    data = datasets.read_dataset(Path(controls.source["dataset"]), creator_column=controls.source["creator_column"])
    there = {item.item_id: item for item in data.items}
    absent = [item_id for item_id in ids if item_id not in there]
    if absent:
        raise DatasetError(
            f"{controls.source['dataset']} lacks {len(absent)} of the {len(ids)} controls, {absent[0]} first; "
            "put them back: their losses under the base are needed once"
        )
    recipe = replace(loaded.recipe, num_draws=controls.build["draws"], curvature_rate=0.0)
    found = np.empty(len(ids), np.float32)
    for i, item_id in enumerate(ids):
        progress("controls under the base", i, len(ids))
        item = there[item_id]
        found[i] = _losses(base, recipe, item_id, decode(base, [item])[0], item.caption)[0].mean()
    progress("controls under the base", len(ids), len(ids))
    controls.write_derived(name, {"loss": found})
    return ControlLosses(ids, finetuned, found)
