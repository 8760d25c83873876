"""Is a picture a near copy of a training picture of a store? Which training pictures are near duplicates?

By looks alone, beside the scores and never mixed with them; see `similarity` for the rule.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from influence import datasets, similarity
from influence import store as stores
from influence.datasets import Item
from influence.errors import DatasetError, OptionError, StoreError
from influence.loading import load_for
from influence.models import Denoiser, pictures_at_once
from influence.progress import Message, Progress, silent
from influence.similarity import SIDE
from influence.store import Store

Name = str | os.PathLike[str]

METRICS = ("pixel", "latent")
COLUMNS = [
    "query", "metric", "item_id", "file_name", "creator", "similarity", "threshold", "ratio", "ratio_limit",
    "near_copy",
]  # fmt: skip
_FEW = 1000  # pairs that a 99.9 % quantile needs


def near_copies(
    images: Name | Sequence[Name],
    store: Name | Store,
    *,
    metrics: Sequence[str] = ("pixel",),
    embedding: Name | None = None,
    dataset: Name | None = None,
    denoiser: Denoiser | None = None,
    model: Name | None = None,
    lora: Name | None = None,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> pd.DataFrame:
    """Find the training picture that each picture is most similar to, and whether the picture is a near copy of it.

    Each metric has its own background and makes its own call. A picture is a near copy if one of them says so: a copy
    may be hidden from one (a changed colour, a new style of line), and chance is held down in each.

    Args:
        images: One picture file, or several.
        store: A store, or its folder.
        metrics: `pixel`, `latent` or both: `similarity.similarity` of pictures, or of what the model's encoder makes
            of them, at up to 32 pixels of a side.
        embedding: A Parquet file of embeddings of your own, for a third metric, `embedding`: their cosine. Columns
            `file_name` and `embedding` (a list of numbers), a row for each training picture, by its name in the data
            set, and for each of `images`, by its path as given.
        dataset: Where the data set is now, if it was moved since the store was built.
        denoiser: The model of the store, if it is loaded already; only `latent` needs it.
        model: Where the model is now.
        lora: Where the LoRA is now.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        One row for each picture and metric: query, metric, item_id, file_name and creator of the nearest training
        picture, similarity (−1 … 1), threshold (99.9 % of the training set's own pairs are below), ratio, ratio_limit
        (what the ratio must be below), near_copy. Without two different training pictures there is no background, and
        near duplicates alone are near copies. Excluded pictures are left out.

    Raises:
        InfluenceError: A picture, an embedding or the data set cannot be used, or is not that of the store.
    """
    made = store if isinstance(store, Store) else stores.open_store(store)
    made.refresh()
    odd = next((metric for metric in metrics if metric not in METRICS), None)
    if odd is not None or not (metrics or embedding):
        found = "no metric" if odd is None else f"metric {odd!r}"
        raise OptionError(f"{found} is given; expected {' or '.join(METRICS)}, or a file of embeddings")
    names = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    items = training_items(made, dataset, progress)
    shape = compared_shape(made)
    works = pixels(items, shape)
    sample = similarity.sample([item.item_id for item in items])
    same = similarity.duplicates(works[sample], works)
    same[np.arange(len(sample)), sample] = True
    table = []
    copies: dict[int, np.ndarray] = {}
    for metric in [*metrics, *["embedding"] * (embedding is not None)]:
        if metric == "pixel":
            compare, trained, asked = similarity.similarity, works, pixels(names, shape)
        elif metric == "latent":
            if denoiser is None:
                denoiser = load_for(
                    made, model=model, lora=lora, draws=1, engine="auto", batch_size=1, device=device, message=message
                )[0].denoiser
            compare = similarity.similarity
            trained = _trained_latents(made, denoiser, items, progress, message)
            asked = _latents(denoiser, names, silent)
        else:
            compare = similarity.cosine
            trained, asked = _embeddings(Path(str(embedding)), [item.file_name for item in items], names)
        null = similarity.background(compare(trained[sample], trained), same)
        if null.pairs < _FEW:
            message(f"the background of near copies ({metric}) is of {null.pairs} pairs only; {_FEW} make a quantile")
        alike = None if null.pairs else similarity.duplicates(pixels(names, shape), works)  # with nothing to compare to
        for number, (name, values) in enumerate(zip(names, compare(asked, trained), strict=True)):
            index = int(values.argmax())
            if index not in copies:
                copies[index] = similarity.duplicates(works[[index]], works)[0]
                copies[index][index] = True
            found = similarity.nearest(values, copies[index], null)
            item = items[found.index]
            near = found.near_copy if alike is None else bool(alike[number, found.index])
            facts = (found.similarity, null.threshold, found.ratio, null.ratio_limit, near)
            table.append((str(name), metric, item.item_id, item.file_name, item.creator, *facts))
    return pd.DataFrame(table, columns=COLUMNS)


def duplicate_clusters(
    store: Name | Store,
    *,
    dataset: Name | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Near-duplicate cluster of each training picture of a store that is not excluded.

    All pairs of pictures are compared, once: the answer is kept in the store, named by the pictures' ids.

    Args:
        store: A store, or its folder.
        dataset: Where the data set is now, if it was moved since the store was built.
        progress: Called as work gets done.

    Returns:
        For each item id that of its cluster: the least item id in it. A picture without duplicates is its own.

    Raises:
        InfluenceError: The data set cannot be used, or is not that of the store.
    """
    made = store if isinstance(store, Store) else stores.open_store(store)
    made.refresh()
    ids, shape = sorted(set(made.items["item_id"])), compared_shape(made)
    key = repr((ids, shape, similarity.SIDE, similarity.SHIFT, similarity.DUPLICATE))
    name = f"clusters-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    kept = made.read_derived(name)
    if kept is None:
        there = {item.item_id: item for item in training_items(made, dataset, progress)}
        kept = {"clusters": similarity.clusters(pixels([there[item_id] for item_id in ids], shape))}
        made.write_derived(name, kept)
    first: dict[int, str] = {}
    return {item_id: first.setdefault(int(c), item_id) for item_id, c in zip(ids, kept["clusters"], strict=True)}


def training_items(made: Store, dataset: Name | None, progress: Progress = silent) -> list[Item]:
    """The training pictures of a store that are not excluded, one for each item id, by file name.

    Raises:
        StoreError: The data set lacks pictures of the store.
        DatasetError: It cannot be read.
    """
    if not len(made.items):
        raise StoreError(f"all images of store {made.path.name} are excluded: there is nothing to compare with")
    root = made.pictures(dataset)
    reading = functools.partial(progress, "reading pictures")
    data = datasets.read_dataset(root, creator_column=made.source["creator_column"], progress=reading)
    wanted = set(made.items["item_id"])
    there = {item.item_id: item for item in sorted(data.items, key=lambda item: item.file_name, reverse=True)}
    if absent := sorted(wanted - set(there)):
        files = made.items.set_index("item_id")["file_name"].loc[[absent[0]]].iloc[0]
        found = f"{root} lacks {len(absent)} of the {len(wanted)} pictures of store {made.path.name}, {files!r} first"
        raise StoreError(f"{found}; expected all as they were: put them back, or exclude them")
    return sorted((there[item_id] for item_id in wanted), key=lambda item: item.file_name)


def compared_shape(made: Store) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that are compared: the model's own, up to 32 pixels."""
    channels, height, width = made.spec.sample_shape
    if made.spec.conditional:  # of a latent; the pictures are larger
        return 3, SIDE, SIDE
    return channels, min(height, SIDE), min(width, SIDE)


def pixels(pictures: Sequence[Item | Name], shape: tuple[int, int, int]) -> Tensor:
    """Training pictures or files, `[pictures, *shape]`."""
    channels, height, width = shape
    arrays = [
        datasets.load(picture, height=height, width=width, channels=channels)
        if isinstance(picture, Item)
        else datasets.to_array(datasets.decode(picture)[0], height=height, width=width, channels=channels)
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(arrays))


def metrics_of(denoiser: Denoiser) -> tuple[str, ...]:
    """Those that a model allows: latents are others than pixels only where there is an encoder."""
    return METRICS if tuple(denoiser.sample_shape) != tuple(denoiser.image_size) else METRICS[:1]


def _trained_latents(
    made: Store, denoiser: Denoiser, items: Sequence[Item], progress: Progress, message: Message
) -> Tensor:
    """Latents of training pictures, made once and kept in the store, named by the pictures' ids and the model."""
    key = repr(([item.item_id for item in items], made.spec.to_json(), similarity.SIDE))
    name = f"latents-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    kept = made.read_derived(name)
    if kept is None:
        message(f"encoding {len(items)} training pictures once for near copies, kept in the store")
        kept = {"latents": _latents(denoiser, items, progress).numpy()}
        made.write_derived(name, kept)
    return torch.from_numpy(kept["latents"])


def _latents(denoiser: Denoiser, pictures: Sequence[Item | Name], progress: Progress) -> Tensor:
    """What the model's encoder makes of pictures, averaged down to at most 32 of a side."""
    height, width = (min(side, SIDE) for side in denoiser.sample_shape[1:])
    device = next(iter(denoiser.parameters.values())).device
    parts = []
    size = pictures_at_once(denoiser)
    for first in range(0, len(pictures), size):
        progress("latents", first, len(pictures))
        part = pixels(pictures[first : first + size], denoiser.image_size)
        latents = denoiser.encode_images(part.to(device)).float()
        parts.append(torch.nn.functional.adaptive_avg_pool2d(latents, (height, width)).cpu())
    progress("latents", len(pictures), len(pictures))
    return torch.cat(parts)


def _embeddings(file: Path, trained: Sequence[str], asked: Sequence[Name]) -> tuple[np.ndarray, np.ndarray]:
    """A user's embeddings of the training pictures and of the queries."""
    try:
        table = pd.read_parquet(file, columns=["file_name", "embedding"]).set_index("file_name")["embedding"]
        rows = {str(name): np.asarray(row, dtype=np.float64) for name, row in table.items()}
        widths = {row.shape for row in rows.values()}
    except Exception as error:  # pyarrow raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{file} cannot be read ({reason}); expected a Parquet file with columns file_name and embedding"
        ) from error
    if len(rows) < len(table):
        raise DatasetError(f"{file} names a picture twice; expected one row for each file_name")
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise DatasetError(f"{file} has embeddings of shapes {sorted(widths)}; expected lists of numbers, all as long")
    names = [[str(name) for name in part] for part in (trained, asked)]
    if absent := [name for part in names for name in part if name not in rows]:
        found = f"{file} has no embedding of {absent[0]!r}, {len(absent)} pictures in all"
        raise DatasetError(f"{found}; expected one for each training picture and each query: add them")
    trained_rows, asked_rows = (np.stack([rows[name] for name in part]) for part in names)
    return trained_rows, asked_rows
