"""Attribute pictures with a store: features of the query → scores of all training images → significance → a table."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from influence import derived, scanning, scoring, significance
from influence import store as stores
from influence.building import run_shards
from influence.curvature import Curvature
from influence.ensemble import combined
from influence.errors import OptionError, StoreError
from influence.loading import DEFAULT_BATCH, load_for
from influence.pipeline import read
from influence.progress import Message, Progress, silent
from influence.queries import control_losses, losses_alone, read_queries
from influence.scored import COLUMNS, Controls, Creators, Scored, creator_rows, query_rows
from influence.scoring import METHODS
from influence.shards import FAMILIES
from influence.store import Store
from influence.waypoints import base_is_known, default_method, load_base, model_of
from influence.wholeway import whole_way, with_alone

Stores = str | os.PathLike[str] | Store | Sequence[str | os.PathLike[str] | Store]


def attribute(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: Stores,
    *,
    k: int | None = 10,
    method: str | None = None,
    damping: float | None = None,
    draws: int = 256,
    prompt: str | Sequence[str] | None = None,
    intervals: bool = True,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    half: str | os.PathLike[str] | None = None,
    dataset: str | os.PathLike[str] | None = None,
    controls: str | os.PathLike[str] | None = None,
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
        store: A store, or its folder; or several of the same data set, of models that were retrained or checkpoints:
            scores are then means, and intervals cover that training again gives another model.
        k: Rows for each query; `None` for all.
        method: Name in `METHODS`; by default `two-length` where the store has a fine-tune of half the length, or else
            `two-point` where the model before the fine-tune is known, or else `gauss-newton`.
        damping: λ in units of tr(H)/k. By default that of the fine-tune's own steps (`horizon`), for methods of its
            curvature and if the store knows how it was trained, or else 0.1.
        draws: S of a query.
        prompt: The prompt that the pictures were made with, or one for each; needed if the model reads captions.
        intervals: Whether to give standard errors: a second scan of the store, of more bytes than the first.
        model: Where the model is now, if it was moved since the store was built.
        lora: Where the LoRA is now.
        base: The pipeline that the fine-tune started from, if it was not named at build; a LoRA's is known.
        half: Where the model of half the length is now, if it was moved.
        dataset: Where the data set is now; its pictures are needed for a method that was not asked for before.
        controls: Where the controls are now; theirs are needed at the first query.
        engine: As for `build`.
        batch_size: As for `build`.
        memory: As for `build`; of gradients, not of the solve.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        Columns query, rank, item_id, file_name, creator, caption; score, its standard error and 95 % interval (of draws
        alone, not of training again), leverage h, score_adj = score / (1 − h), score_rel = score / √(score of the image
        for itself); p_value of score_rel against controls and q_value over all images (NaN without controls); rows by
        query and rank. `attrs` holds `creators` (for each query and creator the signed sum of score_adj over *all*
        images, its p and q if works and controls change places, and what its trained works score above held-out works
        of the same creator), `queries` (losses), `method`, `damping`, `draws`, `formula`, `controls` (how many).

    Raises:
        InfluenceError: An input cannot be used, or the model is not the one of the store.
    """
    return score(
        images, store, k=k, method=method, damping=damping, draws=draws, prompt=prompt, intervals=intervals,
        model=model, lora=lora, base=base, half=half, dataset=dataset, controls=controls, engine=engine,
        batch_size=batch_size, memory=memory, device=device, progress=progress, message=message,
    ).table  # fmt: skip


def listed(store: Stores) -> list[str | os.PathLike[str] | Store]:
    """One store or several, as a list.

    Raises:
        OptionError: There is none.
    """
    given = [store] if isinstance(store, (str, os.PathLike, Store)) else list(store)
    if not given:
        raise OptionError("there is no store; give one, or several of the same data set")
    return given


def score(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: Stores,
    *,
    k: int | None,
    intervals: bool,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    **options: Any,
) -> Scored:
    """Score pictures with a store, or with several; arguments as for `attribute`, and `clusters` as for `score_one`.

    Raises:
        InfluenceError: As for `attribute`.
    """
    given = listed(store)
    where = {"intervals": intervals, "model": model, "lora": lora}
    if k is not None and k < 1:
        raise OptionError(f"k is {k}; expected at least 1, or all")
    if len(given) == 1:
        return score_one(images, given[0], k=k, **where, **options)
    if not (model is lora is options.get("half") is None):
        raise OptionError("with several stores there are several models; put them where they were, or ask one store")
    return combined([score_one(images, one, k=None, **where, **options) for one in given], k)


def score_one(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | Store,
    *,
    k: int | None,
    method: str | None,
    damping: float | None,
    draws: int,
    prompt: str | Sequence[str] | None,
    intervals: bool,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    half: str | os.PathLike[str] | None,
    engine: str,
    batch_size: int,
    memory: str | None,
    device: str,
    progress: Progress,
    message: Message,
    dataset: str | os.PathLike[str] | None = None,
    controls: str | os.PathLike[str] | None = None,
    clusters: Mapping[str, str] | None = None,
    path: bool = False,
    solo: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
) -> Scored:
    """Score pictures with one store; arguments as for `attribute`.

    `clusters` names the near-duplicate cluster of each image: totals then count each cluster as one work. `path` asks
    for creators' totals along the whole way from the base, too, where it is known. `solo` is what `influence solo`
    made: these totals then count what the works of each creator do alone.

    Raises:
        InfluenceError: As for `attribute`.
    """
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    _require_names(paths)
    if damping is not None and not 0 < damping < math.inf:
        raise OptionError(f"damping is {damping}; expected a number above 0")
    made = store if isinstance(store, Store) else stores.open_store(store)
    made.refresh()
    if made.excluded:
        message(f"{len(made.excluded)} images of store {made.path.name} are excluded")
    method = default_method(made.source) if method is None else method
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    known = base_is_known(made.source)
    if chosen.beside == "half" and made.source.get("half") is None:
        raise OptionError(
            f"{method} needs a fine-tune of half the epochs, which store {made.path.name} was built without: make it "
            "with influence halve, and build another store with --half DIR"
        )
    if {"base", "middle", "late"} & {*chosen.elsewhere} and not known:
        raise OptionError(
            f"{method} needs the model before the fine-tune, which store {made.path.name} was built without: build "
            "another store with --base DIR"
        )
    require_complete(made)
    prompts = _prompts(made, prompt, len(paths))
    loaded, options = load_for(
        made, model=model, lora=lora, draws=draws, engine=engine, batch_size=batch_size, memory=memory, device=device,
        message=message,
    )  # fmt: skip
    strangers = made.controls()
    if strangers is not None and strangers.missing("loss"):
        raise StoreError(f"the controls of store {made.path.name} are not complete; run the same build again")
    moved = {"model": model if made.source["lora"] else None, "lora": lora}
    before = load_base(made.source, loaded.denoiser, base, loaded.device, **moved)
    if path and before is not None and not known:
        message(
            "creators' totals are of the end of the fine-tune, not of the whole way: build the store with --base DIR"
        )
    along = path and known and method in ("gauss-newton", "two-point", "two-length")
    families = {*chosen.elsewhere, *(METHODS["path"].elsewhere if along else ())}
    points = {
        family: model_of(family, made.source, loaded, before=before, half=half, model=model, lora=lora)
        for family in sorted(families)
    }
    needed = [(part, chosen.family, loaded) for part in (made, strangers)]
    for family, of in points.items():
        needed += [(part, family, of) for part in (made, strangers if family in chosen.elsewhere else None)]
    for part, family, of in needed:
        if part is not None and part.missing(family):
            message(f"taking the gradients of {len(part.items)} images {FAMILIES[family]} once, kept in the store")
            folder = part.pictures(dataset if part is made else controls)
            data = read(folder, of.denoiser, part.source["creator_column"], progress, silent)
            run_shards(part, family, of, options, data, 1, progress, message)
    captions = () if strangers is None else strangers.items["caption"].dropna().unique().tolist()
    asked = read_queries(loaded, chosen.family, paths, prompts, progress, message, before, points, captions)
    groups = scanning.groups_of(made, chosen.family)
    num_train = float(groups.files.sum())
    factored = derived.solver(made, chosen, damping) if chosen.curvature else None
    h = derived.leverages(made, chosen, damping, factored, groups)
    own = derived.own_influence(made, made, chosen, damping, factored, groups, num_train)
    if chosen.curvature == "phi":
        own = own * (1 - h)  # H holds φ_i as well: without it τ(i, i) and τ(q, i) are larger by 1/(1 − h)
    if clusters is not None:
        groups = scoring.shared(groups, clusters)

    def preconditioned(method: scoring.Method, by: Curvature | None) -> tuple[torch.Tensor, torch.Tensor]:
        return scanning.preconditioned(method, asked.read_by(method), by, num_train, intervals)

    def scan(
        method: scoring.Method, v: torch.Tensor, parts: torch.Tensor, k: int | None, h: np.ndarray, to: Controls | None
    ) -> tuple[pd.DataFrame, Creators]:
        table, creators = scanning.rank(made, method, v, asked, k, groups, h, own, to)
        if intervals:
            table, creators = scanning.with_errors(made, method, v, parts, groups, h, table, creators)
        return table, creators

    v, parts = preconditioned(chosen, factored)
    compared = None
    if strangers is not None:
        theirs = scanning.groups_of(strangers, chosen.family)
        alone = derived.own_influence(made, strangers, chosen, damping, factored, theirs, num_train)
        compared = scanning.control_scores(strangers, chosen, v, asked, theirs, alone)
    table, creators = scan(chosen, v, parts, k, h, compared)
    whole = gain_alone = None
    if path and along and asked.loss_base is not None:
        as_it_is = np.zeros(len(h))  # a Shapley value is no removal at the end: nothing to correct
        of_way = METHODS["path"]
        by = factored if of_way.steps == chosen.steps else derived.solver(made, of_way, damping)
        (_, end), (_, way) = (
            scan(method, *rows, 1, as_it_is, None)
            for method, rows in ((chosen, (v, parts)), (of_way, preconditioned(of_way, by)))
        )
        if solo is not None:
            under = losses_alone(made, loaded, solo, creators.names, asked, progress, model=moved["model"])
            by_part = asked.loss_base[:, :, None] - under
            end, gain_alone = with_alone(end, by_part), by_part.mean(1)
        whole = whole_way(end, way, asked.loss_base - asked.loss)
    elif solo is not None:
        lacking = f"{method} has no such totals" if known else f"store {made.path.name} was built without --base DIR"
        raise OptionError(
            f"--solo goes into creators' totals of the whole way from the base, and {lacking}; leave it out, or "
            "take a store with --base, and the default --method"
        )
    count = 0 if compared is None else len(compared.item_ids)
    if 0 < count < significance.MIN_CONTROLS:
        message(
            f"there are {count} controls: no p-value can be below {1 / (1 + count):.2g}; "
            f"pass {significance.MIN_CONTROLS} or more to build --controls"
        )
    table = table[COLUMNS]
    table.attrs = {
        "method": method,
        "damping": None if factored is None else factored.damping / factored.unit / chosen.steps,
        "draws": draws,
        "formula": chosen.formula,
        "controls": count,
        "models": 1,
        "creators": creator_rows(asked.paths, creators, compared),
        "queries": query_rows(asked),
    }
    losses = None if strangers is None else control_losses(strangers, loaded, before, controls, progress, message)
    return Scored(made, loaded, asked, table, creators, compared, losses, whole, gain_alone)


def _require_names(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Raise unless each picture has a name of its own that a table can hold."""
    names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise OptionError("a picture is given twice; give it once (check and export count it by its usage)")
    for name in names:
        if not _is_unicode(name):
            raise OptionError(f"the name of {name!a} is not UTF-8, and no table could hold it; rename the file")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompts(made: Store, prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One for each picture."""
    if made.spec.conditional and prompt is None:
        raise OptionError(
            f"store {made.path.name} is of a model that reads captions, and no prompt was given; "
            'pass the picture\'s --prompt TEXT (an empty one, --prompt "", counts)'
        )
    if not made.spec.conditional and prompt is not None:
        raise OptionError(f"store {made.path.name} is of a model that reads no captions; leave out --prompt")
    prompts = [prompt] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise OptionError(f"there are {len(prompts)} prompts for {count} pictures; pass one, or one for each")
    for text in prompts:
        if text is not None and not _is_unicode(text):
            raise OptionError(f"the prompt {text!a} is not UTF-8; pass it in that encoding")
    return prompts


def require_complete(made: Store) -> None:
    """Refuse a store of which shards are missing.

    Raises:
        StoreError: Some are.
    """
    missing, there = made.missing("loss"), len(made.records("loss"))
    if not len(made.items):
        raise StoreError(f"all images of store {made.path.name} are excluded: there is nothing to ask")
    if missing:
        raise StoreError(
            f"store {made.path.name} has {there} of {there + len(missing)} shards; "
            "run the same influence build again to complete it"
        )
