import numpy as np
import pytest
import torch
from torch import nn

from influence import diffusion, keys, training
from influence.diffusion import NoiseSchedule
from influence.errors import GradientError, OptionError

ALPHAS = tuple(torch.linspace(0.999, 0.01, 100, dtype=torch.float64).tolist())
SCHEDULE = NoiseSchedule(ALPHAS, "epsilon", "uniform")
X0 = torch.from_numpy(keys.normal(("test-training",), (7, 1, 4, 4))).clamp(-1, 1)
OPTIONS = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "seed": 3}


class Tiny(nn.Module):
    """Two linear layers on x_t, t and, if there is one, a condition of one number."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(18, 32)
        self.out = nn.Linear(32, 16)
        for name, parameter in self.named_parameters():
            noise = keys.normal(("test-weights", name), tuple(parameter.shape))
            parameter.data = torch.from_numpy(noise) / 5

    def forward(self, x_t, t, cond):
        c = torch.zeros(len(t), 1) if cond is None else cond
        x = torch.cat([x_t.flatten(1), t[:, None] / 100, c], 1)
        return self.out(torch.tanh(self.hidden(x))).reshape(x_t.shape)


def trained(x0=X0, **options):
    network = Tiny()
    training.train(network, SCHEDULE, x0, **OPTIONS | options)
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def perfect(schedule, image):
    """The prediction that is exact if every picture is `image`."""
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)

    def network(x_t, t, cond):
        a = table[t].reshape(-1, 1, 1, 1)
        eps = (x_t - a.sqrt() * image) / (1 - a).sqrt()
        return diffusion.TARGETS[schedule.prediction](a, image.expand_as(x_t).double(), eps)

    return network


def test_train_lowers_the_loss():
    losses = []
    training.train(
        Tiny(), SCHEDULE, X0, **OPTIONS | {"steps": 300}, progress=lambda step, loss: losses.append((step, loss))
    )
    assert [step for step, _ in losses] == list(range(1, 301))
    values = np.array([loss for _, loss in losses])
    assert values[-50:].mean() < 0.6 * values[:20].mean()


def test_train_is_deterministic_and_keyed_by_the_seed():
    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(seed=4))


def test_train_leaves_the_global_generators_alone():
    network = Tiny()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    training.train(network, SCHEDULE, X0, **OPTIONS)
    training.generate(network, SCHEDULE, count=2, shape=(1, 4, 4), seed=0, steps=5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize(
    "members",
    [[True] * 7, np.ones(7, dtype=bool), torch.ones(7, dtype=torch.bool), list(range(7)), torch.arange(7).flip(0)],
    ids=["list of booleans", "mask", "torch mask", "indices", "indices in another order"],
)
def test_all_members_are_no_restriction(members):
    assert torch.equal(trained(members=members), trained())


@pytest.mark.parametrize("members", [[1, 4, 5], np.array([0, 1, 0, 0, 1, 1, 0], dtype=bool)], ids=["indices", "mask"])
def test_members_train_as_if_the_others_did_not_exist(members):
    assert torch.equal(trained(members=members), trained(X0[[1, 4, 5]]))


def test_each_epoch_takes_every_member_once():
    members = np.array([2, 3, 5, 7, 11])
    taken = np.concatenate([training.batch_indices(0, step, 3, members) for step in range(10)]).reshape(6, 5)
    assert np.array_equal(np.sort(taken, axis=1), np.tile(members, (6, 1)))
    assert len({tuple(epoch) for epoch in taken}) > 1


def test_a_batch_may_span_epochs():
    taken = training.batch_indices(0, 0, 12, np.array([4, 6, 9]))
    assert sorted(taken) == sorted([4, 6, 9] * 4)


def test_only_parameters_that_require_a_gradient_are_trained():
    network = Tiny()
    network.hidden.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    training.train(network, SCHEDULE, X0, **OPTIONS)
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"out.weight", "out.bias"}


def test_the_condition_follows_its_image():
    clean = NoiseSchedule((1 - 1e-9,), "epsilon", "uniform")
    seen = []

    class Spy(Tiny):
        def forward(self, x_t, t, cond):
            seen.append((x_t.mean((1, 2, 3)), cond[:, 0]))
            return super().forward(x_t, t, cond)

    training.train(Spy(), clean, X0, **OPTIONS, cond=X0.mean((2, 3)))
    assert len(seen) == 6
    for image, cond in seen:
        torch.testing.assert_close(image, cond, atol=1e-3, rtol=0)


def test_dropout_is_off():
    dropping = nn.Sequential(nn.Dropout(0.5))
    network = Tiny()
    network.dropout = dropping
    network.train()
    training.train(network, SCHEDULE, X0, **OPTIONS)
    assert not dropping.training


def test_weights_end_as_their_moving_average():
    network = Tiny()
    average = [parameter.detach().double() for parameter in network.parameters()]

    def follow(step, loss):
        decay = min(0.5, step / (9 + step))
        for k, parameter in enumerate(network.parameters()):
            average[k] = decay * average[k] + (1 - decay) * parameter.detach().double()

    training.train(network, SCHEDULE, X0, **OPTIONS | {"steps": 20}, ema_decay=0.5, progress=follow)
    for parameter, expected in zip(network.parameters(), average, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-5, rtol=0)


def test_cosine_moves_less_than_constant():
    start = torch.cat([parameter.detach().flatten() for parameter in Tiny().parameters()])
    constant, cosine = trained(steps=20), trained(steps=20, learning_rate_schedule="cosine")
    assert 0 < (cosine - start).norm() < (constant - start).norm()


def test_a_loss_that_is_not_finite_stops_at_once():
    x0 = X0.clone()
    x0[:] = float("nan")
    network, before = Tiny(), Tiny()
    with pytest.raises(GradientError, match="the loss of step 0 is nan"):
        training.train(network, SCHEDULE, x0, **OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"cond": torch.zeros(6, 1)}, "6 entries for 7 images"),
        ({"members": []}, "non-empty"),
        ({"members": [False] * 7}, "without a True"),
        ({"members": [True] * 6}, "mask of 6 booleans; expected 7"),
        ({"members": [0, 7]}, "from 0 to 7; expected 0 to 6"),
        ({"members": [-1, 2]}, "from -1 to 2"),
        ({"members": [2, 2]}, "repeats an index"),
        ({"x0": X0.double()}, "float64"),
        ({"x0": X0[:0]}, "at least one"),
    ],
)
def test_train_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        trained(**options)


def test_train_refuses_a_frozen_network():
    with pytest.raises(OptionError, match="unfreeze"):
        training.train(Tiny().requires_grad_(False), SCHEDULE, X0, **OPTIONS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_perfect_prediction_recovers_the_image(prediction, steps):
    schedule = NoiseSchedule(ALPHAS, prediction, "uniform")
    made = training.generate(perfect(schedule, X0[:1]), schedule, count=2, shape=(1, 4, 4), seed=0, steps=steps)
    torch.testing.assert_close(made, X0[:1].expand(2, -1, -1, -1), atol=1e-5, rtol=0)


def test_generate_starts_each_image_from_its_own_noise():
    options = {"shape": (1, 4, 4), "seed": 5, "steps": 10}
    many = training.generate(Tiny(), SCHEDULE, count=5, **options)
    assert torch.equal(many, training.generate(Tiny(), SCHEDULE, count=5, **options))
    few = training.generate(Tiny(), SCHEDULE, count=3, batch_size=2, **options)
    torch.testing.assert_close(many[:3], few)
    assert not torch.allclose(many[0], many[1])
    assert many.abs().max() <= 1
    assert not torch.allclose(many, training.generate(Tiny(), SCHEDULE, count=5, **options | {"seed": 6}))


def test_generate_without_clipping_may_leave_the_range():
    image = torch.full((1, 1, 4, 4), 3.0)
    options = {"count": 1, "shape": (1, 4, 4), "seed": 0, "steps": 10}
    assert training.generate(perfect(SCHEDULE, image), SCHEDULE, clip=None, **options).mean() > 2.9
    assert training.generate(perfect(SCHEDULE, image), SCHEDULE, **options).max() <= 1


def test_generate_passes_each_image_its_condition():
    def network(x_t, t, cond):
        return cond[:, :, None, None].expand_as(x_t)

    schedule = NoiseSchedule(ALPHAS, "sample", "uniform")
    cond = torch.tensor([[-0.5], [0.0], [0.5]])
    made = training.generate(network, schedule, count=3, shape=(1, 4, 4), seed=0, steps=5, cond=cond, batch_size=2)
    torch.testing.assert_close(made, cond[:, :, None, None].expand(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"steps": 101}, "steps is 101; expected at most 100"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"cond": torch.zeros(3, 1)}, "3 entries for 2 images"),
    ],
)
def test_generate_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        training.generate(Tiny(), SCHEDULE, **{"count": 2, "shape": (1, 4, 4), "seed": 0} | options)
