"""Attribute pictures with a store: features of the query → scores of all training images → a table."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from influence import curvature as curvatures
from influence import datasets, scoring, store
from influence.curvature import Curvature
from influence.errors import GradientError, OptionError, StoreError
from influence.pipeline import (
    DEFAULT_BATCH,
    Loaded,
    Message,
    Progress,
    load_for,
    read,
    run_shards,
    silent,
    take_arrays,
    with_changes,
)
from influence.scoring import METHODS, Groups
from influence.store import Store


def attribute(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | Store,
    *,
    k: int | None = 10,
    method: str = "gauss-newton",
    damping: float = 0.1,
    draws: int = 256,
    prompt: str | Sequence[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    memory: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> pd.DataFrame:
    """Rank the training images by how much training on them lowered the loss of each picture.

    Args:
        images: One picture file, or several.
        store: A store, or its folder.
        k: Rows for each query; `None` for all.
        method: Name in `METHODS`.
        damping: λ in units of tr(H)/k.
        draws: S of a query.
        prompt: The prompt that the pictures were made with, or one for each; needed if the model reads captions.
        model: Where the model is now, if it was moved since the store was built.
        lora: Where the LoRA is now.
        engine: As for `build`.
        batch_size: As for `build`.
        memory: As for `build`; of gradients, not of the solve.
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
    made.refresh()
    if made.excluded:
        message(f"{len(made.excluded)} images of store {made.path.name} are excluded")
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if k is not None and k < 1:
        raise OptionError(f"k is {k}; expected at least 1, or all")
    chosen = METHODS[method]
    require_complete(made)
    if made.spec.conditional and prompt is None:
        raise OptionError(
            f"store {made.path.name} is of a model that reads captions, and no prompt was given; "
            'pass the picture\'s --prompt TEXT (an empty one, --prompt "", counts)'
        )
    if not made.spec.conditional and prompt is not None:
        raise OptionError(f"store {made.path.name} is of a model that reads no captions; leave out --prompt")
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    prompts = [prompt] * len(paths) if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(paths):
        raise OptionError(f"there are {len(prompts)} prompts for {len(paths)} pictures; pass one, or one for each")
    loaded, options = load_for(
        made, model=model, lora=lora, draws=draws, engine=engine, batch_size=batch_size, memory=memory, device=device,
        message=message,
    )  # fmt: skip
    if made.missing(chosen.family):
        message(
            f"{method} needs gradients of another output of the training images: taking them once, kept in the store"
        )
        data = read(made.source["dataset"], loaded.denoiser, made.source["creator_column"], progress, message)
        run_shards(made, chosen.family, loaded, options, data, 1, progress, message)
    phi_q = query_features(loaded, chosen.family, paths, prompts, progress, message)
    groups = _groups(made, chosen.family)
    num_train = float(groups.files.sum())
    factored = solver(made, chosen, damping) if chosen.curvature else None
    v = scoring.precondition(chosen, torch.from_numpy(phi_q), factored, num_train)
    table = _rank(made, chosen, v, [str(path) for path in paths], k, groups)
    table.attrs |= {"method": method, "damping": damping, "draws": draws, "formula": chosen.formula}
    return table


def _open(path: str | os.PathLike[str]) -> Store:
    return store.open_store(path)


def require_complete(made: Store) -> None:
    """Refuse a store of which shards are missing.

    Raises:
        StoreError: Some are.
    """
    missing, there = made.missing("loss"), len(made.records("loss"))
    if missing:
        raise StoreError(
            f"store {made.path.name} has {there} of {there + len(missing)} shards; "
            "run the same influence build again to complete it"
        )


def query_features(
    loaded: Loaded,
    family: str,
    paths: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str | None],
    progress: Progress,
    message: Message,
) -> np.ndarray:
    """φ_q `[query, k]`, from draws of their own."""
    channels, height, width = loaded.denoiser.image_size
    recipe = with_changes(loaded.recipe, role="query", output=family, curvature_rate=0.0)
    rows = []
    for done, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        progress("queries", done, len(paths))
        image, notes = datasets.decode(Path(path))
        for note in notes:
            message(f"{Path(path).name}: {note}")
        pixels = datasets.to_array(image, height=height, width=width, channels=channels)
        taken = take_arrays(loaded.denoiser, recipe, [datasets.item_id(image, prompt)], [pixels], [prompt])
        if not np.isfinite(taken.phi).all():
            raise GradientError(f"{path}: its loss or gradient is not finite under this model")
        rows.append(taken.phi)
    progress("queries", len(paths), len(paths))
    return np.concatenate(rows)


def _groups(made: Store, family: str) -> Groups:
    """For each image that has features, how many files of each creator it is."""
    items = made.items[~made.items["item_id"].isin(list(made.refused(family)))]
    return scoring.groups(items["item_id"], items["creator"])


def solver(made: Store, method: scoring.Method, damping: float) -> Curvature:
    """Factor H + λI, or read it back if it was factored before: named by all that it depends on."""
    weights = made.items["item_id"].value_counts().astype(float)
    several = sorted(weights[weights > 1].items())  # the others weigh 1 each
    key = (made.family_hash(method.family), method.curvature, repr(float(damping)), repr(several))
    name = f"curvature-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    num_rows = made.num_rows(method.family)[method.curvature == "psi"]

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for content in made.blocks(method.family):
            w = weights[content.item_ids].to_numpy()
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
    made.write_derived(name, {"factor": made_now.factor.numpy(), "facts": np.array([made_now.damping, made_now.rows])})
    return made_now


def _rank(
    made: Store,
    method: scoring.Method,
    v: torch.Tensor,
    queries: Sequence[str],
    k: int | None,
    groups: Groups,
) -> pd.DataFrame:
    """Scan the store once for all queries; keep the best k of each, and the totals of the creators."""
    limit = len(groups.ids) if k is None else k
    best: list[scoring.Ranked] = [[] for _ in queries]
    totals = np.zeros((len(queries), len(groups.names)))
    blocks = ((content.item_ids, content.phi) for content in made.blocks(method.family))
    for ids, tau in scoring.scores(method, v, blocks):
        best = [scoring.top(so_far, ids, row, limit) for so_far, row in zip(best, tau, strict=True)]
        totals += scoring.group_totals(groups, ids, tau)
    ranked = [(q, query, item_id, score) for q, query in enumerate(queries) for score, item_id in best[q]]
    table = pd.DataFrame(ranked, columns=["number", "query", "item_id", "score"])
    files = made.items[made.items["item_id"].isin(table["item_id"])].sort_values("file_name")
    table = table.merge(files, on="item_id")  # keeps the order of scores, and under it that of the files
    table["rank"] = table.groupby("number").cumcount() + 1
    table = table[table["rank"] <= (k or len(table))]
    table["caption"] = table["caption"].astype(object).where(table["caption"].notna(), None)
    table = table[["query", "rank", "item_id", "file_name", "creator", "caption", "score"]].reset_index(drop=True)
    counts = made.items.groupby("creator").size()
    table.attrs["creator_totals"] = [
        {"query": query, "creator": creator, "total": float(total), "images": int(counts[creator])}
        for query, row in zip(queries, totals, strict=True)
        for creator, total in sorted(zip(groups.names, row, strict=True), key=lambda pair: (-pair[1], pair[0]))
    ]
    return table
