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


ALONE = 1 / 4
"""Weight of what works do alone, by Gauss and Radau."""


def with_alone(
    whole: Creators, alone: Float[np.ndarray, "query parts creators"], gain: Float[np.ndarray, "query parts"]
) -> Creators:
    """T_g = ¼ A_g + ¾ W_g + ¼ (G − Σ_h A_h) n_g / N, with what a fine-tune on the works of g alone gains, A_g.

    A Shapley value is φ_g = ∫₀¹ D_g(s) ds, where D_g(s) is what the works of g add, on average, to a fine-tune on those
    of others who are in it with probability s each (Owen, 1972). D_g(0) is A_g, which is measured. The rule of Gauss
    and Radau with one end fixed, exact for D of second degree, is ¼ D(0) + ¾ D(⅔); for D(⅔) stand totals W, as scores
    are of fine-tunes on half of the images and on all of them (s = ½ and 1). Totals add up to G as before: what works
    do alone and do not do together, or the other way round, is divided by works, n_g of N.

    Args:
        whole: As `whole_way` makes them: W.
        alone: Loss under the base less that under the fine-tune of each creator alone, by batch of the same draws.
        gain: As for `whole_way`.
    """
    n = whole.images

    def mixed(W: np.ndarray, A: np.ndarray, G: np.ndarray) -> np.ndarray:
        return (1 - ALONE) * W + ALONE * (A + n / n.sum() * (G - A.sum(-1))[..., None])

    measured, A = gain.astype(float), alone.astype(float)
    totals = mixed(whole.totals, A.mean(1), measured.mean(1))
    batches = len(whole.by_batch)
    each = np.abs(totals - (1 - ALONE) * whole.totals) / np.sqrt(n)  # as if all works of a creator did as much
    return replace(
        whole,
        totals=totals,
        squares=((1 - ALONE) * np.sqrt(whole.squares) + each) ** 2,
        by_batch=mixed(whole.by_batch, A.transpose(1, 0, 2)[:batches], measured.T[:batches]),
        train_variance=(1 - ALONE) ** 2 * whole.train_variance,
    )
