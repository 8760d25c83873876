"""The metric and the damping that follow from the steps of a fine-tune."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import derived, finetuning, horizon, models, waypoints
from influence.curvature import curvature, solve
from influence.errors import GradientError, OptionError
from influence.finetuning import FineTune

RECIPE = FineTune(epochs=4, batch_size=6, learning_rate=2e-3, learning_rate_schedule="constant")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return models.load_denoiser(tiny_ddpm(tmp_path_factory.mktemp("horizon") / "model"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return models.load_denoiser(tiny_ddpm(tmp_path_factory.mktemp("horizon") / "base", seed=3))


def batches(count=3, rows=4):
    rng = np.random.default_rng(0)
    return [(torch.from_numpy(rng.uniform(-1, 1, (rows, 3, 8, 8)).astype(np.float32)), None) for _ in range(count)]


def test_second_moments_are_the_mean_over_batches_and_points_of_every_entry(denoiser, base, monkeypatch):
    seen = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **o: seen.append(real(*a, **o)) or seen[-1])
    v = horizon.second_moments([(0.25, base), (0.75, denoiser)], batches(), batch_size=6, seed=0)
    assert len(seen) == 6 and list(v) == list(denoiser.parameters)
    for i, value in enumerate(v.values()):
        squares = [part[i].double().square() for part in seen]
        expected = (0.25 * sum(squares[:3]) / 3 + 0.75 * sum(squares[3:]) / 3) * 4 / 6
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-12)


def test_scales_are_the_root_of_d_along_the_gradients_of_each_tensor():
    v = {
        "a": torch.tensor([4.0, 1.0]),
        "b": torch.tensor([[1e-4, 0.0]]),
        "c": torch.zeros(3),
        "d": torch.full((2,), 1e-9),
    }
    least = 1e-3 * horizon.mean_along_gradients(v)
    d = {"a": (8 + 1) / (4 + 1), "b": 1e-2, "c": least, "d": least}  # no gradient, or nothing but rounding
    found = horizon.tensor_scales(v)
    assert list(found) == ["a", "b", "c", "d"]
    for name, scale in found.items():
        assert scale == pytest.approx(d[name] ** -0.5, rel=2 ** (1 / 16) - 1 + 1e-9)
        assert 8 * math.log2(scale) == pytest.approx(round(8 * math.log2(scale)), abs=1e-9)
    assert horizon.mean_along_gradients(v) == pytest.approx((8 + 1 + 1e-6) / (4 + 1 + 1e-4), rel=1e-6)


def test_the_scores_are_those_of_adamws_own_step():
    """φᵀ (H + λI)⁻¹ φ′ with φ = W g is gᵀ (H + λD)⁻¹ g′."""
    rng = np.random.default_rng(0)
    psi, g = rng.standard_normal((30, 8)), rng.standard_normal((2, 8))
    d, lam = rng.uniform(0.1, 3, 8), 0.7
    plain = np.linalg.solve(psi.T @ psi / 30 + lam * np.diag(d), g[1]) @ g[0]
    blocks = [((psi * d**-0.5).astype(np.float32), np.ones(30))]
    factored = curvature(blocks, dim=8, damping=lam, num_rows=30, absolute=True)
    phi = torch.from_numpy(g * d**-0.5)
    assert float(solve(factored, phi[1:]) @ phi[0]) == pytest.approx(plain, rel=1e-4)


def test_the_total_learning_rate_is_the_sum_over_the_steps_that_are_taken():
    steps = RECIPE.steps(13)
    each = [2e-3 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert replace(RECIPE, learning_rate_schedule="cosine").total_learning_rate(13) == pytest.approx(sum(each))


def test_parameters_are_left_as_they_were_and_a_model_without_gradients_is_refused(denoiser):
    before = [parameter.requires_grad for parameter in denoiser.parameters.values()]
    horizon.second_moments([(1.0, denoiser)], batches(), batch_size=6, seed=0)
    assert [parameter.requires_grad for parameter in denoiser.parameters.values()] == before
    infinite = [(torch.full((4, 3, 8, 8), float("inf")), None)]
    with pytest.raises(GradientError, match="expected finite weights and pictures"):
        horizon.second_moments([(1.0, denoiser)], infinite, batch_size=6, seed=0)
    some = horizon.second_moments([(1.0, denoiser)], [*infinite, *batches()], batch_size=6, seed=0)
    assert all(bool(value.isfinite().all()) for value in some.values())
    zero = {"a": torch.zeros(2)}
    for made in (horizon.tensor_scales, horizon.mean_along_gradients):
        with pytest.raises(GradientError, match="all gradients are zero"):
            made(zero)


def test_a_parameter_that_plays_no_part_is_refused_by_name_as_its_features_are(denoiser, monkeypatch):
    unused = torch.nn.Parameter(torch.zeros(2))
    monkeypatch.setattr(denoiser, "parameters", {**denoiser.parameters, "spare.weight": unused})
    with pytest.raises(GradientError, match="no gradient reached spare.weight: .*; leave it out with --parameters"):
        horizon.second_moments([(1.0, denoiser)], batches(), batch_size=6, seed=0)


@pytest.mark.parametrize("rows", [20, 5])
def test_a_damping_that_is_lambda_itself(rows):
    rng = np.random.default_rng(0)
    psi, v = rng.standard_normal((rows, 9)).astype(np.float32), torch.from_numpy(rng.standard_normal((2, 9)))
    blocks = [(psi, np.ones(rows))]
    relative = curvature(blocks, dim=9, damping=0.3, num_rows=rows)
    assert relative.unit == pytest.approx(float((psi**2).sum()) / rows / 9)
    assert relative.damping == pytest.approx(0.3 * relative.unit)
    absolute = curvature(blocks, dim=9, damping=relative.damping, num_rows=rows, absolute=True)
    torch.testing.assert_close(solve(absolute, v), solve(relative, v))


def test_the_way_is_from_the_base_to_the_end_if_the_base_is_known(tmp_path):
    model, start = tiny_ddpm(tmp_path / "model"), tiny_ddpm(tmp_path / "base", seed=3)
    end = models.load_denoiser(model)
    source = {"lora": None, "model": str(model), "base": None, "base_model": None, "parameters": None,
              "resolution": None}  # fmt: skip
    assert [part for part, _ in waypoints.way(source, end)] == [1.0]
    source |= {"base": str(start), "base_model": models.load_denoiser(start).identity["model"]}
    points = list(waypoints.way(source, end))
    assert [part for part, _ in points] == [0.25, 0.5, 0.25] and points[2][1] is end
    first, late, last = (next(iter(each.parameters.values())) for _, each in points)
    torch.testing.assert_close(late, 0.25 * first + 0.75 * last)


def test_a_store_takes_both_from_the_recipe_beside_the_model_and_uses_them(tmp_path):
    model, data = tiny_ddpm(tmp_path / "model"), pictures(tmp_path / "data", count=5, size=8, captions=False)
    said = []
    options = {"model": model, "dim": 64, "draws": 4, "message": said.append}
    bare = influence.build(data, store=tmp_path / "bare", metric="plain", **options)
    assert any("how the model was trained is not known" in line and "0.1 tr(H)/k" in line for line in said)
    assert bare.source["damping"] is None and bare.source["scales"] is None and bare.spec.metric == "plain"
    picture = data / "000.png"
    plain = influence.attribute(picture, bare, k=None, draws=8)
    assert plain.attrs["damping"] == pytest.approx(derived.DAMPING)
    guessed = influence.build(data, store=tmp_path / "guessed", **options)
    assert any("as after learning rates of 0.25 in all" in line for line in said)
    assert guessed.source["damping"] == pytest.approx(4) and guessed.spec.metric != "plain"

    recipe = {"epochs": 3, "batch_size": 2, "learning_rate": 1e-3, "learning_rate_schedule": "constant"}
    (model / finetuning.RECIPE_FILE).write_text(json.dumps(recipe), encoding="utf-8")
    made = influence.build(data, store=tmp_path / "store", **options)
    again = influence.build(data, store=tmp_path / "store", **options)
    assert made.source["damping"] == again.source["damping"] == pytest.approx(1 / (1e-3 * 8))
    assert made.source["scales"] == again.source["scales"]
    # a batch of 2 in place of 8: D is twice as large
    for name, scale in made.source["scales"].items():
        assert scale == pytest.approx(guessed.source["scales"][name] * 2**-0.5, rel=0.1)
    content, unscaled = (next(iter(store.blocks())) for store in (made, bare))
    assert not np.allclose(content.phi, unscaled.phi)
    table = influence.attribute(picture, made, k=None, draws=8)
    same = influence.attribute(picture, made, k=None, draws=8, damping=table.attrs["damping"])
    assert table["score"].tolist() == pytest.approx(same["score"].tolist(), rel=1e-9)
    assert table["score"].tolist() != pytest.approx(plain["score"].tolist(), rel=0.01)
    again = influence.attribute(picture, made, k=None, draws=8)  # from the factor that was kept
    assert again.equals(table)
    assert influence.attribute(picture, made, method="trak", draws=8).attrs["damping"] == pytest.approx(0.1)

    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps(recipe | {"learning_rate": 2e-3}), encoding="utf-8")
    faster = influence.build(data, store=tmp_path / "faster", recipe=other, **options)
    assert faster.source["damping"] == pytest.approx(made.source["damping"] / 2)
    by_entry = influence.build(data, store=tmp_path / "plain", recipe=other, metric="plain", **options)
    assert 0 < by_entry.source["damping"] != faster.source["damping"] and by_entry.source["scales"] is None
    with pytest.raises(OptionError, match="store store is in the adamw metric; --metric is plain; leave it out"):
        influence.build(data, store=tmp_path / "store", metric="plain", **options)
    with pytest.raises(OptionError, match="store plain is in the plain metric; --metric is adamw; leave it out"):
        influence.build(data, store=tmp_path / "plain", recipe=other, metric="adamw", **options)
    with pytest.raises(OptionError, match="metric 'sgd' is unknown; expected adamw or plain"):
        influence.build(data, store=tmp_path / "other", metric="sgd", **options)


def test_a_build_that_goes_on_takes_k_from_the_store_and_refuses_another_projection(tmp_path):
    model, data = tiny_ddpm(tmp_path / "model"), pictures(tmp_path / "data", count=3, size=8, captions=False)
    made = influence.build(data, model=model, store=tmp_path / "s", draws=4, metric="plain")
    parameters = sum(p.numel() for p in models.load_denoiser(model).parameters.values())
    assert (made.spec.projection, made.spec.dim) in {("identity", parameters), ("countsketch", 32768)}
    assert influence.build(data, model=model, store=tmp_path / "s", draws=4, metric="plain").spec == made.spec
    assert influence.build(data, model=model, store=tmp_path / "s", draws=4).spec == made.spec
    with pytest.raises(influence.SpecMismatchError, match="projection is rademacher"):
        influence.build(data, model=model, store=tmp_path / "s", draws=4, metric="plain", projection="rademacher")


def test_a_store_is_not_given_a_base_that_it_was_not_made_with(tmp_path):
    model, data = tiny_ddpm(tmp_path / "model"), pictures(tmp_path / "data", count=3, size=8, captions=False)
    base, other = (tiny_ddpm(tmp_path / name, seed=seed) for name, seed in (("base", 3), ("other", 4)))
    options = {"model": model, "dim": 64, "draws": 4, "metric": "plain"}
    influence.build(data, store=tmp_path / "bare", **options)
    influence.build(data, store=tmp_path / "based", base=base, **options)
    for store, given in (("bare", base), ("based", other)):
        with pytest.raises(
            OptionError, match=f"store {store} was made without this model before the fine-tune; leave out --base, or b"
        ):
            influence.build(data, store=tmp_path / store, base=given, **options)
    for again in ({}, {"base": base}):
        assert influence.build(data, store=tmp_path / "based", **again, **options).source["base"] == str(base)


def test_the_base_of_a_lora_can_be_named_again_or_for_the_first_time(tmp_path):
    base, data = tiny_stable_diffusion(tmp_path / "base"), pictures(tmp_path / "data", count=2)
    tiny_lora(base, tmp_path / "lora")
    options = {"model": base, "lora": tmp_path / "lora", "dim": 32, "draws": 2, "metric": "plain"}
    made = influence.build(data, store=tmp_path / "s", **options)
    assert influence.build(data, store=tmp_path / "s", base=base, **options).items.equals(made.items)
