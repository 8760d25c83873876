"""Scores of pictures with all that answers are made of, and what a person reads of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64
from scipy import sparse

from influence import significance
from influence.loading import Loaded
from influence.queries import ControlLosses, Queries
from influence.store import Store

COLUMNS = [
    "query", "rank", "item_id", "file_name", "creator", "caption", "score", "score_se", "score_low", "score_high",
    "leverage", "score_adj", "score_rel", "p_value", "q_value",
]  # fmt: skip


@dataclass(frozen=True)
class Controls:
    """Images that were never trained on."""

    item_ids: list[str]
    creators: list[str]
    scores: Float64[np.ndarray, "query controls"]
    """NaN where the control is the query itself."""
    relative: Float64[np.ndarray, "query controls"]
    """Relative scores, likewise."""
    by_model: Float64[np.ndarray, "models query controls"] | None = None
    """Scores by each model, where they are means over several."""

    def of(self, query: int) -> Float[np.ndarray, " controls"]:
        """Scores for one query, without itself."""
        row = self.scores[query]
        return row[~np.isnan(row)]

    def relative_of(self, query: int) -> Float[np.ndarray, " controls"]:
        """Relative scores for one query, without itself."""
        row = self.relative[query]
        return row[~np.isnan(row)]


@dataclass(frozen=True)
class Creators:
    """Sums over the images of each creator, of leave-one-out-corrected scores."""

    names: list[str]
    images: Float64[np.ndarray, " creators"]
    """Files; if there are clusters, works without near duplicates, and their part of a work that several sent in."""
    totals: Float64[np.ndarray, "query creators"]
    squares: Float64[np.ndarray, "query creators"]
    """Sums of squared scores."""
    magnitude: Float64[np.ndarray, " query"]
    """Sum of the absolute scores of all images."""
    lowest_q: Float64[np.ndarray, " query"]
    """Least q-value of an image, listed or not; NaN without controls."""
    by_batch: Float64[np.ndarray, "batches query creators"]
    """Totals with one batch of the query's draws in place of all; no batches without intervals."""
    train_variance: Float64[np.ndarray, "query creators"]
    """Variance of the totals from the training images' draws."""
    works: Float64[np.ndarray, "query works"] | None
    """Mean score of each work; `None` without controls, whom it is compared with."""
    parts: sparse.csr_array
    """`[works, creators]`: a total is Σ parts · works."""
    by_model: Float64[np.ndarray, "models query creators"] | None = None
    """Totals of each model, where they are means over several."""

    def nulls(self, query: int, controls: Controls | None) -> list[np.ndarray]:
        """What each creator's total would be by chance; none without controls."""
        if controls is None or self.works is None:
            return []
        strangers, columns = controls.of(query), self.parts.tocsc()
        if not len(strangers):
            return []
        found = []
        for g in range(len(self.names)):
            mine = slice(columns.indptr[g], columns.indptr[g + 1])
            works, parts = self.works[query, columns.indices[mine]], columns.data[mine].astype(float)
            found.append(significance.null_among(works, parts, strangers, len(self.names)))
        return found


@dataclass(frozen=True)
class Scored:
    """Scores of pictures, with all that answers are made of."""

    store: Store
    loaded: Loaded
    queries: Queries
    table: pd.DataFrame
    """As `attribute` returns it."""
    creators: Creators
    controls: Controls | None
    control_losses: ControlLosses | None
    whole: Creators | None = None
    """Totals of the whole way from the base to the fine-tune, if they were wanted and the base is known."""
    alone: Float[np.ndarray, "query creators"] | None = None
    """What a fine-tune on the works of each creator alone took off the loss, if there are such fine-tunes."""


def styles(creators: Creators, controls: Controls | None, query: int) -> pd.DataFrame:
    """Trained works of each creator against works of the same creator that were held out, by mean score_adj.

    If held-out works score as high, a style that is recognised does not show that these works contributed.

    Returns:
        Columns creator, n_trained, n_heldout, mean_trained, mean_heldout, gap with its 95 % interval and two-sided
        p-value (Welch, 1947); creators of whom there are two of each at least.
    """
    rows = []
    held_by = np.array([] if controls is None else controls.creators, dtype=object)
    for g, name in enumerate(creators.names):
        mine = held_by == name
        values = np.empty(0) if controls is None else controls.scores[query][mine]
        known, n = ~np.isnan(values), float(creators.images[g])
        values = values[known]
        if len(values) < 2 or n < 2:
            continue
        mean = creators.totals[query, g] / n
        variance = max(creators.squares[query, g] - n * mean**2, 0.0) / (n - 1)
        errors = significance.difference(variance, n, float(values.var(ddof=1)), float(len(values)))
        gap = np.array([mean - values.mean()])
        if creators.by_model is not None and controls is not None and controls.by_model is not None:
            each = creators.by_model[:, query, g] / n - controls.by_model[:, query, mine][:, known].mean(1)
            errors = significance.with_training(errors, np.array([each.var(ddof=1)]) / len(each), len(each))
        (low,), (high,) = errors.interval(gap)
        p = significance.two_sided(float(gap[0]), float(errors.se[0]), float(errors.dof[0]))
        rows.append((name, n, len(values), mean, values.mean(), gap[0], low, high, p))
    columns = [
        "creator",
        "n_trained",
        "n_heldout",
        "mean_trained",
        "mean_heldout",
        "gap",
        "gap_low",
        "gap_high",
        "p_gap",
    ]
    return pd.DataFrame(rows, columns=columns)


# What a person reads ------------------------------------------------------------------------------------------------


def creator_rows(queries: Sequence[str], creators: Creators, controls: Controls | None) -> list[dict[str, Any]]:
    """Totals of the creators of each query, highest first, with p and q of changing places with controls."""
    rows = []
    for q, query in enumerate(queries):
        p = significance.group_p_values(creators.totals[q], creators.nulls(q, controls))
        fdr = significance.false_discovery_rates(p)
        gaps = styles(creators, controls, q).set_index("creator")
        for g in np.lexsort((creators.names, -creators.totals[q])):
            rows.append({
                "query": query,
                "creator": creators.names[g],
                "images": int(creators.images[g]),
                "total": float(creators.totals[q, g]),
                "p_value": float(p[g]),
                "q_value": float(fdr[g]),
                **_gap(gaps, creators.names[g]),
            })  # fmt: skip
    return rows


def _gap(gaps: pd.DataFrame, name: str) -> dict[str, float | None]:
    """What trained works score above held-out works of the same creator; `None` without such works."""
    columns = ("gap", "gap_low", "gap_high")
    return {column: float(gaps.loc[name, column]) if name in gaps.index else None for column in columns}


def query_rows(asked: Queries) -> list[dict[str, Any]]:
    """Losses of each query under the fine-tuned model and its base."""
    rows = []
    for q, query in enumerate(asked.paths):
        row: dict[str, Any] = {"query": query, "query_id": asked.item_ids[q], "prompt": asked.prompts[q]}
        row["loss_finetuned"] = float(asked.loss[q].mean())
        row |= dict.fromkeys(("loss_base", "gain", "gain_se", "gain_p", "gain_bits", "gain_bits_se"))
        if asked.loss_base is not None and asked.gain is not None and asked.bits is not None:
            gain, bits = asked.gain[q], asked.bits[q]
            row |= {"loss_base": float(asked.loss_base[q].mean()), "gain": float(gain.mean())}
            row["gain_bits"] = float(bits.mean())
            if len(gain) % 2 == 0 and len(gain) > 2:
                errors = significance.stratified_errors(np.stack([gain, bits], axis=1))
                if asked.between is not None:
                    errors = significance.with_training(errors, asked.between[q], asked.models)
                se, dof = float(errors.se[0]), float(errors.dof[0])
                row |= {"gain_se": se, "gain_p": significance.above_zero(float(gain.mean()), se, dof)}
                row["gain_bits_se"] = float(errors.se[1])
        rows.append(row)
    return rows
