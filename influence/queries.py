"""Pictures that are asked about: their features, and how much better the fine-tune predicts them than its base did."""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from influence import datasets, diffusion, features
from influence.errors import DatasetError, GradientError
from influence.features import Features, Recipe
from influence.loading import Loaded
from influence.models import Denoiser
from influence.progress import Message, Progress
from influence.scoring import Method
from influence.solo import read_solos, require_same
from influence.store import Store
from influence.taking import decode, encoded, take_arrays
from influence.waypoints import base_identity, load_alone


@dataclass(frozen=True)
class Queries:
    """Pictures, in the order given."""

    paths: list[str]
    prompts: list[str | None]
    item_ids: list[str]
    """Hash of pixels and prompt, as for training images."""
    same: list[frozenset[str]]
    """Ids that the picture has with its prompt, without, and with each caption of the controls."""
    phi: Float32[np.ndarray, "queries k"]
    phi_batch: Float32[np.ndarray, "queries batches k"]
    loss: Float32[np.ndarray, "queries parts"]
    """Training loss under the fine-tuned model, by batch of draws; one batch if they cannot be divided."""
    loss_base: Float32[np.ndarray, "queries parts"] | None
    """Under the base, on the same draws; `None` if the base is not known."""
    gain: Float64[np.ndarray, "queries draws"] | None = None
    """What the fine-tune took off the loss, draw by draw; `None` if the base is not known."""
    bits: Float64[np.ndarray, "queries draws"] | None = None
    """The same in bits per dimension of the evidence bound."""
    models: int = 1
    between: Float64[np.ndarray, "queries 2"] | None = None
    """Variance of the means of `gain` and `bits` from training again, where they are those of several models."""
    beside: Mapping[str, tuple[Float32[np.ndarray, "queries k"], Float32[np.ndarray, "queries batches k"]]] = field(
        default_factory=dict
    )
    """Features under models on the way of the fine-tune, and those of batches of draws, by family."""

    def read_by(self, method: Method) -> "Queries":
        """Features as a method reads them: the mean along the way, or those of a second model behind the end's."""
        if not method.elsewhere:
            return self
        if method.along:
            points = {**self.beside, method.family: (self.phi, self.phi_batch)}
            phi, batch = (sum(np.float32(w) * points[f][i] for f, w in method.along.items()) for i in (0, 1))
        else:
            pairs = zip((self.phi, self.phi_batch), self.beside[method.beside], strict=True)
            phi, batch = (np.concatenate(pair, axis=-1) for pair in pairs)
        return replace(self, phi=phi, phi_batch=batch, beside={})


def read_queries(
    loaded: Loaded,
    family: str,
    paths: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str | None],
    progress: Progress,
    message: Message,
    base: Denoiser | None = None,
    beside: Mapping[str, Loaded] | None = None,
    captions: Collection[str | None] = (),
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
        beside: Models on the way of the fine-tune to take features under as well, by family.
        captions: Of the controls: which of them show one of the pictures is told by its pixels.

    Raises:
        DatasetError: A picture cannot be read.
        GradientError: A loss or gradient is not finite.
    """
    channels, height, width = loaded.denoiser.image_size
    recipe = replace(loaded.recipe, role="query", output=family, curvature_rate=0.0)
    ids, same, taken, losses, losses_base, gains, bits = [], [], [], [], [], [], []
    taken_beside: dict[str, list[Features]] = {family: [] for family in beside or {}}
    of_base = None if base is None else replace(recipe, parameters=base.parameters)
    for done, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        progress("queries", done, len(paths))
        image, notes = datasets.decode(Path(path))
        for note in notes:
            message(f"{Path(path).name}: {note}")
        pixels = datasets.to_array(image, height=height, width=width, channels=channels)
        ids.append(datasets.item_id(image, prompt))
        same.append(frozenset(datasets.item_ids(image, {prompt, None, *captions})))
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
            gains.append(start.astype(np.float64) - after)
            bits.append(unit * gains[-1])
        for family, of in (beside or {}).items():
            of_beside = replace(recipe, parameters=of.denoiser.parameters)
            taken_beside[family].append(take_arrays(of.denoiser, of_beside, ids[-1:], [pixels], [prompt]))
    progress("queries", len(paths), len(paths))
    return Queries(
        paths=[str(path) for path in paths],
        prompts=list(prompts),
        item_ids=ids,
        same=same,
        phi=np.concatenate([found.phi for found in taken]),
        phi_batch=np.concatenate([found.phi_batch for found in taken]),
        loss=np.stack(losses),
        loss_base=np.stack(losses_base) if base is not None else None,
        gain=np.stack(gains) if base is not None else None,
        bits=np.stack(bits) if base is not None else None,
        beside={
            family: (np.concatenate([part.phi for part in parts]), np.concatenate([part.phi_batch for part in parts]))
            for family, parts in taken_beside.items()
        },
    )


def losses_alone(
    made: Store,
    loaded: Loaded,
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    creators: Sequence[str],
    asked: Queries,
    progress: Progress,
    *,
    model: str | os.PathLike[str] | None = None,
) -> Float32[np.ndarray, "queries parts creators"]:
    """Losses of pictures under the fine-tune of each creator alone, on the draws of `asked`, by batch of these.

    Of several trainings with other seeds it is the mean.

    Args:
        made: The store.
        loaded: Its model, and how features are taken.
        folders: What `solo` made of the store's data set; several of other seeds.
        creators: In which order.
        asked: The pictures.
        progress: Called as work gets done.
        model: Where the model that a LoRA was put on is now, if it was moved.

    Raises:
        OptionError: A folder is of other works, or of another fine-tune.
    """
    trainings = read_solos(folders)
    base = base_identity(made.source, loaded.denoiser)
    for alone in trainings:
        require_same(alone, base, made.items["creator"], made.items["item_id"])
    places = [{one.creator: one.path for one in alone} for alone in trainings]
    channels, height, width = loaded.denoiser.image_size
    images = [datasets.decode(Path(path))[0] for path in asked.paths]
    pixels = [datasets.to_array(image, height=height, width=width, channels=channels) for image in images]
    found = np.zeros((*asked.loss.shape, len(creators)), np.float32)
    models = [(g, where[creator]) for where in places for g, creator in enumerate(creators)]
    for done, (g, place) in enumerate(models):
        progress("creators alone", done, len(models))
        of = load_alone(made.source, loaded.denoiser, place, loaded.device, model=model)
        recipe = replace(loaded.recipe, role="query", output="loss", curvature_rate=0.0, parameters=of.parameters)
        for q, (item_id, prompt) in enumerate(zip(asked.item_ids, asked.prompts, strict=True)):
            found[q, :, g] += features.by_batch(_losses(of, recipe, item_id, pixels[q], prompt)[0]) / len(trainings)
    progress("creators alone", len(models), len(models))
    return found


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
    controls: Store,
    loaded: Loaded,
    base: Denoiser | None,
    pictures: str | os.PathLike[str] | None,
    progress: Progress,
    message: Message,
) -> ControlLosses:
    """Losses of the controls under both models, on the draws that their features have; those of the base once.

    `pictures` is where the controls are now, if they were moved.

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
    folder = controls.pictures(pictures)
    data = datasets.read_dataset(folder, creator_column=controls.source["creator_column"])
    there = {item.item_id: item for item in data.items}
    absent = [item_id for item_id in ids if item_id not in there]
    if absent:
        raise DatasetError(
            f"{folder} lacks {len(absent)} of the {len(ids)} controls, {absent[0]} first; "
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
