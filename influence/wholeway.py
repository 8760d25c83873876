"""Creators' totals of the whole way from the base to the fine-tune, which add up to what the fine-tune gained."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from influence.scored import Creators


def whole_way(end: Creators, path: Creators, gain: Float[np.ndarray, "query parts"]) -> Creators:
    """T_g = E_g + R (w P_g / S + (1 − w) n_g / N): totals at the end, and the rest of the measured gain divided.

    The rest is R = G − Σ_g E_g, of the gain G. As far as the images agree along the path, w = |S| / Σ_i |P_i| with
    S = Σ_g P_g = Σ_i P_i, it is divided as the totals along the path are; where they do not, or S says the opposite of
    R (then w = 0), P says who competes with whom, as E does, and nothing of what all did together: that is divided by
    works, n_g of N. Totals add up to G, as Shapley values do. What P moves is never more than |R|, however near to 0 S
    is, since R w / S = |R| / Σ_i |P_i|; and w is of images, so that dividing a creator's works between two names
    changes nothing.

    Batches of draws are taken to first order; errors of E and P as if they went together, which is on the safe side.

    Args:
        end: Totals of scores as they are, without the correction for leaving an image out: a Shapley value adds up
            what images brought, it does not remove them.
        path: Totals of method `path`, of the same creators and batches of draws.
        gain: Loss under the base less that under the fine-tune, by batch of the same draws.
    """
    measured, n = gain.astype(float), end.images
    R, S = (part[:, None] for part in (measured.mean(1) - end.totals.sum(1), path.totals.sum(1)))
    size = path.magnitude[:, None]
    c = np.divide(np.abs(R), size, out=np.zeros_like(R), where=(R * S > 0) & (size > 0))  # R w / S
    per_work = (R - c * S) / n.sum()
    totals = end.totals + c * path.totals + n * per_work

    ends, paths = end.by_batch - end.totals, path.by_batch - path.totals  # [batches, query, creators]
    rest = (measured - measured.mean(1, keepdims=True)).T[: len(ends), :, None] - ends.sum(2, keepdims=True)
    steeper = np.divide(c, R, out=np.zeros_like(c), where=c > 0) * rest
    change = ends + c * paths + steeper * path.totals
    change += n / n.sum() * (rest - c * paths.sum(2, keepdims=True) - steeper * S)
    errors = [np.sqrt(end.train_variance), c * np.sqrt(path.train_variance)]
    return replace(
        end,
        totals=totals,
        squares=(np.sqrt(end.squares) + c * np.sqrt(path.squares) + np.sqrt(n) * np.abs(per_work)) ** 2,
        by_batch=totals + change,
        train_variance=sum(each + n / n.sum() * np.sqrt((each**2).sum(1, keepdims=True)) for each in errors) ** 2,
        works=None,
    )


def with_alone(end: Creators, alone: Float[np.ndarray, "query parts creators"]) -> Creators:
    """E′_g = A_g / n + (1 − 1/n) E_g: totals at the end, and what a fine-tune on the works of g alone gains, A_g.

    A Shapley value of n creators is the mean of n terms (Shapley, 1953): what the works of g add to those of k others,
    on average over these, for k = 0 … n − 1. The first is A_g, and can be measured; scores foretell the others, for
    they are of fine-tunes on half of the images and on all.

    Args:
        end: As for `whole_way`, which then takes the result in its place.
        alone: Loss under the base less that under the fine-tune of each creator alone, by batch of the same draws.
    """
    A, w = alone.astype(float), 1 / len(end.names)
    mean = A.mean(1)
    each = np.abs(mean) / np.sqrt(end.images)  # √Σ score² as if all works of a creator did as much
    return replace(
        end,
        totals=w * mean + (1 - w) * end.totals,
        squares=(w * each + (1 - w) * np.sqrt(end.squares)) ** 2,
        by_batch=w * A.transpose(1, 0, 2)[: len(end.by_batch)] + (1 - w) * end.by_batch,
        train_variance=(1 - w) ** 2 * end.train_variance,
    )
