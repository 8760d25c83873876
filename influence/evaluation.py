"""Scores against retrained models: linear datamodeling score, deletion, owners' Shapley values.

Each function scores the truth's queries with a store of the same fine-tune, retrains what is missing in the truth's
folder, and says how well the scores foretold what was measured.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image

from influence import datasets, finetuning, keys, metrics, retraining, training
from influence.attribution import attribute
from influence.errors import OptionError
from influence.progress import Message, Progress, silent
from influence.retraining import Query, Retrainer, Run, Truth
from influence.store import Store

Scores = Float[np.ndarray, "query train"]


def truth_of(
    store: Store,
    folder: str | Path,
    *,
    base: str | Path,
    queries: Mapping[str, str | Path],
    recipe: str | Path | None = None,
    dataset: str | Path | None = None,
    draws: int = 64,
    message: Message = silent,
) -> Truth:
    """Begin, or open, a truth of the fine-tune that a store was built of.

    Args:
        store: The store: it says which data set and model.
        folder: Where retrained models' losses are kept.
        base: The pipeline that the fine-tune started from.
        queries: For each kind of query (`generated`, `trained`, `unseen`, …) a folder of pictures, read as a data set.
        recipe: `finetune.json`; by default the one beside the fine-tuned model or LoRA.
        dataset: Where the data set is now, if it was moved since the store was built.
        draws: Draws (t, ε) of a query's loss.
        message: Called with refusals and remarks on the queries, one line each.

    Raises:
        OptionError: There is no recipe or no query, or the folder holds another truth.
    """
    source = store.source
    if recipe is None:
        place = Path(source["model"] if source["lora"] is None else source["lora"])
        recipe = place if place.is_dir() else place.parent
    found = []
    for kind, pictures in queries.items():
        data = datasets.read_dataset(pictures)
        for line in [*data.notes, *(f"refused {refusal.file_name}: {refusal.reason}" for refusal in data.refused)]:
            message(f"queries {kind}: {line}")
        captions = [item.caption if store.spec.conditional else None for item in data.items]
        found += [Query(str(item.path), kind, text) for item, text in zip(data.items, captions, strict=True)]
    if not found:
        raise OptionError("there are no queries; name folders of pictures, as in --queries generated=DIR")
    return retraining.create(
        folder,
        base=base,
        dataset=store.pictures(dataset),
        recipe=finetuning.read_recipe(recipe),
        queries=found,
        draws=draws,
        resolution=source["resolution"],
        creator_column=source["creator_column"],
    )


def score_matrix(store: Store, truth: Truth, *, method: str | None = None, **options: Any) -> Scores:
    """τ of all queries and images of a truth, in its order.

    Args:
        store: A store of the fine-tune.
        truth: The truth.
        method: As for `attribute`.
        options: As for `attribute`.

    Raises:
        OptionError: The store is of other images than the truth.
    """
    prompts = [query.caption or "" for query in truth.queries] if store.spec.conditional else None
    table = attribute(
        [query.path for query in truth.queries],
        store,
        k=None,
        method=method,
        prompt=prompts,
        intervals=False,
        **options,
    )
    ids = [item.item_id for item in truth.items]
    missing = set(ids) ^ set(table["item_id"])
    if missing:
        raise OptionError(
            f"the truth in {truth.folder} and store {store.path.name} differ in {len(missing)} images, {min(missing)} "
            "among them; build the store of the data set that the truth was made of"
        )
    count = len(truth.queries)
    position = np.repeat(np.arange(count), len(table) // count)
    first = table.assign(position=position).drop_duplicates(["position", "item_id"])
    return first.pivot(index="position", columns="item_id", values="score")[ids].to_numpy()


def outcomes(truth: Truth, runs: Sequence[Run], workers: int, progress: Progress) -> Float[np.ndarray, "run query"]:
    """−loss of every query under every run, retrained where it is missing."""
    done = retraining.retrain(truth, runs, workers=workers, progress=progress)
    found = {(row.name, row.seed): row.loss for row in done.itertuples(index=False)}
    return -np.stack([found[run.name, run.seed] for run in runs])


def half_runs(truth: Truth, subsets: int, seeds: int) -> list[Run]:
    """Exact halves, each with every training seed: subset by subset."""
    masks = retraining.halves(0, subsets, len(truth.items))
    return [Run(f"half-{i:03d}", mask, seed) for i, mask in enumerate(masks) for seed in range(seeds)]


def coalition_runs(truth: Truth, seeds: int) -> dict[frozenset[str], list[Run]]:
    """All coalitions of owners, each with every training seed."""
    masks = retraining.coalitions([item.creator for item in truth.items])
    return {
        owners: [Run(coalition_name(owners), mask, seed) for seed in range(seeds)] for owners, mask in masks.items()
    }


def evaluate_lds(
    truth: Truth,
    scores: dict[str, Scores],
    *,
    subsets: int = 64,
    seeds: int = 2,
    workers: int = 1,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Linear datamodeling score of each method and kind of query, beside the control of a constant score.

    Args:
        truth: Where models are retrained.
        scores: τ [query, train] by the name of the method.
        subsets: Exact halves to retrain.
        seeds: Training seeds for each of them; their mean is the outcome. Two at least.
        workers: Processes that retrain.
        progress: Called as work gets done.

    Returns:
        Columns kind, method, lds, low, high (95 %, bootstrap over queries and subsets), ceiling, of_ceiling.
    """
    runs = half_runs(truth, subsets, seeds)
    by_seed = outcomes(truth, runs, workers, progress).reshape(subsets, seeds, -1).transpose(1, 0, 2)
    masks = np.stack([run.members for run in runs[::seeds]])
    scores = {"constant": np.ones((len(truth.queries), len(truth.items)))} | scores
    rows = []
    for kind, chosen in _kinds(truth):
        ceiling = metrics.reliability(by_seed[:, :, chosen]).ceiling
        outcome = by_seed.mean(0)[:, chosen]
        foretold = np.stack([metrics.predictions(tau[chosen], masks) for tau in scores.values()])
        repeats = metrics.bootstrap(foretold, outcome)
        for column, (method, tau) in enumerate(scores.items()):
            value = float(metrics.lds(tau[chosen], masks, outcome).mean())
            found = metrics.interval(value, repeats[:, column])
            share = value / ceiling if ceiling > 0 else float("nan")
            rows.append((kind, method, value, found.low, found.high, ceiling, share))
    return pd.DataFrame(rows, columns=["kind", "method", "lds", "low", "high", "ceiling", "of_ceiling"])


def _kinds(truth: Truth) -> list[tuple[str, np.ndarray]]:
    """Kinds of queries, in the order of the truth, and the indices of theirs."""
    kinds = np.array([query.kind for query in truth.queries])
    return [(kind, np.flatnonzero(kinds == kind)) for kind in dict.fromkeys(kinds)]


@dataclass(frozen=True)
class OwnerTruth:
    """What owners were worth to each query, and what their summed scores said."""

    owners: list[str]
    measured: Float[np.ndarray, "owner query"]
    """Exact Shapley value of −loss over coalitions retrained."""
    predicted: Float[np.ndarray, "owner query"]
    """Σ τ over the owner's images."""
    gain: Float[np.ndarray, " query"]
    """loss under the base − loss under the fine-tune on everything."""


def owner_truth(
    truth: Truth, scores: Scores, *, seeds: int = 3, workers: int = 1, progress: Progress = silent
) -> OwnerTruth:
    """Retrain all coalitions of owners and compare with the totals of a score."""
    plan = coalition_runs(truth, seeds)
    flat = [run for runs in plan.values() for run in runs]
    found = outcomes(truth, flat, workers, progress).reshape(len(plan), seeds, -1).mean(1)
    values = dict(zip(plan, found, strict=True))
    exact = metrics.shapley(values)
    owners = list(exact)
    creators = np.array([item.creator for item in truth.items])
    predicted = np.stack([scores[:, creators == owner].sum(1) for owner in owners])
    gain = values[frozenset(owners)] - values[frozenset()]
    return OwnerTruth(owners, np.stack(list(exact.values())), predicted, gain)


def kept_shapley(folder: str | os.PathLike[str]) -> tuple[list[str], dict[str, Float[np.ndarray, " query"]]]:
    """Ids of a truth's queries and the owners' exact Shapley values, of coalitions that were retrained before.

    Raises:
        OptionError: There is no truth, or a coalition was not retrained.
    """
    path = Path(folder) / "truth.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        owners = [item["creator"] for item in facts["items"]]
        ids = [query["item_id"] for query in facts["queries"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise OptionError(f"there is no truth in {folder}; make one with influence evaluate shapley") from None
    journal = retraining.read_runs(Path(folder), len(owners))
    values = {}
    for coalition in retraining.coalitions(owners):
        found = journal[journal["name"] == coalition_name(coalition)]
        if not len(found):
            raise OptionError(
                f"the truth in {folder} lacks {coalition_name(coalition)!r}; influence evaluate shapley completes it"
            )
        values[coalition] = -np.stack(found["loss"].tolist()).mean(0)
    return ids, metrics.shapley(values)


def require_truth_of(
    folder: str | os.PathLike[str], works: Iterable[tuple[str, str]], base: str | None, store: str
) -> None:
    """Refuse a truth of another fine-tune than a store's.

    Args:
        folder: The truth.
        works: Id and creator of each file of the store that is not excluded.
        base: Hash of the model that its fine-tune started from, if it is known.
        store: Its name.

    Raises:
        OptionError: There is no truth, or it is of other works, or of another base.
    """
    facts = retraining.read_json(Path(folder) / "truth.json")
    try:
        there = Counter((str(item["item_id"]), str(item["creator"])) for item in facts["items"])
    except (KeyError, TypeError):
        raise OptionError(f"there is no truth in {folder}; make one with influence evaluate shapley") from None
    here = Counter(works)
    if here != there:
        count = max((here - there).total(), (there - here).total())
        raise OptionError(
            f"the truth in {folder} is not of the works of store {store}: {count} differ, or their creators; its exact "
            "values say nothing of this fine-tune; leave out --truth, or make one of these works"
        )
    if base is not None and facts.get("base") != base:
        raise OptionError(
            f"the truth in {folder} was retrained from another base than the fine-tune of store {store}; leave out "
            "--truth, or make one from its base"
        )


def coalition_name(owners: frozenset[str]) -> str:
    """The name of a coalition's runs in the journal of a truth: no two coalitions have the same."""
    if any("+" in owner for owner in owners):
        return "owners as JSON: " + json.dumps(sorted(owners), ensure_ascii=False)
    return "owners: " + " + ".join(sorted(owners))


def evaluate_shapley(
    truth: Truth,
    scores: dict[str, Scores],
    *,
    seeds: int = 3,
    workers: int = 1,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Owners' summed scores against their exact Shapley values.

    Returns:
        Columns kind, method, pearson (over owners, mean of queries), total_variation (of shares, negative ones cut to
        0 per owner), slope (measured on predicted, through the origin), gain (measured, mean), predicted_gain (Σᵢ τ).
    """
    rows = []
    for method, tau in scores.items():
        found = owner_truth(truth, tau, seeds=seeds, workers=workers, progress=progress)
        for kind, chosen in _kinds(truth):
            measured, predicted = found.measured[:, chosen], found.predicted[:, chosen]
            pearson = float(np.mean([np.corrcoef(measured[:, q], predicted[:, q])[0, 1] for q in range(len(chosen))]))
            distance = float(metrics.total_variation(measured, predicted).mean())
            slope = metrics.slope(measured, predicted)
            gains = float(found.gain[chosen].mean()), float(predicted.sum(0).mean())
            rows.append((kind, method, pearson, distance, slope, *gains))
    return pd.DataFrame(
        rows, columns=["kind", "method", "pearson", "total_variation", "slope", "gain", "predicted_gain"]
    )


def evaluate_deletion(
    truth: Truth,
    scores: dict[str, Scores],
    *,
    limit: int = 4,
    fractions: Sequence[float] = (0.01, 0.05, 0.2),
    seeds: int = 2,
    controls: int = 2,
    picture: str | Path | None = None,
    workers: int = 1,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Retrain without the images that a method ranks highest for a query, and measure what its loss does.

    Beside the methods: removals at random, and of the images that look most like the query.

    Args:
        truth: Where models are retrained.
        scores: τ by the name of the method.
        limit: Queries of each kind, spread evenly: each costs (methods + 1) × fractions × seeds retrained models.
        fractions: Shares of the images that are removed.
        seeds: Training seeds.
        controls: Random sets for each fraction; they serve all queries.
        picture: PNG to write: the same noise sampled from the model trained on all images (first row) and from those
            trained without the first query's top images by each method, by likeness, and at random.
        workers: Processes that retrain.
        progress: Called as work gets done.

    Returns:
        Columns query (index), kind, method, fraction, seed, rise: loss without − loss of the model trained on all, with
        the same seed.
    """
    count = len(truth.items)
    queries = [int(q) for _, chosen in _kinds(truth) for q in _spread(chosen, limit)]
    everything = [Run("all", np.ones(count, dtype=bool), seed) for seed in range(seeds)]
    ranked = scores | {"similar": similarity(truth)}
    plan: list[tuple[int | None, str, float, Run]] = []
    for fraction in fractions:
        size = max(1, round(fraction * count))
        for number in range(controls):
            order = np.argsort(keys.uniform(("deletion", size, number), count), kind="stable")
            plan += [
                (None, "random", fraction, _without(f"delete random {number}", order[:size], count, seed))
                for seed in range(seeds)
            ]
        for method, tau in ranked.items():
            for q in queries:
                top = np.argsort(-tau[q], kind="stable")[:size]
                plan += [
                    (q, method, fraction, _without(f"delete {method} for {q}", top, count, seed))
                    for seed in range(seeds)
                ]
    if picture is not None:
        first = {method: run for q, method, fraction, run in reversed(plan) if q in (None, queries[0])}
        regenerate(truth, [everything[0], *first.values()], Path(picture))
    runs = everything + [entry[3] for entry in plan]
    found = outcomes(truth, runs, workers, progress)
    base = {run.seed: value for run, value in zip(everything, found, strict=False)}
    rows = []
    for (query, method, fraction, run), value in zip(plan, found[len(everything) :], strict=True):
        for q in queries if query is None else [query]:
            rise = float(base[run.seed][q] - value[q])
            rows.append((q, truth.queries[q].kind, method, fraction, run.seed, rise))
    return pd.DataFrame(rows, columns=["query", "kind", "method", "fraction", "seed", "rise"])


def _spread(chosen: np.ndarray, limit: int) -> np.ndarray:
    return chosen[np.linspace(0, len(chosen) - 1, min(limit, len(chosen))).round().astype(int)]


def _without(name: str, removed: np.ndarray, count: int, seed: int) -> Run:
    members = np.ones(count, dtype=bool)
    members[removed] = False
    return Run(f"{name}, {len(removed)} of {count}, {_digest(members)}", members, seed)


def _digest(members: np.ndarray) -> str:
    """Tells removals of one name apart when scores have changed since."""
    return keys.digest("members", np.packbits(members).tobytes().hex()).hex()[:8]


def similarity(truth: Truth) -> Scores:
    """Cosine of pixels, each picture's own mean taken away: looks, not influence."""
    maker = Retrainer(truth)
    x, q = (part.flatten(1).double() for part in (maker.x0, maker.query_x0))
    x, q = ((part - part.mean(1, keepdim=True)) for part in (x, q))
    return (torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(x).T).numpy()


def regenerate(truth: Truth, runs: Sequence[Run], out: Path, *, count: int = 8) -> None:
    """Retrain the models, and sample the same noise from each: one row of pictures for each model, as a PNG."""
    maker = Retrainer(truth)
    cond = None if maker.query_cond is None else maker.query_cond[:count]
    count = count if cond is None else len(cond)
    rows = []
    for run in runs:
        maker.retrain(run)
        denoiser = maker.denoiser
        clip = 1.0 if cond is None else None
        samples = training.generate(
            denoiser.network, denoiser.schedule, count=count, shape=denoiser.sample_shape, seed=0, cond=cond, clip=clip
        )
        pixels = denoiser.decode_images(samples)  # [count, channels, height, width] → [height, count · width, channels]
        rows.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy())
    sheet = np.concatenate(rows)
    Image.fromarray(sheet if sheet.shape[2] == 3 else sheet[:, :, 0]).save(out)
