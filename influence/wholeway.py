"""Creators' totals of the whole way from the base to the fine-tune, which add up to what the fine-tune gained."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from influence.scored import Creators


def whole_way(end: Creators, path: Creators, gain: Float[np.ndarray, "query parts"]) -> Creators:
    """T = E + c P: totals at the end, and the rest of the measured gain divided as the totals along the path are.

    c = max(0, R S / (S² + σ²)), with the rest R = G − Σ_g E_g of the gain G and S = Σ_g P_g, σ its standard error.
    Without error c = R / S, and the totals add up to G, as Shapley values do. P has the right proportions and an
    unknown scale: the damped step that it stands for is not the way that was gone. c is one number for each query, so
    that totals stay linear in the images: dividing a creator's works between two names changes nothing. Where R and S
    have opposite signs, P says nothing of the rest, and nothing is added.

    Batches of draws are taken to first order; errors of E and P as if they went together, which is on the safe side.

    Args:
        end: Totals of the fine-tuned model's gradients.
        path: Totals of method `path`, of the same creators and batches of draws.
        gain: Loss under the base less that under the fine-tune, by batch of the same draws.
    """
    measured = gain.astype(float)
    rest, whole = measured.mean(1) - end.totals.sum(1), path.totals.sum(1)
    batches = len(path.by_batch)
    variance = path.by_batch.sum(2).var(0, ddof=1) / batches if batches > 1 else np.zeros(len(whole))
    size = whole**2 + variance
    trusted = np.divide(whole**2, size, out=np.zeros(len(whole)), where=size > 0)
    per_whole = np.divide(1.0, whole, out=np.zeros(len(whole)), where=whole != 0)
    c = np.maximum(trusted * rest * per_whole, 0.0)
    by_batch = end.by_batch + c[:, None] * path.by_batch
    if batches:
        ends, paths = ((part.by_batch - part.totals).sum(2) for part in (end, path))  # [batches, query]
        change = (trusted * (measured.T - measured.mean(1) - ends) - c * paths) * per_whole
        by_batch = by_batch + np.where(c > 0, change, 0.0)[:, :, None] * path.totals
    scale = c[:, None]
    return replace(
        end,
        totals=end.totals + scale * path.totals,
        squares=(np.sqrt(end.squares) + scale * np.sqrt(path.squares)) ** 2,
        by_batch=by_batch,
        train_variance=(np.sqrt(end.train_variance) + scale * np.sqrt(path.train_variance)) ** 2,
        works=None,
    )
