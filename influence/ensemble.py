"""Scores by several models of the same fine-tune, retrained or checkpoints, as one: what does not hang on one training.

Scores are means over the models (Park et al., 2023, average them likewise), and the spread over models tells what a
training with another seed may give: intervals cover it. All models are asked with the same draws, so that the error of
the draws is not made smaller by their number.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from influence import significance
from influence.errors import OptionError
from influence.queries import ControlLosses, Queries
from influence.scored import COLUMNS, Controls, Creators, Scored, creator_rows, query_rows

_FILE = ["query", "item_id", "file_name"]


def combined(parts: Sequence[Scored], k: int | None) -> Scored:
    """One result from those of several stores, each with all images.

    Args:
        parts: Two or more; of the same images and controls.
        k: Rows for each query that the table keeps; `None` for all.

    Raises:
        OptionError: The stores hold different images or controls, or some of them cannot give intervals.
    """
    first = parts[0]
    _require_several(parts)
    for part in parts[1:]:
        _require_same(first, part)
    tables = [part.table.set_index(_FILE).sort_index() for part in parts]
    each = {
        name: np.stack([table[name].to_numpy(float) for table in tables])
        for name in ("score", "score_adj", "score_rel", "leverage", "score_se", "score_low", "score_high")
    }
    spread = each["score"].var(0, ddof=1) / len(parts)
    draws = ((each["score_high"] - each["score_low"]) / 2) ** 2
    quantile = stats.t.ppf((1 + significance.LEVEL) / 2, len(parts) - 1)
    half = np.sqrt(draws.mean(0) + quantile**2 * spread)
    score = each["score"].mean(0)
    table = (
        tables[0]
        .assign(
            score=score,
            score_adj=each["score_adj"].mean(0),
            score_rel=each["score_rel"].mean(0),
            leverage=each["leverage"].mean(0),
            score_se=np.sqrt((each["score_se"] ** 2).mean(0) + spread),
            score_low=score - half,
            score_high=score + half,
        )
        .reset_index()
    )
    controls = _controls(parts)
    table = _tested(table, first, controls)
    lowest = table.groupby("query")["q_value"].min()[first.queries.paths].to_numpy(float)
    creators = replace(_creators([part.creators for part in parts]), lowest_q=lowest)
    queries = replace(
        first.queries,
        loss=np.mean([part.queries.loss for part in parts], axis=0, dtype=np.float32),
        loss_base=_mean_or_none([part.queries.loss_base for part in parts]),
        gain=_mean_or_none([part.queries.gain for part in parts]),
        bits=_mean_or_none([part.queries.bits for part in parts]),
        models=len(parts),
        between=_between([part.queries for part in parts]),
    )
    table = _ranked(table, first.queries.paths, k)[COLUMNS]
    table.attrs = first.table.attrs | {
        "damping": _mean_or_none([part.table.attrs["damping"] for part in parts]),
        "models": len(parts),
        "creators": creator_rows(queries.paths, creators, controls),
        "queries": query_rows(queries),
    }
    ways = [part.whole for part in parts if part.whole is not None]
    whole = _creators(ways) if len(ways) == len(parts) else None
    alone = _mean_or_none([part.alone for part in parts])
    return Scored(first.store, first.loaded, queries, table, creators, controls, _losses(parts), whole, alone)


def _require_several(parts: Sequence[Scored]) -> None:
    """Raise if a model is given twice: that training again gives another one would seem to change nothing."""
    seen: dict[str, str] = {}
    for part in parts:
        name, features = part.store.path.name, part.store.family_hash("loss")
        if features in seen:
            raise OptionError(f"stores {seen[features]} and {name} have the same features; expected two models")
        seen[features] = name


def _require_same(first: Scored, other: Scored) -> None:
    """Raise unless two stores can be averaged."""
    names = (first.store.path.name, other.store.path.name)
    a, b = (set(zip(part.store.items["item_id"], part.store.items["creator"], strict=True)) for part in (first, other))
    if a ^ b or len(first.table) != len(other.table):
        raise OptionError(
            f"stores {names[0]} and {names[1]} differ in {max(len(a ^ b), 1)} images or creators; several must be of "
            "one data set, with the same exclusions"
        )
    methods = [part.table.attrs["method"] for part in (first, other)]
    if methods[0] != methods[1]:
        raise OptionError(
            f"store {names[0]} would be asked with {methods[0]} and {names[1]} with {methods[1]}; name one --method"
        )
    if _control_ids(first) != _control_ids(other):
        raise OptionError(
            f"stores {names[0]} and {names[1]} have other controls; build both with the same --controls, or none"
        )
    if first.creators.by_batch.shape != other.creators.by_batch.shape:
        raise OptionError(
            f"stores {names[0]} and {names[1]} have other batches of draws; build them with equal --draws"
        )


def _control_ids(part: Scored) -> list[str]:
    return [] if part.controls is None else sorted(part.controls.item_ids)


def _mean_or_none(values: Sequence[np.ndarray | float | None]) -> np.ndarray | float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean = np.mean(known, axis=0)
    return mean.astype(known[0].dtype) if isinstance(known[0], np.ndarray) else float(mean)


def _controls(parts: Sequence[Scored]) -> Controls | None:
    """Mean scores of each control."""
    first = parts[0].controls
    if first is None:
        return None
    scores, relative = [], []
    for part in parts:
        assert part.controls is not None
        place = {item_id: i for i, item_id in enumerate(part.controls.item_ids)}
        order = [place[item_id] for item_id in first.item_ids]
        scores.append(part.controls.scores[:, order])
        relative.append(part.controls.relative[:, order])
    by_model = np.stack(scores)
    return Controls(first.item_ids, first.creators, by_model.mean(0), np.mean(relative, axis=0), by_model)


def _creators(parts: Sequence[Creators]) -> Creators:
    """Mean totals, and what they vary by over models."""
    totals = np.stack([part.totals for part in parts])
    works = [part.works for part in parts if part.works is not None]
    return replace(
        parts[0],
        totals=totals.mean(0),
        squares=np.mean([part.squares for part in parts], axis=0),
        magnitude=np.mean([part.magnitude for part in parts], axis=0),
        by_batch=np.mean([part.by_batch for part in parts], axis=0),
        train_variance=np.mean([part.train_variance for part in parts], axis=0),
        works=np.mean(works, axis=0) if works else None,
        by_model=totals,
    )


def _between(parts: Sequence[Queries]) -> np.ndarray | None:
    """Variance of the mean gain, and of that in bits, from training again; `None` if no base is known."""
    gains = [[of.mean(1) for of in (part.gain, part.bits) if of is not None] for part in parts]
    if not all(len(each) == 2 for each in gains):
        return None
    return np.stack(gains).var(0, ddof=1).T / len(parts)


def _tested(table: pd.DataFrame, first: Scored, controls: Controls | None) -> pd.DataFrame:
    """With p-values and q-values of the mean scores."""
    table[["p_value", "q_value"]] = np.nan
    for q, query in enumerate(first.queries.paths):
        strangers = np.empty(0) if controls is None else controls.relative_of(q)
        if not len(strangers):
            continue
        mine = table["query"] == query
        above = significance.exceedances(table.loc[mine, "score_rel"].to_numpy(), strangers)
        images = ~table.loc[mine, "item_id"].duplicated().to_numpy()
        counts = np.bincount(above[images], minlength=len(strangers) + 1)
        table.loc[mine, "p_value"] = significance.p_values(above, len(strangers))
        table.loc[mine, "q_value"] = significance.q_values(counts)[above]
    return table


def _ranked(table: pd.DataFrame, paths: Sequence[str], k: int | None) -> pd.DataFrame:
    """Highest scores first, ties in the order of ids, in the order of the queries."""
    order = {path: q for q, path in enumerate(paths)}
    table = table.assign(_query=table["query"].map(order), _down=-table["score"])
    table = table.sort_values(["_query", "_down", "item_id", "file_name"], ignore_index=True)
    table["rank"] = table.groupby("_query").cumcount() + 1
    return table[table["rank"] <= (k or len(table))].reset_index(drop=True)


def _losses(parts: Sequence[Scored]) -> ControlLosses | None:
    """Mean losses of the controls."""
    found = [part.control_losses for part in parts if part.control_losses is not None]
    if not found:
        return None
    ids = found[0].item_ids
    finetuned, base = [], []
    for each in found:
        place = {item_id: i for i, item_id in enumerate(each.item_ids)}
        order = [place[item_id] for item_id in ids]
        finetuned.append(each.finetuned[order])
        base.append(None if each.base is None else each.base[order])
    return ControlLosses(ids, np.mean(finetuned, axis=0), _mean_or_none(base))
