import math

import pytest
import torch
from networks import NETWORKS, SCHEDULE, Called, rows, unconditional
from oracles import gradients_by_loop, jvp_rows_by_loop
from torch import nn

from influence import diffusion, gradients
from influence.errors import GradientError
from influence.gradients import Inputs, Output
from influence.projection import countsketch, identity

CPU = torch.device("cpu")


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def identity_of(parameters):
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return identity(shapes, dim=sum(map(math.prod, shapes.values())), seed=0, device=CPU)


def loss_output(x0, t, eps, draws):
    return Output(lambda f, x0, t, eps: diffusion.losses(SCHEDULE, f, x0, t, eps) / draws, (x0, t, eps), draws)


def probe_output(xi):
    return Output(lambda f, xi: (f * xi).flatten(1).sum(1), (xi,), 1)


@pytest.mark.parametrize("engine", gradients.ENGINES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_both_engines_equal_a_loop_over_single_draws(kind, engine):
    network, parameters, width = NETWORKS[kind]()
    x0, t, eps, cond = rows(3, 2, width)
    x_t = diffusion.noised(SCHEDULE, x0, t, eps)
    xi = eps.flip(0)
    loss, probe = gradients.per_sample_gradients(
        network,
        parameters,
        Inputs(x_t, t, cond),
        [loss_output(x0, t, eps, 2), probe_output(xi)],
        identity_of(parameters),
        engine=engine,
    )
    expected = gradients_by_loop(network, parameters, SCHEDULE, x0, t, eps, cond, 2)
    assert relative(loss.features, expected) < 1e-5
    assert relative(probe.features, jvp_rows_by_loop(network, parameters, x_t, t, cond, xi)) < 1e-5
    start = 0
    for name, parameter in parameters.items():  # a small parameter must not hide behind a large one
        part = slice(start, start + parameter.numel())
        start += parameter.numel()
        scale = expected[:, part].norm() + 1e-4 * expected.norm()
        assert (loss.features[:, part] - expected[:, part]).norm() / scale < 1e-4, name


@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_a_batch_changes_no_row(engine):
    network, parameters, _ = unconditional()
    x0, t, eps, _ = rows(4, 2, None)
    x_t = diffusion.noised(SCHEDULE, x0, t, eps)
    projection = countsketch({n: tuple(p.shape) for n, p in parameters.items()}, dim=64, seed=1, device=CPU)

    def of(part):
        output = loss_output(x0[part], t[part], eps[part], 2)
        inputs = Inputs(x_t[part], t[part])
        return gradients.per_sample_gradients(network, parameters, inputs, [output], projection, engine=engine)[0]

    together = of(slice(None))
    alone = torch.cat([of(slice(2 * i, 2 * i + 2)).features for i in range(4)])
    assert relative(together.features, alone) < 1e-5


class Twice(nn.Module):
    """One layer called twice, and a second that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x_t, t, cond=None):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x_t)))))


class Zoo(nn.Module):
    """Every kind of layer that has a rule, in its unusual settings, and what depends on t alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm((4,))
        self.layer2 = nn.LayerNorm((4, 4), bias=False)
        self.rms = nn.RMSNorm(4)
        self.embed = nn.Embedding(10, 8)
        self.time = nn.Linear(8, 8)
        self.out = nn.Linear(4, 5)

    def forward(self, x_t, t, cond=None):
        h = self.conv(x_t)
        h = self.point(self.depthwise(h)) + self.time(torch.sin(self.embed(t % 10)))[:, :, None, None]
        return self.out(self.rms(self.layer(self.layer2(torch.tanh(self.group(h))))))


@pytest.mark.parametrize("module", [Twice, Zoo])
def test_shared_repeated_and_unusual_layers_equal_the_reference(module):
    torch.manual_seed(0)  # weights only: both engines see the same
    network = module().requires_grad_(False)
    parameters = dict(network.named_parameters())
    x_t = torch.randn(6, 6) if module is Twice else torch.randn(6, 4, 8, 8)
    t = torch.arange(6)
    xi = torch.randn_like(network(x_t, t))
    outputs = [Output(lambda f, xi: (f * xi).flatten(1).sum(1) + f.flatten(1).square().sum(1), (xi,), 3)]
    found = {
        engine: gradients.per_sample_gradients(
            network, parameters, Inputs(x_t, t), outputs, identity_of(parameters), engine=engine
        )[0].features
        for engine in gradients.ENGINES
    }
    assert relative(found["hooks"], found["vmap"]) < 1e-5


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 8, (3, 2), stride=2, padding=(2, 1), dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
    ids=str,
)
def test_the_convolution_rule_of_accelerators_equals_that_of_the_cpu(conv, group):
    x = torch.randn(6, 4, 9, 8)
    grad = torch.randn_like(conv(x))
    by_group, by_product = (
        form(conv, x, grad, group) for form in (gradients._conv2d_by_group, gradients._conv2d_by_product)
    )
    torch.testing.assert_close(by_product, by_group, rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_rule_is_named_by_the_hooks_engine_and_served_by_vmap():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Conv1d(3, 3, 1)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x_t, t, cond=None):
            return self.line(x_t) * self.scale[:, None]

    network = Odd().requires_grad_(False)
    parameters = dict(network.named_parameters())
    assert set(gradients.uncovered(network, parameters)) == {"line.weight", "line.bias", "scale"}
    inputs = Inputs(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.long))
    outputs = [Output(lambda f: f.flatten(1).sum(1), (), 1)]
    with pytest.raises(GradientError, match=r"no rule for .*scale"):
        gradients.per_sample_gradients(network, parameters, inputs, outputs, identity_of(parameters), engine="hooks")
    result = gradients.per_sample_gradients(
        network, parameters, inputs, outputs, identity_of(parameters), engine="vmap"
    )
    assert result[0].features.shape == (2, 3 * 3 + 3 + 3)


@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_a_parameter_that_no_gradient_reaches_is_named(engine):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x_t, t, cond=None):
            self.idle(x_t)
            return self.used(x_t)

    network = Unused().requires_grad_(False)
    parameters = dict(network.named_parameters())
    inputs = Inputs(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    outputs = [Output(lambda f: f.sum(1), (), 1)]
    with pytest.raises(GradientError, match=r"no gradient reached idle\.weight"):
        gradients.per_sample_gradients(network, parameters, inputs, outputs, identity_of(parameters), engine=engine)


def test_rows_that_are_not_in_front_are_refused_not_mixed():
    class Sideways(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x_t, t, cond=None):
            return self.line(x_t.transpose(0, 1)).transpose(0, 1)

    network = Sideways().requires_grad_(False)
    parameters = dict(network.named_parameters())
    inputs = Inputs(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.long))
    outputs = [Output(lambda f: f.flatten(1).sum(1), (), 1)]
    with pytest.raises(GradientError, match="3 rows where 2 were expected"):
        gradients.per_sample_gradients(network, parameters, inputs, outputs, identity_of(parameters), engine="hooks")


def test_an_input_changed_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x_t, t, cond=None):
            x = x_t.clone()
            y = self.line(x)
            x += 1
            return y

    network = InPlace().requires_grad_(False)
    parameters = dict(network.named_parameters())
    inputs = Inputs(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    outputs = [Output(lambda f: f.flatten(1).sum(1), (), 1)]
    with pytest.raises(GradientError, match="changed in place"):
        gradients.per_sample_gradients(network, parameters, inputs, outputs, identity_of(parameters), engine="hooks")


@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_the_network_is_left_as_it_was(engine):
    network, parameters, _ = unconditional()
    network.train()
    network.unet.conv_in.weight.requires_grad_(True)
    x0, t, eps, _ = rows(1, 2, None)
    output = loss_output(x0, t, eps, 2)
    gradients.per_sample_gradients(network, parameters, Inputs(x0, t), [output], identity_of(parameters), engine=engine)
    assert all(module.training for module in network.modules())
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["unet.conv_in.weight"]
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_chunks_of_a_layer_change_nothing(monkeypatch):
    network, parameters, _ = unconditional()
    x0, t, eps, _ = rows(4, 2, None)
    output = loss_output(x0, t, eps, 2)

    def run():
        return gradients.per_sample_gradients(
            network, parameters, Inputs(x0, t), [output], identity_of(parameters), engine="hooks"
        )[0].features

    whole = run()
    monkeypatch.setattr(gradients, "_chunk_bytes", lambda device: 1)
    assert relative(run(), whole) < 1e-6


@pytest.mark.parametrize("engine", gradients.ENGINES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_bf16_passes_stay_near_float32(kind, engine):
    network, parameters, width = NETWORKS[kind]()
    x0, t, eps, cond = rows(2, 4, width)
    x_t = diffusion.noised(SCHEDULE, x0, t, eps)
    output = loss_output(x0, t, eps, 4)
    full, half = (
        gradients.per_sample_gradients(
            network, parameters, Inputs(x_t, t, cond), [output], identity_of(parameters), engine=engine, bf16=bf16
        )[0].features
        for bf16 in (False, True)
    )
    assert half.dtype == torch.float32
    assert 1e-6 < relative(half, full) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("engine", gradients.ENGINES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_gpu_gives_the_features_of_the_cpu_and_the_same_bits_again(kind, engine):
    network, parameters, width = NETWORKS[kind]()
    x0, t, eps, cond = rows(3, 2, width)
    x_t = diffusion.noised(SCHEDULE, x0, t, eps)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}

    def taken(device):
        network.to(device)
        inputs = Inputs(x_t.to(device), t.to(device), None if cond is None else cond.to(device))
        output = loss_output(x0.to(device), t.to(device), eps.to(device), 2)
        projection = countsketch(shapes, dim=128, seed=0, device=torch.device(device))
        found = gradients.per_sample_gradients(network, parameters, inputs, [output], projection, engine=engine)
        return found[0].features.cpu()

    torch.set_float32_matmul_precision("high")  # a user's own setting must not reach features
    try:
        again = [taken("cuda") for _ in range(2)]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative(again[0], taken("cpu")) < 1e-5
    assert torch.equal(*again)


def test_groups_must_divide_the_rows():
    network, parameters, _ = unconditional()
    x0, t, eps, _ = rows(1, 3, None)
    with pytest.raises(GradientError, match="3 rows do not split into groups of 2"):
        gradients.per_sample_gradients(
            network, parameters, Inputs(x0, t), [loss_output(x0, t, eps, 2)], identity_of(parameters), engine="hooks"
        )


def test_called_networks_agree_with_diffusers():
    network, _, _ = unconditional()
    x0, t, _, _ = rows(2, 1, None)
    assert isinstance(network, Called)
    torch.testing.assert_close(network(x0, t, None), network.unet(x0, t).sample)
