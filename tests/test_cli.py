import json
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner
from influence_cli.main import cli
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence.attribution import COLUMNS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    tiny_ddpm(path / "ddpm")
    pictures(path / "data", count=9)
    influence.build(path / "data", model=path / "ddpm", store=path / "s", dim=64, draws=2)
    return path


def run(*parts):
    return CliRunner().invoke(cli, [str(part) for part in parts])


def test_a_store_keeps_its_column_of_creators_and_what_is_excluded_by_it(world, tmp_path):
    data = pictures(tmp_path / "data", count=6)
    file = data / "metadata.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("creator\n", "artist\n", 1), encoding="utf-8")
    build = ("build", data, "--model", world / "ddpm", "--store", tmp_path / "s", "--dim", 64, "--draws", 2)
    assert run(*build, "--creator-column", "artist").exit_code == 0
    assert run("exclude", tmp_path / "s", "--creator", "creator 1").exit_code == 0
    again = run(*build)
    assert again.exit_code == 0, again.output
    made = influence.open_store(tmp_path / "s")
    assert len(made.items) == 4 and len(made.excluded) == 2 and set(made.items["creator"]) == {"creator 0", "creator 2"}
    other = run(*build, "--creator-column", "text")
    assert (
        other.exit_code == 1 and "takes creators from column 'artist', and --creator-column is 'text'" in other.output
    )
    file.write_text(file.read_text(encoding="utf-8").replace("creator 1", "creator one"), encoding="utf-8")
    renamed = run(*build)
    assert "2 images that were excluded by the name of their creator have another creator now" in renamed.output


def test_controls_are_looked_at_before_the_work_begins_and_may_be_moved(world, tmp_path):
    held = pictures(tmp_path / "held", count=5, key=3)
    build = ("build", world / "data", "--model", world / "ddpm", "--store", tmp_path / "s", "--dim", 64, "--draws", 2)
    slip = run(*build, "--controls", tmp_path / "hled")
    assert slip.exit_code == 1 and "is not a folder" in slip.output
    assert not [*(tmp_path / "s" / "shards").glob("*")]
    assert run(*build, "--controls", held).exit_code == 0
    more = pictures(tmp_path / "more", count=7, key=3)  # the five, and two more
    shutil.rmtree(held)
    found = run(*build, "--controls", more)
    assert found.exit_code == 0, found.output
    assert influence.open_store(tmp_path / "s").controls().num_rows()[0] == 7
    fewer = run(*build, "--controls", pictures(tmp_path / "fewer", count=3, key=3))
    assert fewer.exit_code == 1 and "holds 4 images that the data set has not" in fewer.output


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0 and f"influence {name}" in result.output and "Example:" in result.output


def test_the_table_names_the_creators_and_their_totals(world):
    result = run("attribute", world / "data" / "003.png", "--store", world / "s", "-k", 3, "--draws", 4)
    assert result.exit_code == 0
    for word in ("rank", "score", "creator 0", "creator 1", "creator 2", "signed sum over all images"):
        assert word in result.output


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_output_files_hold_the_table(world, tmp_path, suffix):
    file = tmp_path / f"t{suffix}"
    query = world / "data" / "003.png"
    result = run("attribute", query, "--store", world / "s", "-k", "all", "--draws", 4, "--output", file, "--json")
    printed = json.loads(result.stdout)
    assert [set(a) for a in printed[0]["attributions"]] == [{*COLUMNS} - {"query"}] * 9
    if suffix == ".json":
        assert json.loads(file.read_text(encoding="utf-8")) == printed
        return
    table = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert table["file_name"].tolist() == [a["file_name"] for a in printed[0]["attributions"]]
    assert table["score"].tolist() == pytest.approx([a["score"] for a in printed[0]["attributions"]], rel=1e-12)


def test_a_plan_says_the_cost_and_writes_nothing(world, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = run("build", world / "data", "--model", world / "ddpm", "--dim", 64, "--draws", 2, "--plan")
    assert result.exit_code == 0, result.output
    for word in ("images", "draws", "disk_bytes", "seconds", "curvature_rows"):
        assert word in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_build_says_what_it_assumed_and_what_it_made(world, tmp_path):
    result = run("build", world / "data", "--model", world / "ddpm", "--store", tmp_path / "s", "--dim", 64)
    assert result.exit_code == 0, result.output
    assert "training loss assumed" in result.stderr
    assert (
        result.stdout == f"{tmp_path / 's'}: 9 images, 128 curvature rows, 0 refused\n" or "9 images" in result.stdout
    )


@pytest.mark.parametrize(
    ("parts", "code", "words"),
    [
        (("attribute", "x.png", "--store", "nowhere"), 1, "there is no store at nowhere"),
        (("build", "nowhere", "--model", "nowhere", "--store", "s"), 1, "there is no model folder at"),
        (("build", "x", "--model", "m", "--store", "s", "--memory", "much"), 1, "expected a size such as 8GiB"),
        (("build", "nowhere", "--model", "m"), 2, "Missing option '--store'"),
        (("attribute", "x.png", "--store", "s", "-k", "0"), 2, "'0' is not a number above 0, nor all"),
        (("attribute", "x.png", "--store", "s", "--method", "magic"), 2, "'magic' is not one of"),
        (("attribute", "x.png", "--store", "s", "--output", "x.doc"), 2, "expected one of .csv, .parquet, .json"),
        (("inspect", "nowhere"), 1, "there is nothing at nowhere"),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(parts, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*parts)
    assert result.exit_code == code
    assert words in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_control_characters_of_strangers_are_not_printed(world, tmp_path):
    pictures(tmp_path / "data", count=9)
    metadata = tmp_path / "data" / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("creator 1", "\x1b[31mred\x07"), encoding="utf-8")
    influence.build(tmp_path / "data", model=world / "ddpm", store=tmp_path / "s", dim=64, draws=2)
    result = run("attribute", tmp_path / "data" / "003.png", "--store", tmp_path / "s", "--draws", 4)
    assert "red" in result.output and "\x1b" not in result.output and "\x07" not in result.output


def test_inspect_tells_what_things_are(world, tmp_path):
    tiny_stable_diffusion(tmp_path / "sd")
    lora = tiny_lora(tmp_path / "sd", tmp_path / "lora")
    for path, kind in (
        (world / "s", "store"),
        (world / "ddpm", "model"),
        (tmp_path / "sd", "model"),
        (lora, "LoRA"),
        (world / "data", "data set"),
        (world / "data" / "003.png", "picture"),
    ):
        result = run("inspect", path, "--json")
        facts = json.loads(result.stdout)
        assert (facts["kind"], facts["whole"], result.exit_code) == (kind, True, 0)
        assert run("inspect", path).exit_code == 0


def test_inspect_notices_what_is_not_whole(world, tmp_path):
    data = (world / "data" / "003.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:100])
    assert run("inspect", tmp_path / "cut.png").exit_code == 1
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert run("inspect", tmp_path / "cut.safetensors").exit_code == 1


def test_exclude_says_what_is_left_and_undo_brings_it_back(world, tmp_path):
    store = shutil.copytree(world / "s", tmp_path / "s")
    result = run("exclude", store, "--creator", "creator 1")
    assert result.stdout == f"{store}: creator 1 excluded; 6 images left, 3 excluded\n"
    assert "already excluded" in run("exclude", store, "--creator", "creator 1").stdout
    facts = json.loads(run("inspect", store, "--json").stdout)
    assert facts["excluded"] == {"creators": ["creator 1"], "items": [], "images": 3}
    result = run("exclude", store, "--creator", "creator 1", "--undo")
    assert result.stdout == f"{store}: creator 1 included again; 9 images left, 0 excluded\n"
    for parts in ((), ("--creator", "x", "--item", "y")):
        assert run("exclude", store, *parts).exit_code == 2
    result = run("exclude", store, "--creator", "\x1b[31mx")
    assert result.exit_code == 1 and "has no creator" in result.stderr and "\x1b" not in result.stderr


def test_verify_says_that_all_is_well_or_what_is_not(world, tmp_path):
    store = shutil.copytree(world / "s", tmp_path / "s")
    result = run("verify", store)
    assert result.exit_code == 0 and result.stdout == f"{store}: every byte is as it was committed\n"
    (store / "shards" / "loss-000001.json").unlink()
    assert "; 1 shards are not built yet: run the same influence build to go on" in run("verify", store).stdout
    (store / "store.json").write_bytes(b"{}")
    result = run("verify", store)
    assert result.exit_code == 1 and "store.json: " in result.stdout
    assert len(result.stderr.strip().splitlines()) == 1 and "1 problems" in result.stderr
    result = run("verify", store, "--repair")
    assert result.exit_code == 1 and "cannot be built again, restore it from a copy" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,prompt\na.png,a house\n", "1 pictures have no prompt, others have; give all one"),
        ("picture\na.png\n", "is no CSV with a column file (and numbers in usage)"),
        ("file,usage\na.png,often\n", "is no CSV with a column file (and numbers in usage)"),
    ],
)
def test_a_list_that_says_too_little_is_refused(world, tmp_path, text, words):
    (tmp_path / "list.csv").write_text(text)
    result = run("check", world / "data" / "001.png", "--list", tmp_path / "list.csv", "--store", world / "s")
    assert result.exit_code in (1, 2) and words in " ".join(result.output.split())


def test_pictures_of_a_list_come_after_those_named_with_their_own_prompts_and_weights(tmp_path):
    from influence_cli.answers import _pictures

    (tmp_path / "list.csv").write_text("file,prompt,usage\na.png,a house,3\nsub/b.png,,\n")
    named, own = tmp_path / "x.png", tmp_path / "list.csv"
    paths, prompts, usage = _pictures((named,), own, "a tree")
    assert paths == [named, tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    assert prompts == ["a tree", "a house", ""] and usage == [1.0, 3.0, 1.0]
    (tmp_path / "bare.csv").write_text("file\na.png\n")
    assert _pictures((), tmp_path / "bare.csv", "a tree") == ([tmp_path / "a.png"], ["a tree"], [1.0])
    assert _pictures((), tmp_path / "bare.csv", None) == ([tmp_path / "a.png"], None, [1.0])


def test_what_cannot_be_written_or_counted_is_said_in_one_line_before_the_work(world, tmp_path):
    (tmp_path / "file").write_text("x")
    picture, store = world / "data" / "003.png", world / "s"
    for parts, words in (
        (("attribute", picture, "--store", store, "--output", tmp_path / "no" / "x.csv"), "is no folder; make it"),
        (("build", world / "data", "--model", world / "ddpm", "--store", tmp_path / "t", "--workers", 0), "0 is not"),
        (("extract", "--store", store, "-o", tmp_path / "file" / "x", "--count", 1), "Not a directory"),
        (("evaluate", "lds", "--store", store, "--truth", tmp_path / "file", "--base", world / "ddpm",
          "--queries", f"a={world / 'data'}", "--subsets", 1), "1 is not in"),
        (("evaluate", "lds", "--store", store, "--truth", tmp_path / "t", "--base", world / "ddpm",
          "--queries", f"a={world / 'data'}", "--queries", f"a={world / 'data'}"), "names a twice"),
        (("evaluate", "deletion", "--store", store, "--truth", tmp_path / "t", "--base", world / "ddpm",
          "--queries", f"a={world / 'data'}", "--picture", tmp_path / "no" / "x.png"), "is no folder; make it"),
    ):  # fmt: skip
        result = run(*parts)
        assert result.exit_code in (1, 2) and words in result.stderr and "Traceback" not in result.stderr, parts
        assert result.exception is None or isinstance(result.exception, SystemExit), parts


def test_a_store_without_all_controls_and_a_model_without_weights_are_not_whole(world, tmp_path):
    tiny_stable_diffusion(tmp_path / "sd")
    for weights in (tmp_path / "sd" / "vae").glob("*.safetensors"):
        weights.unlink()
    result = run("inspect", tmp_path / "sd", "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["whole"], facts["without weights"]) == (1, False, ["vae"])
    influence.build(
        world / "data", model=world / "ddpm", store=tmp_path / "s", dim=64, draws=4, controls=controls(tmp_path)
    )
    assert json.loads(run("inspect", tmp_path / "s", "--json").stdout)["whole"]
    (tmp_path / "s" / "controls" / "shards" / "loss-000000.json").unlink()
    result = run("inspect", tmp_path / "s", "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["whole"], facts["controls"]["missing shards"]) == (1, False, 1)
    assert "; 1 shards are not built yet" in run("verify", tmp_path / "s").stdout


def controls(path):
    """Other pictures than those of `world`."""
    pictures(path / "all", count=16)
    for i in range(12):
        (path / "all" / f"{i:03d}.png").unlink()
    lines = (path / "all" / "metadata.csv").read_text().splitlines(keepends=True)
    (path / "all" / "metadata.csv").write_text("".join([lines[0], *lines[13:]]))
    return path / "all"
