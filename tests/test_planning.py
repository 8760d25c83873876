"""What a plan foretells, and what then happens; seconds are compared by benchmarks/plan.py."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import pictures, tiny_ddpm, tiny_stable_diffusion

import influence
from influence import features, horizon, loading

OPTIONS = {"dim": 512, "draws": 6, "curvature_rows": 40}
MEASURED = """
import json, sys
from pathlib import Path
import torch
import influence
torch.set_num_threads(1)
what, data, model, store, options = sys.argv[1:]
options = {"model": model} | json.loads(options)
if what == "plan":
    print(json.dumps(influence.plan(data, **options)))
else:
    influence.build(data, store=store, **options)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    tiny_ddpm(path / "ddpm")
    tiny_ddpm(path / "base", seed=1)
    tiny_stable_diffusion(path / "sd")
    pictures(path / "data", count=20)
    pictures(path / "controls", count=30)  # 20 of them are training images
    return path


@pytest.mark.parametrize("model", ["ddpm", "sd"])
def test_disk_and_memory_are_within_a_fifth_of_what_then_happens(world, tmp_path, model):
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of a process is read from /proc")

    def run(what):
        parts = [what, world / "data", world / model, tmp_path / "s", json.dumps(OPTIONS)]
        command = [sys.executable, "-c", MEASURED, *map(str, parts)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    planned, held = run("plan"), run("build")
    disk = sum(p.stat().st_size for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert planned["disk_bytes"] == pytest.approx(disk, rel=0.2)
    assert planned["memory_bytes"] == pytest.approx(held, rel=0.2)
    rows, psi_rows = influence.open_store(tmp_path / "s").num_rows()
    assert (planned["images"], planned["curvature_rows"]) == (rows, psi_rows)


CASES = [(None, "adamw", {}), ("base", "adamw", {}), (None, "plain", {})]
EVERY_DRAW = {"controls": None, "curvature_rows": 20 * 6}  # gives a curvature row


@pytest.mark.parametrize(("base", "metric", "more"), [*CASES, (None, "adamw", EVERY_DRAW), (None, "plain", EVERY_DRAW)])
def test_every_forward_of_the_build_is_counted(world, tmp_path, monkeypatch, base, metric, more):
    """One second for each row of a forward, one more for each curvature row: the plan must add up to the same."""
    clock, taken = [0.0], []

    def forward(network, recipe, ids, x0, cond, images, which, num_probes):
        clock[0] += which.size * (1 + num_probes)
        taken.append(which.size * (1 + num_probes))
        return real(network, recipe, ids, x0, cond, images, which, num_probes)

    real = features.forward
    monkeypatch.setattr(features, "forward", forward)
    monkeypatch.setattr("influence.planning.time.perf_counter", lambda: clock[0])
    options = {"model": world / "ddpm", "controls": world / "controls", "metric": metric, **OPTIONS, **more}
    options |= {} if base is None else {"base": world / base}
    planned = influence.plan(world / "data", **options)
    taken.clear()
    made = influence.build(world / "data", store=tmp_path / "s", **options)
    points = 0 if metric == "plain" else 1 if base is None else 3  # of the way, where the metric is measured
    assert ("curvature_density" in made.source) == (metric == "adamw")
    assert planned["seconds"] == pytest.approx(sum(taken) + points * horizon.BATCHES * horizon.ROWS)
    controls = 0 if more else 10
    assert (planned["images"], planned["controls"]) == (20, controls) == (len(made.items), _controls(made))
    disk = sum(p.stat().st_size for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert planned["disk_bytes"] == pytest.approx(disk, rel=0.2)


def _controls(made):
    return 0 if made.controls() is None else len(made.controls().items)


def test_a_memory_chooses_the_batch_and_no_value_changes(world, tmp_path):
    said = []
    for name, more in (("a", {"batch_size": 5}), ("b", {"memory": "6GiB", "message": said.append})):
        influence.build(world / "data", model=world / "ddpm", store=tmp_path / name, **OPTIONS, **more)
    assert f"batches of {loading.MAX_BATCH} rows (image, draw), for a memory of 6GiB" in said
    a, b = (list(influence.open_store(tmp_path / name).blocks()) for name in "ab")
    for first, second in zip(a, b, strict=True):
        for x, y in ((first.phi, second.phi), (first.psi, second.psi)):
            assert (np.linalg.norm(x - y, axis=1) <= 1e-5 * np.linalg.norm(x, axis=1)).all()


def test_what_the_metric_takes_is_in_the_plan_and_in_the_budget(world, tmp_path, monkeypatch):
    monkeypatch.setattr(horizon, "held", lambda *args, points: points << 40)
    for base, count in ((None, 1), (world / "base", 3)):
        options = {"model": world / "ddpm", "base": base, **OPTIONS}
        assert influence.plan(world / "data", **options)["memory_bytes"] >> 40 == count
        with pytest.raises(influence.OptionError, match=rf"metric and damping, take {count * 1024}\.0 GiB"):
            influence.build(world / "data", store=tmp_path / "s", memory="500GiB", **options)
        assert influence.plan(world / "data", metric="plain", **options)["memory_bytes"] < 1 << 40
    assert not (tmp_path / "s").exists()


MOMENTS = """
import json, sys
import torch
from influence import horizon, loading, memory
torch.set_num_threads(1)
denoiser = loading.network(loading.BuildOptions("", sys.argv[1], None, device="cpu"))
x0 = torch.zeros(horizon.ROWS, *denoiser.sample_shape)
points, batches = [(0.5, denoiser)] * 2, [(x0, None)] * 3
before = memory.peak(lambda: None, x0.device)
foretold = horizon.held(denoiser, x0, None, points=2)
found = memory.peak(lambda: horizon.second_moments(points, batches, batch_size=8, seed=0), x0.device)
weights = sum(4 * p.numel() for p in denoiser.parameters.values())
print(json.dumps([foretold - before, found - before, weights]))
"""


def test_what_the_metric_holds_is_what_it_then_takes(tmp_path):
    path = tiny_ddpm(tmp_path / "wide", width=256)
    command = [sys.executable, "-c", MOMENTS, str(path)]  # a process of its own: freed memory of others is not given up
    foretold, found, weights = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert weights > 10e6 and found > 1.5 * weights
    assert abs(foretold - found) < 0.2 * found


@pytest.mark.parametrize(
    ("given", "metric", "words"),
    [
        ("much", None, "expected a size such as 8GiB"),
        ("10MB", None, "memory is 10MB, and the second moments of all gradients, which decide metric"),
        ("10MB", "plain", "memory is 10 MiB for a process, and one with"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(world, tmp_path, given, metric, words):
    with pytest.raises(influence.OptionError, match=words):
        influence.build(
            world / "data", model=world / "ddpm", store=tmp_path / "s", memory=given, metric=metric, **OPTIONS
        )
    assert not (tmp_path / "s").exists()
