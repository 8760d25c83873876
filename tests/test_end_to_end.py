"""The whole path on real classes: build and attribute, against plain autograd; invariances; refusals."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from influence_cli.main import cli
from oracles import gradients_by_loop
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import datasets, diffusion, features, models, taking
from influence.projection import countsketch

DRAWS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    tiny_ddpm(path / "ddpm")
    tiny_ddpm(path / "base", seed=1)
    tiny_ddpm(path / "half", seed=2)
    tiny_stable_diffusion(path / "sd")
    tiny_lora(path / "sd", path / "lora")
    pictures(path / "data", count=10)
    return path


def build(world, store, *, model="ddpm", **options):
    defaults = {"dim": 256, "draws": DRAWS, "batch_size": 6}
    return influence.build(world / "data", model=world / model, store=store, **defaults | options)


def command(*parts):
    """The installed command, in a process of its own."""
    program = Path(sys.executable).parent / "influence"
    run = subprocess.run([str(program), *map(str, parts)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run


def invoked(*parts):
    """The same in this process, which spares the imports."""
    return CliRunner().invoke(cli, [str(part) for part in parts])


def rows_of(store):
    """φ by id, and ψ by id, draw and how many of the draw's rows stand before it."""
    phi, psi = {}, {}
    for content in influence.open_store(store).blocks():
        phi |= dict(zip(content.item_ids, content.phi, strict=True))
        for item, draw, row in zip(content.psi_item, content.psi_draw, content.psi, strict=True):
            number = sum(key[:2] == (content.item_ids[item], int(draw)) for key in psi)
            psi[content.item_ids[item], int(draw), number] = row
    return phi, psi


def test_features_of_batches_are_kept_and_average_to_the_feature(world, tmp_path):
    build(world, tmp_path / "s")
    for content in influence.open_store(tmp_path / "s").blocks():
        parts = content.phi_batch.astype(np.float32) * content.phi_scale[:, :, None]
        assert parts.shape == (len(content.phi), 2, 256) and np.abs(content.phi_batch).max() == 1
        largest = np.abs(content.phi).max(1, keepdims=True)
        np.testing.assert_allclose(parts.mean(1) / largest, content.phi / largest, atol=2e-3)
        assert np.abs(parts[:, 0] - parts[:, 1]).max() > 0.01 * np.abs(content.phi).max(), "other draws"


def same(a, b, tolerance=1e-5):
    for first, second in zip(rows_of(a), rows_of(b), strict=True):
        assert first.keys() == second.keys()
        for key, row in first.items():
            assert np.linalg.norm(row - second[key]) <= tolerance * np.linalg.norm(row), key


@pytest.fixture(scope="module")
def built(world):
    build(world, world / "built.store", base=world / "base", half=world / "half")
    return world / "built.store"


def loop_gradients(denoiser, images, captions, ids, role, draws):
    """Unprojected mean loss gradients by plain autograd, one draw at a time."""
    rows = []
    for image, caption, item_id in zip(images, captions, ids, strict=True):
        channels, height, width = denoiser.image_size
        pixels = datasets.to_array(image, height=height, width=width, channels=channels)
        x0 = denoiser.encode_images(torch.from_numpy(pixels)[None])
        cond = denoiser.encode_captions([caption]).repeat_interleave(draws, 0) if denoiser.conditional else None
        t, eps = diffusion.draws(0, role, item_id, draws, 1000, tuple(x0.shape[1:]))
        args = (x0.repeat_interleave(draws, 0), t, eps, cond, draws)
        rows.append(gradients_by_loop(denoiser.network, denoiser.parameters, denoiser.schedule, *args))
    return torch.cat(rows)


@pytest.mark.parametrize("engine", influence.ENGINES)
def test_a_lora_from_the_command_line_gives_the_dot_products_of_plain_autograd_with_captions_in_play(
    world, tmp_path, engine
):
    query = world / "data" / "003.png"
    lora = world / "lora" / "pytorch_lora_weights.safetensors"
    made = invoked(
        "build", world / "data", "--model", world / "sd", "--lora", lora, "--store", tmp_path / "s",
        "--projection", "identity", "--metric", "plain", "--draws", DRAWS, "--engine", engine,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    answered = (command if engine == "hooks" else invoked)(
        "attribute", query, "--store", tmp_path / "s", "-k", "all", "--method", "grad-dot", "--draws", 6,
        "--prompt", "something else", "--json", "--engine", engine,
    )  # fmt: skip
    (answer,) = json.loads(answered.stdout)
    assert answer["query"] == str(query)
    found = {a["file_name"]: a["score"] for a in answer["attributions"]}
    denoiser = models.load_denoiser(world / "sd", lora=lora)
    items = datasets.read_dataset(world / "data").items
    train = loop_gradients(
        denoiser,
        [datasets.decode(i.path)[0] for i in items],
        [i.caption for i in items],
        [i.item_id for i in items],
        "train",
        DRAWS,
    )
    image = datasets.decode(query)[0]
    one = loop_gradients(denoiser, [image], ["something else"], [datasets.item_id(image, "something else")], "query", 6)
    wanted = (one @ train.T)[0]
    for item, score in zip(items, wanted.tolist(), strict=True):
        assert found[item.file_name] == pytest.approx(score, rel=1e-4, abs=1e-4 * float(wanted.abs().max()))
    blank = influence.attribute(query, tmp_path / "s", k=None, method="grad-dot", draws=6, prompt="")
    other = influence.attribute(query, tmp_path / "s", k=None, method="grad-dot", draws=6, prompt="picture 3")
    assert not np.allclose(np.sort(blank["score"]), np.sort(other["score"]), rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 64}, {"engine": "vmap"}, {"workers": 2}],
    ids=str,
)
def test_batches_engines_and_workers_change_no_feature(world, built, tmp_path, options):
    build(world, tmp_path / "s", base=world / "base", half=world / "half", **options)
    same(built, tmp_path / "s")
    if "workers" in options:
        bytes_of = {p.name: p.read_bytes() for p in (tmp_path / "s" / "shards").iterdir()}
        assert bytes_of == {p.name: p.read_bytes() for p in (built / "shards").iterdir()}


@pytest.mark.gpu
def test_a_store_made_on_a_gpu_holds_the_rows_of_the_cpu_and_the_same_bytes_again(world, built, tmp_path):
    for name in "ab":
        build(world, tmp_path / name, base=world / "base", half=world / "half", device="cuda")
    same(built, tmp_path / "a")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name / "shards").iterdir()} for name in "ab")
    assert first == second


@pytest.mark.gpu
def test_a_gpu_gives_the_rows_of_a_latent_model_with_captions_and_a_lora(world, tmp_path):
    lora = world / "lora" / "pytorch_lora_weights.safetensors"
    for device in ("cpu", "cuda"):
        build(world, tmp_path / device, model="sd", lora=lora, device=device)
    same(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["two-length", "two-point", "gauss-newton", "d-trak"])
def test_a_gpu_gives_the_scores_of_the_cpu(world, built, method):
    found = {
        device: influence.attribute(world / "data" / "003.png", built, k=None, method=method, draws=16, device=device)
        for device in ("cpu", "cuda")
    }
    cpu, gpu = (table.set_index("file_name")["score"] for table in found.values())
    np.testing.assert_allclose(gpu[cpu.index], cpu, rtol=1e-4, atol=1e-5 * np.abs(cpu).max())


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["ddpm", "sd"])
def test_a_gpu_is_never_waited_for_within_a_batch(world, model):
    denoiser = models.load_denoiser(world / model, device="cuda")
    shapes = {name: tuple(p.shape) for name, p in denoiser.parameters.items()}
    recipe = features.Recipe(
        schedule=denoiser.schedule, parameters=denoiser.parameters, seed=0, role="train", num_draws=DRAWS,
        projection=countsketch(shapes, dim=256, seed=0, device=torch.device("cuda")), curvature_rate=2.0,
        output="loss", bf16=False, engine="hooks", batch_size=8, density=(3.0,) + (1.0,) * (DRAWS - 1),
    )  # fmt: skip
    pictures = [datasets.decode(world / "data" / f"00{i}.png")[0] for i in range(4)]
    channels, height, width = denoiser.image_size
    arrays = [datasets.to_array(p, height=height, width=width, channels=channels) for p in pictures]
    ids = [str(i) for i in range(4)]
    x0, cond = taking.encoded(denoiser, arrays, ids)
    batches = list(features.forwards(recipe, ids))
    assert {num_probes for *_, num_probes in batches} == {0, 1}
    try:
        with warnings.catch_warnings():  # that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            x0.sum().item()
        for rows, which, num_probes in batches:
            features.forward(denoiser.network, recipe, ids, x0, cond, rows // 2, which, num_probes)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_names_and_order_of_files_change_no_feature(world, built, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    lines = (tmp_path / "data" / "metadata.csv").read_text().splitlines()
    renamed = [lines[0], *(f"x{line}" for line in lines[:0:-1])]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(renamed) + "\n")
    for file in (tmp_path / "data").glob("*.png"):
        file.rename(file.with_name(f"x{file.name}"))
    options = {"model": world / "ddpm", "base": world / "base", "dim": 256, "draws": DRAWS}
    influence.build(tmp_path / "data", store=tmp_path / "s", **options)
    same(built, tmp_path / "s")


def test_a_build_that_lost_shards_goes_on_and_an_incomplete_store_is_not_queried(world, built, tmp_path):
    shutil.copytree(built, tmp_path / "s")
    for record in (tmp_path / "s" / "shards").glob("loss-000001.json"):
        record.unlink()
    with pytest.raises(influence.StoreError, match="has 1 of 2 shards; run the same influence build again"):
        influence.attribute(world / "data" / "000.png", tmp_path / "s")
    build(world, tmp_path / "s")
    same(built, tmp_path / "s")


def test_added_pictures_leave_the_rows_of_the_others_alone(world, built, tmp_path):
    shutil.copytree(built, tmp_path / "s")
    pictures(tmp_path / "data", count=13)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s" / "shards").iterdir()}
    influence.build(tmp_path / "data", model=world / "ddpm", store=tmp_path / "s", dim=256, draws=DRAWS)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s" / "shards").iterdir()}
    assert before.items() < after.items()
    assert len(rows_of(tmp_path / "s")[0]) == 13


def test_half_the_curvature_rows_are_the_same_rows(world, built, tmp_path):
    build(world, tmp_path / "s", base=world / "base", curvature_rows=20)
    (phi, psi), (whole_phi, whole) = rows_of(tmp_path / "s"), rows_of(built)
    assert 12 <= len(psi) <= 28 and len(whole) == 10 * DRAWS
    both = psi.keys() & whole.keys()  # of draws that seldom give one, the half may have other ones
    assert len(both) > len(psi) / 2
    for key in both:
        row = psi[key]
        np.testing.assert_allclose(row, whole[key], rtol=1e-3, atol=1e-5 * np.abs(row).max())
    for key, row in phi.items():
        np.testing.assert_allclose(row, whole_phi[key], rtol=1e-3, atol=1e-5 * np.abs(row).max())


@pytest.mark.parametrize("method", influence.METHODS)
def test_every_method_ranks_all_images_and_totals_are_signed_sums_over_all(world, built, method):
    queries = [world / "data" / "001.png", world / "data" / "002.png"]
    table = influence.attribute(queries, built, k=None, method=method, draws=4)
    top = influence.attribute(queries, built, k=2, method=method, draws=4)
    plain = influence.attribute(queries, built, k=None, method=method, draws=4, intervals=False)
    assert list(table.columns)[:7] == ["query", "rank", "item_id", "file_name", "creator", "caption", "score"]
    for query in map(str, queries):
        rows = table[table["query"] == query]
        assert rows["rank"].tolist() == list(range(1, 11))
        assert rows["score"].is_monotonic_decreasing
        assert rows["score_se"].notna().all() and plain["score_se"].isna().all()
        both = rows.merge(plain[plain["query"] == query], on="item_id")  # v is then a mean over batches, in float32
        np.testing.assert_allclose(both["score_x"], both["score_y"], atol=1e-4 * rows["score"].abs().max())
        for attrs in (table.attrs, top.attrs):
            totals = {e["creator"]: e["total"] for e in attrs["creators"] if e["query"] == query}
            for creator, total in rows.groupby("creator")["score_adj"].sum().items():
                assert totals[creator] == pytest.approx(total, rel=1e-6)
    assert np.allclose(top["score"], table[table["rank"] <= 2]["score"], rtol=1e-5)


def test_copies_are_one_image_with_one_row_for_each_file(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "004.png", tmp_path / "data" / "copy.png")
    with (tmp_path / "data" / "metadata.csv").open("a") as file:
        file.write("copy.png,picture 4,someone else\n")
    said = []
    influence.build(
        tmp_path / "data", model=world / "ddpm", store=tmp_path / "s", dim=256, draws=DRAWS, message=said.append
    )
    assert any("more than once" in line for line in said)
    table = influence.attribute(world / "data" / "004.png", tmp_path / "s", k=None, draws=4)
    pair = table[table["file_name"].isin(["004.png", "copy.png"])]
    assert len(table) == 11 and pair["item_id"].nunique() == 1 and pair["score"].nunique() == 1
    totals = {e["creator"]: e for e in table.attrs["creators"]}
    assert totals["someone else"]["total"] == pytest.approx(pair["score_adj"].iloc[0])


def test_a_picture_that_cannot_be_used_is_named_and_the_others_are_untouched(world, built, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "bad.png").write_bytes(b"not a picture")
    Image.new("I;16", (16, 16)).save(tmp_path / "data" / "deep.png")
    with (tmp_path / "data" / "metadata.csv").open("a") as file:
        file.write("bad.png,x,c\ndeep.png,x,c\n")
    run = invoked(
        "build", tmp_path / "data", "--model", world / "ddpm", "--base", world / "base", "--store", tmp_path / "s",
        "--dim", 256, "--draws", DRAWS,
    )  # fmt: skip
    assert "refused bad.png" in run.stderr and "refused deep.png" in run.stderr
    assert "2 pictures refused, 10 used" in run.stderr
    same(built, tmp_path / "s")


def refused(run, *words, last=False):
    assert run.exit_code == 1
    lines = run.stderr.strip().splitlines()
    assert last or len(lines) == 1, run.stderr
    for word in words:
        assert word in lines[-1], run.stderr


def test_another_model_seed_dimension_or_lora_is_refused_in_one_line_with_both_values(world, built, tmp_path):
    shutil.copytree(world / "ddpm", tmp_path / "touched")
    (file,) = (tmp_path / "touched" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    query = world / "data" / "000.png"
    wanted = influence.open_store(built).spec
    touched = models.load_denoiser(tmp_path / "touched").identity["model"]
    run = invoked("attribute", query, "--store", built, "--model", tmp_path / "touched")
    refused(run, wanted.model[:12], touched[:12])

    def again(*more, model=world / "ddpm"):
        return invoked("build", world / "data", "--model", model, "--store", built, "--draws", DRAWS, *more)

    refused(again("--dim", 256, model=tmp_path / "touched"), wanted.model[:12], touched[:12], last=True)
    refused(again("--dim", 256, "--seed", 7), "seed is 7", "has 0", last=True)
    refused(again("--dim", 128), "dim is 128", "has 256", last=True)
    refused(again("--dim", 256, "--draws", 8), "draws is 8", f"has {DRAWS}", last=True)

    store = tmp_path / "lora.store"
    build(world, store, model="sd", lora=world / "lora")
    other = tiny_lora(world / "sd", tmp_path / "other", seed=5)
    run = invoked("attribute", query, "--store", store, "--prompt", "", "--lora", other)
    refused(run, influence.open_store(store).spec.lora[:12], "lora is")
    refused(invoked("attribute", query, "--store", store), "reads captions", "--prompt")
    refused(invoked("attribute", query, "--store", built, "--prompt", "x"), "leave out --prompt")


def test_a_truncated_picture_is_refused_as_a_query(world, built, tmp_path):
    data = (world / "data" / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    refused(invoked("attribute", tmp_path / "cut.png", "--store", built), "cut.png")
