"""Answers on pictures: scores, what they stand against, verdicts, shares: tables that can be audited line by line."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from scipy import stats

from influence import datasets, nearcopies, royalties, significance, similarity, verdicts
from influence.attribution import Stores, listed, score
from influence.errors import OptionError
from influence.evaluation import kept_shapley, require_truth_of
from influence.loading import DEFAULT_BATCH
from influence.progress import Message, Progress, silent
from influence.royalties import BASE_MODEL, DEFAULT_ESTIMATOR, ESTIMATORS, UNATTRIBUTED, Evidence
from influence.scored import Controls, Creators, Scored, styles
from influence.verdicts import Verdict
from influence.waypoints import base_identity

ALL = "ALL"
"""In place of a query: the statement over all of them."""
_LIKENESS = 0.95  # quantile of a query's similarities above which a work counts as more alike than usual


@dataclass(frozen=True)
class Answers:
    """Tables on pictures; their columns are described in `tables.SCHEMA`."""

    queries: pd.DataFrame
    attributions: pd.DataFrame
    shares: pd.DataFrame
    styles: pd.DataFrame
    controls: pd.DataFrame
    items: pd.DataFrame
    contributors: pd.DataFrame
    facts: dict[str, Any]
    """Method, damping, draws, estimators' formulas, numbers of controls: what the tables depend on."""


def answer(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: Stores,
    *,
    k: int | None = None,
    method: str | None = None,
    damping: float | None = None,
    draws: int = 256,
    prompt: str | Sequence[str] | None = None,
    usage: Sequence[float] | None = None,
    pool: Decimal | None = None,
    currency: str = "EUR",
    truth: str | os.PathLike[str] | None = None,
    embedding: str | os.PathLike[str] | None = None,
    dataset: str | os.PathLike[str] | None = None,
    controls: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    half: str | os.PathLike[str] | None = None,
    solo: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    engine: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    memory: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> Answers:
    """Answer what can be answered on pictures: verdicts, scores with errors and p-values, shares by every estimator.

    Args:
        images: One picture file, or several.
        store: A store, or several, as for `attribute`.
        k: Rows of scores for each query; `None` for all.
        method: As for `attribute`.
        damping: As for `attribute`.
        draws: S of a query.
        prompt: The prompt that the pictures were made with, or one for each; needed if the model reads captions.
        usage: Weight of each picture in the statement over all; equal by default.
        pool: Sum of money to divide by the statement, by every estimator.
        currency: Code of ISO 4217.
        truth: Folder of a truth of which all coalitions of creators were retrained (`evaluate_shapley`): it has exact
            Shapley values of the pictures that are its queries.
        embedding: Parquet file of your own embeddings, as for `near_copies`.
        dataset: Where the data set is now, if it was moved since the store was built.
        controls: Where the controls are now; their pictures are needed at the first query.
        model: Where the model is now.
        lora: Where the LoRA is now.
        base: The pipeline that the fine-tune started from, if it was not named at build; a LoRA's is known.
        half: Where the model of half the length is now, if it was moved.
        solo: Fine-tunes of each creator alone, as the function `solo` makes them, or several of other seeds: with them
            creators' totals are nearer to Shapley values.
        engine: As for `build`.
        batch_size: As for `build`.
        memory: As for `build`.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Raises:
        InfluenceError: An input cannot be used.
    """
    paths = [str(images)] if isinstance(images, (str, os.PathLike)) else [str(path) for path in images]
    weights = np.ones(len(paths)) if usage is None else np.asarray(usage, float)
    if len(weights) != len(paths) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        found = f"usage has {len(weights)} weights for {len(paths)} pictures"
        raise OptionError(f"{found}; expected a finite one from 0 up for each, not all 0")
    if len(set(paths)) < len(paths):
        raise OptionError("a picture is given twice; give it once, with a usage of 2")
    if pool is not None:
        royalties.require_money(pool, currency)
    clusters = nearcopies.duplicate_clusters(listed(store)[0], dataset=dataset, progress=progress)
    scored = score(
        paths, store, k=k, method=method, damping=damping, draws=draws, prompt=prompt, intervals=True, model=model,
        lora=lora, base=base, half=half, dataset=dataset, controls=controls, engine=engine, batch_size=batch_size,
        memory=memory, device=device, progress=progress, message=message, clusters=clusters, path=True, solo=solo,
    )  # fmt: skip
    return of_scored(
        scored, clusters, usage=weights, pool=pool, currency=currency, truth=truth, embedding=embedding,
        dataset=dataset, progress=progress, message=message,
    )  # fmt: skip


def of_scored(
    scored: Scored,
    clusters: Mapping[str, str],
    *,
    usage: Float64[np.ndarray, " queries"],
    pool: Decimal | None = None,
    currency: str = "EUR",
    truth: str | os.PathLike[str] | None = None,
    embedding: str | os.PathLike[str] | None = None,
    dataset: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    message: Message = silent,
) -> Answers:
    """What `answer` says of pictures once they are scored; arguments as there, `clusters` those that `scored` counted.

    Raises:
        InfluenceError: As for `answer`.
    """
    paths, weights = scored.queries.paths, usage
    if scored.store.build.get("batches", 0) < 2 or len(scored.creators.by_batch) < 2:
        raise OptionError(
            "shares need intervals, and these need batches of draws; build with an even number of --draws, as 40, "
            "and ask with one, as 256"
        )
    for again, path in zip(pd.Series(scored.queries.item_ids).duplicated(), paths, strict=True):
        if again:
            raise OptionError(f"{path} is the same picture as one before it; give it once, with a usage of 2")
    denoiser = scored.loaded.denoiser
    copies = nearcopies.near_copies(
        paths, scored.store, metrics=nearcopies.metrics_of(denoiser), embedding=embedding, dataset=dataset,
        denoiser=denoiser, progress=progress, message=message,
    )  # fmt: skip
    looks = _looks(paths, scored, dataset)
    made = [_verdict(scored, q, copies[copies["query"] == path]) for q, path in enumerate(paths)]
    ids = contributor_ids(scored.creators.names)
    shares = _shares(scored, made, looks, clusters, truth, weights, ids, pool, currency)
    queries, recipe = _queries(scored, made, copies, shares), scored.loaded.recipe
    return Answers(
        queries=queries,
        attributions=_attributions(scored, looks, clusters, ids),
        shares=shares,
        styles=_styles(scored, ids),
        controls=_controls(scored),
        items=_items(scored, clusters, ids),
        contributors=_contributors(scored, ids),
        facts={
            name: scored.table.attrs[name] for name in ("method", "formula", "damping", "draws", "controls", "models")
        }
        | {"usage": weights.tolist(), "totals": _totals(scored)}
        | {"engine": recipe.engine, "batch_size": recipe.batch_size, "device": scored.loaded.device},
    )  # fmt: skip


def _totals(scored: Scored) -> str:
    """What creators' totals are, in words."""
    if scored.whole is None:
        return "sums of scores"
    return "whole way" if scored.alone is None else "whole way and alone"


def contributor_ids(names: Sequence[str]) -> dict[str, str]:
    """An ASCII identifier of each creator, of the name alone: readable letters and a hash.

    None begins with an underscore but that of works whose creator is not known, as rows that are no creator have.
    """
    found = {}
    for name in names:
        if name == datasets.UNKNOWN_CREATOR:
            found[name] = name
            continue
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:24]
        found[name] = f"{slug or 'creator'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return found


# Looks ----------------------------------------------------------------------------------------------------------------


def _looks(paths: Sequence[str], scored: Scored, dataset: str | os.PathLike[str] | None) -> pd.DataFrame:
    """Similarity of every training picture to every query: rows item ids, columns numbers of queries."""
    items = nearcopies.training_items(scored.store, dataset)
    shape = nearcopies.compared_shape(scored.store)
    works, asked = nearcopies.pixels(items, shape), nearcopies.pixels([Path(path) for path in paths], shape)
    found = similarity.similarity(torch.as_tensor(asked), torch.as_tensor(works))
    return pd.DataFrame(found.T, index=[item.item_id for item in items])


def _similarity_evidence(
    items: pd.DataFrame, names: Sequence[str], looks: pd.Series, clusters: Mapping[str, str]
) -> np.ndarray:
    """How much more than usual the works of each creator look like the query; near duplicates are one work."""
    beyond = (looks - looks.quantile(_LIKENESS)).clip(lower=0)
    work = beyond.groupby(beyond.index.map(clusters)).mean()
    files = items.assign(work=items["item_id"].map(clusters))
    parts = pd.crosstab(files["work"], files["creator"], normalize="index")
    return parts.mul(work, axis=0).sum().reindex(names).fillna(0.0).to_numpy()


# Verdicts -------------------------------------------------------------------------------------------------------------


def _strangers(scored: Scored, q: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the controls other than the query itself, and the fine-tune's gains on them; empty if not known."""
    found = scored.control_losses
    if found is None:
        return np.empty(0), np.empty(0)
    others = np.array([item_id not in scored.queries.same[q] for item_id in found.item_ids], bool)
    losses = found.finetuned.astype(float)
    return losses[others], np.empty(0) if found.base is None else (found.base - losses)[others]


def _verdict(scored: Scored, q: int, copies: pd.DataFrame) -> Verdict:
    row = scored.table.attrs["queries"][q]
    losses, gains = _strangers(scored, q)
    creators = [entry["q_value"] for entry in scored.table.attrs["creators"] if entry["query"] == row["query"]]
    return verdicts.verdict(
        near_copy=bool(copies["near_copy"].any()),
        loss=row["loss_finetuned"],
        gain=row["gain"],
        gain_p=row["gain_p"],
        control_losses=losses,
        control_gains=gains,
        creator_q=np.array(creators),
        image_q=float(scored.creators.lowest_q[q]),
    )


# Shares ---------------------------------------------------------------------------------------------------------------


def _shapley_of(scored: Scored, truth: str | os.PathLike[str] | None) -> dict[int, np.ndarray]:
    """Exact Shapley values of the queries that a truth has."""
    if truth is None:
        return {}
    made = scored.store
    works = zip(made.items["item_id"], made.items["creator"], strict=True)
    require_truth_of(truth, works, base_identity(made.source, scored.loaded.denoiser), made.path.name)
    query_ids, exact = kept_shapley(truth)
    position = {item_id: i for i, item_id in enumerate(query_ids)}
    names = scored.creators.names
    return {
        q: np.array([exact[name][position[item_id]] for name in names])
        for q, item_id in enumerate(scored.queries.item_ids)
        if item_id in position
    }


def _of_query(creators: Creators, q: int) -> dict[str, np.ndarray]:
    return {
        "images": creators.images,
        "totals": creators.totals[q],
        "squares": creators.squares[q],
        "by_batch": creators.by_batch[:, q],
        "train_variance": creators.train_variance[q],
        "by_model": None if creators.by_model is None else creators.by_model[:, q],
    }


def _shares(
    scored: Scored,
    made: Sequence[Verdict],
    looks: pd.DataFrame,
    clusters: Mapping[str, str],
    truth: str | os.PathLike[str] | None,
    usage: np.ndarray,
    ids: Mapping[str, str],
    pool: Decimal | None,
    currency: str,
) -> pd.DataFrame:
    """Shares of each query and of the statement over all, by every estimator that what is known allows."""
    creators, controls = scored.creators, scored.controls
    way = creators if scored.whole is None else scored.whole
    exact = _shapley_of(scored, truth)
    names = [ids[name] for name in creators.names] + [UNATTRIBUTED, BASE_MODEL]
    items = scored.store.items
    corpus = np.append(creators.images / creators.images.sum(), [np.nan, np.nan])
    rows: list[pd.DataFrame] = []
    whole: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for q, found in enumerate(made):
        nulls = creators.nulls(q, controls)
        at_end = royalties.resampled((scored.queries.item_ids[q],), **_of_query(creators, q))
        again = royalties.resampled((scored.queries.item_ids[q],), **_of_query(way, q))
        p = significance.group_p_values(np.vstack([creators.totals[q][None], at_end]), nulls)
        fdr = significance.false_discovery_rates(p)
        variance = _variance(way, q)
        rho = royalties.reliability(way.totals[q], variance)
        alike = _similarity_evidence(items, creators.names, looks[q], clusters)
        common = {"reliability": rho, "similarity": alike, "shapley": exact.get(q)}
        once = Evidence(creators.images, way.totals[q], fdr[0], **common)
        repeated = Evidence(creators.images, again, fdr[1:], **common)
        for estimator in ESTIMATORS:
            lacking = {"gated_group_sum": not nulls, "shrunk": bool(np.isnan(rho)), "shapley": q not in exact}
            if lacking.get(estimator):
                continue
            share = royalties.shares(estimator, once, from_model=found.explained)
            repeats = royalties.shares(estimator, repeated, from_model=found.explained)
            sums = whole.setdefault(estimator, ([], []))
            sums[0].append(share)
            sums[1].append(repeats)
            table = _share_table(scored.queries.item_ids[q], estimator, names, share, repeats, creators.images, corpus)
            count = len(creators.names)
            table.loc[: count - 1, "group_score"] = way.totals[q]
            table.loc[: count - 1, "group_score_se"] = np.sqrt(variance)
            if scored.alone is not None:
                table.loc[: count - 1, "gain_alone"] = scored.alone[q]
            table.loc[: count - 1, "p_null_group"] = p[0]
            table.loc[: count - 1, "q_fdr_group"] = fdr[0]
            rows.append(table)
    for estimator, (parts, repeats_of) in whole.items():
        if len(parts) < len(made):
            continue  # shapley, of which not all queries have values
        share = royalties.whole(np.stack(parts), usage)
        repeats = royalties.whole(np.stack(repeats_of), usage)
        table = _share_table(ALL, estimator, names, share, repeats, creators.images, corpus)
        if pool is not None:
            table["amount"] = royalties.amounts(pool, currency, share.tolist())
            table["currency"] = currency
        rows.append(table)
    return pd.concat(rows, ignore_index=True)


def _variance(creators: Creators, q: int) -> np.ndarray:
    """Variance of creators' totals from draws, of the query and of the training images, and from training again."""
    batches = creators.by_batch[:, q]
    if len(batches) < 2:
        return np.full(len(creators.names), np.nan)
    models = creators.by_model
    again = 0.0 if models is None else models[:, q].var(0, ddof=1) / len(models)
    return batches.var(0, ddof=1) / len(batches) + creators.train_variance[q] + again


def _share_table(
    query: str,
    estimator: str,
    names: Sequence[str],
    share: np.ndarray,
    repeats: np.ndarray,
    images: np.ndarray,
    corpus: np.ndarray,
) -> pd.DataFrame:
    tail = (1 - significance.LEVEL) / 2
    low, high = np.quantile(repeats, [tail, 1 - tail], axis=0)
    count = len(images)
    works = np.append(images, [np.nan, np.nan])
    top = repeats[:, :count].argmax(1)
    first = [float(((top == g) & (repeats[:, g] > 0)).mean()) if g < count else np.nan for g in range(len(names))]
    return pd.DataFrame({
        "query_id": query,
        "contributor_id": list(names),
        "estimator": estimator,
        "attribution": ESTIMATORS[estimator].attribution,
        "n_works": works,
        "group_score": np.nan,
        "group_score_se": np.nan,
        "gain_alone": np.nan,
        "p_null_group": np.nan,
        "q_fdr_group": np.nan,
        "share": share,
        "share_low": np.minimum(low, share),
        "share_high": np.maximum(high, share),
        "share_per_work": share / works,
        "corpus_share": corpus,
        "lift": share / corpus,
        "prob_positive": (repeats > 0).mean(0),
        "prob_top1": first,
        "amount": None,
        "currency": None,
    })  # fmt: skip


# Tables ---------------------------------------------------------------------------------------------------------------


def _queries(scored: Scored, made: Sequence[Verdict], copies: pd.DataFrame, shares: pd.DataFrame) -> pd.DataFrame:
    rows = []
    way = scored.creators if scored.whole is None else scored.whole
    by_name = shares.set_index(["estimator", "query_id", "contributor_id"])["share"]
    for q, (row, found) in enumerate(zip(scored.table.attrs["queries"], made, strict=True)):
        mine = copies[copies["query"] == row["query"]]
        nearest = mine.sort_values(["near_copy", "similarity"], ascending=False).iloc[0]
        gain_null = None
        _, gains = _strangers(scored, q)
        if row["gain"] is not None and len(gains):
            above = significance.exceedances(np.array([row["gain"]]), gains)
            gain_null = float(significance.p_values(above, len(gains))[0])
        rows.append({
            "query_id": row["query_id"],
            "file": row["query"],
            "prompt": row["prompt"],
            "verdict": found.verdict,
            "reason": found.reason,
            "loss_finetuned": row["loss_finetuned"],
            "loss_base": row["loss_base"],
            "finetune_gain": row["gain"],
            "gain_se": row["gain_se"],
            "gain_p": row["gain_p"],
            "gain_p_null": gain_null,
            "gain_bits": row["gain_bits"],
            "gain_bits_se": row["gain_bits_se"],
            "near_copy": bool(mine["near_copy"].any()),
            "max_similarity": float(nearest["similarity"]),
            "max_similarity_item": nearest["item_id"],
            "similarity_metric": nearest["metric"],
            "reliability": royalties.reliability(way.totals[q], _variance(way, q)),
            "unattributed_share": by_name.get(("gated_group_sum", row["query_id"], UNATTRIBUTED)),
            "base_model_share": float(by_name[DEFAULT_ESTIMATOR, row["query_id"], BASE_MODEL]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _attributions(
    scored: Scored, looks: pd.DataFrame, clusters: Mapping[str, str], ids: Mapping[str, str]
) -> pd.DataFrame:
    parts = []
    for q, path in enumerate(scored.queries.paths):
        table = scored.table[scored.table["query"] == path].reset_index(drop=True)
        lowest, highest = np.sort(table["score_low"].to_numpy()), np.sort(table["score_high"].to_numpy())
        certain = len(table) == len(scored.store.items)
        above = len(table) - np.searchsorted(lowest, table["score_high"].to_numpy(), side="right")
        at_most = len(table) - np.searchsorted(highest, table["score_low"].to_numpy(), side="left")
        z = np.full(len(table), np.nan)
        if scored.controls is not None and len(scored.controls.relative_of(q)):
            null = scored.controls.relative_of(q)
            spread = stats.median_abs_deviation(null, scale="normal")
            z = (table["score_rel"] - np.median(null)) / spread if spread > 0 else z
        table = table.assign(
            query_id=scored.queries.item_ids[q],
            contributor_id=table["creator"].map(ids),
            rank_low=(1 + above if certain else np.nan),
            rank_high=(at_most if certain else np.nan),
            z_null=z,
            similarity=table["item_id"].map(looks[q]),
            dup_cluster_id=table["item_id"].map(clusters),
        )
        parts.append(table)
    return pd.concat(parts, ignore_index=True).drop(columns=["query", "creator", "caption"])


def _styles(scored: Scored, ids: Mapping[str, str]) -> pd.DataFrame:
    """Of all queries, with identifiers in place of names."""
    parts = []
    for q, query in enumerate(scored.queries.item_ids):
        found = styles(scored.creators, scored.controls, q)
        parts.append(found.assign(query_id=query, contributor_id=found["creator"].map(ids)))
    return pd.concat(parts, ignore_index=True)


def _controls(scored: Scored) -> pd.DataFrame:
    columns = ["query_id", "control_id", "creator", "score", "score_rel"]
    found: Controls | None = scored.controls
    if found is None:
        return pd.DataFrame(columns=columns)
    rows = [
        (query, item_id, creator, value, relative)
        for q, query in enumerate(scored.queries.item_ids)
        for item_id, creator, value, relative in zip(
            found.item_ids, found.creators, found.scores[q], found.relative[q], strict=True
        )
        if not np.isnan(value)
    ]
    return pd.DataFrame(rows, columns=columns)


def _items(scored: Scored, clusters: Mapping[str, str], ids: Mapping[str, str]) -> pd.DataFrame:
    made = scored.store
    files = made.items["item_id"].value_counts()
    table = made.items.assign(
        contributor_id=made.items["creator"].map(ids),
        dup_cluster_id=made.items["item_id"].map(clusters),
        train_weight=made.items["item_id"].map(files).astype(float),
        split="train",
    )
    columns = ["item_id", "file_name", "caption", "contributor_id", "creator", "licence", "split", "train_weight",
               "dup_cluster_id"]  # fmt: skip
    inside = made.controls()
    if inside is not None:
        others = inside.items.assign(split="control", train_weight=0.0, dup_cluster_id=None)
        others["contributor_id"] = others["creator"].map(contributor_ids(list(others["creator"].unique())))
        table = pd.concat([table[columns], others[columns]], ignore_index=True)
    return table[columns].sort_values(
        ["split", "item_id", "file_name"], ascending=[False, True, True], ignore_index=True
    )


def _contributors(scored: Scored, ids: Mapping[str, str]) -> pd.DataFrame:
    held = pd.Series(scored.controls.creators if scored.controls is not None else [], dtype=object).value_counts()
    names, files = scored.creators.names, scored.store.items["creator"].value_counts()
    return pd.DataFrame({
        "contributor_id": [*(ids[name] for name in names), UNATTRIBUTED, BASE_MODEL],
        "name": [*names, UNATTRIBUTED, BASE_MODEL],
        "n_works": [*(int(files[name]) for name in names), 0, 0],
        "n_heldout": [*(int(held.get(name, 0)) for name in names), 0, 0],
    })  # fmt: skip
