"""Several stores of one data set, of models that were trained again."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from influence_cli.main import cli
from scipy import stats
from tiny_models import pictures, tiny_ddpm

import influence
from influence import ensemble
from influence.errors import OptionError

DRAWS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("ensemble")
    pictures(path / "data", count=9, size=8, captions=False)
    pictures(path / "controls", count=12, size=8, captions=False, key=1)
    pictures(path / "query", count=2, size=8, captions=False, key=2)
    for seed in range(3):
        influence.build(
            path / "data", model=tiny_ddpm(path / f"m{seed}", seed=seed), store=path / f"s{seed}", dim=64, draws=DRAWS,
            controls=path / "controls",
        )  # fmt: skip
    return path


def ask(world, stores, **options):
    query = [world / "query" / "000.png", world / "data" / "004.png"]
    return influence.attribute(query, stores, draws=DRAWS, **({"k": None} | options))


def test_a_store_beside_itself_says_what_it_says_alone(world, monkeypatch):
    monkeypatch.setattr(ensemble, "_require_several", lambda parts: None)
    alone, twice = ask(world, world / "s0"), ask(world, [world / "s0", world / "s0"])
    assert twice["item_id"].tolist() == alone["item_id"].tolist()
    for column in (
        "rank",
        "score",
        "score_adj",
        "score_rel",
        "score_se",
        "score_low",
        "score_high",
        "p_value",
        "q_value",
    ):
        np.testing.assert_allclose(twice[column], alone[column], rtol=1e-9)
    assert twice.attrs["models"] == 2
    a, b = ([(row["creator"], row["total"], row["p_value"]) for row in t.attrs["creators"]] for t in (alone, twice))
    assert [row[0] for row in a] == [row[0] for row in b]
    np.testing.assert_allclose([row[1:] for row in a], [row[1:] for row in b], rtol=1e-9)


def test_scores_are_means_and_intervals_have_the_spread_over_models(world):
    parts = [ask(world, world / f"s{seed}") for seed in range(3)]
    table = ask(world, [world / f"s{seed}" for seed in range(3)])
    key = ["query", "item_id"]
    each = np.stack([part.set_index(key)["score"].reindex(table.set_index(key).index).to_numpy() for part in parts])
    np.testing.assert_allclose(table["score"], each.mean(0), rtol=1e-9)
    relative = [part.set_index(key)["score_rel"].reindex(table.set_index(key).index) for part in parts]
    np.testing.assert_allclose(table["score_rel"], np.mean(relative, axis=0), rtol=1e-9)
    assert (table.groupby("query", sort=False)["score"].diff().dropna() <= 0).all()
    half = (table["score_high"] - table["score_low"]) / 2
    least = stats.t.ppf(0.975, 2) * each.std(0, ddof=1) / 3**0.5
    assert (half >= least).all()
    assert (table["score_se"] >= each.std(0, ddof=1) / 3**0.5 * (1 - 1e-9)).all()
    totals = {(row["query"], row["creator"]): row["total"] for row in table.attrs["creators"]}
    for (query, creator), total in totals.items():
        mine = (table["query"] == query) & (table["creator"] == creator)
        assert total == pytest.approx(table.loc[mine, "score_adj"].sum())
    assert ask(world, [world / "s0", world / "s1"], k=3).groupby("query").size().tolist() == [3, 3]


def test_gains_totals_and_gaps_have_the_spread_over_models(tmp_path):
    """Of pictures of which the creators have works that were held out, under models of two other trainings."""
    data = pictures(tmp_path / "data", count=9, size=8, captions=False)
    held = pictures(tmp_path / "controls", count=12, size=8, captions=False, key=1)  # by the same creators
    query = pictures(tmp_path / "query", count=1, size=8, captions=False, key=2) / "000.png"
    base = tiny_ddpm(tmp_path / "base", seed=9)
    for seed in range(2):
        influence.build(
            data, model=tiny_ddpm(tmp_path / f"m{seed}", seed=seed), base=base, store=tmp_path / f"s{seed}", dim=64,
            draws=DRAWS, controls=held,
        )  # fmt: skip
    stores = [tmp_path / "s0", tmp_path / "s1"]
    parts, both = (
        [influence.answer(query, one, draws=DRAWS) for one in stores],
        influence.answer(query, stores, draws=DRAWS),
    )

    def half(column, table, by=None):
        values = [getattr(part, table) for part in parts]
        if by is not None:
            values = [value.set_index(by).sort_index() for value in values]
        return np.abs(values[0][column].astype(float) - values[1][column].astype(float)) / 2

    for gain, se in (("finetune_gain", "gain_se"), ("gain_bits", "gain_bits_se")):
        spread, se = half(gain, "queries").iloc[0], both.queries[se].iloc[0]
        assert se > spread > 0
    by = ["query_id", "estimator", "contributor_id"]
    shares = both.shares[both.shares["group_score"].notna()].set_index(by).sort_index()
    assert (shares["group_score_se"] >= half("group_score", "shares", by).reindex(shares.index)).all()
    gaps = both.styles.set_index("contributor_id").sort_index()
    assert len(gaps) == 3
    spread = half("gap", "styles", "contributor_id")
    width = (gaps["gap_high"] - gaps["gap_low"]) / 2
    assert (width > spread * stats.t.ppf(0.975, 8)).all() and (width > 0).all()
    assert (both.shares["share_low"] <= both.shares["share"]).all()


def test_an_export_of_several_can_be_replayed_and_says_what_its_intervals_cover(world, tmp_path):
    stores = [world / "s0", world / "s1"]
    influence.export([world / "query" / "000.png"], stores, tmp_path / "out", draws=DRAWS)
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert len(record["features"]) == len(record["specs"]) == len(record["stores"]) == 2
    assert record["facts"]["models"] == 2
    assert any("2 models differ" in line for line in record["limits"])
    again = influence.replay(tmp_path / "out" / "run.json", tmp_path / "again")
    assert again.changed == {}
    with pytest.raises(OptionError, match="has other features"):
        influence.replay(tmp_path / "out" / "run.json", tmp_path / "other", store=[world / "s1", world / "s0"])
    with pytest.raises(OptionError, match="made of 2 stores, and 1 are given"):
        influence.replay(tmp_path / "out" / "run.json", tmp_path / "other", store=world / "s0")


def test_stores_that_cannot_be_averaged_are_refused(world, tmp_path):
    others = pictures(tmp_path / "data", count=8, size=8, captions=False)
    influence.build(others, model=world / "m1", store=tmp_path / "fewer", dim=64, draws=DRAWS)
    with pytest.raises(OptionError, match="differ in 1 images or creators"):
        ask(world, [world / "s0", tmp_path / "fewer"])
    shutil.copytree(world / "s1", tmp_path / "bare", ignore=shutil.ignore_patterns("controls"))
    with pytest.raises(OptionError, match="other controls"):
        ask(world, [world / "s0", tmp_path / "bare"])
    with pytest.raises(OptionError, match="several models"):
        ask(world, [world / "s0", world / "s1"], model=world / "m0")
    with pytest.raises(OptionError, match="there is no store"):
        ask(world, [])
    with pytest.raises(OptionError, match="there is no store"):
        influence.answer(world / "query" / "000.png", [], draws=DRAWS)


def test_the_command_line_takes_several_stores(world):
    common = ["--store", str(world / "s0"), "--store", str(world / "s1"), "--draws", str(DRAWS)]
    found = CliRunner().invoke(cli, ["attribute", str(world / "query" / "000.png"), *common, "--json"])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(cli, ["check", str(world / "query" / "000.png"), *common])
    assert found.exit_code in (0, 10, 11, 12, 13), found.output
