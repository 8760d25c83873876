"""The damping that follows from the steps of a fine-tune."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import pictures, tiny_ddpm

import influence
from influence import derived, finetuning, models
from influence.curvature import curvature, solve
from influence.errors import GradientError
from influence.finetuning import FineTune
from influence.horizon import horizon_damping

RECIPE = FineTune(epochs=4, batch_size=6, learning_rate=2e-3, learning_rate_schedule="constant")


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return models.load_denoiser(tiny_ddpm(tmp_path_factory.mktemp("horizon") / "model"))


def batches(count=3, rows=4):
    rng = np.random.default_rng(0)
    return [(torch.from_numpy(rng.uniform(-1, 1, (rows, 3, 8, 8)).astype(np.float32)), None) for _ in range(count)]


def test_it_is_the_formula_over_every_single_entry(denoiser, monkeypatch):
    seen = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: seen.append(real(*a)) or seen[-1])
    found = horizon_damping(denoiser, RECIPE, batches(), images=12, seed=0)
    assert len(seen) == 3
    flat = np.stack([torch.cat([part.flatten() for part in each]).double().numpy() for each in seen])
    v = (flat**2).mean(0) * 4 / 6
    steps = [RECIPE.learning_rate] * 8  # 4 epochs of 12 images in batches of 6
    expected = sum(x * math.sqrt(x) / sum(steps) for x in v) / sum(v)
    assert found == pytest.approx(expected, rel=1e-5)


def test_longer_or_faster_training_damps_less(denoiser):
    def damping(images=12, **changes):
        return horizon_damping(denoiser, replace(RECIPE, **changes), batches(), images=images, seed=0)

    whole = damping()
    assert damping(learning_rate=4e-3) == pytest.approx(whole / 2)
    assert damping(epochs=12) == pytest.approx(whole / 3)
    assert damping(images=24) == pytest.approx(whole / 2)
    assert damping(batch_size=24, epochs=16) == pytest.approx(whole / 2)  # as many steps, each with less noise
    assert damping(learning_rate_schedule="cosine") == pytest.approx(whole * 8 / 4.5)


def test_the_total_learning_rate_is_the_sum_over_the_steps_that_are_taken():
    steps = RECIPE.steps(13)
    each = [2e-3 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert replace(RECIPE, learning_rate_schedule="cosine").total_learning_rate(13) == pytest.approx(sum(each))


def test_parameters_are_left_as_they_were_and_a_model_without_gradients_is_refused(denoiser):
    before = [parameter.requires_grad for parameter in denoiser.parameters.values()]
    horizon_damping(denoiser, RECIPE, batches(), images=12, seed=0)
    assert [parameter.requires_grad for parameter in denoiser.parameters.values()] == before
    infinite = [(torch.full((4, 3, 8, 8), float("inf")), None)]
    with pytest.raises(GradientError, match="expected a finite number above 0"):
        horizon_damping(denoiser, RECIPE, infinite, images=12, seed=0)


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


def test_a_store_takes_it_from_the_recipe_beside_the_model_and_uses_it(tmp_path):
    model, data = tiny_ddpm(tmp_path / "model"), pictures(tmp_path / "data", count=5, size=8, captions=False)
    said = []
    bare = influence.build(data, model=model, store=tmp_path / "bare", dim=64, draws=4, message=said.append)
    assert any("how the model was trained is not known" in line for line in said)
    assert bare.source["damping"] is None
    picture = data / "000.png"
    plain = influence.attribute(picture, bare, k=None, draws=8)
    assert plain.attrs["damping"] == pytest.approx(derived.DAMPING)

    recipe = {"epochs": 3, "batch_size": 2, "learning_rate": 1e-3}
    (model / finetuning.RECIPE_FILE).write_text(json.dumps(recipe), encoding="utf-8")
    made = influence.build(data, model=model, store=tmp_path / "store", dim=64, draws=4)
    again = influence.build(data, model=model, store=tmp_path / "store", dim=64, draws=4)
    assert made.source["damping"] == again.source["damping"] > 0
    table = influence.attribute(picture, made, k=None, draws=8)
    same = influence.attribute(picture, made, k=None, draws=8, damping=table.attrs["damping"])
    assert table["score"].tolist() == pytest.approx(same["score"].tolist(), rel=1e-9)
    assert table["score"].tolist() != pytest.approx(plain["score"].tolist(), rel=0.01)
    again = influence.attribute(picture, made, k=None, draws=8)  # from the factor that was kept
    assert again.equals(table)
    assert influence.attribute(picture, made, method="trak", draws=8).attrs["damping"] == pytest.approx(0.1)

    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps(recipe | {"learning_rate": 2e-3}), encoding="utf-8")
    faster = influence.build(data, model=model, store=tmp_path / "faster", dim=64, draws=4, recipe=other)
    assert faster.source["damping"] == pytest.approx(made.source["damping"] / 2)
