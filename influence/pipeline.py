"""Build a store: model and data set → features → shards. With `attribution`, the only composer of the stages."""

import functools
import importlib.metadata
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from influence import datasets, diffusion, executors, finetuning, gradients, keys, models, shards, spec, store
from influence import items as tables
from influence.errors import DatasetError, GradientError, OptionError
from influence.features import Features, Recipe, features, joined
from influence.horizon import BATCHES, ROWS, horizon_damping
from influence.memory import parse_size, peak, rows_within
from influence.models import Denoiser
from influence.projection import PROJECTIONS
from influence.spec import FeatureSpec
from influence.store import ShardContent, Store

Progress = Callable[[str, int, int], Any]
"""`progress(what, done, total)`."""
Message = Callable[[str], Any]
"""Called with one line that a person must see."""

LIBRARIES = ("influence", "torch", "diffusers", "peft", "transformers", "numpy", "h5py", "pillow")
DEFAULT_BATCH, MAX_BATCH = 64, 256
COPIES = 4  # of a shard's rows, at its commit: the features, HDF5's image of them, the bytes of the file, both again
_NOT_FINITE = "its loss or gradient is not finite"
_GONE = "it is excluded, and was not in the data set when its shard was built"


def silent(*_: Any) -> None:
    """The default for progress and messages."""


@dataclass(frozen=True)
class Loaded:
    """A model, a store and all that is needed to take features for it."""

    denoiser: Denoiser
    spec: FeatureSpec
    recipe: Recipe


# Build --------------------------------------------------------------------------------------------------------------


def build(
    dataset: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    lora: str | os.PathLike[str] | None = None,
    dim: int = 8192,
    projection: str = "countsketch",
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
    recipe: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    message: Message = silent,
) -> Store:
    """Take the features of every image of a fine-tune data set and keep them in a store.

    Run again, it goes on where it stopped, and takes only the features of images that were added.

    Args:
        dataset: Image folder with `metadata.csv` or `metadata.jsonl`, or with captions in `.txt` files.
        model: Diffusers pipeline folder, or training output folder; the base pipeline if `lora` is given.
        store: Folder to write to.
        lora: `pytorch_lora_weights.safetensors`, or a folder that holds it.
        dim: k, entries of a feature; the identity projection takes the number of parameters instead.
        projection: Name in `PROJECTIONS`.
        draws: S, draws (t, ε) of each image.
        curvature_rows: Curvature rows in all, spread over the images; 2 · dim by default.
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
    loaded = load(options, message)
    data = read(dataset, loaded.denoiser, creator_column, progress, message)
    source = {
        "model": options.model,
        "lora": options.lora,
        "base": None if base is None else str(Path(base).absolute()),
        "base_model": None if base is None else models.load_denoiser(Path(base)).identity["model"],
        "parameters": options.parameters,
        "resolution": options.resolution,
        "creator_column": creator_column,
    }
    if memory is not None:
        held = COPIES * shard_bytes(loaded, options, data, curvature_budget(loaded, options, data, curvature_rows)[1])
        loaded, options = within_memory(loaded, options, memory, held, message, workers)
    source["damping"] = _own_damping(Path(store), loaded, options, data, recipe, message)
    made = _open_or_create(Path(store), loaded, options, data, curvature_rows, source)
    run_shards(made, "loss", loaded, options, data, workers, progress, message)
    if controls is not None:
        _build_controls(made, loaded, options, controls, source, workers, progress, message)
    return made


@dataclass(frozen=True)
class BuildOptions:
    """What a worker process needs to do its part; see `build`."""

    dataset: str
    model: str
    lora: str | None = None
    dim: int = 8192
    projection: str = "countsketch"
    draws: int = 40
    seed: int = 0
    engine: str = "auto"
    parameters: str | None = None
    resolution: int | None = None
    batch_size: int = DEFAULT_BATCH
    device: str = "auto"
    dtype: str = "fp32"


def load(options: BuildOptions, message: Message) -> Loaded:
    """Load the model, and say how features are taken from it."""
    for name, value, least in (
        ("dim", options.dim, 1),
        ("draws", options.draws, 1),
        ("batch-size", options.batch_size, 1),
    ):
        if value < least:
            raise OptionError(f"{name} is {value}; expected at least {least}")
    if options.projection not in PROJECTIONS:
        raise OptionError(f"projection {options.projection!r} is unknown; expected one of {', '.join(PROJECTIONS)}")
    if options.dtype not in ("fp32", "bf16"):
        raise OptionError(f"dtype {options.dtype!r} is unknown; expected fp32 or bf16")
    device = _device(options.device)
    denoiser = models.load_denoiser(
        Path(options.model),
        lora=None if options.lora is None else Path(options.lora),
        parameters=options.parameters,
        resolution=options.resolution,
        device=device,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.parameters.items()}
    dim = options.dim
    if options.projection == "identity":
        dim = sum(parameter.numel() for parameter in denoiser.parameters.values())
    made = FeatureSpec(
        **denoiser.identity,
        prediction=denoiser.schedule.prediction,
        weighting=denoiser.schedule.weighting,
        sample_shape=tuple(denoiser.sample_shape),
        conditional=denoiser.conditional,
        projection=options.projection,
        dim=dim,
        seed=options.seed,
        dtype=options.dtype,
    )
    recipe = Recipe(
        schedule=denoiser.schedule,
        parameters=denoiser.parameters,
        projection=PROJECTIONS[options.projection](shapes, dim=dim, seed=options.seed, device=torch.device(device)),
        seed=options.seed,
        role="train",
        num_draws=options.draws,
        curvature_rate=0.0,
        output="loss",
        bf16=options.dtype == "bf16",
        engine=_engine(options.engine, denoiser, message),
        batch_size=options.batch_size,
    )
    return Loaded(denoiser, made, recipe)


def within_memory(
    loaded: Loaded, options: BuildOptions, memory: str, held: int, message: Message, workers: int = 1
) -> tuple[Loaded, BuildOptions]:
    """Choose the batch size by a budget, for all workers together; `held` bytes of each are for other things.

    Raises:
        OptionError: The budget is no size, or too small for one row.
    """
    denoiser, device = loaded.denoiser, torch.device(_device(options.device))
    blank = np.zeros(denoiser.image_size, np.float32)

    def cost(rows: int) -> int:
        recipe = with_changes(loaded.recipe, num_draws=rows, curvature_rate=float(rows), batch_size=rows)
        return held + peak(lambda: rows and take_arrays(denoiser, recipe, ["blank"], [blank], [""]), device)

    rows = rows_within(parse_size(memory) // workers, cost, MAX_BATCH)
    message(f"batches of {rows} rows (image, draw), for a memory of {memory}")
    return replace(loaded, recipe=with_changes(loaded.recipe, batch_size=rows)), replace(options, batch_size=rows)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _engine(name: str, denoiser: Denoiser, message: Message) -> str:
    """Choose an engine; never in silence when it is not the fast one."""
    missing = gradients.uncovered(denoiser.network, denoiser.parameters)
    if name == "auto":
        if not missing:
            return "hooks"
        message(f"the hooks engine has no rule for {missing[0]} ({len(missing)} parameters in all): using vmap, slower")
        return "vmap"
    if name not in gradients.ENGINES:
        raise OptionError(f"engine {name!r} is unknown; expected auto, {' or '.join(gradients.ENGINES)}")
    if name == "hooks" and missing:
        raise GradientError(
            f"the hooks engine has no rule for {missing[0]} ({len(missing)} parameters in all); "
            "use --engine vmap, or leave them out with --parameters"
        )
    return name


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
        progress=functools.partial(progress, "reading pictures"),
    )
    for note in data.notes:
        message(note)
    for refusal in data.refused:
        message(f"refused {refusal.file_name}: {refusal.reason}")
    if data.refused:
        message(f"{len(data.refused)} pictures refused, {len(data.items)} used")
    return data


def curvature_budget(
    loaded: Loaded, options: BuildOptions, data: datasets.Dataset, curvature_rows: int | None
) -> tuple[int, float]:
    """Curvature rows that are wanted in all, and for each image on average.

    Raises:
        OptionError: Fewer than none are wanted.
    """
    wanted = 2 * loaded.spec.dim if curvature_rows is None else curvature_rows
    if wanted < 0:
        raise OptionError(f"curvature-rows is {wanted}; expected 0 or more")
    return wanted, min(wanted / len({item.item_id for item in data.items}), float(options.draws))


def shard_bytes(loaded: Loaded, options: BuildOptions, data: datasets.Dataset, rate: float) -> int:
    """Bytes of the features of one shard."""
    k = loaded.spec.dim
    images = tables.images_per_shard(len({item.item_id for item in data.items}), k, rate)
    return shards.size(shards.layout(images, math.ceil(images * rate), k, diffusion.num_batches(options.draws)))


def own_recipe(options: BuildOptions, recipe: str | os.PathLike[str] | None) -> finetuning.FineTune | None:
    """How the model was trained, if that is known."""
    found = finetuning.find_recipe(options.model, options.lora) if recipe is None else Path(recipe)
    return None if found is None else finetuning.read_recipe(found)


def _own_damping(
    path: Path,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    recipe: str | os.PathLike[str] | None,
    message: Message,
) -> float | None:
    """λ of the fine-tune's own steps; of a store that is there already, what it has."""
    if (path / "store.json").exists():
        if recipe is not None:
            message(f"store {path.name} keeps the damping that it was made with: --recipe is not read again")
        return store.open_store(path).source.get("damping")
    trained = own_recipe(options, recipe)
    if trained is None:
        message(
            f"how the model was trained is not known: there is no {finetuning.RECIPE_FILE} beside it, and no --recipe; "
            "scores will be damped by 0.1 tr(H)/k"
        )
        return None
    rows = keys.integers(("horizon", options.seed), BATCHES * ROWS, len(data.items)).reshape(BATCHES, ROWS)
    batches = (
        encoded(loaded.denoiser, decode(loaded.denoiser, part), [item.caption for item in part])
        for part in ([data.items[i] for i in numbers] for numbers in rows)
    )
    return horizon_damping(loaded.denoiser, trained, batches, images=len(data.items), seed=options.seed)


def _open_or_create(
    path: Path,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    curvature_rows: int | None,
    source: dict[str, Any],
) -> Store:
    """Create the store, or open it to go on; in both cases the spec must be this one."""
    wanted, rate = curvature_budget(loaded, options, data, curvature_rows)
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


def _build_controls(
    made: Store,
    loaded: Loaded,
    options: BuildOptions,
    dataset: str | os.PathLike[str],
    source: dict[str, Any],
    workers: int,
    progress: Progress,
    message: Message,
) -> None:
    """Take the features of control images into a store inside the store; it has no curvature rows."""
    data = datasets.read_dataset(
        Path(dataset), creator_column=source["creator_column"], captions_required=loaded.denoiser.conditional
    )
    for note in [*data.notes, *(f"refused {refusal.file_name}: {refusal.reason}" for refusal in data.refused)]:
        message(f"controls: {note}")
    members = set(made.items["item_id"]) | made.excluded
    trained = [item for item in data.items if item.item_id in members]
    if trained:
        message(f"controls: {len(trained)} are training images and left out, {trained[0].file_name} first")
    others = replace(data, items=[item for item in data.items if item.item_id not in members])
    if not others.items:
        raise DatasetError(f"{dataset} holds no image that was not trained on; pass others as controls")
    options = replace(options, dataset=str(Path(dataset).absolute()))
    before = made.controls()
    if before is not None and before.source["dataset"] != options.dataset:
        raise OptionError(
            f"the controls of store {made.path.name} are those of {before.source['dataset']}; pass that folder again, "
            "with more pictures if there are more, or build another --store"
        )
    inside = _open_or_create(made.path / store.CONTROLS, loaded, options, others, 0, source)
    run_shards(inside, "loss", loaded, options, others, workers, progress, message)


def load_for(
    made: Store,
    *,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    draws: int,
    engine: str,
    batch_size: int,
    device: str,
    message: Message,
    memory: str | None = None,
) -> tuple[Loaded, BuildOptions]:
    """Load the model of a store, and make sure that it is the one.

    Args:
        made: The store.
        model: Where its model is now, if it was moved.
        lora: Where its LoRA is now.
        draws: S.
        engine: As for `build`.
        batch_size: As for `build`.
        device: As for `build`.
        message: Called with lines that a person must see.
        memory: As for `build`.

    Raises:
        InfluenceError: The model is not there, or is another one.
    """
    source = made.source
    options = BuildOptions(
        dataset=source["dataset"],
        model=source["model"] if model is None else str(Path(model).absolute()),
        lora=source["lora"] if lora is None else str(Path(lora).absolute()),
        dim=made.spec.dim,
        projection=made.spec.projection,
        draws=draws,
        seed=made.spec.seed,
        engine=engine,
        parameters=source["parameters"],
        resolution=source["resolution"],
        batch_size=batch_size,
        device=device,
        dtype=made.spec.dtype,
    )
    if not Path(options.model).is_dir():
        raise OptionError(f"the model of the store was at {options.model} and is not there; say where with --model DIR")
    loaded = load(options, message)
    spec.check_equal(
        loaded.spec.to_json(),
        made.spec.to_json(),
        what="the model",
        where=f"store {made.path.name}",
        advice="Pass the model and LoRA that the store was built with.",
    )
    return (loaded, options) if memory is None else within_memory(loaded, options, memory, 0, message)


def run_shards(
    made: Store,
    family: str,
    loaded: Loaded,
    options: BuildOptions,
    data: datasets.Dataset,
    workers: int,
    progress: Progress,
    message: Message,
    only: Collection[int] | None = None,
) -> None:
    """Build the shards of one family that are not there yet: all, or `only` some."""
    todo = [shard for shard in made.missing(family) if only is None or shard in only]
    finished = len(made.records(family))
    total = finished + len(todo)

    def done(shard: int) -> None:
        nonlocal finished
        finished += 1
        progress("gradients", finished, total)

    progress("gradients", finished, total)
    if workers == 1:
        executors.run_here(_shard_work(made, family, loaded, data), todo, done)
    elif todo:
        prepare = functools.partial(_prepare_worker, made.path, family, options, data)
        executors.run_processes(prepare, todo, workers, done)
    refused = made.refused(family)
    names = made.items.drop_duplicates("item_id").set_index("item_id")["file_name"]
    for item_id, reason in refused.items():
        message(f"refused {names[item_id]} ({item_id}): {reason}")
    if refused:
        message(f"{len(refused)} images have no features, {made.num_rows(family)[0]} have")


def _prepare_worker(
    path: Path, family: str, options: BuildOptions, data: datasets.Dataset, workers: int
) -> executors.Work:
    """In a worker process: load everything again."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers)))
    loaded = load(options, silent)
    return _shard_work(store.open_store(path), family, loaded, data)


def _shard_work(made: Store, family: str, loaded: Loaded, data: datasets.Dataset) -> executors.Work:
    """Work that builds and commits one shard."""
    spec.check_equal(
        loaded.spec.to_json(),
        made.spec.to_json(),
        what="the model given",
        where=f"store {made.path.name}",
        advice="Use the model that the store was made with, or another --store folder.",
    )
    rate = made.build["curvature_rate"] if family == "loss" else 0.0
    output = "loss" if family == "base" else family
    recipe = with_changes(loaded.recipe, output=output, num_draws=made.build["draws"], curvature_rate=rate)
    by_id = {item.item_id: item for item in data.items}

    def work(shard: int) -> None:
        ids = made.shard_items(shard)
        refused = dict.fromkeys([i for i in ids if i not in by_id and i in made.excluded], _GONE)
        ids = [item_id for item_id in ids if item_id not in refused]
        absent = [item_id for item_id in ids if item_id not in by_id]
        if absent:
            raise DatasetError(
                f"{len(absent)} images of the store are not in the data set any more, {absent[0]} first; "
                "build needs them to go on: put them back, or build another --store"
            )
        taken = take(loaded.denoiser, recipe, [by_id[item_id] for item_id in ids])
        made.commit(_content(family, shard, ids, taken, refused))

    return work


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values of some fields."""
    return Recipe(**{**vars(recipe), **changes})


def take(denoiser: Denoiser, recipe: Recipe, items: Sequence[datasets.Item]) -> Features:
    """Load images, and take their features; pictures of one batch at a time are in memory."""
    parts = []
    for start in range(0, max(len(items), 1), recipe.batch_size):
        part = items[start : start + recipe.batch_size]
        ids, captions = [item.item_id for item in part], [item.caption for item in part]
        parts.append(take_arrays(denoiser, recipe, ids, decode(denoiser, part), captions))
    return joined(parts)


def decode(denoiser: Denoiser, items: Sequence[datasets.Item]) -> list[np.ndarray]:
    """Pixels of images, as the model takes them."""
    channels, height, width = denoiser.image_size
    return [datasets.load(item, height=height, width=width, channels=channels) for item in items]


def take_arrays(
    denoiser: Denoiser,
    recipe: Recipe,
    item_ids: Sequence[str],
    pixels: Sequence[np.ndarray],
    captions: Sequence[str | None],
) -> Features:
    """Encode pictures and their captions once, and take their features."""
    return features(denoiser.network, recipe, item_ids, *encoded(denoiser, pixels, captions))


def encoded(
    denoiser: Denoiser, pixels: Sequence[np.ndarray], captions: Sequence[str | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x₀ and c of pictures, on the network's device."""
    device = next(iter(denoiser.parameters.values())).device
    if not pixels:
        return torch.empty(0, *denoiser.sample_shape, device=device), None
    x0 = torch.cat([denoiser.encode_images(torch.from_numpy(image)[None].to(device)) for image in pixels])
    if not denoiser.conditional:
        return x0, None
    return x0, torch.cat([denoiser.encode_captions([caption or ""]) for caption in captions])


def _content(
    family: str, shard: int, ids: Sequence[str], taken: Features, refused: dict[str, str] | None = None
) -> ShardContent:
    """What is committed: rows that are finite throughout; the other images are refused by name."""
    bad_psi = set(taken.psi_item[~np.isfinite(taken.psi).all(1)].tolist())
    good = np.isfinite(taken.phi).all(1) & np.isfinite(taken.loss)
    good &= ~np.isin(np.arange(len(ids)), list(bad_psi))
    index = np.cumsum(good) - 1
    keep = good[taken.psi_item]
    scale = np.abs(taken.phi_batch[good]).max(2, initial=0)
    half = (taken.phi_batch[good] / np.where(scale > 0, scale, 1)[:, :, None]).astype(np.float16)
    return ShardContent(
        family=family,
        shard=shard,
        item_ids=[item_id for item_id, ok in zip(ids, good, strict=True) if ok],
        phi=taken.phi[good],
        phi_batch=half,
        phi_scale=scale,
        loss=taken.loss[good],
        psi=taken.psi[keep],
        psi_item=index[taken.psi_item[keep]].astype(np.int32),
        psi_draw=taken.psi_draw[keep],
        refused={i: _NOT_FINITE for i, ok in zip(ids, good, strict=True) if not ok} | (refused or {}),
    )
