"""Build a store: model and data set → features → shards. With `attribution`, the only composer of the stages."""

import functools
import importlib.metadata
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from influence import allocation, datasets, diffusion, finetuning, horizon, keys, shards, store
from influence import items as tables
from influence.building import run_shards
from influence.errors import DatasetError, OptionError
from influence.loading import DEFAULT_BATCH, BuildOptions, Loaded, network, prepared, with_dim, within_memory
from influence.memory import format_size, parse_size
from influence.models import Denoiser
from influence.progress import Message, Progress, silent
from influence.scoring import METHODS
from influence.store import Store
from influence.taking import decode, encoded
from influence.waypoints import (
    base_is_known,
    default_method,
    half_identity,
    load_base,
    load_half,
    model_of,
    require_same_parameters,
    way,
    where_now,
)

LIBRARIES = ("influence", "torch", "diffusers", "peft", "transformers", "numpy", "h5py", "pillow")
CURVATURE_ROWS = 16384
TOTAL_LEARNING_RATE = 0.25  # Σ η_t of a fine-tune of which nothing is known: 1e-4 for 2,500 steps
COPIES = 4  # of a shard's rows, at its commit: the features, HDF5's image of them, the bytes of the file, both again


def build(
    dataset: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    lora: str | os.PathLike[str] | None = None,
    dim: int | None = None,
    projection: str = "countsketch",
    metric: str | None = None,
    draws: int = 40,
    curvature_rows: int | None = None,
    seed: int = 0,
    engine: str = "auto",
    parameters: str | None = None,
    creator_column: str | None = None,
    resolution: int | None = None,
    batch_size: int = DEFAULT_BATCH,
    memory: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    workers: int = 1,
    controls: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    half: str | os.PathLike[str] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    message: Message = silent,
) -> Store:
    """Take the features of every image of a fine-tune data set and keep them in a store.

    With a model of half the length they are taken of that, too, or else, where the model before the fine-tune is known,
    at a second point of its way, for the default method. Run again, it goes on where it stopped, and takes only the
    features of images that were added.

    Args:
        dataset: Image folder with `metadata.csv` or `metadata.jsonl`, or with captions in `.txt` files.
        model: Diffusers pipeline folder, or training output folder; the base pipeline if `lora` is given.
        store: Folder to write to.
        lora: `pytorch_lora_weights.safetensors`, or a folder that holds it.
        dim: k, entries of a feature; the identity projection takes the number of parameters instead. By default 32768
            for up to some 4,000 images, 8192 for more than 9,000 or so, or what the store has.
        projection: Name in `PROJECTIONS`.
        metric: `adamw`, by default: gradients are compared in the metric in which AdamW moved (`horizon`); `plain`: as
            they are. A store that is there keeps its own.
        draws: S, draws (t, ε) of each image.
        curvature_rows: Curvature rows in all, spread over the images; 16,384 by default.
        seed: Key of the projection and of every draw.
        engine: `hooks`, `vmap`, or `auto`: hooks where they cover every parameter.
        parameters: Glob over parameter names; all trained parameters by default.
        creator_column: Column of the metadata that names the creator; `creator` if there is one.
        resolution: Pixels of a side; the model's own by default.
        batch_size: Rows (image, draw) in one forward.
        memory: What all workers may hold together, such as `8GiB`: chooses the batch size instead.
        device: `auto`, `cpu`, `cuda` …
        dtype: `fp32`, or `bf16` for the forward and backward passes.
        workers: Number of processes.
        controls: Data set of images that were never trained on, best of the same kind: scores are compared with theirs.
            Their features are kept apart, and counted nowhere else.
        base: The pipeline that all weights were fine-tuned from; that of a LoRA is known.
        half: Pipeline folder or LoRA of the same fine-tune in half of its epochs; `halve` makes one.
        recipe: `finetune.json`, which says how the model was trained: its steps decide the damping. By default the one
            beside the model or LoRA.
        progress: Called as work gets done.
        message: Called with assumptions, refusals and warnings, one line each.

    Raises:
        InfluenceError: An input cannot be used; one line says what was found, expected, and to do.
    """
    if memory is not None:
        parse_size(memory)  # a slip of the pen is told before anything is read
    options = BuildOptions(
        dataset=str(Path(dataset).absolute()),
        model=str(Path(model).absolute()),
        lora=None if lora is None else str(Path(lora).absolute()),
        dim=dim,
        projection=projection,
        draws=draws,
        seed=seed,
        engine=engine,
        parameters=parameters,
        resolution=resolution,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    denoiser = network(options)
    before = _store_there(Path(store))
    if before is not None:
        creator_column = _kept_column(before, creator_column)
    data = read(dataset, denoiser, creator_column, progress, message)
    source = source_of(options, base, half, creator_column, denoiser)
    if memory is not None and before is None and (metric != "plain" or own_recipe(options, recipe) is not None):
        _require_room(denoiser, source, memory)
    options, facts = settled(Path(store), denoiser, options, data, source, metric, recipe, message)
    source |= facts
    loaded = prepared(denoiser, options, message)
    if memory is not None:
        held = COPIES * shard_bytes(loaded, options, data, curvature_budget(options, data, curvature_rows)[1])
        held += waypoint_bytes(source, denoiser)
        loaded, options = within_memory(loaded, options, memory, held, message, workers)
    new, wanted = before is None, curvature_budget(options, data, curvature_rows)[1] > 0
    if new and wanted and options.scales is not None:  # in the plain metric nothing is measured on the data set
        source["curvature_density"] = _density(loaded, pilots(options, data))
    made = _open_or_create(Path(store), loaded, options, data, curvature_rows, source)
    if before is not None and (back := before.excluded & {*made.items["item_id"]}):
        message(
            f"{len(back)} images that were excluded by the name of their creator have another creator now, and count "
            "again; exclude that name too"
        )
    parts = [(made, options, data)]
    if controls is not None:  # looked at before the work begins
        parts.append(_controls(made, loaded, options, data, controls, source, message))
    for part, how, images in parts:
        run_shards(part, "loss", loaded, how, images, workers, progress, message)
    where = where_now(made.source, **{name: source[name] for name in ("model", "lora", "base", "half")})
    for family in METHODS[default_method(made.source)].elsewhere:
        todo = [part for part in parts if part[0].missing(family)]
        of = model_of(family, where, loaded) if todo else loaded
        for part, how, images in todo:
            run_shards(part, family, of, how, images, workers, progress, message, source=where)
    return made


def _store_there(path: Path) -> Store | None:
    """The store that is there already."""
    return store.open_store(path) if (path / "store.json").exists() else None


def _require_room(denoiser: Denoiser, source: Mapping[str, Any], memory: str) -> None:
    """Raise if what is known of the fine-tune's steps takes more than a budget: gradients and squares of all weights.

    Raises:
        OptionError: It does.
    """
    x0, cond = encoded(denoiser, [np.zeros(denoiser.image_size, np.float32)], [""])
    held = horizon.held(denoiser, x0, cond, points=3 if base_is_known(source) else 1)
    held += waypoint_bytes(source, denoiser)
    if held > parse_size(memory):
        raise OptionError(
            f"memory is {memory}, and the second moments of all gradients, which decide metric and damping, take "
            f"{format_size(held)}; give more, or choose fewer --parameters"
        )


def _kept_column(made: Store, column: str | None) -> str | None:
    """The column of creators that a store was made with: what is excluded by a creator's name rests on it.

    Raises:
        OptionError: Another one is named.
    """
    kept = made.source["creator_column"]
    if column is not None and column != (kept or "creator"):
        raise OptionError(
            f"store {made.path.name} takes creators from column {kept or 'creator'!r}, and --creator-column is "
            f"{column!r}; leave it out, or build another store"
        )
    return kept


def source_of(
    options: BuildOptions,
    base: str | os.PathLike[str] | None,
    half: str | os.PathLike[str] | None,
    creator_column: str | None,
    denoiser: Denoiser,
) -> dict[str, Any]:
    """Where things come from, as the store keeps it.

    Raises:
        InfluenceError: The base or the model of half the length cannot be loaded, or is none of this fine-tune.
    """
    source = {
        "model": options.model,
        "lora": options.lora,
        "base": None if base is None else str(Path(base).absolute()),
        "base_model": None,
        "base_encoders": None,
        "half": None if half is None else str(Path(half).absolute()),
        "half_model": None,
        "parameters": options.parameters,
        "resolution": options.resolution,
        "creator_column": creator_column,
    }
    if base is not None:
        before = load_base(source, denoiser, None, "cpu")
        assert before is not None
        require_same_parameters(before, denoiser, "the base", "pass the pipeline that the fine-tune started from")
        source["base_model"], source["base_encoders"] = (before.identity[name] for name in ("model", "encoders"))
    if half is not None:
        source["half_model"] = half_identity(load_half(source, denoiser, "cpu"))
    return source


def waypoint_bytes(source: Mapping[str, Any], denoiser: Denoiser) -> int:
    """Bytes of the networks held beside the fine-tuned one: base and ¾ of the way, or that of half the length."""
    weights = denoiser.network.state_dict().values()
    count = 2 if base_is_known(source) else int(source["half"] is not None)
    return count * sum(value.numel() * value.element_size() for value in weights)


def read(
    dataset: str | os.PathLike[str],
    denoiser: Denoiser,
    creator_column: str | None,
    progress: Progress,
    message: Message,
) -> datasets.Dataset:
    """Read the data set; report on it and on what was assumed of the model."""
    for note in denoiser.notes:
        message(note)
    data = datasets.read_dataset(
        Path(dataset),
        creator_column=creator_column,
        captions_required=denoiser.conditional,
        shape=denoiser.image_size[1:],
        progress=functools.partial(progress, "reading pictures"),
    )
    for note in data.notes:
        message(note)
    for refusal in data.refused:
        message(f"refused {refusal.file_name}: {refusal.reason}")
    if data.refused:
        message(f"{len(data.refused)} pictures refused, {len(data.items)} used")
    return data


def curvature_budget(options: BuildOptions, data: datasets.Dataset, curvature_rows: int | None) -> tuple[int, float]:
    """Curvature rows that are wanted in all, and for each image on average.

    Raises:
        OptionError: Fewer than none are wanted.
    """
    wanted = CURVATURE_ROWS if curvature_rows is None else curvature_rows
    if wanted < 0:
        raise OptionError(f"curvature-rows is {wanted}; expected 0 or more")
    return wanted, min(wanted / len({item.item_id for item in data.items}), float(options.draws))


def pilots(options: BuildOptions, data: datasets.Dataset) -> list[datasets.Item]:
    """Images on which it is measured how often each draw should give a curvature row."""
    items = sorted({item.item_id: item for item in data.items}.values(), key=lambda item: item.item_id)
    numbers = keys.integers(("allocation", options.seed), allocation.IMAGES, len(items))
    return [items[i] for i in np.unique(numbers)]


def _density(loaded: Loaded, chosen: list[datasets.Item]) -> tuple[float, ...]:
    """How often each draw gives a curvature row."""
    of = loaded.denoiser
    x0, cond = encoded(of, decode(of, chosen), [item.caption for item in chosen])
    return allocation.density(of.network, loaded.recipe, [item.item_id for item in chosen], x0, cond)


def shard_bytes(loaded: Loaded, options: BuildOptions, data: datasets.Dataset, rate: float) -> int:
    """Bytes of the features of one shard."""
    k = loaded.spec.dim
    batches = diffusion.num_batches(options.draws)
    images = tables.images_per_shard(len({item.item_id for item in data.items}), k, rate, batches)
    return shards.size(shards.layout(images, math.ceil(images * rate), k, batches))


def own_recipe(options: BuildOptions, recipe: str | os.PathLike[str] | None) -> finetuning.FineTune | None:
    """How the model was trained, if that is known."""
    found = finetuning.find_recipe(options.model, options.lora) if recipe is None else Path(recipe)
    return None if found is None else finetuning.read_recipe(found)


def settled(
    path: Path,
    denoiser: Denoiser,
    options: BuildOptions,
    data: datasets.Dataset,
    source: Mapping[str, Any],
    metric: str | None,
    recipe: str | os.PathLike[str] | None,
    message: Message,
) -> tuple[BuildOptions, dict[str, Any]]:
    """Options with k and W, and what the store keeps: W, and λ of the fine-tune's own steps.

    A store that is there already has them: features that are added to it must meet those that it has.

    Raises:
        OptionError: The metric is unknown; or it, the base or the model of half the length is not that of the store.
    """
    if metric not in (None, *horizon.METRICS):
        raise OptionError(f"metric {metric!r} is unknown; expected {' or '.join(horizon.METRICS)}")
    made = _store_there(path)
    if made is not None:
        if source["half_model"] not in (None, made.source.get("half_model")):
            raise OptionError(
                f"store {path.name} was made without this model of half the length; leave out --half, or build another "
                "store"
            )
        if source["lora"] is None and source["base_model"] not in (None, made.source.get("base_model")):
            raise OptionError(
                f"store {path.name} was made without this model before the fine-tune; leave out --base, or build "
                "another store with it"
            )
        if recipe is not None:
            message(f"store {path.name} keeps the damping that it was made with: --recipe is not read again")
        kept = {name: made.source.get(name) for name in ("scales", "damping")}
        if options.dim is None:
            options = replace(options, dim=made.spec.dim)
            if made.spec.projection == "identity" and options.projection == "countsketch":  # as `with_dim` chose
                options = replace(options, projection="identity")
        own = "plain" if kept["scales"] is None else "adamw"
        if metric not in (None, own):
            raise OptionError(
                f"store {path.name} is in the {own} metric; --metric is {metric}; leave it out, or build another store"
            )
        return replace(options, scales=kept["scales"]), kept
    metric = metric or "adamw"
    options = with_dim(options, denoiser, len({item.item_id for item in data.items}))
    trained = own_recipe(options, recipe)
    if trained is None:
        guess = f"as after learning rates of {TOTAL_LEARNING_RATE} in all" if metric == "adamw" else "by 0.1 tr(H)/k"
        message(
            f"how the model was trained is not known: there is no {finetuning.RECIPE_FILE} beside it, and no --recipe; "
            f"scores will be damped {guess}"
        )
        if metric == "plain":
            return options, {"scales": None, "damping": None}
    items = sorted(data.items, key=lambda item: item.item_id)  # names and order of files change nothing
    rows = keys.integers(("horizon", options.seed), horizon.BATCHES * horizon.ROWS, len(items))
    batches = [
        encoded(denoiser, decode(denoiser, part), [item.caption for item in part])
        for part in ([items[i] for i in numbers] for numbers in rows.reshape(horizon.BATCHES, horizon.ROWS))
    ]
    size = horizon.ROWS if trained is None else trained.batch_size
    v = horizon.second_moments(way(source, denoiser), batches, batch_size=size, seed=options.seed)
    total = TOTAL_LEARNING_RATE if trained is None else trained.total_learning_rate(len(data.items))
    if metric == "plain":
        return options, {"scales": None, "damping": horizon.mean_along_gradients(v) / total}
    scales = horizon.tensor_scales(v)
    return replace(options, scales=scales), {"scales": scales, "damping": 1 / total}


def _open_or_create(
    path: Path,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    curvature_rows: int | None,
    source: dict[str, Any],
) -> Store:
    """Create the store, or open it to go on; in both cases the spec must be this one."""
    wanted, rate = curvature_budget(options, data, curvature_rows)
    # The rate belongs to the store: images that are added later do not change the rows of those already there.
    if (path / "store.json").exists():
        rate = store.open_store(path).build.get("curvature_rate", rate)
    items = pd.DataFrame(
        [(i.item_id, i.file_name, i.caption, i.creator, i.licence) for i in data.items],
        columns=["item_id", "file_name", "caption", "creator", "licence"],
    )
    return store.create(
        path,
        spec=loaded.spec,
        build={
            "draws": options.draws,
            "batches": diffusion.num_batches(options.draws),
            "curvature_rows": wanted,
            "curvature_rate": rate,
        },
        source={
            "dataset": options.dataset,
            "dataset_sha256": datasets.dataset_fingerprint(data.items),
            **source,
            "refused": {refusal.file_name: refusal.reason for refusal in data.refused},
            "notes": [*loaded.denoiser.notes, *data.notes],
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        items=items,
    )


def read_controls(
    controls: str | os.PathLike[str],
    denoiser: Denoiser,
    creator_column: str | None,
    members: Collection[str],
    message: Message,
) -> datasets.Dataset:
    """Read the control images: those of a folder that were not trained on, with whatever caption.

    `members` has the ids of the training images, and of their pictures.

    Raises:
        DatasetError: None is left, or the folder cannot be read.
    """
    data = datasets.read_dataset(
        Path(controls),
        creator_column=creator_column,
        captions_required=denoiser.conditional,
        shape=denoiser.image_size[1:],
    )
    for note in [*data.notes, *(f"refused {refusal.file_name}: {refusal.reason}" for refusal in data.refused)]:
        message(f"controls: {note}")
    trained = [item.item_id in members or item.picture_id in members for item in data.items]
    if any(trained):
        first = data.items[trained.index(True)].file_name
        message(f"controls: {sum(trained)} are training images and left out, {first} first")
    others = replace(data, items=[item for item, member in zip(data.items, trained, strict=True) if not member])
    if not others.items:
        raise DatasetError(f"{controls} holds no image that was not trained on; pass others as controls")
    return others


def _controls(
    made: Store,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    controls: str | os.PathLike[str],
    source: dict[str, Any],
    message: Message,
) -> tuple[Store, BuildOptions, datasets.Dataset]:
    """A store of control images inside the store, without curvature rows; how it is built, and its images."""
    members = {*made.items["item_id"], *made.excluded, *(item.picture_id for item in data.items)}
    others = read_controls(controls, loaded.denoiser, source["creator_column"], members, message)
    options = replace(options, dataset=str(Path(controls).absolute()))
    return _open_or_create(made.path / store.CONTROLS, loaded, options, others, 0, source), options, others
