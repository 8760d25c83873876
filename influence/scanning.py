"""Scans of a store: every block of features is read once, for all queries together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from influence import scoring, significance
from influence.curvature import Curvature
from influence.errors import StoreError
from influence.queries import Queries
from influence.readahead import ahead
from influence.scored import Controls, Creators
from influence.scoring import Groups, Method
from influence.shards import FAMILIES, ShardContent
from influence.store import Store


def groups_of(made: Store, family: str) -> Groups:
    """For each image that has features, how many files of each creator it is."""
    items = made.items[~made.items["item_id"].isin(list(made.refused(family)))]
    return scoring.groups(items["item_id"], items["creator"])


@dataclass(frozen=True)
class Features:
    """Features of some images, as a method reads them: in one array, or in two side by side."""

    item_ids: list[str]
    phi: tuple[np.ndarray, ...]
    batches: list[tuple[np.ndarray, ...]]
    """φ of each batch of draws."""


def blocks(made: Store, method: Method, batches: bool = False) -> Iterator[Features]:
    """Features that a method reads, shard by shard; batches of draws if they are wanted.

    Raises:
        StoreError: Images were refused under one model and not under the other.
    """

    def drawn(content: ShardContent) -> list[np.ndarray]:
        scaled = zip(content.phi_batch.transpose(1, 0, 2), content.phi_scale.T, strict=True) if batches else ()
        return [rows.astype(np.float32) * scale[:, None] for rows, scale in scaled]

    families = (method.family, *method.elsewhere)
    weights = [np.float32(method.along.get(family, 0.0)) for family in families]
    for contents in zip(*map(made.blocks, families), strict=True):
        ids = contents[0].item_ids
        for family, content in zip(families, contents, strict=True):
            if content.item_ids != ids:
                raise StoreError(
                    f"store {made.path.name} has gradients {FAMILIES[method.family]} and {FAMILIES[family]} of "
                    "different images; leave out those that were refused, with influence exclude"
                )
        read = list(zip(*([content.phi, *drawn(content)] for content in contents), strict=True))
        if method.along:
            read = [(sum(w * rows for w, rows in zip(weights, each, strict=True)),) for each in read]
        yield Features(ids, read[0], read[1:])


def control_scores(
    controls: Store, method: Method, v: torch.Tensor, asked: Queries, groups: Groups, own: np.ndarray
) -> Controls:
    """Score the controls as if they were training images; a query is none of its own, whatever the caption there.

    `own` is τ(i, i) of each in the order of `groups.ids`, as `derived.own_influence` gives it.
    """
    ids: list[str] = []
    parts = []
    for names, tau in scoring.scores(method, v, ((c.item_ids, c.phi) for c in blocks(controls, method))):
        ids += names
        parts.append(tau)
    tau = np.concatenate(parts, axis=1) if parts else np.empty((len(v), 0))
    for row, same in zip(tau, asked.same, strict=True):
        row[[item_id in same for item_id in ids]] = np.nan
    creators = controls.items.drop_duplicates("item_id").set_index("item_id")["creator"]
    relative = scoring.relative(tau, own[groups.places(ids)])
    return Controls(ids, [str(creators[item_id]) for item_id in ids], tau, relative)


def rank(
    made: Store,
    method: Method,
    v: torch.Tensor,
    asked: Queries,
    k: int | None,
    groups: Groups,
    h: np.ndarray,
    own: np.ndarray,
    controls: Controls | None,
) -> tuple[pd.DataFrame, Creators]:
    """Scan the store once for all queries: the best k of each, creators' totals, and counts for q-values.

    Leverages `h` and τ(i, i) (`own`) are of each image in the order of `groups.ids`.
    """
    count = len(asked.paths)
    limit = len(groups.ids) if k is None else k
    best: list[scoring.Ranked] = [[] for _ in range(count)]
    totals, squares = np.zeros((2, count, len(groups.names)))
    magnitude = np.zeros(count)
    strangers = [np.sort(controls.relative_of(q)) if controls is not None else np.empty(0) for q in range(count)]
    exceeded = [np.zeros(len(row) + 1, np.int64) for row in strangers]
    works = None if controls is None else np.zeros((count, groups.parts.shape[0]))
    images = np.bincount(groups.work)
    features = ahead(blocks(made, method), lambda content: content.phi)
    for ids, tau in scoring.scores(method, v, ((content.item_ids, content.phi) for content in features)):
        here = groups.places(ids)
        adjusted = tau / (1 - h[here])
        if works is not None:
            np.add.at(works.T, groups.work[here], (adjusted / images[groups.work[here]]).T)
        best = [scoring.top(so_far, ids, row, limit) for so_far, row in zip(best, tau, strict=True)]
        totals += scoring.group_totals(groups, here, adjusted)
        squares += scoring.group_totals(groups, here, adjusted**2)
        magnitude += scoring.group_totals(groups, here, np.abs(adjusted)).sum(1)
        if works is not None:
            relative = scoring.relative(tau, own[here])
            for q, row in enumerate(strangers):
                above = significance.exceedances(relative[q], row)
                exceeded[q] += np.bincount(above, minlength=len(row) + 1)
    ranked = [(q, query, item_id, tau) for q, query in enumerate(asked.paths) for tau, item_id in best[q]]
    table = pd.DataFrame(ranked, columns=["number", "query", "item_id", "score"])
    places = groups.places(table["item_id"].tolist())
    table["leverage"] = h[places]
    table["score_adj"] = table["score"] / (1 - table["leverage"])
    table["score_rel"] = scoring.relative(table["score"].to_numpy(), own[places])
    table[["score_se", "score_low", "score_high", "p_value", "q_value"]] = np.nan
    lowest = np.full(count, np.nan)
    for q, row in enumerate(strangers):
        if len(row):
            here = table["number"] == q
            above = significance.exceedances(table.loc[here, "score_rel"].to_numpy(), row)
            of_level = significance.q_values(exceeded[q])
            table.loc[here, "p_value"] = significance.p_values(above, len(row))
            table.loc[here, "q_value"] = of_level[above]
            lowest[q] = of_level[exceeded[q] > 0].min(initial=1.0)
    files = made.items[made.items["item_id"].isin(table["item_id"])].sort_values("file_name")
    table = table.merge(files, on="item_id")  # keeps the order of scores, and under it that of the files
    table["rank"] = table.groupby("number").cumcount() + 1
    table = table[table["rank"] <= (k or len(table))].reset_index(drop=True)
    table["caption"] = table["caption"].astype(object).where(table["caption"].notna(), None)
    sizes = np.asarray(groups.files.sum(0)).ravel()
    none = np.empty((0, *totals.shape))
    return table, Creators(
        groups.names,
        sizes,
        totals,
        squares,
        magnitude,
        lowest,
        none,
        np.full(totals.shape, np.nan),
        works,
        groups.parts,
    )


def preconditioned(
    method: Method,
    asked: Queries,
    factored: Curvature | None,
    num_train: float,
    intervals: bool,
) -> tuple[Float64[torch.Tensor, "query k"], Float64[torch.Tensor, "batches query k"]]:
    """V, and V with one batch of the query's draws in place of all, by one solve; no batches without intervals."""
    phi, batches = torch.from_numpy(asked.phi), torch.from_numpy(asked.phi_batch).transpose(0, 1)
    if not intervals:
        batches = batches[:0]
    if method.cosine:
        v = scoring.precondition(method, phi, factored, num_train)
        return v, batches.double() / phi.double().norm(dim=1)[:, None]
    rows = batches if len(batches) else phi[None]  # φ is the mean of its batches, and v is linear in it
    found = scoring.precondition(method, rows.flatten(0, 1), factored, num_train).unflatten(0, rows.shape[:2])
    return found.mean(0), found if len(batches) else found[:0]


def with_errors(
    made: Store,
    method: Method,
    v: torch.Tensor,
    parts: Float64[torch.Tensor, "batches query k"],
    groups: Groups,
    h: np.ndarray,
    table: pd.DataFrame,
    creators: Creators,
) -> tuple[pd.DataFrame, Creators]:
    """Scan again, with batches of draws: standard errors of the listed scores, and what totals vary by.

    For totals, whose error is the query's for the most part, the product of both errors is left in either.
    """
    batches, count = parts.shape[:2]
    by_batch = np.zeros((batches, *creators.totals.shape))
    variance = np.zeros(creators.totals.shape) if made.build["batches"] else np.full(creators.totals.shape, np.nan)
    listed = [set(table.loc[table["number"] == q, "item_id"]) for q in range(count)]
    anywhere = set.union(*listed)
    found: dict[tuple[int, str], tuple[float, float]] = {}
    flat = parts.flatten(0, 1)
    columns, columns_batches = (np.ascontiguousarray(part.float().numpy().T) for part in (v, flat))
    for content in ahead(blocks(made, method, batches=True), lambda content: content.phi if batches else ()):
        ids, n = content.item_ids, len(content.item_ids)
        here = groups.places(ids)
        one_query = np.empty((batches * count, n))
        if batches:
            ((_, one_query),) = scoring.scores(method, flat, [(ids, content.phi)])
        one_query = one_query.reshape(batches, count, n)
        sizes = [part.shape[1] for part in content.phi]
        chosen = np.flatnonzero([item_id in anywhere for item_id in ids])
        one_train = np.empty((len(content.batches), count, n))
        one_each = np.empty((batches, len(content.batches), count, len(chosen)))
        for c, rows in enumerate(content.batches):
            one_train[c] = _product(rows, columns, sizes).T
            each = _product([part[chosen] for part in rows], columns_batches, sizes)
            one_each[:, c] = each.T.reshape(batches, count, len(chosen))
        if method.cosine:
            norms = np.linalg.norm(content.phi[0], axis=1)
            one_train /= norms
            one_each /= norms[chosen]
        for b in range(batches):
            by_batch[b] += scoring.group_totals(groups, here, one_query[b] / (1 - h[here]))
        if len(one_train):
            spread = (one_train / (1 - h[here])).var(0, ddof=1) / len(one_train)
            variance += (groups.files[here].power(2).T @ spread.T).T
        errors = significance.errors(one_each)
        for q in range(count):
            for place, i in enumerate(chosen):
                if ids[i] in listed[q]:
                    found[q, ids[i]] = float(errors.se[q, place]), float(errors.dof[q, place])
    pairs = np.array([found[q, item_id] for q, item_id in zip(table["number"], table["item_id"], strict=True)])
    errors = significance.Errors(*(pairs.reshape(-1, 2).T))
    low, high = errors.interval(table["score"].to_numpy())
    table = table.assign(score_se=errors.se, score_low=low, score_high=high)
    return table, replace(creators, by_batch=by_batch, train_variance=variance)


def _product(rows: Sequence[np.ndarray], columns: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Of features in one array or in two side by side with columns: [rows, columns]."""
    return sum(part @ side for part, side in zip(rows, np.split(columns, np.cumsum(sizes)[:-1]), strict=True))
