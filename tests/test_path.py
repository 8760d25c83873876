"""Totals along the whole way: features under the base, and scores of the mean, against plain linear algebra."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from real_stores import stacked
from scipy import sparse
from tiny_models import pictures, tiny_ddpm, tiny_lora, tiny_stable_diffusion

import influence
from influence import features, models, waypoints
from influence.errors import OptionError
from influence.scored import Creators
from influence.wholeway import whole_way

DRAWS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("path")
    pictures(path / "data", count=7, size=8, captions=False)
    pictures(path / "controls", count=5, size=8, captions=False, key=1)
    tiny_ddpm(path / "base", seed=1)
    tiny_ddpm(path / "model", seed=2)
    options = {"dim": 64, "draws": DRAWS, "controls": path / "controls"}
    options["metric"] = "plain"  # that of AdamW is of the way to each model
    influence.build(path / "data", model=path / "model", store=path / "s", base=path / "base", **options)
    influence.build(path / "data", model=path / "base", store=path / "of_base", **options)
    influence.build(path / "data", model=path / "base", store=path / "back", base=path / "model", **options)
    return path


def test_features_under_the_base_are_those_of_a_store_of_the_base(world):
    influence.attribute(world / "data" / "003.png", world / "s", method="path", draws=DRAWS)
    ids, phi, _ = stacked(world / "s", "base")
    others, expected, _ = stacked(world / "of_base")
    assert ids == others
    np.testing.assert_allclose(phi, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert influence.verify(world / "s") == []


def test_a_damaged_shard_of_the_base_is_built_again_of_the_base(world, tmp_path):
    influence.attribute(world / "data" / "003.png", world / "s", method="path", draws=DRAWS)
    store = shutil.copytree(world / "s", tmp_path / "s")
    file = next((store / "shards").glob("base-*.h5"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes(100))
    assert [problem.family for problem in influence.verify(store)] == ["base"]
    influence.repair(store)
    assert file.read_bytes() == whole


def test_a_build_takes_the_second_point_of_the_way_and_the_default_method_reads_it(world):
    made, without = influence.open_store(world / "s"), influence.open_store(world / "of_base")
    assert made.complete("late") and made.controls().complete("late")
    assert without.missing("late") and without.controls().missing("late")
    found = [
        influence.attribute(world / "data" / "003.png", one, draws=DRAWS).attrs["method"] for one in (made, without)
    ]
    assert found == ["two-point", "gauss-newton"]
    with pytest.raises(OptionError, match="s would be asked with two-point and of_base with gauss-newton; name one"):
        influence.attribute(world / "data" / "003.png", [made, without], draws=DRAWS)


def test_a_base_of_other_parameters_is_refused_before_anything_is_written(world, tmp_path):
    tiny_ddpm(tmp_path / "wide", channels=3, size=8, width=16)
    with pytest.raises(OptionError, match=r"the base has other parameters .* pass the pipeline that the fine-tune"):
        influence.build(world / "data", model=world / "model", base=tmp_path / "wide", store=tmp_path / "s", dim=64)
    assert not (tmp_path / "s").exists()


def test_two_points_are_two_implicit_steps(world):
    picture = world / "controls" / "002.png"
    table = influence.attribute(picture, world / "s", method="two-point", k=None, draws=DRAWS, damping=0.3)
    made = influence.open_store(world / "s")
    (ids, end, psi), (_, late, _) = stacked(world / "s"), stacked(world / "s", "late")
    silent = influence.progress.silent
    loaded, _ = influence.loading.load_for(
        made, model=None, lora=None, draws=DRAWS, engine="auto", batch_size=64, device="cpu", message=print
    )
    base = waypoints.load_base(made.source, loaded.denoiser, None, "cpu")
    between = waypoints.model_of("late", made.source, loaded, before=base)
    for name, p in between.denoiser.parameters.items():
        torch.testing.assert_close(p, 0.25 * base.parameters[name] + 0.75 * loaded.denoiser.parameters[name])
    asked = influence.queries.read_queries(loaded, "loss", [picture], [None], silent, silent, None, {"late": between})
    twice = 2 * 0.3 * (psi**2).sum() / len(psi) / 64
    inverse = np.linalg.inv(psi.T @ psi / len(psi) + twice * np.eye(64))
    q, q_late = (part[0].astype(float) for part in (asked.phi, asked.beside["late"][0]))
    expected = (end @ inverse @ q + twice * late @ inverse @ inverse @ q_late) / len(ids)
    by_item = table.set_index("item_id")["score"]
    np.testing.assert_allclose([by_item[i] for i in ids], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert table["p_value"].between(1 / 6, 1).all() and (table["score_se"] > 0).all()
    assert (table["leverage"] > 0).any()
    file = next((world / "s" / "shards").glob("late-*.h5"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes(100))
    influence.repair(world / "s")
    assert file.read_bytes() == whole


def test_scores_are_those_of_the_mean_of_the_features_along_the_way(world):
    picture = world / "data" / "003.png"
    table = influence.attribute(picture, world / "s", method="path", k=None, draws=DRAWS, damping=0.3)
    # the features of the query under either model, by their own stores: grad-dot with every image gives them
    dots = [influence.attribute(picture, world / s, method="grad-dot", k=None, draws=DRAWS) for s in ("s", "of_base")]
    ids, phi, psi = stacked(world / "s")
    _, phi0, _ = stacked(world / "of_base")
    _, phi_middle, _ = stacked(world / "s", "middle")
    mean = (phi0 + 4 * phi_middle + phi) / 6
    h = psi.T @ psi / len(psi)
    h += 2 * 0.3 * np.trace(h) / 64 * np.eye(64)
    # grad-dot has rank 7 of 64: compare on the span, through features taken by the same call
    store = influence.open_store(world / "s")
    loaded, _ = influence.loading.load_for(
        store, model=None, lora=None, draws=DRAWS, engine="auto", batch_size=64, device="cpu", message=print
    )
    base = waypoints.load_base(store.source, loaded.denoiser, None, "cpu")
    silent = influence.progress.silent
    points = {family: waypoints.model_of(family, store.source, loaded, before=base) for family in ("base", "middle")}
    asked = influence.queries.read_queries(loaded, "loss", [picture], [None], silent, silent, base, points)
    under_base, middle = (asked.beside[family][0] for family in points)
    for found, q, rows in zip(dots, (asked.phi, under_base), (phi, phi0), strict=True):
        by_item = found.set_index("item_id")["score"]
        np.testing.assert_allclose([by_item[i] for i in ids], rows @ q[0].astype(float), rtol=1e-4)
    q = (under_base[0].astype(float) + 4 * middle[0] + asked.phi[0]) / 6
    expected = mean @ np.linalg.solve(h, q) / 7
    by_item = table.set_index("item_id")["score"]
    np.testing.assert_allclose([by_item[i] for i in ids], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert table["p_value"].between(1 / 6, 1).all()
    assert (table["score_low"] <= table["score"]).all() and (table["score"] <= table["score_high"]).all()


def test_the_weights_along_the_way_integrate_cubics():
    weights = influence.METHODS["path"].along
    at = {"base": 0.0, "middle": waypoints.MIDDLE, "loss": 1.0}
    for power in range(4):
        assert sum(w * at[family] ** power for family, w in weights.items()) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize("of_end", ["two-point", "gauss-newton"])
@pytest.mark.parametrize("store", ["s", "back"])
def test_shares_are_of_the_whole_way_where_the_base_is_known(world, of_end, store):
    picture = world / "controls" / "002.png"
    made = influence.answer(picture, world / store, draws=DRAWS, method=of_end, damping=3.0)
    assert made.facts["totals"] == "whole way"
    end, path = (
        influence.attribute(picture, world / store, method=method, k=None, draws=DRAWS, damping=3.0)
        for method in (of_end, "path")
    )
    e, p = end.groupby("creator")["score"].sum(), path.groupby("creator")["score"].sum()
    names = made.contributors.set_index("contributor_id")["name"]
    shares = made.shares[(made.shares["estimator"] == "group_sum") & (made.shares["query_id"] != "ALL")]
    shares = shares[shares["n_works"].notna()]
    found = shares.set_index(shares["contributor_id"].map(names))["group_score"].astype(float)
    (query,) = end.attrs["queries"]
    rest, n = query["gain"] - e.sum(), end.groupby("creator").size()
    c = abs(rest) / path["score"].abs().sum() if rest * p.sum() > 0 else 0.0
    assert (c > 0) == (store == "back"), "either case is met"
    expected = e + c * p + (rest - c * p.sum()) * n / n.sum()
    np.testing.assert_allclose(found[e.index], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert found.sum() == pytest.approx(query["gain"], rel=1e-4)
    assert (shares["group_score_se"] > 0).all()
    without = influence.answer(picture, world / "of_base", draws=DRAWS)
    assert without.facts["totals"] == "sums of scores"


def made_up(totals, batches=0, seed=0, spread=0.01, magnitude=10.0, images=5.0):
    """Creators with these totals `[query, creators]`, whose batches of draws differ a little."""
    rng = np.random.default_rng(seed)
    totals = np.asarray(totals, float)
    noise = rng.normal(scale=spread, size=(batches, *totals.shape))
    noise -= noise.mean(0) if batches else 0
    count = totals.shape[1]
    parts = sparse.csr_array(np.eye(count))
    variance = np.full(totals.shape, 0.04)
    return Creators(
        [f"c{i}" for i in range(count)], np.broadcast_to(images, count).astype(float), totals, totals**2,
        np.full(len(totals), magnitude), np.full(len(totals), np.nan), totals + noise, variance, None, parts,
    )  # fmt: skip


def test_totals_of_the_whole_way_add_up_to_the_gain():
    end, path = made_up([[1.0, -2.0, 0.5], [1.0, 1.0, 1.0]]), made_up([[6.0, 2.0, -4.0], [3.0, 0.0, 3.0]])
    found = whole_way(end, path, np.array([[6.5], [9.0]])).totals
    # R = 7 and S = 4 of 10: 7/10 of P, and 7 − 2.8 by works; R = 6 and S = 6 of 10
    np.testing.assert_allclose(found, [[1 + 4.2 + 1.4, -2 + 1.4 + 1.4, 0.5 - 2.8 + 1.4], [3.6, 1.8, 3.6]])
    np.testing.assert_allclose(found.sum(1), [6.5, 9.0])


def test_where_all_images_agree_the_rest_is_divided_as_the_path_is():
    end, path = made_up([[1.0, -2.0, 0.5]]), made_up([[6.0, 3.0, 1.0]])
    found = whole_way(end, path, np.array([[19.5]])).totals
    np.testing.assert_allclose(found, end.totals + 2 * path.totals)


@pytest.mark.parametrize(("gain", "path"), [(-3.0, [1.0, 2.0]), (9.0, [-3.0, 1.0]), (9.0, [0.0, 0.0])])
def test_where_the_path_says_the_opposite_or_nothing_the_rest_is_divided_by_works(gain, path):
    end = made_up([[1.0, 2.0]], batches=4, images=[1.0, 3.0])
    found = whole_way(end, made_up([path], 4, 1, magnitude=np.abs(path).sum()), np.full((1, 4), gain))
    np.testing.assert_allclose(found.totals, end.totals + (gain - 3.0) * np.array([0.25, 0.75]))
    np.testing.assert_allclose(found.by_batch.sum(2), gain)


def test_a_path_that_nearly_cancels_moves_no_more_than_the_rest():
    end, gain = made_up([[1.0, 2.0, 0.0]]), np.array([[5.0]])
    for sign in (-1.0, 1.0):
        path = made_up([[4.0, -4.0 + sign * 1e-9, 0.0]], magnitude=8.0)
        moved = whole_way(end, path, gain).totals - end.totals
        assert np.abs(moved - moved.mean()).sum() <= 2.0 + 1e-6


def test_two_names_of_one_creator_get_what_he_got():
    end, path = made_up([[1.0, 2.0, 3.0]], 4, images=[2.0, 5.0, 4.0]), made_up([[1.0, 5.0, -2.0]], 4, 1)
    gain = np.full((1, 4), 9.0)
    sums = np.array([[1.0, 0], [1, 0], [0, 1]])
    merged = [
        replace(
            part, names=["c01", "c2"], images=part.images @ sums, totals=part.totals @ sums, squares=np.ones((1, 2)),
            by_batch=part.by_batch @ sums, train_variance=np.ones((1, 2)), parts=sparse.csr_array(part.parts @ sums),
        )
        for part in (end, path)
    ]  # fmt: skip
    apart, together = whole_way(end, path, gain), whole_way(*merged, gain)
    np.testing.assert_allclose(together.totals[0, 0], apart.totals[0, 0] + apart.totals[0, 1])
    np.testing.assert_allclose(together.by_batch[:, 0, 0], apart.by_batch[:, 0, 0] + apart.by_batch[:, 0, 1])


def test_batches_move_totals_of_the_whole_way_as_finite_steps_do():
    end, path = made_up([[1.0, 2.0]], 8, 0, 1e-5, images=[1.0, 3.0]), made_up([[2.0, 1.0]], 8, 1, 1e-5)
    gain = 9.0 + 1e-5 * np.random.default_rng(2).normal(size=(1, 8))
    found = whole_way(end, path, gain)
    for b in range(8):  # the totals that one batch alone would give
        one = [replace(part, totals=part.by_batch[b], by_batch=part.by_batch[:0]) for part in (end, path)]
        np.testing.assert_allclose(found.by_batch[b], whole_way(*one, gain[:, b : b + 1]).totals, atol=1e-8)
    np.testing.assert_allclose(found.by_batch.sum(2), gain.T)


def test_a_base_that_is_not_known_or_not_the_one_is_refused(world, tmp_path):
    with pytest.raises(OptionError, match="path needs the model before the fine-tune"):
        influence.attribute(world / "data" / "003.png", world / "of_base", method="path", draws=DRAWS)
    shutil.copytree(world / "model", tmp_path / "other")
    with pytest.raises(OptionError, match="is not the one that the store was built with"):
        influence.attribute(world / "data" / "003.png", world / "s", base=tmp_path / "other", draws=DRAWS)


def test_a_base_that_makes_other_latents_or_encodes_otherwise_than_at_build_is_refused(tmp_path):
    for name, seed in (("model", 0), ("base", 1), ("other", 2)):
        tiny_stable_diffusion(tmp_path / name, seed=seed)
        if name != "model":
            for part in ("vae", "text_encoder"):
                shutil.rmtree(tmp_path / name / part)
                shutil.copytree(tmp_path / "model" / part, tmp_path / name / part)
    data = pictures(tmp_path / "data", count=4)
    build = {"model": tmp_path / "model", "dim": 64, "draws": 4}
    influence.build(data, base=tmp_path / "base", store=tmp_path / "s", **build)
    ask = {"images": data / "001.png", "store": tmp_path / "s", "prompt": "x", "draws": DRAWS}
    assert len(influence.attribute(**ask, base=tmp_path / "base"))
    tiny_stable_diffusion(tmp_path / "third", seed=3)
    moved = shutil.copytree(tmp_path / "base", tmp_path / "vae")
    shutil.rmtree(moved / "vae")
    shutil.copytree(tmp_path / "third" / "vae", moved / "vae")
    with pytest.raises(OptionError, match="is not the one that the store was built with"):
        influence.attribute(**ask, base=moved)
    with pytest.raises(OptionError, match="the base at .* has another VAE"):
        influence.build(data, base=moved, store=tmp_path / "t", **build)
    spoken = shutil.copytree(tmp_path / "base", tmp_path / "text")
    shutil.rmtree(spoken / "text_encoder")
    shutil.copytree(tmp_path / "third" / "text_encoder", spoken / "text_encoder")
    with pytest.raises(OptionError, match="is not the one that the store was built with"):
        influence.attribute(**ask, base=spoken)
    assert influence.build(data, base=spoken, store=tmp_path / "u", **build), "it may have been trained as well"


def test_the_base_of_a_lora_is_its_network_with_an_adapter_that_does_nothing(tmp_path):
    sd = tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(tmp_path / "sd", tmp_path / "lora")
    pictures(tmp_path / "data", count=3)
    influence.build(tmp_path / "data", model=sd, lora=tmp_path / "lora", store=tmp_path / "s", dim=64, draws=DRAWS)
    store = influence.open_store(tmp_path / "s")
    plain = models.load_denoiser(sd)
    silent = waypoints.load_base(store.source, models.load_denoiser(sd, lora=tmp_path / "lora"), None, "cpu")
    x = torch.randn(2, *plain.sample_shape, generator=torch.Generator().manual_seed(0))
    t, c = torch.tensor([5, 700]), plain.encode_captions(["a", "b"])
    with torch.no_grad():
        torch.testing.assert_close(silent.network(x, t, c), plain.network(x, t, c), rtol=1e-5, atol=1e-5)
    made = influence.answer(tmp_path / "data" / "001.png", store, prompt="x", draws=DRAWS)
    assert made.facts["totals"] == "whole way"


@pytest.mark.parametrize("bf16", [False, True])
def test_losses_by_forwards_alone_are_those_of_the_features_in_the_same_precision(world, bf16):
    store = influence.open_store(world / "s")
    loaded, _ = influence.loading.load_for(
        store, model=None, lora=None, draws=DRAWS, engine="auto", batch_size=64, device="cpu", message=print
    )
    recipe = replace(loaded.recipe, bf16=bf16)
    x0 = torch.randn(2, *loaded.denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    taken = features.features(loaded.denoiser.network, recipe, ["a", "b"], x0, None)
    found, t = features.losses(loaded.denoiser.network, recipe, ["a", "b"], x0, None)
    np.testing.assert_allclose(found.mean(1), taken.loss, rtol=1e-5)
    np.testing.assert_allclose([features.by_batch(row) for row in found], taken.loss_batch, rtol=1e-5)
    assert (np.diff(t, axis=1) >= 0).all()  # a draw from each stratum, in order


def of_lora(base, lora, parameters=None):
    """The fine-tuned model and its base, as a store of a LoRA has them."""
    source = {"lora": str(lora), "model": str(base), "base": None, "base_model": None, "resolution": None}
    source["parameters"] = parameters
    finetuned = models.load_denoiser(base, lora=lora, parameters=parameters)
    return finetuned, waypoints.load_base(source, finetuned, None, "cpu")


@torch.no_grad()
def predicted(denoiser, cond=None):
    x = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    cond = denoiser.encode_captions(["a", "b"]) if cond is None else cond
    return denoiser.network(x, torch.tensor([5, 700]), cond)


@pytest.mark.parametrize("parameters", ["*attn2*", "*lora_A*"])
def test_the_way_of_a_lora_does_not_depend_on_which_parameters_are_selected(tmp_path, parameters):
    sd = tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(sd, tmp_path / "lora")
    (whole, whole_base), (finetuned, base) = (of_lora(sd, tmp_path / "lora", p) for p in (None, parameters))
    assert 0 < len(finetuned.parameters) < len(whole.parameters)
    torch.testing.assert_close(predicted(base), predicted(models.load_denoiser(sd)), rtol=1e-5, atol=1e-5)
    for part in (waypoints.MIDDLE, waypoints.LATE):
        found, expected = models.between(base, finetuned, part), models.between(whole_base, whole, part)
        assert torch.equal(predicted(found), predicted(expected))
        assert not torch.allclose(predicted(found), predicted(finetuned), atol=1e-3)


def test_the_way_of_a_full_fine_tune_moves_all_weights_whichever_are_selected(world):
    source = {"lora": None, "model": str(world / "model"), "base": str(world / "base"), "base_model": None}
    source |= {"resolution": None, "parameters": "conv_in.*"}
    finetuned = models.load_denoiser(world / "model", parameters="conv_in.*")
    middle = models.between(waypoints.load_base(source, finetuned, None, "cpu"), finetuned, waypoints.MIDDLE)
    whole = [models.load_denoiser(world / name).network.state_dict() for name in ("base", "model")]
    for name, value in middle.network.state_dict().items():
        torch.testing.assert_close(value, (whole[0][name] + whole[1][name]) / 2)
    assert set(middle.parameters) == {"conv_in.weight", "conv_in.bias"}


def test_the_base_of_a_lora_encodes_captions_without_its_part_for_the_text_encoder(tmp_path):
    sd = tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(sd, tmp_path / "lora", text_encoder=True)
    finetuned, base = of_lora(sd, tmp_path / "lora")
    plain = models.load_denoiser(sd)
    captions = ["a", "a red fox"]
    adapted = finetuned.encode_captions(captions)
    torch.testing.assert_close(base.encode_captions(captions), plain.encode_captions(captions), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, plain.encode_captions(captions), atol=1e-2)
    torch.testing.assert_close(predicted(base), predicted(plain), rtol=1e-5, atol=1e-5)
    middle = models.between(base, finetuned, waypoints.MIDDLE)
    half = models.load_denoiser(sd, lora=tmp_path / "lora")
    for module in vars(half).values():
        if isinstance(module, torch.nn.Module):
            for name, value in module.state_dict().items():
                value.mul_(0.5 if "lora_B" in name else 1)
    torch.testing.assert_close(middle.encode_captions(captions), half.encode_captions(captions))
    torch.testing.assert_close(predicted(middle), predicted(half))
    assert torch.equal(finetuned.encode_captions(captions), adapted)


def test_between_two_text_encoders_captions_are_encoded_by_one_between(tmp_path):
    start, end = (models.load_denoiser(tiny_stable_diffusion(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    before, after = (each.encode_captions(["a fox"]) for each in (start, end))
    middle = models.between(start, end, 0.5)
    weights = [each._text_encoder.state_dict() for each in (start, middle, end)]
    for name, value in weights[1].items():
        torch.testing.assert_close(value, torch.lerp(weights[0][name], weights[2][name], 0.5))
    found = middle.encode_captions(["a fox"])
    assert not torch.allclose(found, before, atol=1e-3) and not torch.allclose(found, after, atol=1e-3)
    assert torch.equal(end.encode_captions(["a fox"]), after)
    same = models.between(end, end, 0.5)
    assert same._text_encoder is end._text_encoder  # no copy where the fine-tune left it as it was


def test_the_base_of_a_lora_is_where_its_model_is_now(tmp_path):
    sd = tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(sd, tmp_path / "lora")
    pictures(tmp_path / "data", count=4)
    influence.build(tmp_path / "data", model=sd, base=sd, lora=tmp_path / "lora", store=tmp_path / "s", dim=32, draws=4)
    (file,) = (tmp_path / "s" / "shards").glob("late-000000-*.h5")
    file.write_bytes(file.read_bytes()[:-9])
    (tmp_path / "sd").rename(tmp_path / "sd2")
    influence.repair(tmp_path / "s", model=tmp_path / "sd2")
    assert influence.verify(tmp_path / "s") == []
