"""Build a store, and attribute pictures with it: the only module that composes the stages."""

import functools
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from influence import curvature as curvatures
from influence import datasets, executors, gradients, models, scoring, spec, store
from influence.curvature import Curvature
from influence.errors import DatasetError, GradientError, InfluenceError, OptionError, StoreError
from influence.features import Features, Recipe, features
from influence.models import Denoiser
from influence.projection import PROJECTIONS
from influence.scoring import METHODS
from influence.spec import FeatureSpec
from influence.store import ShardContent, Store

Progress = Callable[[str, int, int], Any]
"""`progress(what, done, total)`."""
Message = Callable[[str], Any]
"""Called with one line that a person must see."""

LIBRARIES = ("influence", "torch", "diffusers", "peft", "transformers", "numpy", "h5py", "pillow")
DEFAULT_BATCH = 64


def _silent(*_: Any) -> None:
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
    device: str = "auto",
    dtype: str = "fp32",
    workers: int = 1,
    progress: Progress = _silent,
    message: Message = _silent,
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
        device: `auto`, `cpu`, `cuda` …
        dtype: `fp32`, or `bf16` for the forward and backward passes.
        workers: Number of processes.
        progress: Called as work gets done.
        message: Called with assumptions, refusals and warnings, one line each.

    Raises:
        InfluenceError: An input cannot be used; one line says what was found, expected, and to do.
    """
    options = _BuildOptions(
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
    loaded = _load(options, message)
    data = _read(dataset, loaded.denoiser, creator_column, progress, message)
    made = _open_or_create(store, loaded, options, data, curvature_rows, creator_column)
    _run(made, "loss", loaded, options, data, workers, progress, message)
    return made


@dataclass(frozen=True)
class _BuildOptions:
    """What a worker process needs to do its part."""

    dataset: str
    model: str
    lora: str | None
    dim: int
    projection: str
    draws: int
    seed: int
    engine: str
    parameters: str | None
    resolution: int | None
    batch_size: int
    device: str
    dtype: str


def _load(options: _BuildOptions, message: Message) -> Loaded:
    """Load the model, and say how features are taken from it."""
    for name, value, least in (("dim", options.dim, 1), ("draws", options.draws, 1), ("batch-size", options.batch_size, 1)):
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


def _read(
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


def _open_or_create(
    path: str | os.PathLike[str],
    loaded: Loaded,
    options: _BuildOptions,
    data: datasets.Dataset,
    curvature_rows: int | None,
    creator_column: str | None,
) -> Store:
    """Create the store, or open it to go on; in both cases the spec must be this one."""
    wanted = 2 * loaded.spec.dim if curvature_rows is None else curvature_rows
    if wanted < 0:
        raise OptionError(f"curvature-rows is {wanted}; expected 0 or more")
    # The rate belongs to the store: images that are added later do not change the rows of those already there.
    rate = min(wanted / len({item.item_id for item in data.items}), options.draws)
    if (Path(path) / "store.json").exists():
        rate = store.open_store(path).build.get("curvature_rate", rate)
    items = pd.DataFrame(
        [(i.item_id, i.file_name, i.caption, i.creator, i.licence) for i in data.items],
        columns=["item_id", "file_name", "caption", "creator", "licence"],
    )
    return store.create(
        path,
        spec=loaded.spec,
        build={"draws": options.draws, "curvature_rows": wanted, "curvature_rate": rate},
        source={
            "dataset": options.dataset,
            "dataset_sha256": datasets.dataset_fingerprint(data.items),
            "model": options.model,
            "lora": options.lora,
            "parameters": options.parameters,
            "resolution": options.resolution,
            "creator_column": creator_column,
            "refused": {refusal.file_name: refusal.reason for refusal in data.refused},
            "notes": [*loaded.denoiser.notes, *data.notes],
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        items=items,
    )


def _run(
    made: Store,
    family: str,
    loaded: Loaded,
    options: _BuildOptions,
    data: datasets.Dataset,
    workers: int,
    progress: Progress,
    message: Message,
) -> None:
    """Build the shards of one family that are not there yet."""
    todo = made.missing(family)
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
    for item_id, reason in refused.items():
        message(f"refused {item_id}: {reason}")


def _prepare_worker(
    path: Path, family: str, options: _BuildOptions, data: datasets.Dataset, workers: int
) -> executors.Work:
    """In a worker process: load everything again."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    loaded = _load(options, _silent)
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
    recipe = _replaced(loaded.recipe, output=family, num_draws=made.build["draws"], curvature_rate=rate)
    by_id = {item.item_id: item for item in data.items}

    def work(shard: int) -> None:
        ids = made.shard_items(shard)
        absent = [item_id for item_id in ids if item_id not in by_id]
        if absent:
            raise DatasetError(
                f"{len(absent)} images of the store are not in the data set any more, {absent[0]} first; "
                "build needs them to go on: put them back, or build another --store"
            )
        taken = _take(loaded.denoiser, recipe, [by_id[item_id] for item_id in ids])
        made.commit(_content(family, shard, ids, taken))

    return work


def _replaced(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe(**{**vars(recipe), **changes})


def _take(denoiser: Denoiser, recipe: Recipe, items: Sequence[datasets.Item]) -> Features:
    """Load images, encode them and their captions once, and take their features."""
    channels, height, width = denoiser.image_size
    pixels = [datasets.load(item, height=height, width=width, channels=channels) for item in items]
    return _take_arrays(denoiser, recipe, [i.item_id for i in items], pixels, [i.caption for i in items])


def _take_arrays(
    denoiser: Denoiser,
    recipe: Recipe,
    item_ids: Sequence[str],
    pixels: Sequence[np.ndarray],
    captions: Sequence[str | None],
) -> Features:
    device = next(iter(denoiser.parameters.values())).device
    x0 = torch.cat([denoiser.encode_images(torch.from_numpy(image)[None].to(device)) for image in pixels])
    cond = None
    if denoiser.conditional:
        cond = torch.cat([denoiser.encode_captions([caption or ""]) for caption in captions])
    return features(denoiser.network, recipe, item_ids, x0, cond)


def _content(family: str, shard: int, ids: Sequence[str], taken: Features) -> ShardContent:
    """What is committed: rows that are finite throughout; the other images are refused by name."""
    bad_psi = set(taken.psi_item[~np.isfinite(taken.psi).all(1)].tolist())
    good = np.isfinite(taken.phi).all(1) & np.isfinite(taken.loss)
    good &= ~np.isin(np.arange(len(ids)), list(bad_psi))
    index = np.cumsum(good) - 1
    keep = good[taken.psi_item]
    return ShardContent(
        family=family,
        shard=shard,
        item_ids=[item_id for item_id, ok in zip(ids, good, strict=True) if ok],
        phi=taken.phi[good],
        loss=taken.loss[good],
        psi=taken.psi[keep],
        psi_item=index[taken.psi_item[keep]].astype(np.int32),
        psi_draw=taken.psi_draw[keep],
        refused={i: "its loss or gradient is not finite" for i, ok in zip(ids, good, strict=True) if not ok},
    )


# Plan ---------------------------------------------------------------------------------------------------------------


def plan(dataset: str | os.PathLike[str], *, model: str | os.PathLike[str], message: Message = _silent, **options: Any) -> dict[str, Any]:
    """Say what a build would cost, from two measured batches; takes the options of `build` and writes nothing.

    Returns:
        Images, draws, curvature rows, bytes on disk, seconds (one process), engine and parameters.

    Raises:
        InfluenceError: An input cannot be used.
    """
    creator_column, curvature_rows = options.pop("creator_column", None), options.pop("curvature_rows", None)
    progress, lora = options.pop("progress", _silent), options.pop("lora", None)
    for name in ("store", "workers"):
        options.pop(name, None)
    defaults = {
        "dim": 8192, "projection": "countsketch", "draws": 40, "seed": 0, "engine": "auto", "parameters": None,
        "resolution": None, "batch_size": DEFAULT_BATCH, "device": "auto", "dtype": "fp32",
    }  # fmt: skip
    chosen = _BuildOptions(
        dataset=str(dataset), model=str(model), lora=None if lora is None else str(lora), **defaults | options
    )
    loaded = _load(chosen, message)
    data = _read(dataset, loaded.denoiser, creator_column, progress, message)
    unique = list({item.item_id: item for item in data.items}.values())
    k, n = loaded.spec.dim, len(unique)
    rows = min(2 * k if curvature_rows is None else curvature_rows, n * chosen.draws)
    recipe = _replaced(loaded.recipe, curvature_rate=rows / n)
    sample = unique[: max(1, recipe.batch_size // chosen.draws)]
    seconds = []
    for _ in range(2):  # the first pays for allocations and kernels: the second is the price
        start = time.perf_counter()
        _take(loaded.denoiser, recipe, sample)
        seconds.append(time.perf_counter() - start)
    return {
        "images": n,
        "files": len(data.items),
        "refused": len(data.refused),
        "draws": chosen.draws,
        "curvature_rows": rows,
        "parameters": sum(parameter.numel() for parameter in loaded.denoiser.parameters.values()),
        "dim": k,
        "engine": recipe.engine,
        "device": _device(chosen.device),
        "disk_bytes": 4 * k * (n + rows),
        "seconds": seconds[0] - seconds[1] + seconds[1] * n / len(sample),
    }


# Attribute ----------------------------------------------------------------------------------------------------------


def attribute(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | Store,
    *,
    k: int | None = 10,
    method: str = "gauss-newton",
    damping: float = 0.1,
    draws: int = 256,
    prompt: str | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    device: str = "auto",
    progress: Progress = _silent,
    message: Message = _silent,
) -> pd.DataFrame:
    """Rank the training images by how much training on them lowered the loss of each picture.

    Args:
        images: One picture file, or several.
        store: A store, or its folder.
        k: Rows for each query; `None` for all.
        method: Name in `METHODS`.
        damping: λ in units of tr(H)/k.
        draws: S of a query.
        prompt: The prompt that the picture was made with; needed if the model reads captions.
        model: Where the model is now, if it was moved since the store was built.
        lora: Where the LoRA is now.
        engine: As for `build`.
        batch_size: As for `build`.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        Columns query, rank, item_id, file_name, creator, caption, score; rows by query and rank. `attrs` holds
        `creator_totals`: for each query and creator the signed sum over *all* images, and `method`, `damping`, `draws`.

    Raises:
        InfluenceError: An input cannot be used, or the model is not the one of the store.
    """
    made = store if isinstance(store, Store) else _open(store)
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if k is not None and k < 1:
        raise OptionError(f"k is {k}; expected at least 1, or all")
    chosen = METHODS[method]
    _require_complete(made)
    if made.spec.conditional and prompt is None:
        raise OptionError(
            f"store {made.path.name} is of a model that reads captions, and no prompt was given; "
            'pass the picture\'s --prompt TEXT (an empty one, --prompt "", counts)'
        )
    if not made.spec.conditional and prompt is not None:
        raise OptionError(f"store {made.path.name} is of a model that reads no captions; leave out --prompt")
    loaded, options = _load_for(made, model, lora, draws, engine, batch_size, device, message)
    if made.missing(chosen.family):
        message(f"{method} needs gradients of another output of the training images: taking them once, kept in the store")
        data = _read(made.source["dataset"], loaded.denoiser, made.source["creator_column"], progress, message)
        _run(made, chosen.family, loaded, options, data, 1, progress, message)
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    phi_q = _query_features(loaded, chosen.family, paths, prompt, progress, message)
    groups = _groups(made.items)
    num_train = float(sum(sum(files.values()) for files in groups.values()))
    solver = _curvature(made, chosen, damping) if chosen.curvature else None
    v = scoring.precondition(chosen, torch.from_numpy(phi_q), solver, num_train)
    table = _rank(made, chosen, v, [str(path) for path in paths], k, groups)
    table.attrs |= {"method": method, "damping": damping, "draws": draws, "formula": chosen.formula}
    return table


def _open(path: str | os.PathLike[str]) -> Store:
    return store.open_store(path)


def _require_complete(made: Store) -> None:
    missing, there = made.missing("loss"), len(made.records("loss"))
    if missing:
        raise StoreError(
            f"store {made.path.name} has {there} of {there + len(missing)} shards; "
            "run the same influence build again to complete it"
        )


def _load_for(
    made: Store,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    draws: int,
    engine: str,
    batch_size: int,
    device: str,
    message: Message,
) -> tuple[Loaded, _BuildOptions]:
    """Load the model of a store, and make sure that it is the one."""
    source = made.source
    options = _BuildOptions(
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
    loaded = _load(options, message)
    spec.check_equal(
        loaded.spec.to_json(),
        made.spec.to_json(),
        what="the model",
        where=f"store {made.path.name}",
        advice="Pass the model and LoRA that the store was built with.",
    )
    return loaded, options


def _query_features(
    loaded: Loaded,
    family: str,
    paths: Sequence[str | os.PathLike[str]],
    prompt: str | None,
    progress: Progress,
    message: Message,
) -> np.ndarray:
    """φ_q `[query, k]`, from draws of their own."""
    channels, height, width = loaded.denoiser.image_size
    recipe = _replaced(loaded.recipe, role="query", output=family, curvature_rate=0.0)
    rows = []
    for done, path in enumerate(paths):
        progress("queries", done, len(paths))
        image, notes = datasets.decode(Path(path))
        for note in notes:
            message(f"{Path(path).name}: {note}")
        pixels = datasets.to_array(image, height=height, width=width, channels=channels)
        taken = _take_arrays(loaded.denoiser, recipe, [datasets.item_id(image, prompt)], [pixels], [prompt])
        if not np.isfinite(taken.phi).all():
            raise GradientError(f"{path}: its loss or gradient is not finite under this model")
        rows.append(taken.phi)
    progress("queries", len(paths), len(paths))
    return np.concatenate(rows)


def _groups(items: pd.DataFrame) -> dict[str, dict[str, int]]:
    """For each image, how many files of each creator it is."""
    counts = items.groupby(["item_id", "creator"], sort=True).size()
    groups: dict[str, dict[str, int]] = {}
    for (item_id, creator), files in counts.items():
        groups.setdefault(item_id, {})[creator] = int(files)
    return groups


def _curvature(made: Store, method: scoring.Method, damping: float) -> Curvature:
    """Factor H + λI, or read it back if it was factored before: named by all that it depends on."""
    files = made.items.groupby("item_id").size()
    weights = {item_id: float(n) for item_id, n in files.items()}
    key = (made.family_hash(method.family), method.curvature, repr(float(damping)), repr(sorted(weights.items())))
    name = f"curvature-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    records = made.records(method.family).values()
    num_rows = sum(r.psi_rows if method.curvature == "psi" else r.rows for r in records)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for content in made.blocks(method.family):
            w = np.array([weights[item_id] for item_id in content.item_ids])
            if method.curvature == "psi":
                yield content.psi, w[content.psi_item]
            else:
                yield content.phi, w

    kept = made.read_derived(name)
    if kept is not None:
        factor, facts = torch.from_numpy(kept["factor"]), kept["facts"]
        psi = None
        if len(factor) != made.spec.dim or num_rows < made.spec.dim:
            psi = curvatures.stack(blocks())
        return Curvature(factor, float(facts[0]), float(facts[1]), psi)
    made_now = curvatures.curvature(blocks(), dim=made.spec.dim, damping=damping, num_rows=num_rows)
    made.write_derived(
        name, {"factor": made_now.factor.numpy(), "facts": np.array([made_now.damping, made_now.rows])}
    )
    return made_now


def _rank(
    made: Store,
    method: scoring.Method,
    v: torch.Tensor,
    queries: Sequence[str],
    k: int | None,
    groups: dict[str, dict[str, int]],
) -> pd.DataFrame:
    """Scan the store once for all queries; keep the best k of each, and the totals of the creators."""
    limit = len(groups) if k is None else k
    best: list[scoring.Ranked] = [[] for _ in queries]
    totals: list[dict[str, float]] = [{} for _ in queries]
    blocks = ((content.item_ids, content.phi) for content in made.blocks(method.family))
    for ids, tau in scoring.scores(method, v, blocks):
        for q in range(len(queries)):
            best[q] = scoring.top(best[q], ids, tau[q], limit)
            scoring.group_totals(totals[q], ids, tau[q], groups)
    files = {item_id: rows for item_id, rows in made.items.sort_values("file_name").groupby("item_id")}
    rows = []
    for query, ranked in zip(queries, best, strict=True):
        listed = [(item, score) for score, item_id in ranked for item in files[item_id].itertuples()][: k or None]
        for rank, (item, score) in enumerate(listed, 1):
            caption = None if pd.isna(item.caption) else item.caption
            rows.append((query, rank, item.item_id, item.file_name, item.creator, caption, score))
    table = pd.DataFrame(
        rows, columns=["query", "rank", "item_id", "file_name", "creator", "caption", "score"]
    )
    counts = made.items.groupby("creator").size()
    table.attrs["creator_totals"] = [
        {"query": query, "creator": creator, "total": total, "images": int(counts[creator])}
        for query, of in zip(queries, totals, strict=True)
        for creator, total in sorted(of.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    return table
