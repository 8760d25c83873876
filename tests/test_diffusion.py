import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from influence import diffusion, keys
from influence.diffusion import NoiseSchedule
from influence.errors import ModelError

SHAPE = (2, 3, 3)


def schedule_of(prediction="epsilon", weighting="uniform"):
    return NoiseSchedule(tuple(DDPMScheduler().alphas_cumprod.double().tolist()), prediction, weighting)


def rows(n):
    x0 = torch.from_numpy(keys.normal(("x0",), (n, *SHAPE)))
    eps = torch.from_numpy(keys.normal(("eps",), (n, *SHAPE)))
    return x0, torch.from_numpy(keys.integers(("t",), n, 1000)), eps


@pytest.mark.parametrize("prediction", diffusion.TARGETS)
def test_noising_and_targets_equal_those_of_diffusers(prediction):
    x0, t, eps = rows(16)
    scheduler = DDPMScheduler()
    ours = schedule_of(prediction)
    torch.testing.assert_close(
        diffusion.noised(ours, x0, t, eps), scheduler.add_noise(x0, eps, t), rtol=1e-5, atol=1e-6
    )
    wanted = {"epsilon": eps, "v_prediction": scheduler.get_velocity(x0, eps, t), "sample": x0}[prediction]
    torch.testing.assert_close(diffusion.target(ours, x0, t, eps), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", diffusion.TARGETS)
@pytest.mark.parametrize("weighting", ["uniform", "snr"])
def test_the_loss_is_zero_at_the_target_and_a_weighted_mean_square_elsewhere(prediction, weighting):
    x0, t, eps = rows(16)
    ours = schedule_of(prediction, weighting)
    y = diffusion.target(ours, x0, t, eps)
    assert diffusion.losses(ours, y, x0, t, eps).abs().max() == 0
    a = DDPMScheduler().alphas_cumprod.double()[t]
    w = torch.ones(16, dtype=torch.float64) if weighting == "uniform" else a / (1 - a)
    torch.testing.assert_close(diffusion.losses(ours, y + 2, x0, t, eps).double(), 4 * w, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_their_key_alone_and_can_be_taken_in_part():
    t, eps = diffusion.draws(0, "train", "id", 8, 1000, SHAPE)
    t2, eps2 = diffusion.draws(0, "train", "id", 8, 1000, SHAPE, which=[5, 2])
    assert torch.equal(t2, t[[5, 2]]) and torch.equal(eps2, eps[[5, 2]])
    for other in ((1, "train", "id"), (0, "query", "id"), (0, "train", "other")):
        assert not torch.equal(diffusion.draws(*other, 8, 1000, SHAPE)[1], eps)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_timesteps_are_stratified_and_noise_is_antithetic(count):
    t, eps = diffusion.draws(3, "train", "id", count, 1000, SHAPE)
    strata = (t.double() + 0.5) * count / 1000
    assert (strata.floor().long() - torch.arange(count)).abs().max() <= 1  # a rounding at the edge of a stratum
    for s in range(0, count - 1, 2):
        assert torch.equal(eps[s], -eps[s + 1])


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 2.5, 8.0, 99.0])
def test_curvature_draws_have_the_rate_on_average_and_are_distinct(rate):
    counts = []
    for i in range(400):
        chosen = diffusion.curvature_draws(0, str(i), 8, rate)
        assert len(set(chosen.tolist())) == len(chosen) and all(0 <= s < 8 for s in chosen)
        counts.append(len(chosen))
    assert set(counts) <= {int(min(rate, 8)), int(min(np.ceil(rate), 8))}
    assert abs(np.mean(counts) - min(rate, 8)) <= 5 * 0.5 / 400**0.5


def test_probes_are_keyed_by_image_and_draw():
    a = diffusion.probes(0, "id", np.array([1, 4]), SHAPE)
    assert torch.equal(a[1], diffusion.probes(0, "id", np.array([4]), SHAPE)[0])
    assert not torch.equal(a, diffusion.probes(0, "id", np.array([1, 4]), SHAPE, number=1))
    assert diffusion.probes(0, "id", np.array([], dtype=int), SHAPE).shape == (0, *SHAPE)


def test_unknown_predictions_and_weightings_are_refused():
    with pytest.raises(ModelError, match="prediction type 'flow' is not supported; expected epsilon"):
        schedule_of("flow")
    with pytest.raises(ModelError, match="weighting 'min_snr' is not supported"):
        schedule_of("epsilon", "min_snr")


def test_zero_terminal_snr_gives_finite_losses():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = NoiseSchedule(tuple(scheduler.alphas_cumprod.double().tolist()), "v_prediction", "uniform")
    x0, _, eps = rows(2)
    t = torch.tensor([999, 999])
    assert torch.isfinite(diffusion.losses(ours, x0, x0, t, eps)).all()


CASES = [(40, 5), (256, 8), (80, 8), (4, 2), (6, 3), (2, 0), (7, 0), (1, 0), (22, 0)]


@pytest.mark.parametrize(("draws", "batches"), CASES)
def test_batches_hold_equally_many_antithetic_pairs_from_all_over_the_schedule(draws, batches):
    assert diffusion.num_batches(draws) == batches
    batch = diffusion.batch_of(draws)
    assert len(batch) == draws
    if not batches:
        assert not batch.any()
        return
    assert (np.bincount(batch) == draws // batches).all()
    assert (batch[0::2] == batch[1::2]).all(), "a pair stays together"
    rounds = draws // (2 * batches)
    for first in range(0, draws, 2 * batches):  # every batch is in each part of the schedule
        assert set(batch[first : first + 2 * batches]) == set(range(batches))
    if rounds % 2 == 0:
        means = [np.flatnonzero(batch == b).mean() for b in range(batches)]
        np.testing.assert_allclose(means, (draws - 1) / 2, rtol=1e-12)  # a linear trend over t is in all alike


@pytest.mark.parametrize("draws", [40, 256])
def test_batches_foretell_the_variance_of_the_mean_where_a_trend_over_the_schedule_dwarfs_the_noise(draws):
    batches, batch, count = diffusion.num_batches(draws), diffusion.batch_of(draws), 8000
    u, noise = keys.uniform(("u", draws), count * draws), keys.normal(("noise", draws), (count, draws // 2))
    t = (np.arange(draws) + u.reshape(count, draws)) / draws
    # The part of a pair's noise that its signs do not cancel, smaller at the end, beside a line that bends a little.
    values = 20 * (1 - t) + 2 * (1 - t) ** 2 + np.repeat(noise, 2, axis=1) * (1.5 - t)
    found = np.stack([values[:, batch == b].mean(1) for b in range(batches)]).var(0, ddof=1).mean() / batches
    assert found == pytest.approx(values.mean(1).var(ddof=1), rel=0.1)


@pytest.mark.parametrize("weighting", ["uniform", "snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_bits_of_the_best_predictor_of_gaussian_data_are_the_information_that_the_noise_takes(prediction, weighting):
    """x₀ ~ N(0, 1) has the posterior mean √ᾱ x_t; the bound is then ½ log₂ of how far 1 + SNR falls (Guo et al., 2005).

    The sum of a schedule is a little more than the integral, since the error of each step is that at its end.
    """
    a = 1 / (1 + np.exp(np.linspace(-6, 6, 4000)))
    schedule = NoiseSchedule(tuple(a.tolist()), prediction, weighting)
    t = torch.arange(4000)
    x0, eps = (torch.from_numpy(keys.normal(("bits", name), (4000, 256))) for name in ("x0", "eps"))
    x_t = diffusion.noised(schedule, x0, t, eps)
    root, rest = (torch.from_numpy(part).float()[:, None] for part in (np.sqrt(a), np.sqrt(1 - a)))
    estimate = root * x_t
    of = {"epsilon": rest * x_t, "v_prediction": torch.zeros_like(x_t), "sample": estimate}
    loss = diffusion.losses(schedule, of[prediction], x0, t, eps)
    snr = a / (1 - a)
    found = float((diffusion.bits(schedule, t) * loss).mean())
    assert found == pytest.approx(0.5 * np.log2((1 + snr[0]) / (1 + snr[-1])), rel=0.01)
    assert diffusion.bits(schedule, torch.tensor([0])) == 0


@pytest.mark.parametrize("weighting", ["uniform", "snr"])
@pytest.mark.parametrize("prediction", diffusion.TARGETS)
def test_bits_of_noise_alone_are_left_out_where_the_loss_does_not_tell_the_error_and_finite_elsewhere(
    prediction, weighting
):
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    schedule = NoiseSchedule(tuple(scheduler.alphas_cumprod.double().tolist()), prediction, weighting)
    assert schedule.alphas_cumprod[-1] == 0
    unit = diffusion.bits(schedule, torch.arange(1000))
    assert unit.isfinite().all() and (unit[1:-1] > 0).all()
    a = schedule.alphas_cumprod[-2]
    told = prediction != "epsilon" and weighting == "uniform"  # a loss of weight 0 says nothing
    expected = 1000 * a / (1 - a) / (2 * np.log(2)) if told else 0  # SNR falls to 0, and the error is that of x̂₀
    assert float(unit[-1]) == pytest.approx(expected)
