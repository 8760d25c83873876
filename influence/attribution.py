"""Attribute pictures with a store: features of the query → scores of all training images → significance → a table."""

import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from influence import curvature as curvatures
from influence import scoring, significance
from influence import store as stores
from influence.building import run_shards
from influence.curvature import Curvature
from influence.ensemble import combined
from influence.errors import OptionError, StoreError
from influence.loading import DEFAULT_BATCH, load_for
from influence.pipeline import read
from influence.progress import Message, Progress, silent
from influence.queries import Queries, control_losses, load_base, read_queries, under_base, under_late
from influence.scored import COLUMNS, Controls, Creators, Scored, creator_rows, query_rows
from influence.scoring import METHODS, Groups
from influence.shards import ShardContent
from influence.store import Store
from influence.wholeway import whole_way

Stores = str | os.PathLike[str] | Store | Sequence[str | os.PathLike[str] | Store]
DAMPING = 0.1
"""λ in units of tr(H)/k, where nothing is known of the fine-tune's steps."""
_LAST: weakref.WeakKeyDictionary[Store, tuple[str, Curvature]] = weakref.WeakKeyDictionary()
"""The name and the factor that an open store used last."""
_SAMPLE = 256  # images, about, whose scores on each other give the usual size of scores


def attribute(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: Stores,
    *,
    k: int | None = 10,
    method: str = "gauss-newton",
    damping: float | None = None,
    draws: int = 256,
    prompt: str | Sequence[str] | None = None,
    intervals: bool = True,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
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
        method: Name in `METHODS`.
        damping: λ in units of tr(H)/k. By default that of the fine-tune's own steps (`horizon`), for methods of its
            curvature and if the store knows how it was trained, or else 0.1.
        draws: S of a query.
        prompt: The prompt that the pictures were made with, or one for each; needed if the model reads captions.
        intervals: Whether to give standard errors: a second scan of the store, of more bytes than the first.
        model: Where the model is now, if it was moved since the store was built.
        lora: Where the LoRA is now.
        base: The pipeline that the fine-tune started from, if it was not named at build; a LoRA's is known.
        engine: As for `build`.
        batch_size: As for `build`.
        memory: As for `build`; of gradients, not of the solve.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        Columns query, rank, item_id, file_name, creator, caption; score, its standard error and 95 % interval (of draws
        alone, not of training again), leverage h, score_adj = score / (1 − h); p_value of score_adj against controls
        and q_value over all images (NaN without controls); rows by query and rank. `attrs` holds `creators` (for each
        query and creator the signed sum of score_adj over *all* images, its p and q if works and controls change
        places, and what its trained works score above held-out works of the same creator),
        `queries` (losses), `method`, `damping`, `draws`, `formula`, `controls` (how many).

    Raises:
        InfluenceError: An input cannot be used, or the model is not the one of the store.
    """
    if k is not None and k < 1:
        raise OptionError(f"k is {k}; expected at least 1, or all")
    return score(
        images, store, k=k, method=method, damping=damping, draws=draws, prompt=prompt, intervals=intervals,
        model=model, lora=lora, base=base, engine=engine, batch_size=batch_size, memory=memory, device=device,
        progress=progress, message=message,
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
    if len(given) == 1:
        return score_one(images, given[0], k=k, **where, **options)
    if model is not None or lora is not None:
        raise OptionError("with several stores there are several models; put them where they were, or ask one store")
    return combined([score_one(images, one, k=None, **where, **options) for one in given], k)


def score_one(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | Store,
    *,
    k: int | None,
    method: str,
    damping: float | None,
    draws: int,
    prompt: str | Sequence[str] | None,
    intervals: bool,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    engine: str,
    batch_size: int,
    memory: str | None,
    device: str,
    progress: Progress,
    message: Message,
    clusters: Mapping[str, str] | None = None,
    path: bool = False,
) -> Scored:
    """Score pictures with one store; arguments as for `attribute`.

    `clusters` names the near-duplicate cluster of each image: totals then count each cluster as one work. `path` asks
    for creators' totals along the whole way from the base, too, where it is known.

    Raises:
        InfluenceError: As for `attribute`.
    """
    made = store if isinstance(store, Store) else stores.open_store(store)
    made.refresh()
    if made.excluded:
        message(f"{len(made.excluded)} images of store {made.path.name} are excluded")
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    require_complete(made)
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    prompts = _prompts(made, prompt, len(paths))
    loaded, options = load_for(
        made, model=model, lora=lora, draws=draws, engine=engine, batch_size=batch_size, memory=memory, device=device,
        message=message,
    )  # fmt: skip
    controls = made.controls()
    if controls is not None and controls.missing("loss"):
        raise StoreError(f"the controls of store {made.path.name} are not complete; run the same build again")
    device_of = str(next(iter(loaded.denoiser.parameters.values())).device)
    before = load_base(made, base, device_of, model=model if made.source["lora"] else None, lora=lora)
    start = under_base(made, loaded, before)
    if chosen.beside is not None and start is None:
        raise OptionError(
            f"{method} needs the model before the fine-tune: build store {made.path.name} with --base DIR"
        )
    if path and before is not None and start is None:
        message(
            "creators' totals are of the end of the fine-tune, not of the whole way: build the store with "
            "--base DIR, of a base that has the same parameters"
        )
    along = path and method == "gauss-newton" and start is not None
    second = "base" if along else chosen.beside
    beside = start if second == "base" else under_late(loaded, start) if second == "late" and start else None
    needed = [(part, chosen.family, loaded) for part in (made, controls)]
    if second is not None:
        needed += [(part, second, beside) for part in (made, None if along else controls)]
    for part, family, of in needed:
        if part is not None and part.missing(family):
            message(f"taking the gradients of {len(part.items)} images {_OTHER[family]} once, kept in the store")
            data = read(part.source["dataset"], of.denoiser, part.source["creator_column"], progress, silent)
            run_shards(part, family, of, options, data, 1, progress, message)
    asked = read_queries(loaded, chosen.family, paths, prompts, progress, message, before, beside)
    groups = _groups(made, chosen.family)
    num_train = float(groups.files.sum())
    factored = solver(made, chosen, damping) if chosen.curvature else None
    h = leverages(made, chosen, damping, factored, groups)
    late = _late_scale(made, chosen, damping, factored)
    if clusters is not None:
        groups = scoring.shared(groups, clusters)

    def scan(
        method: scoring.Method, asked: Queries, k: int | None, h: np.ndarray, controls: Store | None
    ) -> tuple[pd.DataFrame, Creators, Controls | None]:
        v, parts = _preconditioned(method, asked, factored, num_train, late, intervals)
        compared = None if controls is None else _control_scores(controls, method, v, asked)
        table, creators = _rank(made, method, v, asked, k, groups, h, compared)
        if intervals:
            table, creators = _with_errors(made, method, v, parts, groups, h, table, creators)
        return table, creators, compared

    table, creators, compared = scan(chosen, asked.with_beside(chosen.beside), k, h, controls)
    whole = None
    if path and along and asked.loss_base is not None:
        _, along_path, _ = scan(METHODS["path"], asked.with_beside("base"), 1, np.zeros(len(h)), None)
        whole = whole_way(creators, along_path, asked.loss_base - asked.loss)
    count = 0 if compared is None else len(compared.item_ids)
    if 0 < count < significance.MIN_CONTROLS:
        message(
            f"there are {count} controls: no p-value can be below {1 / (1 + count):.2g}; "
            f"pass {significance.MIN_CONTROLS} or more to build --controls"
        )
    table = table[COLUMNS]
    table.attrs = {
        "method": method,
        "damping": None if factored is None else factored.damping / factored.unit,
        "draws": draws,
        "formula": chosen.formula,
        "controls": count,
        "models": 1,
        "creators": creator_rows(asked.paths, creators, compared),
        "queries": query_rows(asked),
    }
    losses = None if controls is None else control_losses(controls, loaded, before, progress, message)
    return Scored(made, loaded, asked, table, creators, compared, losses, whole)


_OTHER = {
    "square": "of another output",
    "base": "under the model before the fine-tune",
    "late": "at ¾ of the way of the fine-tune",
    "loss": "of the loss",
}


@dataclass(frozen=True)
class _Rows:
    """Features of some images."""

    item_ids: list[str]
    phi: np.ndarray
    batches: list[np.ndarray]
    """φ of each batch of draws."""


def _blocks(made: Store, method: scoring.Method, batches: bool = False) -> Iterator[_Rows]:
    """Features that a method reads, shard by shard; batches of draws if they are wanted."""

    def drawn(content: ShardContent) -> list[np.ndarray]:
        scaled = zip(content.phi_batch.transpose(1, 0, 2), content.phi_scale.T, strict=True) if batches else ()
        return [rows.astype(np.float32) * scale[:, None] for rows, scale in scaled]

    if method.beside is None:
        for content in made.blocks(method.family):
            yield _Rows(content.item_ids, content.phi, drawn(content))
        return
    for end, other in zip(made.blocks("loss"), made.blocks(method.beside), strict=True):
        if end.item_ids != other.item_ids:
            raise StoreError(
                f"store {made.path.name} has gradients under the fine-tune and {_OTHER[method.beside]} of different "
                "images; leave out those that were refused, with influence exclude"
            )
        both = list(zip(drawn(end), drawn(other), strict=True))
        if method.beside == "base":
            yield _Rows(end.item_ids, (end.phi + other.phi) / 2, [(a + b) / 2 for a, b in both])
        else:
            joined = [np.concatenate(pair, axis=1) for pair in ((end.phi, other.phi), *both)]
            yield _Rows(end.item_ids, joined[0], joined[1:])


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
    return prompts


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


# Curvature ----------------------------------------------------------------------------------------------------------


def _groups(made: Store, family: str) -> Groups:
    """For each image that has features, how many files of each creator it is."""
    items = made.items[~made.items["item_id"].isin(list(made.refused(family)))]
    return scoring.groups(items["item_id"], items["creator"])


def _weights(made: Store) -> pd.Series:
    """Files of each image."""
    return made.items["item_id"].value_counts().astype(float)


def _damping(made: Store, method: scoring.Method, damping: float | None) -> tuple[float, bool]:
    """The damping to use, and whether it is λ itself."""
    if damping is None and method.curvature == "psi" and made.source.get("damping") is not None:
        return float(made.source["damping"]), True
    return (DAMPING if damping is None else float(damping)), False


def _derived_name(made: Store, what: str, method: scoring.Method, damping: float | None, *more: str) -> str:
    """Named by all that it depends on."""
    weights = _weights(made)
    several = sorted(weights[weights > 1].items())  # the others weigh 1 each
    key = (
        made.family_hash(method.family),
        *more,
        method.curvature,
        repr(_damping(made, method, damping)),
        repr(several),
    )
    return f"{what}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"


def solver(made: Store, method: scoring.Method, damping: float | None) -> Curvature:
    """Factor H + λI, or read it back if it was factored before; `damping` as for `attribute`.

    A store that stays open keeps the last one in memory: the file of k = 8192 has half a gigabyte.
    """
    value, absolute = _damping(made, method, damping)
    weights = _weights(made)
    name = _derived_name(made, "curvature", method, damping)
    last, found = _LAST.get(made, ("", None))
    if found is not None and last == name:
        return found
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
        found = Curvature(factor, *(float(fact) for fact in facts), psi)
        _LAST[made] = name, found
        return found
    made_now = curvatures.curvature(blocks(), dim=made.spec.dim, damping=value, num_rows=num_rows, absolute=absolute)
    facts = np.array([made_now.damping, made_now.rows, made_now.unit])
    made.write_derived(name, {"factor": made_now.factor.numpy(), "facts": facts})
    _LAST[made] = name, made_now
    return made_now


def leverages(
    made: Store, method: scoring.Method, damping: float | None, factored: Curvature | None, groups: Groups
) -> Float64[np.ndarray, " images"]:
    """H of every image, in the order of `groups.ids`; 0 for methods without curvature, which say nothing of it."""
    if factored is None or method.beside == "base":
        return np.zeros(len(groups.ids))
    name = _derived_name(made, "leverage", method, damping)
    kept = made.read_derived(name)
    if kept is not None:
        return kept["h"]
    h = np.full(len(groups.ids), np.nan)
    for content in made.blocks(method.family):
        phi = torch.tensor(content.phi)
        if method.curvature == "phi":
            found = curvatures.feature_leverage(factored, phi)
        else:
            psi, item = torch.tensor(content.psi), torch.tensor(content.psi_item).long()
            found = curvatures.leverage(factored, phi, psi, item, float(groups.files.sum()))
        h[groups.places(content.item_ids)] = found.numpy()
    h = np.where(np.isnan(h), np.nanmean(h), h)  # images without curvature rows
    weights = np.asarray(groups.files.sum(1)).ravel()
    h = np.minimum(h * weights, curvatures.MAX_LEVERAGE)
    made.write_derived(name, {"h": h})
    return h


def _late_scale(made: Store, method: scoring.Method, damping: float | None, factored: Curvature | None) -> float:
    """The c of `two-point`, by which scores of training images on each other have the same root mean square."""
    if method.beside != "late" or factored is None:
        return 1.0
    name = _derived_name(made, "late-scale", method, damping, made.family_hash(method.beside))
    kept = made.read_derived(name)
    if kept is not None:
        return float(kept["scale"][0])
    every, seen, parts = max(1, made.num_rows(method.family)[0] // _SAMPLE), 0, []
    for rows in _blocks(made, method):
        parts.append(rows.phi[-seen % every :: every])
        seen += len(rows.phi)
    end, late = torch.from_numpy(np.concatenate(parts)).double().chunk(2, dim=1)
    scale = float((curvatures.solve(factored, end) @ end.T).norm() / (curvatures.solve(factored, late) @ late.T).norm())
    made.write_derived(name, {"scale": np.array([scale])})
    return scale


# Scans of the store -------------------------------------------------------------------------------------------------


def _control_scores(controls: Store, method: scoring.Method, v: torch.Tensor, asked: Queries) -> Controls:
    """Score the controls as if they were training images; the query itself is none of its own controls."""
    ids: list[str] = []
    parts = []
    for names, tau in scoring.scores(method, v, ((c.item_ids, c.phi) for c in _blocks(controls, method))):
        ids += names
        parts.append(tau)
    tau = np.concatenate(parts, axis=1) if parts else np.empty((len(v), 0))
    tau[np.asarray(asked.item_ids)[:, None] == np.asarray(ids, dtype=object)[None]] = np.nan
    creators = controls.items.drop_duplicates("item_id").set_index("item_id")["creator"]
    return Controls(ids, [str(creators[item_id]) for item_id in ids], tau)


def _rank(
    made: Store,
    method: scoring.Method,
    v: torch.Tensor,
    asked: Queries,
    k: int | None,
    groups: Groups,
    h: np.ndarray,
    controls: Controls | None,
) -> tuple[pd.DataFrame, Creators]:
    """Scan the store once for all queries: the best k of each, creators' totals, and counts for q-values."""
    count = len(asked.paths)
    limit = len(groups.ids) if k is None else k
    best: list[scoring.Ranked] = [[] for _ in range(count)]
    totals, squares = np.zeros((2, count, len(groups.names)))
    strangers = [np.sort(controls.of(q)) if controls is not None else np.empty(0) for q in range(count)]
    exceeded = [np.zeros(len(row) + 1, np.int64) for row in strangers]
    works = None if controls is None else np.zeros((count, groups.parts.shape[0]))
    images = np.bincount(groups.work)
    blocks = ((content.item_ids, content.phi) for content in _blocks(made, method))
    for ids, tau in scoring.scores(method, v, blocks):
        here = groups.places(ids)
        adjusted = tau / (1 - h[here])
        if works is not None:
            np.add.at(works.T, groups.work[here], (adjusted / images[groups.work[here]]).T)
        best = [scoring.top(so_far, ids, row, limit) for so_far, row in zip(best, tau, strict=True)]
        totals += scoring.group_totals(groups, here, adjusted)
        squares += scoring.group_totals(groups, here, adjusted**2)
        for q, row in enumerate(strangers):
            above = significance.exceedances(adjusted[q], row)
            exceeded[q] += np.bincount(above, minlength=len(row) + 1)
    ranked = [(q, query, item_id, tau) for q, query in enumerate(asked.paths) for tau, item_id in best[q]]
    table = pd.DataFrame(ranked, columns=["number", "query", "item_id", "score"])
    table["leverage"] = h[groups.places(table["item_id"].tolist())]
    table["score_adj"] = table["score"] / (1 - table["leverage"])
    table[["score_se", "score_low", "score_high", "p_value", "q_value"]] = np.nan
    for q, row in enumerate(strangers):
        if len(row):
            here = table["number"] == q
            above = significance.exceedances(table.loc[here, "score_adj"].to_numpy(), row)
            table.loc[here, "p_value"] = significance.p_values(above, len(row))
            table.loc[here, "q_value"] = significance.q_values(exceeded[q])[above]
    files = made.items[made.items["item_id"].isin(table["item_id"])].sort_values("file_name")
    table = table.merge(files, on="item_id")  # keeps the order of scores, and under it that of the files
    table["rank"] = table.groupby("number").cumcount() + 1
    table = table[table["rank"] <= (k or len(table))].reset_index(drop=True)
    table["caption"] = table["caption"].astype(object).where(table["caption"].notna(), None)
    sizes = np.asarray(groups.files.sum(0)).ravel()
    none = np.empty((0, *totals.shape))
    return table, Creators(
        groups.names, sizes, totals, squares, none, np.full(totals.shape, np.nan), works, groups.parts
    )


def _preconditioned(
    method: scoring.Method,
    asked: Queries,
    factored: Curvature | None,
    num_train: float,
    late: float,
    intervals: bool,
) -> tuple[Float64[torch.Tensor, "query k"], Float64[torch.Tensor, "batches query k"]]:
    """V, and V with one batch of the query's draws in place of all, by one solve; no batches without intervals."""
    phi, batches = torch.from_numpy(asked.phi), torch.from_numpy(asked.phi_batch).transpose(0, 1)
    rows = torch.cat([phi[None], batches if intervals else batches[:0]])
    if method.cosine:
        v = scoring.precondition(method, phi, factored, num_train)
        return v, rows[1:].double() / phi.double().norm(dim=1)[:, None]
    found = scoring.precondition(method, rows.flatten(0, 1), factored, num_train, late).unflatten(0, rows.shape[:2])
    return found[0], found[1:]


def _with_errors(
    made: Store,
    method: scoring.Method,
    v: torch.Tensor,
    parts: Float64[torch.Tensor, "batches query k"],
    groups: Groups,
    h: np.ndarray,
    table: pd.DataFrame,
    creators: Creators,
) -> tuple[pd.DataFrame, Creators]:
    """Scan again, with batches of draws: standard errors of the listed scores, and what totals vary by."""
    batches, count = parts.shape[:2]
    by_batch = np.zeros((batches, *creators.totals.shape))
    variance = np.zeros(creators.totals.shape) if made.build["batches"] else np.full(creators.totals.shape, np.nan)
    listed = [set(table.loc[table["number"] == q, "item_id"]) for q in range(count)]
    found: dict[tuple[int, str], tuple[float, float]] = {}
    flat, columns = parts.flatten(0, 1), np.ascontiguousarray(v.float().numpy().T)
    for content in _blocks(made, method, batches=True):
        ids, n = content.item_ids, len(content.item_ids)
        here = groups.places(ids)
        one_query = np.empty((batches * count, n))
        if batches:
            ((_, one_query),) = scoring.scores(method, flat, [(ids, content.phi)])
        one_query = one_query.reshape(batches, count, n)
        one_train = np.empty((len(content.batches), count, n))
        for b, rows in enumerate(content.batches):
            one_train[b] = (rows @ columns).T
        if method.cosine:
            one_train /= np.linalg.norm(content.phi, axis=1)
        for b in range(batches):
            by_batch[b] += scoring.group_totals(groups, here, one_query[b] / (1 - h[here]))
        if len(one_train):
            spread = (one_train / (1 - h[here])).var(0, ddof=1) / len(one_train)
            variance += (groups.files[here].power(2).T @ spread.T).T
        errors = significance.errors(one_query, one_train)
        for q in range(count):
            for i in np.flatnonzero([item_id in listed[q] for item_id in ids]):
                found[q, ids[i]] = float(errors.se[q, i]), float(errors.dof[q, i])
    pairs = np.array([found[q, item_id] for q, item_id in zip(table["number"], table["item_id"], strict=True)])
    errors = significance.Errors(*(pairs.reshape(-1, 2).T))
    low, high = errors.interval(table["score"].to_numpy())
    table = table.assign(score_se=errors.se, score_low=low, score_high=high)
    return table, replace(creators, by_batch=by_batch, train_variance=variance)
