"""Curvature rows divided among the draws: the same rows as before on the whole, as often as they are long."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from influence import allocation, diffusion, features, keys
from influence.diffusion import NoiseSchedule
from influence.errors import GradientError
from influence.projection import identity

DRAWS, SHAPE = 8, (2, 4, 4)
P = (4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)


class Loud(nn.Module):
    """A convolution that answers louder at early timesteps, by a known factor."""

    def __init__(self, *, early: float = 3.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.early = early
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(keys.normal((name,), tuple(parameter.shape))) / 3)

    def forward(self, x, t, cond=None):
        return self.conv(x) * torch.where(t < 500, self.early, 1.0).float()[:, None, None, None]


def recipe_of(network, **changed):
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    dim = sum(p.numel() for p in parameters.values())
    options = {
        "schedule": NoiseSchedule(tuple(DDPMScheduler().alphas_cumprod.double().tolist()), "epsilon", "uniform"),
        "parameters": parameters,
        "projection": identity(shapes, dim=dim, seed=0, device=torch.device("cpu")),
        "seed": 0, "role": "train", "num_draws": DRAWS, "curvature_rate": float(DRAWS), "output": "loss",
        "bf16": False, "engine": "hooks", "batch_size": 16,
    }  # fmt: skip
    return features.Recipe(**options | changed)


def pictures(ids):
    return torch.from_numpy(np.stack([keys.normal(("x0", i), SHAPE) for i in ids]))


def taken(network, ids, **changed):
    return features.features(network, recipe_of(network, **changed), ids, pictures(ids), None)


IDS = [str(i) for i in range(6)]


def test_rows_are_those_of_equal_division_times_a_root_and_phi_is_as_before():
    network = Loud()
    whole, found = taken(network, IDS), taken(network, IDS, density=P)
    np.testing.assert_allclose(found.phi, whole.phi, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.phi_batch, whole.phi_batch, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-5)
    assert len(found.psi) == len(whole.psi)
    first = np.r_[True, np.diff(found.psi_item * DRAWS + found.psi_draw) != 0]
    assert 10 < first.sum() < len(first) and (np.diff(found.psi_item * DRAWS + found.psi_draw) >= 0).all()
    place = {(i, s): row for row, (i, s) in enumerate(zip(whole.psi_item, whole.psi_draw, strict=True))}
    same = [place[key] for key in zip(found.psi_item[first], found.psi_draw[first], strict=True)]
    root = np.sqrt(np.mean(P) / np.array(P)[found.psi_draw[first]])[:, None]
    np.testing.assert_allclose(found.psi[first], whole.psi[same] * root, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [{"engine": "vmap"}, {"batch_size": 3}])
def test_engine_and_batches_change_no_row(changed):
    network = Loud()
    a, b = taken(network, IDS, density=P), taken(network, IDS, density=P, **changed)
    np.testing.assert_array_equal(a.psi_draw, b.psi_draw)
    np.testing.assert_allclose(a.psi, b.psi, rtol=1e-4, atol=1e-5 * np.abs(a.psi).max())
    one = taken(network, IDS[3:4], density=P)
    np.testing.assert_allclose(one.psi, a.psi[a.psi_item == 3], rtol=1e-4, atol=1e-5 * np.abs(a.psi).max())


def test_probes_of_one_draw_differ():
    found = taken(Loud(), IDS, density=P)
    again = np.flatnonzero(np.diff(found.psi_item * DRAWS + found.psi_draw) == 0)
    assert len(again) and all(not np.allclose(found.psi[i], found.psi[i + 1], rtol=0.1) for i in again)


def test_h_is_the_same_on_average_and_its_error_is_less():
    network, ids = Loud(early=6.0), [str(i) for i in range(40)]
    density = allocation.density(network, recipe_of(network), ids[:8], pictures(ids[:8]), None)
    h = exact_h(network, ids)
    errors = {}
    for name, p in (("equally", None), ("as long", density)):
        each = []
        for seed in range(12):
            psi = taken(network, ids, seed=seed, curvature_rate=2.0, density=p).psi.astype(float)
            each.append(psi.T @ psi / len(psi))
        errors[name] = np.mean([np.linalg.norm(one - h) for one in each]) / np.linalg.norm(h)
        assert np.linalg.norm(np.mean(each, 0) - h) < 2 * errors[name] / 12**0.5 * np.linalg.norm(h)
    assert errors["as long"] < 0.85 * errors["equally"]


def exact_h(network, ids):
    """Mean over many draws."""
    psi = taken(network, ids, num_draws=400, curvature_rate=400.0, seed=99).psi.astype(float)
    return psi.T @ psi / len(psi)


def test_density_follows_the_length_of_rows_and_not_the_order_of_images():
    network = Loud(early=3.0)
    found = np.array(allocation.density(network, recipe_of(network), IDS, pictures(IDS), None))
    early, late = found[: DRAWS // 2].mean(), found[DRAWS // 2 :].mean()
    assert 6 < early / late < 13  # 3², times what noise does to the length of x_t
    backwards = IDS[::-1]
    assert tuple(found) == allocation.density(network, recipe_of(network), backwards, pictures(backwards), None)
    assert set(np.round(4 * np.log2(found), 9) % 1) == {0.0}


def test_density_of_rows_that_are_all_zero_is_refused():
    network = Loud()
    network.forward = lambda x, t, cond=None: network.conv(x) * 0.0
    with pytest.raises(GradientError, match="curvature rows"):
        allocation.density(network, recipe_of(network), IDS, pictures(IDS), None)


@pytest.mark.parametrize("rate", [0.7, 3.0, 8.0])
def test_draws_are_as_often_as_their_density_and_evenly_spread(rate):
    counts = np.array(
        [np.bincount(diffusion.curvature_draws(0, str(i), DRAWS, rate, P), minlength=DRAWS) for i in range(500)]
    )
    wanted = rate * np.array(P) / sum(P)
    assert np.abs(counts.mean(0) - wanted).max() < 0.1
    if rate >= 1:  # one point after the other along the density: never more or fewer than that
        assert (counts >= np.floor(wanted)).all() and (counts <= np.ceil(wanted)).all()
    np.testing.assert_array_equal(
        diffusion.curvature_draws(0, "a", DRAWS, rate), diffusion.curvature_draws(0, "a", DRAWS, rate, (2.0,) * DRAWS)
    )
