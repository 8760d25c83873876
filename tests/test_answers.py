"""Controls, verdicts, shares and exports on real classes; hostile names; outside readers."""

import csv
import json
import shutil
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from influence_cli.main import cli
from PIL import Image
from scipy import stats
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import answers, tables, typefaces
from influence.errors import DatasetError, OptionError, StoreError

HOSTILE = '=cmd|"/C calc"!A1\n\u202egnp.exe\u2066, "x"'
DRAWS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers")
    tiny_ddpm(path / "ddpm")
    shutil.copytree(path / "ddpm", path / "base")
    tiny_stable_diffusion(path / "sd")
    tiny_lora(path / "sd", path / "lora")
    pictures(path / "all", count=30)
    with (path / "all" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, part in (("data", rows[:12]), ("controls", rows[12:28])):
        (path / name).mkdir()
        with (path / name / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for i, row in enumerate(part):
                shutil.copy(path / "all" / row["file_name"], path / name / row["file_name"])
                writer.writerow(row | {"creator": [HOSTILE, "Ann", "Bo"][i % 3]})
    influence.build(
        path / "data", model=path / "ddpm", store=path / "s", dim=128, draws=DRAWS, controls=path / "controls",
        base=path / "base",
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def exported(world):
    return influence.export(
        [world / "all" / "028.png", world / "data" / "003.png"], world / "s", world / "out", draws=DRAWS, pool="100.01"
    )


def test_controls_are_kept_apart_and_are_no_training_images(world):
    made = influence.open_store(world / "s")
    inside = made.controls()
    assert made.num_rows()[0] == 12 and inside.num_rows() == (16, 0)
    assert not set(made.items["item_id"]) & set(inside.items["item_id"])
    assert influence.verify(world / "s") == []


def test_a_control_that_was_trained_on_is_left_out_by_name(world, tmp_path):
    shutil.copytree(world / "controls", tmp_path / "controls")
    shutil.copy(world / "data" / "002.png", tmp_path / "controls" / "copy.png")
    with (world / "data" / "metadata.csv").open(newline="", encoding="utf-8") as file:
        caption = next(row for row in csv.DictReader(file) if row["file_name"] == "002.png")
    with (tmp_path / "controls" / "metadata.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["copy.png" if k == "file_name" else v for k, v in caption.items()])
    said = []
    shutil.copytree(world / "s", tmp_path / "s", ignore=shutil.ignore_patterns("controls"))
    influence.build(
        world / "data", model=world / "ddpm", store=tmp_path / "s", dim=128, draws=DRAWS,
        controls=tmp_path / "controls", message=said.append,
    )  # fmt: skip
    assert any("1 are training images and left out, copy.png first" in line for line in said)
    with pytest.raises(DatasetError, match="holds no image that was not trained on"):
        influence.build(
            world / "data", model=world / "ddpm", store=tmp_path / "t", dim=128, draws=DRAWS, controls=world / "data"
        )


def test_a_damaged_control_is_found_and_repaired(world, tmp_path):
    shutil.copytree(world / "s", tmp_path / "s")
    victim = sorted((tmp_path / "s" / "controls" / "shards").glob("loss-*.h5"))[0]
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.write_bytes(data)
    (problem,) = influence.verify(tmp_path / "s")
    assert problem.file.startswith("controls/shards/loss-") and problem.item_ids
    assert influence.repair(tmp_path / "s") and influence.verify(tmp_path / "s") == []
    assert victim.read_bytes() == (world / "s" / victim.relative_to(tmp_path / "s")).read_bytes()


def test_incomplete_controls_are_refused(world, tmp_path):
    shutil.copytree(world / "s", tmp_path / "s")
    for path in sorted((tmp_path / "s" / "controls" / "shards").glob("loss-*"))[:2]:
        path.unlink()
    with pytest.raises(StoreError, match="controls of store s are not complete"):
        influence.attribute(world / "all" / "028.png", tmp_path / "s", draws=DRAWS)


def test_scores_have_errors_and_are_compared_with_controls(world):
    said = []
    table = influence.attribute(
        [world / "all" / "028.png", world / "controls" / "013.png"], world / "s", k=None, draws=DRAWS,
        message=said.append,
    )  # fmt: skip
    assert any("there are 16 controls" in line for line in said)
    assert (table["score_low"] < table["score"]).all() and (table["score"] < table["score_high"]).all()
    assert table["leverage"].between(0, 0.9).all()
    np.testing.assert_allclose(table["score_adj"], table["score"] / (1 - table["leverage"]))
    first = table[table["query"].str.endswith("028.png")]
    assert set(np.round(first["p_value"] * 17).astype(int)) <= set(range(1, 18))
    assert (np.diff(first.sort_values("p_value")["q_value"]) >= 0).all()
    itself = table[table["query"].str.endswith("013.png")]
    assert set(np.round(itself["p_value"] * 16).astype(int)) <= set(range(1, 17)), "a query is not its own control"
    for query in table.attrs["queries"]:
        assert query["gain"] == pytest.approx(0, abs=1e-5), "the base is the model itself"


def test_a_picture_is_none_of_its_own_controls_whatever_its_caption_there(world):
    made = influence.answer(world / "controls" / "013.png", world / "s", draws=DRAWS)
    files = made.items.set_index("item_id")
    assert len(made.controls) == 15
    assert "013.png" not in files.loc[made.controls["control_id"], "file_name"].tolist()
    assert files[files["file_name"] == "013.png"]["caption"].notna().all(), "and the model reads none"
    below = (made.queries["gain_p_null"] * 16).iloc[0]
    assert below == pytest.approx(round(below)), "of 15 gains of others"


def moved(world, tmp_path):
    """The store, and a command line on it; data set and controls are no longer where they were."""
    for name in ("data", "controls"):
        shutil.copytree(world / name, tmp_path / name)
    options = {"dim": 64, "draws": DRAWS, "base": world / "base", "controls": tmp_path / "controls"}
    influence.build(tmp_path / "data", model=world / "ddpm", store=tmp_path / "s", **options)
    for name in ("data", "controls"):
        (tmp_path / name).rename(tmp_path / f"{name}-now")
    return tmp_path / "s"


def test_what_was_moved_is_asked_for_and_found_where_it_is_said_to_be(world, tmp_path):
    store = moved(world, tmp_path)

    def ask(*parts):
        found = CliRunner().invoke(
            cli, [str(p) for p in ("attribute", world / "all" / "028.png", "--store", store, "--draws", DRAWS, *parts)]
        )
        assert found.exception is None or isinstance(found.exception, SystemExit)
        return found.exit_code, found.output

    code, said = ask("--method", "path")
    assert code == 1 and "the data set of the store" in said and "say where with --dataset DIR" in said, said
    code, said = ask("--method", "path", "--dataset", tmp_path / "data-now")
    assert code == 1 and "the controls of the store" in said and "say where with --controls DIR" in said, said
    code, said = ask("--controls", tmp_path)
    assert code == 1 and "lacks 16 of the 16 controls" in said, said
    assert ask("--method", "path", "--dataset", tmp_path / "data-now", "--controls", tmp_path / "controls-now")[0] == 0
    assert ask("--method", "path")[0] == 0, "what was needed is kept"
    found = influence.answer(world / "all" / "028.png", store, draws=DRAWS, dataset=tmp_path / "data-now")
    assert len(found.controls) == 16


def test_creators_of_controls_are_excluded_by_name_and_without_controls_nothing_is_tested(world, tmp_path):
    store = shutil.copytree(world / "s", tmp_path / "s")
    inside = influence.open_store(store).controls()
    other = inside.items["item_id"].iloc[0]
    assert influence.exclude(store, item=other)
    found = influence.answer(world / "all" / "028.png", store, draws=DRAWS)
    assert len(found.controls) == 15 and other not in set(found.controls["control_id"])
    for item_id in inside.items["item_id"][1:]:
        influence.exclude(store, item=item_id)
    found = influence.answer(world / "all" / "028.png", store, draws=DRAWS)
    assert found.controls.empty and found.attributions["p_value"].isna().all()
    assert found.shares["p_null_group"].isna().all() and "gated_group_sum" not in set(found.shares["estimator"])


@pytest.mark.parametrize(("command", "message"), [
    (("export", "028.png", "-o", "out", "-k", 0), "0 is not in the range"),
    (("attribute", "028.png", "028.png"), "a picture is given twice"),
    (("attribute", "028.png", "--damping", "nan"), "damping is nan; expected a number above 0"),
    (("check", "028.png", "--method", "grad-dot", "--damping", "inf"), "damping is inf; expected"),
    (("attribute", "028.png", "--draws", 10**20), "draws is 1"),
    (("attribute", "q\udcff.png"), "is not UTF-8, and no table could hold it; rename the file"),
    (("check", "q\udcff.png"), "is not UTF-8, and no table could hold it; rename the file"),
])  # fmt: skip
def test_what_no_table_could_hold_is_refused_in_one_line(world, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    for name in ("028.png", "q\udcff.png"):
        shutil.copy(world / "all" / "028.png", tmp_path / name)
    found = CliRunner().invoke(cli, [str(part) for part in (*command, "--store", world / "s")])
    assert found.exit_code in (1, 2) and isinstance(found.exception, SystemExit), found.output
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_no_text_and_a_store_without_images_are_refused(world, tmp_path):
    pictures(tmp_path / "data", count=4)
    influence.build(tmp_path / "data", model=world / "sd", lora=world / "lora", store=tmp_path / "s", dim=64, draws=2)
    with pytest.raises(OptionError, match=r"the prompt 'caf\\udce9' is not UTF-8"):
        influence.attribute(world / "all" / "028.png", tmp_path / "s", prompt="caf\udce9", draws=DRAWS)
    for creator in influence.open_store(tmp_path / "s").items["creator"].unique():
        influence.exclude(tmp_path / "s", creator=creator)
    with pytest.raises(StoreError, match="all images of store s are excluded"):
        influence.attribute(world / "all" / "028.png", tmp_path / "s", prompt="", draws=DRAWS, method="grad-dot")


def test_relative_scores_under_trak_are_those_of_the_image_left_out(world):
    table = influence.attribute(world / "all" / "028.png", world / "s", k=None, draws=DRAWS, method="trak", damping=9.0)
    phi = {}
    for block in influence.open_store(world / "s").blocks():
        phi |= dict(zip(block.item_ids, block.phi, strict=True))
    rows = np.array([phi[item_id] for item_id in table["item_id"]], dtype=float)
    gram = rows.T @ rows
    damped = gram + table.attrs["damping"] * np.trace(gram) / gram.shape[0] * np.eye(gram.shape[0])
    alone = [row @ np.linalg.solve(damped - np.outer(row, row), row) for row in rows]
    np.testing.assert_allclose(table["score_rel"], table["score_adj"] / np.sqrt(alone), rtol=1e-4)


def test_a_relative_score_is_divided_by_what_the_image_does_for_itself(world):
    table = influence.attribute(world / "all" / "028.png", world / "s", k=None, draws=DRAWS, method="grad-dot")
    lengths = {}
    for block in influence.open_store(world / "s").blocks():
        lengths |= dict(zip(block.item_ids, np.linalg.norm(block.phi, axis=1), strict=True))
    np.testing.assert_allclose(table["score_rel"], table["score"] / table["item_id"].map(lengths), rtol=1e-5)


def test_p_values_can_be_counted_from_the_tables(exported):
    scores, controls = exported.attributions, exported.controls
    for query, mine in scores.groupby("query_id"):
        strangers = controls.loc[controls["query_id"] == query, "score_rel"].to_numpy()
        above = (strangers >= mine["score_rel"].to_numpy()[:, None]).sum(1)
        np.testing.assert_allclose(mine["p_value"], (1 + above) / (1 + len(strangers)))
        images = mine.drop_duplicates("item_id")
        np.testing.assert_allclose(images["q_value"], stats.false_discovery_control(images["p_value"]))
    lengths = controls["score"] / controls["score_rel"]  # √τ(i, i), whoever asks
    assert (lengths > 0).all()
    assert (lengths.groupby(controls["control_id"]).std().dropna() < 1e-9 * lengths.max()).all()


def test_without_controls_and_base_answers_say_so(world, tmp_path):
    shutil.copytree(world / "s", tmp_path / "s", ignore=shutil.ignore_patterns("controls"))
    record = influence.open_store(tmp_path / "s").source
    assert record["base"]
    made = influence.answer(world / "all" / "028.png", tmp_path / "s", draws=DRAWS)
    assert made.queries["verdict"].tolist() != ["attributable"]
    assert "gated_group_sum" not in set(made.shares["estimator"])
    assert made.attributions["p_value"].isna().all() and len(made.controls) == 0


def test_tables_have_their_schema_and_keys(exported):
    for name, schema in tables.SCHEMA.items():
        table = getattr(exported, name)
        assert list(tables.typed(name, table).column_names) == [field.name for field in schema.fields]
        assert not table.duplicated(list(schema.primary_key)).any(), name
        for field in schema.fields:
            assert not field.required or table[field.name].notna().all(), (name, field.name)
        for column, other, key in schema.foreign_keys:
            assert set(table[column]) <= set(getattr(exported, other)[key]), (name, column)


def test_shares_sum_to_one_and_money_to_the_pool(exported):
    for (query, _), rows in exported.shares.groupby(["query_id", "estimator"]):
        assert sum(rows["share"].tolist()) == 1.0
        assert (rows["share_low"] <= rows["share"]).all() and (rows["share"] <= rows["share_high"]).all()
        if query == answers.ALL:
            assert str(sum(rows["amount"])) == "100.01"
    assert set(exported.shares["query_id"]) == {*exported.queries["query_id"], answers.ALL}


def test_intervals_of_ranks_hold_the_rank(exported):
    table = exported.attributions
    assert (table["rank_low"] <= table["rank"]).all() and (table["rank"] <= table["rank_high"]).all()


def test_style_is_shown_against_works_of_the_same_creator_that_were_held_out(exported):
    styles = exported.styles
    assert len(styles) == 6 and (styles["n_trained"] == 4).all() and styles["n_heldout"].between(4, 6).all()
    np.testing.assert_allclose(styles["gap"], styles["mean_trained"] - styles["mean_heldout"])
    assert (styles["gap_low"] < styles["gap"]).all() and (styles["gap"] < styles["gap_high"]).all()


def test_an_export_validates_against_its_own_description_with_an_outside_reader(world, exported):
    frictionless = pytest.importorskip("frictionless")
    report = frictionless.validate(str(world / "out" / "datapackage.json"))
    assert report.valid, report.flatten(["type", "message"])[:5]


def test_a_hostile_name_does_no_harm_in_any_format(world, exported):
    assert HOSTILE in exported.contributors["name"].tolist()
    with (world / "out" / "contributors.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)
    back = pd.read_csv(world / "out" / "contributors.csv")
    assert "'" + HOSTILE in back["name"].tolist()
    assert all(text.isascii() and "\n" not in text for text in back["contributor_id"])
    lossless = [
        json.loads(line)["name"] for line in tables.write("contributors", exported.contributors, "jsonl").splitlines()
    ]
    assert HOSTILE in lossless
    openpyxl = pytest.importorskip("openpyxl")
    path = world / "x.xlsx"
    path.write_bytes(tables.write("contributors", exported.contributors, "xlsx"))
    cells = [cell for row in openpyxl.load_workbook(path).active.iter_rows() for cell in row]
    assert any(cell.value and "cmd|" in str(cell.value) and cell.data_type == "s" for cell in cells)
    assert not any(cell.data_type == "f" for cell in cells)


def test_a_text_that_no_cell_holds_is_refused_in_a_spreadsheet_alone(exported):
    long = exported.contributors.assign(name="x" * 32_768)
    with pytest.raises(influence.OptionError, match="has 32768 characters, a cell 32767 at most; use another format"):
        tables.write("contributors", long, "xlsx")
    assert b"x" * 32_768 in tables.write("contributors", long, "csv")


@pytest.mark.parametrize("form", tables.FORMATS)
def test_equal_tables_have_equal_bytes(exported, form):
    for name in tables.SCHEMA:
        assert tables.write(name, getattr(exported, name), form) == tables.write(name, getattr(exported, name), form)


def test_types_survive_pandas(world, exported):
    back = pd.read_csv(world / "out" / "shares.csv")
    assert back["share"].dtype == float and back["attribution"].dtype == bool
    np.testing.assert_array_equal(back["share"], exported.shares["share"])
    (world / "t.parquet").write_bytes(tables.write("shares", exported.shares, "parquet"))
    assert pd.read_parquet(world / "t.parquet")["n_works"].dropna().tolist() == [4] * back["n_works"].notna().sum()


def test_an_export_is_replayed_byte_for_byte_and_a_changed_picture_is_refused(world, exported, tmp_path):
    found = influence.replay(world / "out" / "run.json", tmp_path / "again")
    assert found.changed == {}
    for path in sorted((world / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    record = json.loads((world / "out" / "run.json").read_text())
    record["images"][0]["sha256"] = "0" * 64
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(OptionError, match="is another picture than was exported"):
        influence.replay(tmp_path / "run.json", tmp_path / "b")
    with pytest.raises(OptionError, match="is there already"):
        influence.export(world / "all" / "028.png", world / "s", world / "out", draws=DRAWS)
    with pytest.raises(OptionError, match=r"is no run.json of an export"):
        influence.replay(world / "out" / "datapackage.json", tmp_path / "c")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(OptionError, match=r"is no run.json of an export"):
        influence.replay(tmp_path / "deep.json", tmp_path / "c")
    record["images"][0]["file"] = "elsewhere/028.png"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(OptionError, match="is not there; .* and run replay in the folder that export ran in"):
        influence.replay(tmp_path / "run.json", tmp_path / "c")


def test_the_same_picture_twice_is_refused(world, tmp_path):
    shutil.copy(world / "all" / "028.png", tmp_path / "same.png")
    with pytest.raises(OptionError, match="given twice"):
        influence.answer([world / "all" / "028.png"] * 2, world / "s", draws=DRAWS)
    with pytest.raises(OptionError, match="same picture as one before it"):
        influence.answer([world / "all" / "028.png", tmp_path / "same.png"], world / "s", draws=DRAWS)


def test_noise_and_a_photograph_are_not_from_a_model_of_letters(tmp_path):
    """Its own base stands for the fine-tune, letters for what it was trained on, other letters for controls."""
    model = Path(influence.__file__).parent / "demo_base"
    typefaces.render(tmp_path / "all", typefaces.demo_fonts(), string.ascii_uppercase, size=24)
    with (tmp_path / "all" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, part in (("data", rows[::5]), ("controls", [row for i, row in enumerate(rows) if i % 5])):
        for row in part:
            (tmp_path / name / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "all" / row["file_name"], tmp_path / name / row["file_name"])
    store = tmp_path / "s"
    influence.build(tmp_path / "data", model=model, store=store, dim=1024, draws=8, controls=tmp_path / "controls")
    rng = np.random.Generator(np.random.PCG64(0))
    Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8)).save(tmp_path / "noise.png")
    y, x = np.mgrid[:24, :24] / 24
    hills = 90 + 60 * np.sin(5 * x + 2 * y) + 40 * (y > 0.5 + 0.1 * np.sin(9 * x)) + rng.normal(0, 8, (24, 24))
    Image.fromarray(np.clip(hills, 0, 255).astype(np.uint8)).save(tmp_path / "hills.png")
    made = influence.answer([tmp_path / "noise.png", tmp_path / "hills.png"], store, draws=64)
    assert made.queries["verdict"].tolist() == ["not_from_model"] * 2, made.queries["reason"].tolist()
    shares = made.shares[made.shares["attribution"]]
    assert (shares.loc[shares["contributor_id"] == "_base_model", "share"] == 1).all()


def test_a_lora_has_its_base_with_it(world, tmp_path):
    pictures(tmp_path / "data", count=6)
    influence.build(tmp_path / "data", model=world / "sd", lora=world / "lora", store=tmp_path / "s", dim=64, draws=4)
    table = influence.attribute(tmp_path / "data" / "001.png", tmp_path / "s", prompt="picture 1", draws=4)
    (query,) = table.attrs["queries"]
    assert query["gain"] != 0 and query["loss_base"] == pytest.approx(query["loss_finetuned"] + query["gain"], rel=1e-4)
    assert query["gain_bits"] != 0 and query["gain_bits_se"] > 0


def test_a_carriage_return_neither_ends_a_row_nor_begins_a_formula(exported, tmp_path):
    hostile = "x\r=cmd|'/c calc'!A0"
    table = exported.contributors.iloc[:1].assign(name=hostile)
    for name, data in (("a.csv", tables.write("contributors", table, "csv")), ("b.csv", influence.csv_bytes(table))):
        (tmp_path / name).write_bytes(data)
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == [hostile]
        assert pd.read_csv(tmp_path / name)["name"].tolist() == [hostile]


def test_no_creator_can_take_the_id_of_what_is_no_creator():
    names = ["_base_model", "_unattributed", "_\u202egnp\n=x", "_unknown_creator", "=x"]
    ids = answers.contributor_ids(names)
    assert ids["_unknown_creator"] == "_unknown_creator" and len(set(ids.values())) == len(names)
    others = [ids[name] for name in names if name != "_unknown_creator"]
    assert all(one[0].isalnum() and one.isascii() and one.isprintable() for one in others)


def test_a_creator_called_base_model_is_a_creator(tmp_path):
    tiny_ddpm(tmp_path / "ddpm")
    pictures(tmp_path / "data", count=8)
    text = (tmp_path / "data" / "metadata.csv").read_text()
    (tmp_path / "data" / "metadata.csv").write_text(
        text.replace("creator 0", "_base_model").replace("creator 1", "_unattributed")
    )
    influence.build(tmp_path / "data", model=tmp_path / "ddpm", store=tmp_path / "s", dim=64, draws=4)
    made = influence.export(tmp_path / "data" / "001.png", tmp_path / "s", tmp_path / "out", draws=4)
    assert not made.contributors["contributor_id"].duplicated().any()
    assert not made.shares.duplicated(["query_id", "contributor_id", "estimator"]).any()


def test_the_least_q_value_does_not_depend_on_how_many_are_listed(world):
    asked = {"images": world / "data" / "003.png", "store": world / "s", "intervals": False, "model": None,
             "lora": None, "base": None, "half": None, "method": None, "damping": None, "draws": DRAWS, "prompt": None,
             "engine": "auto", "batch_size": 64, "memory": None, "device": "cpu", "progress": lambda *_: None,
             "message": lambda *_: None}  # fmt: skip
    few, every = (influence.attribution.score(**asked, k=k) for k in (1, None))
    assert few.creators.lowest_q.tolist() == every.creators.lowest_q.tolist() == [every.table["q_value"].min()]


def test_what_changes_the_last_bits_is_replayed_too(world, tmp_path):
    picture = world / "all" / "028.png"
    for i, options in enumerate(({"batch_size": 3}, {"engine": "vmap"}, {"memory": "3GiB"})):
        influence.export(picture, world / "s", tmp_path / f"out{i}", draws=DRAWS, **options)
        assert influence.replay(tmp_path / f"out{i}" / "run.json", tmp_path / f"again{i}").changed == {}


@pytest.mark.parametrize("changes", [
    {"images": ["a.png"]},
    {"truth": 3, "format": ["csv"]},
    {"options": {"form": "csv"}},
    {"options": {"draws": "8"}},
    {"options": {"k": True}},
    {"options": {"usage": ["a"]}},
    {"options": {"solo": [1]}},
    {"options": {"draws": 10**20}},
    {"options": 3},
    {"tables": []},
])  # fmt: skip
def test_a_record_that_nobody_exported_is_refused_in_one_line(world, exported, tmp_path, changes):
    record = json.loads((world / "out" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | changes))
    with pytest.raises(OptionError):
        influence.replay(tmp_path / "run.json", tmp_path / "again")


def test_money_is_checked_before_anything_is_computed(tmp_path):
    for pool, currency, message in ((1, "eur", "no code of ISO 4217"), (10**18, "IDR", "from 0 to below")):
        with pytest.raises(OptionError, match=message):
            influence.export("a.png", tmp_path / "none", tmp_path / "out", pool=pool, currency=currency)


def test_large_sums_are_kept_to_the_last_unit(exported):
    shares = exported.shares.assign(amount=None)
    shares.loc[shares.index[0], "amount"] = answers.Decimal("999999999999999999")
    assert b"999999999999999999.000000" in tables.write("shares", shares, "csv")


def test_one_store_is_not_several_models(world):
    with pytest.raises(OptionError, match="have the same features; expected two models"):
        influence.answer(world / "all" / "028.png", [world / "s", world / "s"], draws=DRAWS)


def test_latents_are_compared_as_well_and_kept(world, tmp_path, monkeypatch):
    pictures(tmp_path / "data", count=6)
    influence.build(tmp_path / "data", model=world / "sd", lora=world / "lora", store=tmp_path / "s", dim=64, draws=4)
    made = influence.answer(tmp_path / "data" / "001.png", tmp_path / "s", prompt="picture 1", draws=4)
    (kept,) = (tmp_path / "s" / "derived").glob("latents-*")
    again = influence.near_copies(tmp_path / "data" / "001.png", tmp_path / "s", metrics=("pixel", "latent"))
    assert made.queries["max_similarity"][0] == pytest.approx(again["similarity"].max(), abs=1e-5)
    from influence import nearcopies

    asked = []
    real = nearcopies._latents
    monkeypatch.setattr(nearcopies, "_latents", lambda d, p, progress: asked.append(len(p)) or real(d, p, progress))
    influence.near_copies(tmp_path / "data" / "001.png", tmp_path / "s", metrics=("latent",))
    assert asked == [1] and kept.exists()


def test_likeness_pays_for_a_work_once_however_many_copies_were_sent_in():
    def evidence(copies):
        ids = ["a", "b", *(f"c{i}" for i in range(copies)), *(f"other{i}" for i in range(40))]
        who = ["Ann", "Bo", *["Bo"] * copies, *["Cy"] * 40]
        looks = pd.Series([0.9, 0.9, *[0.9] * copies, *np.linspace(0, 0.1, 40)], index=ids)
        clusters = {item_id: "b" if item_id.startswith("c") else item_id for item_id in ids}
        items = pd.DataFrame({"item_id": ids, "creator": who})
        return answers._similarity_evidence(items, ["Ann", "Bo", "Cy"], looks, clusters)

    ann, bo, cy = evidence(0)
    assert ann == bo > 0 and cy < ann
    ann, bo, _ = evidence(1)
    assert ann == pytest.approx(bo)


def test_works_are_counted_in_files_and_shares_in_works(world):
    made = influence.answer(world / "all" / "028.png", world / "s", draws=DRAWS)
    assert made.contributors.set_index("name")["n_works"].loc["Ann"] == 4
