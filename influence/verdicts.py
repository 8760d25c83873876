"""One word on a picture, and the sentence that says why: what the numbers allow, and no more."""

from dataclasses import dataclass

import numpy as np

from influence import significance

ALPHA = 0.05
VERDICTS = ("near_copy", "attributable", "weak", "not_attributable", "not_from_model")


@dataclass(frozen=True)
class Verdict:
    """What can be said of a picture."""

    verdict: str
    """Of `VERDICTS`."""
    reason: str
    """One sentence."""
    explained: bool = True
    """Whether the fine-tune explains the picture better than its base does, as far as is known."""


def verdict(
    *,
    near_copy: bool,
    loss: float,
    gain: float | None,
    gain_p: float | None,
    control_losses: np.ndarray,
    control_gains: np.ndarray,
    creator_q: np.ndarray,
    image_q: float,
) -> Verdict:
    """Decide.

    Args:
        near_copy: Whether the picture is nearly a training picture: looks, whatever its influence.
        loss: Of the picture, under the fine-tuned model.
        gain: Loss under the base less that under the fine-tune; `None` if the base is not known.
        gain_p: One-sided p-value of a gain above 0, from neighbouring draws.
        control_losses: The same losses of the controls.
        control_gains: The same gains of the controls; empty if the base is not known.
        creator_q: q-values of the creators' totals; empty without controls.
        image_q: Least q-value of an image; NaN without controls.

    Returns:
        `near_copy` before all else. `not_from_model` if its loss is above that of every one of at least 99 controls and
        no gain of the fine-tune is shown, or if the base predicts it better, the gain is below and the loss above that
        of 95 % of the controls: noise, a photograph, another model's picture. One of the two alone is not enough: a
        weak model's own pictures can be less likely under it than real ones. `not_attributable` if no gain is shown
        (as for many pictures that a weak fine-tune made itself), or nothing stands out against the controls. `weak` if
        single images do and no creator does.
    """
    found = _explained(loss, gain, gain_p, control_losses, control_gains)
    if near_copy:
        explained = found is None or found.explained
        return Verdict(
            "near_copy", "it looks nearly the same as a training picture, which says nothing of influence", explained
        )
    if found is not None:
        return found
    if not len(control_losses):
        return Verdict("not_attributable", "without controls nothing says whether a score is more than chance")
    if (creator_q <= significance.Q_VALUE).any():
        return Verdict(
            "attributable", "the totals of some creators are higher than when their works and controls change places"
        )
    if image_q <= significance.Q_VALUE:
        return Verdict("weak", "single images score higher than controls do, and no creator's total does")
    return Verdict("not_attributable", "no creator and no image scores higher than controls do")


def _explained(
    loss: float, gain: float | None, gain_p: float | None, control_losses: np.ndarray, control_gains: np.ndarray
) -> Verdict | None:
    """A verdict if the fine-tune does not explain the picture."""
    strangers, known = len(control_losses), gain_p is not None and gain is not None
    gained = known and gain_p <= ALPHA
    if strangers >= significance.MIN_CONTROLS and loss > control_losses.max() and not gained:
        shown = "and the fine-tune gained nothing on it" if known else "and what the fine-tune gained is not known"
        return Verdict("not_from_model", f"its loss is above that of all {strangers} controls, {shown}", False)
    if known:
        worse = 1 - gain_p <= ALPHA
        if worse and _rare(control_gains <= gain) and _rare(control_losses >= loss):
            reason = "its loss is above, and the fine-tune's gain on it below, that of 95 % of the controls"
            return Verdict("not_from_model", reason, False)
        if worse:
            return Verdict("not_attributable", "the base predicts it better than the fine-tune does", False)
        if gain_p > ALPHA:
            return Verdict("not_attributable", "the fine-tune predicts it no better than its base does", False)
    return None


def _rare(beyond: np.ndarray) -> bool:
    """Whether at most 5 % of the controls are as far out; not without controls."""
    return bool(len(beyond)) and (1 + int(beyond.sum())) / (1 + len(beyond)) <= ALPHA
