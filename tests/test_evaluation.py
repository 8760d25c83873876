"""`influence evaluate` on a small fine-tune: retraining, tables and the doctor, by the library and the command line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from influence_cli.main import cli
from PIL import Image
from tiny_models import pictures, tiny_ddpm

import influence
from influence import finetuning, retraining
from influence.errors import DatasetError, OptionError
from influence.finetuning import FineTune
from influence.retraining import Query, Run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fine-tune with its store and three kinds of queries, as a user has them."""
    folder = tmp_path_factory.mktemp("evaluation")
    base, data = tiny_ddpm(folder / "base"), pictures(folder / "data", count=12, size=8, captions=False)
    pictures(folder / "unseen", count=2, size=8, captions=False, key=1)
    recipe = FineTune(epochs=60, batch_size=6, learning_rate=3e-3)
    query = Query(str(data / "000.png"), "trained")
    truth = retraining.create(folder / "making", base=base, dataset=data, recipe=recipe, queries=[query], draws=8)
    maker = retraining.Retrainer(truth)
    maker.retrain(Run("all", np.ones(12, dtype=bool), 0))
    finetuning.save(maker.denoiser, recipe, folder / "model", base=base)
    influence.build(data, model=folder / "model", store=folder / "store", dim=512, draws=16)
    return folder


@pytest.fixture(scope="module")
def truth(made):
    store = influence.open_store(made / "store")
    queries = {"trained": made / "data", "unseen": made / "unseen"}
    return influence.truth_of(store, made / "truth", base=made / "base", queries=queries, draws=16)


@pytest.fixture(scope="module")
def scores(made, truth):
    return influence.score_matrix(influence.open_store(made / "store"), truth, draws=16)


def test_the_score_matrix_is_attribute_in_the_order_of_the_truth(made, truth, scores):
    assert scores.shape == (14, 12)
    table = influence.attribute([truth.queries[3].path], made / "store", k=None, draws=16)
    by_item = table.set_index("item_id")["score"]
    assert scores[3] == pytest.approx([by_item[item.item_id] for item in truth.items], rel=1e-5)


def test_trained_pictures_lose_when_they_are_left_out_and_the_scores_foretell_it(truth, scores):
    table = influence.evaluate_lds(truth, {"gauss-newton": scores}, subsets=8, seeds=2)
    rows = table.set_index(["kind", "method"])
    assert rows.loc[("trained", "constant"), "lds"] == 0
    found = rows.loc[("trained", "gauss-newton")]
    assert found["low"] <= found["lds"] <= found["high"]
    assert found["lds"] > 0.3
    assert 0 < found["ceiling"] <= 1
    assert found["of_ceiling"] == pytest.approx(found["lds"] / found["ceiling"])


def test_owners_values_sum_to_the_gain_of_the_fine_tune(truth, scores):
    found = influence.evaluation.owner_truth(truth, scores, seeds=1)
    assert found.owners == ["creator 0", "creator 1", "creator 2"]
    assert found.measured.sum(0) == pytest.approx(found.gain)
    table = influence.evaluate_shapley(truth, {"gauss-newton": scores}, seeds=1).set_index("kind")
    assert table.loc["trained", "gain"] == pytest.approx(found.gain[:12].mean())
    assert table.loc["trained", "gain"] > 0


def test_exact_values_are_of_the_fine_tune_of_the_truth_alone(made, truth, scores, tmp_path):
    influence.evaluation.owner_truth(truth, scores, seeds=1)
    ask = {"images": truth.queries[0].path, "draws": 16, "truth": truth.folder}
    store = shutil.copytree(made / "store", tmp_path / "store")
    found = influence.answer(store=store, **ask)
    shares = found.shares[(found.shares["estimator"] == "shapley") & found.shares["n_works"].notna()]
    assert len(shares.query("query_id != 'ALL'")) == 3
    item = influence.open_store(store).items["item_id"].iloc[0]
    influence.exclude(store, item=item)
    with pytest.raises(OptionError, match="is not of the works of store store: 1 differ, or their creators"):
        influence.answer(store=store, **ask)
    influence.exclude(store, item=item, undo=True)
    other = shutil.copytree(truth.folder, tmp_path / "truth")
    facts = json.loads((other / "truth.json").read_text(encoding="utf-8"))
    (other / "truth.json").write_text(json.dumps(facts | {"base": "0"}), encoding="utf-8")
    assert influence.answer(store=store, **ask | {"truth": other}), "this store does not say what its base is"
    named = tmp_path / "named"
    influence.build(made / "data", model=made / "model", base=made / "base", store=named, dim=512, draws=16)
    with pytest.raises(OptionError, match="was retrained from another base than the fine-tune of store named"):
        influence.answer(store=named, **ask | {"truth": other})
    (other / "truth.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OptionError, match="there is no truth in"):
        influence.answer(store=store, **ask | {"truth": other})


def test_deletion_removes_what_is_ranked_first(made, truth, scores):
    out = made / "regenerated.png"
    table = influence.evaluate_deletion(
        truth, {"gauss-newton": scores}, limit=1, fractions=(0.25,), seeds=1, controls=1, picture=out
    )
    assert sorted(table["method"].unique()) == ["gauss-newton", "random", "similar"]
    assert len(table) == 2 * 3
    run = truth.runs().set_index("name")
    name = next(name for name in run.index if name.startswith("delete gauss-newton for 0,"))
    assert set(np.flatnonzero(~run.loc[name, "members"])) == set(np.argsort(-scores[0])[:3])
    with Image.open(out) as sheet:
        assert sheet.size == (8 * 8, 4 * 8)
    trained = table[(table["kind"] == "trained") & (table["method"] != "random")]
    assert (trained["rise"] > 0).all()  # both remove the picture itself


def test_the_doctor_finds_a_good_store_well(made):
    table = influence.doctor(influence.open_store(made / "store"), [made / "unseen" / "000.png"], draws=64)
    rows = table.set_index("check")
    assert rows.loc["coverage", "value"] == 1
    for check in ("coverage", "batch invariance", "finds itself"):
        assert rows.loc[check, "ok"], rows.loc[check]
    assert rows.loc["batch invariance", "value"] < 1e-5
    with pytest.raises(OptionError, match="reads others"):
        influence.doctor(influence.open_store(made / "store"), method="d-trak")


def test_the_doctor_finds_a_store_of_few_draws_out(made, tmp_path):
    influence.build(made / "data", model=made / "model", store=tmp_path / "store", dim=64, draws=2)
    table = influence.doctor(influence.open_store(tmp_path / "store"), draws=2).set_index("check")
    assert not table.loc["training draws", "ok"]
    assert not table.loc["query draws", "ok"]


def test_the_doctor_samples_what_is_left_of_the_data_set(made, tmp_path):
    data = shutil.copytree(made / "data", tmp_path / "data")
    store = influence.build(data, model=made / "model", store=tmp_path / "store", dim=64, draws=4)
    whole = influence.doctor(store, draws=4)
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    said = []
    (data / "metadata.csv").write_text("\n".join(lines[:-2]) + "\n", encoding="utf-8")
    table = influence.doctor(store, draws=4, message=said.append)
    assert table["check"].tolist() == whole["check"].tolist() and np.isfinite(table["value"]).all()
    (line,) = [line for line in said if "any more" in line]
    assert line == f"2 of 12 images of store store are not in {data} any more: the doctor samples the others"
    shutil.rmtree(data)
    pictures(data, count=2, size=8, captions=False, key=9)
    with pytest.raises(DatasetError, match="12 of 12 images of store store are not in .* put them back, or build anot"):
        influence.doctor(store, draws=4)


@pytest.fixture(scope="module")
def brief(made, tmp_path_factory):
    """A store of the same model beside a recipe of one epoch: what a command does, without long retraining."""
    folder = tmp_path_factory.mktemp("brief")
    shutil.copytree(made / "model", folder / "model")
    file = folder / "model" / finetuning.RECIPE_FILE
    recipe = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(recipe | {"epochs": 1}), encoding="utf-8")
    influence.build(made / "data", model=folder / "model", store=folder / "store", dim=512, draws=16)
    return folder / "store"


def test_the_command_line(made, brief):
    common = ["--store", str(brief), "--truth", str(made / "truth-by-command"), "--base", str(made / "base")]
    common += ["--queries", f"unseen={made / 'unseen'}", "--draws", "8", "--json"]
    found = CliRunner().invoke(cli, ["evaluate", "lds", *common, "--subsets", "3", "--method", "grad-dot"])
    assert found.exit_code == 0, found.output
    assert [row["method"] for row in json.loads(found.stdout)] == ["constant", "grad-dot"]
    found = CliRunner().invoke(cli, ["evaluate", "shapley", *common, "--seeds", "1"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["kind"] == "unseen"
    found = CliRunner().invoke(cli, ["evaluate", "deletion", *common, "--seeds", "1", "--fraction", "0.2"])
    assert {row["method"] for row in json.loads(found.stdout)} == {"random", "similar", "gauss-newton"}
    moved = ["evaluate", "doctor", *common[:2], "--dataset", str(made / "nowhere")]
    assert "nowhere is not there; say where with --dataset DIR" in CliRunner().invoke(cli, moved).output
    twice = ["evaluate", "doctor", *common[:2], "--method", "trak", "--method", "grad-dot"]
    assert "doctor examines one --method at a time" in CliRunner().invoke(cli, twice).output
    found = CliRunner().invoke(cli, ["evaluate", "lds", *common[:-5], "--queries", "odd"])
    assert found.exit_code == 2
    found = CliRunner().invoke(cli, ["evaluate", "doctor", "--store", str(made / "store"), "--draws", "2"])
    assert "batch invariance" in found.stdout


def test_a_store_of_other_images_is_refused(made, truth, tmp_path):
    pictures(tmp_path / "other", count=12, size=8, captions=False, key=5)
    influence.build(tmp_path / "other", model=made / "model", store=tmp_path / "store", dim=64, draws=2)
    with pytest.raises(OptionError, match="differ in 24 images"):
        influence.score_matrix(influence.open_store(tmp_path / "store"), truth, draws=2)


def test_files_of_one_picture_are_members_of_their_own_and_so_they_are_scored(made, tmp_path):
    """Two creators sent in the same picture: it counts for both, in what is retrained and in what is foretold."""
    data = pictures(tmp_path / "data", count=4, size=8, captions=False)
    shutil.copy(data / "001.png", data / "copy.png")
    with (data / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("copy.png,,creator 2\n")
    store = influence.build(data, model=made / "model", store=tmp_path / "store", dim=64, draws=4)
    truth = influence.truth_of(
        store, tmp_path / "truth", base=made / "base", queries={"trained": data}, recipe=made / "model", draws=4
    )
    names = [item.file_name for item in truth.items]
    assert sorted(names) == ["000.png", "001.png", "002.png", "003.png", "copy.png"]
    first, second = names.index("001.png"), names.index("copy.png")
    assert second == first + 1
    tau = influence.score_matrix(store, truth, method="grad-dot", draws=4)
    assert tau.shape == (5, 5) and np.array_equal(tau[:, first], tau[:, second])
    facts = json.loads((truth.folder / "truth.json").read_text(encoding="utf-8"))
    assert [item["file_name"] for item in facts["items"]] == names
    owners = retraining.coalitions([item.creator for item in truth.items])
    assert owners[frozenset({"creator 2"})].sum() == 2  # 002.png and the copy
    brief = dataclasses.replace(truth.recipe, epochs=1)
    found = influence.evaluation.owner_truth(dataclasses.replace(truth, recipe=brief), tau, seeds=1)
    totals = {owner: tau[:, [item.creator == owner for item in truth.items]].sum(1) for owner in found.owners}
    np.testing.assert_allclose(found.predicted, list(totals.values()))
    assert found.predicted.sum(0) == pytest.approx(tau.sum(1))


def test_no_two_coalitions_share_a_name():
    name = influence.evaluation.coalition_name
    assert name(frozenset({"b", "a"})) == "owners: a + b" and name(frozenset()) == "owners: "
    sets = [
        {"a", "b"},
        {"a + b"},
        {"a + b", "c"},
        {"a", "b + c"},
        {'["a', 'b"]'},
        {'["a + b"]'},
        {"! +", "b"},
        {"!", "+ b"},
    ]
    assert len({name(frozenset(owners)) for owners in sets}) == len(sets)


def test_queries_that_cannot_be_used_are_told(made, tmp_path):
    folder, said = pictures(tmp_path / "q", count=2, size=8, captions=False, key=3), []
    (folder / "001.png").write_bytes(b"none")
    truth = influence.truth_of(
        influence.open_store(made / "store"), tmp_path / "t", base=made / "base", queries={"unseen": folder},
        message=said.append,
    )  # fmt: skip
    assert len(truth.queries) == 1
    assert any(line.startswith("queries unseen: refused 001.png: ") for line in said), said
