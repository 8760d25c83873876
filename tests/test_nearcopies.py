"""Near copies and extraction with a store: a planted near copy is found, a look-alike is only similar."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from influence_cli.main import cli
from PIL import Image, ImageDraw
from test_similarity import scene
from tiny_models import tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import datasets, models, nearcopies, training, typefaces

COUNT, STEPS = 8, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes by three creators, and a store of them with an untrained model."""
    path = tmp_path_factory.mktemp("scenes")
    (path / "data").mkdir()
    lines = ["file_name,creator"]
    for number in range(40):
        lines.append(f"{number:03d}.png,creator {number % 3}")
        scene(number).save(path / "data" / f"{number:03d}.png")
    (path / "data" / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    influence.build(path / "data", model=tiny_ddpm(path / "model", size=16), store=path / "s", dim=64, draws=2)
    return path


def house(hand):
    """A house, as one hand or another draws it."""
    picture = Image.new("L", (96, 96), 255)
    draw = ImageDraw.Draw(picture)
    if hand == 0:
        draw.polygon([(48, 8), (88, 44), (8, 44)], fill=0)
        draw.rectangle([20, 44, 76, 88], outline=0, width=8)
        draw.rectangle([44, 60, 60, 88], fill=0)
    else:
        draw.polygon([(48, 16), (80, 48), (16, 48)], outline=0, width=8)
        draw.rectangle([16, 44, 80, 84], outline=0, width=8)
        draw.rectangle([28, 56, 44, 84], fill=0)
    return picture


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """The demo's model, trained on twelve letters and, twenty times, on a house; its store and what it generates."""
    path = tmp_path_factory.mktemp("memorised")
    fonts = [font for font in typefaces.demo_fonts() if "Fredoka" in font.name]
    typefaces.render(path / "letters", fonts, letters="ABCEGHKMRSWZ", size=24)
    (path / "data").mkdir()
    for letter in datasets.read_dataset(path / "letters").items:
        shutil.copy(letter.path, path / "data" / f"{letter.caption.split()[1]}.png")
    for copy in range(20):
        house(0).save(path / "data" / f"house-{copy:02d}.png")
    base = Path(influence.__file__).parent / "demo_base"
    denoiser = models.load_denoiser(base)
    denoiser.network.requires_grad_(True)
    items = datasets.read_dataset(path / "data").items
    x0 = np.stack([datasets.load(item, height=24, width=24, channels=1) for item in items])
    training.train(
        denoiser.network, denoiser.schedule, torch.from_numpy(x0), steps=150, batch_size=12, learning_rate=1e-3,
        seed=0, learning_rate_schedule="cosine", stratified=True,
    )  # fmt: skip
    models.save_denoiser(denoiser, path / "model", base=base)
    influence.build(path / "data", model=path / "model", store=path / "s", dim=64, draws=2)
    influence.extract(path / "s", path / "out", count=COUNT, steps=STEPS)
    return path


@pytest.fixture(scope="module")
def extracted(memorised):
    return influence.extract(memorised / "s", memorised / "out", count=COUNT, steps=STEPS)


def test_extract_reports_the_picture_that_was_trained_on_twenty_times(memorised, extracted):
    copies = extracted[extracted["near_copy"]]
    planted = copies[copies["file_name"] == "house-00.png"]
    assert planted["query"].nunique() >= 2 and (planted["hits"] == planted["query"].nunique()).all()
    assert planted["similarity"].max() > 0.95 and planted["ratio"].min() < 0.3
    assert extracted["near_copy"].is_monotonic_decreasing
    kept = pd.read_csv(memorised / "out" / "pairs.csv")
    pd.testing.assert_frame_equal(kept.drop(columns="caption"), extracted.drop(columns="caption"), check_dtype=False)
    assert datasets.decode(memorised / "out" / "pairs.png")[0].width > 800


def test_a_generated_near_copy_is_called_and_a_look_alike_that_was_never_trained_on_is_not(
    memorised, extracted, tmp_path
):
    house(1).save(tmp_path / "alike.png")
    found = extracted[extracted["near_copy"] & (extracted["file_name"] == "house-00.png")]
    queries = [memorised / "out" / found["query"].iloc[0], tmp_path / "alike.png", memorised / "data" / "K.png"]
    table = influence.near_copies(queries, memorised / "s")
    assert list(table.columns) == nearcopies.COLUMNS
    assert table["file_name"].tolist() == ["house-00.png", "house-00.png", "K.png"]
    assert table["near_copy"].tolist() == [True, False, True]
    assert table["similarity"][2] == pytest.approx(1, abs=1e-5) and table["ratio"][2] < 0.01
    assert 0.5 < table["similarity"][1] < table["similarity"][0]


def test_answers_call_the_near_copy_and_find_the_look_alike_similar_but_not_significant(memorised, tmp_path):
    base = Path(influence.__file__).parent / "demo_base"
    fonts = list(typefaces.demo_fonts())
    typefaces.render(tmp_path / "controls", fonts, letters="DFIJLNOPQTUVXYabdefghkmnqrt0123456789", size=24)
    store = influence.build(
        memorised / "data", model=memorised / "model", store=tmp_path / "s", dim=1024, draws=8, base=base,
        controls=tmp_path / "controls",
    )  # fmt: skip
    for name, hand in (("copy", 0), ("alike", 1)):
        house(hand).save(tmp_path / f"{name}.png")
    found = influence.answer([tmp_path / "copy.png", tmp_path / "alike.png"], store, draws=64)
    planted = datasets.read_dataset(memorised / "data").items
    planted = next(item.item_id for item in planted if item.path.name == "house-00.png")
    assert (found.queries["max_similarity_item"] == planted).all()
    assert found.queries["verdict"][0] == "near_copy" and found.queries["near_copy"].tolist() == [True, False]
    assert found.queries["verdict"][1] == "not_from_model" and 0.5 < found.queries["max_similarity"][1] < 0.8
    q_values = found.attributions[found.attributions["item_id"] == planted].drop_duplicates("query_id")["q_value"]
    assert q_values.iloc[0] <= 0.1 < q_values.iloc[1]


def test_a_picture_is_judged_alone(world):
    paths = sorted((world / "data").glob("*.png"))[:4]
    together = influence.near_copies(paths, world / "s")
    alone = pd.concat([influence.near_copies(path, world / "s") for path in paths], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-5, atol=2e-3)  # √(2 − 2s) magnifies rounding at s = 1


def test_a_run_goes_on_where_it_stopped_and_another_run_is_refused(memorised, extracted, tmp_path):
    shutil.copytree(memorised / "out", tmp_path / "out")
    there = {path.name: path.read_bytes() for path in (tmp_path / "out" / "generated").iterdir()}
    for name in sorted(there)[3:]:
        (tmp_path / "out" / "generated" / name).unlink()
    influence.extract(memorised / "s", tmp_path / "out", count=COUNT, steps=STEPS, batch_size=5)
    for name, data in there.items():
        again = datasets.decode(tmp_path / "out" / "generated" / name)[0]
        before = datasets.decode(memorised / "out" / "generated" / name)[0]
        assert np.abs(np.asarray(again, int) - np.asarray(before, int)).max() <= 1, data
    with pytest.raises(influence.OptionError, match="holds another run"):
        influence.extract(memorised / "s", tmp_path / "out", count=COUNT, steps=STEPS, seed=1)
    with pytest.raises(influence.OptionError, match="is no run of extract"):
        influence.extract(memorised / "s", memorised / "data")
    with pytest.raises(influence.OptionError, match="leave out --guidance"):
        influence.extract(memorised / "s", tmp_path / "new", guidance=2.0)
    assert not (tmp_path / "new").exists()


def test_without_two_different_pictures_near_duplicates_alone_are_near_copies(world, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(world / "data" / "000.png", tmp_path / "data" / "000.png")
    influence.build(tmp_path / "data", model=world / "model", store=tmp_path / "s", dim=64, draws=2)
    said = []
    asked = [world / "data" / "000.png", world / "data" / "001.png"]
    found = influence.near_copies(asked, tmp_path / "s", metrics=["pixel"], message=said.append)
    assert found["near_copy"].tolist() == [True, False] and found["threshold"].isna().all()
    assert any("is of 0 pairs only" in line for line in said)
    influence.exclude(tmp_path / "s", creator="_unknown_creator")
    with pytest.raises(
        influence.StoreError, match="all images of store s are excluded: there is nothing to compare with"
    ):
        influence.near_copies(asked, tmp_path / "s", metrics=["pixel"])


def test_excluded_pictures_are_not_compared_with(world, tmp_path):
    store = shutil.copytree(world / "s", tmp_path / "s")
    influence.exclude(store, creator="creator 0")
    table = influence.near_copies(world / "data" / "003.png", store)
    assert table["creator"][0] != "creator 0" and not table["near_copy"][0]


def test_a_data_set_that_moved_or_changed_is_an_error_on_one_line(world, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    query = world / "data" / "003.png"
    assert influence.near_copies(query, world / "s", dataset=data)["similarity"][0] == pytest.approx(1, abs=1e-5)
    scene(77).save(data / "005.png")
    with pytest.raises(influence.StoreError, match=r"lacks 1 of the 40 pictures of store s, '005\.png' first"):
        influence.near_copies(query, world / "s", dataset=data)
    with pytest.raises(influence.StoreError, match="is not there; say where with --dataset DIR"):
        influence.near_copies(query, world / "s", dataset=tmp_path / "nowhere")


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_queries_of_any_mode_and_size_are_compared(world, tmp_path, mode):
    picture = scene(3).convert(mode)
    picture.save(tmp_path / ("q.tif" if mode == "CMYK" else "q.png"))
    Image.new(mode, (1, 1)).save(tmp_path / "one.tif")
    scene(3).resize((1500, 1500)).convert(mode).save(tmp_path / "huge.tif")
    table = influence.near_copies(sorted(tmp_path.iterdir()), world / "s")
    assert np.isfinite(table["similarity"]).all()
    assert not table.set_index(table["query"].map(lambda query: Path(query).name))["near_copy"]["one.tif"]
    if mode == "RGBA":
        assert table["file_name"][0] == "003.png" and table["near_copy"][0]


def test_own_embeddings_come_from_a_parquet_file(world, tmp_path):
    query = str(world / "data" / "003.png")
    names = [item.file_name for item in datasets.read_dataset(world / "data").items]
    rows = {name: np.eye(len(names))[i] + 0.1 for i, name in enumerate(names)}
    table = pd.DataFrame({"file_name": [*rows, query], "embedding": [*rows.values(), rows["007.png"] * 3]})
    table.to_parquet(tmp_path / "e.parquet")
    found = influence.near_copies(query, world / "s", embedding=tmp_path / "e.parquet")
    assert found["metric"].tolist() == ["pixel", "embedding"]
    assert found["file_name"].tolist() == ["003.png", "007.png"] and found["near_copy"].all()
    table[1:].to_parquet(tmp_path / "short.parquet")
    with pytest.raises(influence.DatasetError, match=r"has no embedding of '000\.png', 1 pictures in all"):
        influence.near_copies(query, world / "s", embedding=tmp_path / "short.parquet")
    pd.concat([table, table[:1]]).to_parquet(tmp_path / "twice.parquet")
    with pytest.raises(influence.DatasetError, match="names a picture twice; expected one row for each file_name"):
        influence.near_copies(query, world / "s", embedding=tmp_path / "twice.parquet")
    ragged = table.assign(embedding=[row[:2] if i else row for i, row in enumerate(table["embedding"])])
    ragged.to_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(influence.DatasetError, match="expected lists of numbers, all as long"):
        influence.near_copies(query, world / "s", embedding=tmp_path / "ragged.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(influence.DatasetError, match="expected a Parquet file with columns file_name and embedding"):
        influence.near_copies(query, world / "s", embedding=tmp_path / "bad.parquet")
    with pytest.raises(influence.OptionError, match="metric 'clip' is given; expected pixel or latent"):
        influence.near_copies(query, world / "s", metrics=["clip"])


def test_clusters_have_one_name_for_copies_whatever_their_captions(tmp_path):
    tiny_ddpm(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, number in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
        scene(number).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    influence.build(tmp_path / "data", model=tmp_path / "model", store=tmp_path / "s", dim=16, draws=2)
    clusters = influence.duplicate_clusters(tmp_path / "s")
    by_name = {item.file_name[0]: item.item_id for item in datasets.read_dataset(tmp_path / "data").items}
    assert set(clusters) == set(by_name.values())
    assert clusters[by_name["a"]] == clusters[by_name["c"]] == min(by_name["a"], by_name["c"])
    assert [clusters[by_name[name]] for name in "bd"] == [by_name[name] for name in "bd"]
    shutil.rmtree(tmp_path / "data")
    assert influence.duplicate_clusters(tmp_path / "s") == clusters  # kept
    influence.exclude(tmp_path / "s", item=by_name["b"])
    with pytest.raises(influence.StoreError, match="is not there"):
        influence.duplicate_clusters(tmp_path / "s")


def test_a_lora_generates_with_each_caption_and_is_compared_in_pixels_and_latents(tmp_path):
    tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(tmp_path / "sd", tmp_path / "lora")
    (tmp_path / "data").mkdir()
    for number in range(6):
        scene(number).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(f"scene {number % 3}", encoding="utf-8")
    lora = tmp_path / "lora"
    influence.build(tmp_path / "data", model=tmp_path / "sd", lora=lora, store=tmp_path / "s", dim=16, draws=2)
    table = influence.extract(tmp_path / "s", tmp_path / "out", count=2, steps=3)
    assert len(table) == 2 * 3 * 2 and set(table["metric"]) == {"pixel", "latent"}
    assert table.groupby("caption")["query"].nunique().to_dict() == {f"scene {i}": 2 for i in range(3)}
    other = influence.extract(tmp_path / "s", tmp_path / "plain", count=1, steps=3, guidance=1.0)
    query = other["query"].iloc[0]
    pictures = [np.asarray(datasets.decode(tmp_path / folder / query)[0], int) for folder in ("out", "plain")]
    assert other["caption"].nunique() == 3 and np.abs(pictures[0] - pictures[1]).max() > 0
    itself = influence.near_copies(tmp_path / "data" / "4.png", tmp_path / "s", metrics=("latent",))
    assert itself["file_name"].tolist() == ["4.png"] and itself["similarity"][0] == pytest.approx(1, abs=1e-5)


def test_the_command_says_how_many_come_back_and_where_the_pairs_are(memorised, extracted):
    parts = ["extract", "--store", memorised / "s", "-o", memorised / "out", "--count", COUNT, "--steps", STEPS]
    result = CliRunner().invoke(cli, [str(part) for part in parts])
    assert result.exit_code == 0, result.output
    copies = extracted[extracted["near_copy"]]
    assert result.stdout.startswith(f"{COUNT} generated pictures: {copies['query'].nunique()} are near copies of ")
    for word in ("near copy", "hits", "house-00.png", "pairs.png"):
        assert word in result.stdout
    result = CliRunner().invoke(cli, [str(part) for part in [*parts, "--json"]])
    assert len(json.loads(result.stdout)) == COUNT
