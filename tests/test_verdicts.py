"""Which word a picture gets."""

import numpy as np
import pytest

from influence.verdicts import VERDICTS, verdict

RNG = np.random.Generator(np.random.PCG64(0))
LOSSES, GAINS = 0.1 + 0.02 * RNG.random(120), RNG.normal(0.002, 0.003, 120)
KNOWN = {
    "near_copy": False, "loss": 0.11, "gain": 0.003, "gain_p": 0.001, "control_losses": LOSSES,
    "control_gains": GAINS, "creator_q": np.array([0.02, 0.9]), "image_q": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected", "explained"),
    [
        ({}, "attributable", True),
        ({"near_copy": True}, "near_copy", True),
        ({"near_copy": True, "gain": -0.01, "gain_p": 1.0}, "near_copy", False),
        ({"creator_q": np.array([0.2, 0.9])}, "not_attributable", True),
        ({"creator_q": np.array([0.2, 0.9]), "image_q": 0.05}, "weak", True),
        ({"loss": 0.5}, "attributable", True),
        ({"loss": 0.5, "gain": 0.0, "gain_p": 0.5}, "not_from_model", False),
        ({"loss": 0.5, "gain": None, "gain_p": None, "control_gains": np.empty(0)}, "not_from_model", False),
        ({"loss": 0.5, "control_losses": LOSSES[:20]}, "attributable", True),
        ({"gain": -0.02, "gain_p": 0.9999}, "not_attributable", False),
        ({"gain": -0.02, "gain_p": 0.9999, "loss": LOSSES.max()}, "not_from_model", False),
        ({"gain": -0.001, "gain_p": 0.999}, "not_attributable", False),
        ({"gain": 0.0001, "gain_p": 0.4}, "not_attributable", False),
        ({"gain": None, "gain_p": None, "control_gains": np.empty(0)}, "attributable", True),
        ({"control_losses": np.empty(0), "control_gains": np.empty(0), "creator_q": np.full(2, np.nan),
          "image_q": float("nan")}, "not_attributable", True),
    ],
)  # fmt: skip
def test_verdicts(changes, expected, explained):
    found = verdict(**KNOWN | changes)
    assert found.verdict == expected and found.explained is explained
    assert found.verdict in VERDICTS and found.reason and "\n" not in found.reason


def test_reasons_never_claim_copying_or_debt():
    for changes in ({}, {"near_copy": True}, {"loss": 0.5, "gain_p": 0.5}, {"gain": -0.02, "gain_p": 1.0}):
        words = verdict(**KNOWN | changes).reason
        assert not any(word in words for word in ("stolen", "owed", "source"))
