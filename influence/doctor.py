"""Checks of a user's own store, without retraining: would scores come out the same again, and do they mean anything?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from influence import attribution, datasets, derived, keys, loading, metrics, pipeline, scoring, taking, training
from influence.curvature import Curvature, curvature
from influence.errors import DatasetError, OptionError
from influence.features import Features
from influence.loading import Loaded
from influence.progress import Message, Progress, silent
from influence.queries import read_queries
from influence.scoring import METHODS
from influence.store import Store

SAMPLE, SELF_QUERIES, TOP = 32, 8, 10


def doctor(
    store: Store,
    images: Sequence[str | Path] = (),
    *,
    prompts: Sequence[str] | None = None,
    method: str = "gauss-newton",
    damping: float | None = None,
    draws: int = 256,
    dataset: str | Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> pd.DataFrame:
    """Examine a store on a sample of its own images and on pictures given.

    Args:
        store: A complete store.
        images: Pictures to ask about; without any, training images serve alone.
        prompts: Their prompts, if the model reads captions.
        method: Name in `METHODS`, of those that read the loss features.
        damping: As for `attribute`.
        draws: Draws of a query.
        dataset: Where the data set is now, if it was moved since the store was built.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        Columns check, value, expected, ok, meaning; one row for each check.

    Raises:
        OptionError: The method reads other features.
        DatasetError: None of the store's images is in the data set any more.
    """
    chosen = METHODS[method]
    if chosen.family != "loss" or chosen.elsewhere:
        raise OptionError(f"doctor examines methods on the loss features; {method} reads others; use gauss-newton")
    if store.spec.conditional and len(prompts or ()) != len(images):
        raise OptionError(f"there are {len(prompts or ())} prompts for {len(images)} pictures; pass one for each")
    attribution.require_complete(store)
    loaded, _ = loading.load_for(
        store, model=None, lora=None, draws=draws, engine="auto", batch_size=64, device=device, message=message
    )
    data = pipeline.read(store.pictures(dataset), loaded.denoiser, store.source["creator_column"], silent, silent)
    items = {item.item_id: item for item in data.items}
    ids, phi = _stored(store)
    order = _there(store, ids, items, data.root, message)
    sample = order[:SAMPLE]
    picked = [items[ids[i]] for i in sample]
    queries = [(item.path, item.caption) for item in picked[:SELF_QUERIES]]
    own = len(queries)
    queries += list(zip(map(Path, images), prompts or [None] * len(images), strict=True))

    solver = derived.solver(store, chosen, damping) if chosen.curvature else None
    count = float(len(ids))

    def tau(features: np.ndarray, train: np.ndarray, solved: Curvature | None = solver) -> np.ndarray:
        v = scoring.precondition(chosen, torch.from_numpy(features), solved, count)
        blocks = [([str(i) for i in range(len(train))], train)]
        return np.concatenate([block for _, block in scoring.scores(chosen, v, blocks)], axis=1)

    rows: list[tuple[str, float, str, bool, str]] = []

    def check(name: str, value: float, low: float, high: float, meaning: str) -> None:
        expected = f"≤ {high:g}" if low == -np.inf else f"≥ {low:g}"
        rows.append((name, float(value), expected, bool(low <= value <= high), meaning))
        progress("doctor", len(rows), 7)

    refused = len(store.refused("loss"))
    check("coverage", len(ids) / (len(ids) + refused), 0.99, np.inf, "images that have features")

    again = _train_features(loaded, store, picked[:4], batch_size=7)
    stored = phi[sample[:4]]
    difference = np.linalg.norm(again.phi - stored, axis=1) / np.linalg.norm(stored, axis=1)
    check("batch invariance", float(difference.max()), -np.inf, 1e-4, "relative change with the batch size")

    seeds = [_queries(loaded, queries, seed) for seed in (store.spec.seed, store.spec.seed + 1)]
    first, second = (tau(part, phi) for part in seeds)
    r = float(metrics.correlations(first.T, second.T).mean())
    check("query draws", r, 0.9, np.inf, "rank correlation of scores between two sets of draws of the query")

    other = _train_features(loaded, store, picked, seed=store.spec.seed + 1)
    mean = (seeds[0] + seeds[1]) / 2
    r = float(metrics.correlations(tau(mean, phi[sample]).T, tau(mean, other.phi).T).mean())
    check("training draws", r, 0.8, np.inf, "the same between two sets of draws of training images")

    ranks = [int((first[q] > first[q, sample[q]]).sum()) for q in range(own)]
    check(
        "finds itself", float(np.mean(np.array(ranks) == 0)), 0.9, np.inf, "training images that rank themselves first"
    )

    best = [set(np.argsort(-row, kind="stable")[:TOP].tolist()) for row in first]
    overlaps = [len(a & b) / len(a | b) for i, a in enumerate(best) for b in best[:i]]
    check("overlap", float(np.mean(overlaps)), -np.inf, 0.5, f"of the top {TOP} of different queries: 1 is the same")

    training.initialise(loaded.denoiser.parameters, 0)
    blank = _train_features(loaded, store, picked)
    solved = None
    if solver is not None:
        rows_of = blank.psi if chosen.curvature == "psi" else blank.phi
        solved = curvature(
            [(rows_of, np.ones(len(rows_of)))],
            dim=phi.shape[1],
            damping=solver.damping / solver.unit,
            num_rows=len(rows_of),
        )
    random = tau(_queries(loaded, queries, store.spec.seed), blank.phi, solved)
    apart = np.ones(random.shape, dtype=bool)
    apart[np.arange(own), np.arange(own)] = False  # an image is like itself under any weights
    r = np.mean([
        metrics.correlations(random[q, apart[q], None], first[q, np.array(sample)[apart[q]], None])[0]
        for q in range(len(queries))
    ])  # fmt: skip
    check("random weights", float(r), -np.inf, 0.5, "rank correlation with the scores of a model of random weights")
    return pd.DataFrame(rows, columns=["check", "value", "expected", "ok", "meaning"])


def _stored(store: Store) -> tuple[list[str], np.ndarray]:
    """Ids and φ of all images."""
    parts = [(content.item_ids, content.phi) for content in store.blocks("loss")]
    return [item_id for ids, _ in parts for item_id in ids], np.concatenate([phi for _, phi in parts])


def _there(
    store: Store, ids: Sequence[str], items: Mapping[str, datasets.Item], where: Path, message: Message
) -> list[int]:
    """Numbers of the images that are still in the data set, in the order in which they are sampled.

    The features of the others stand in the store as before and are ranked like all; they cannot be taken again.

    Raises:
        DatasetError: There is none.
    """
    there = [i for i, item_id in enumerate(ids) if item_id in items]
    count = len(ids) - len(there)
    gone = f"{count} of {len(ids)} images of store {store.path.name} are not in {where} any more"
    if not there:
        raise DatasetError(f"{gone}; the doctor takes some again: put them back, or build another --store")
    if count:
        message(f"{gone}: the doctor samples the others")
    return sorted(there, key=lambda i: keys.digest("doctor", ids[i]))


def _train_features(
    loaded: Loaded, store: Store, items: Sequence[datasets.Item], *, seed: int | None = None, batch_size: int = 64
) -> Features:
    """Features of training images, as a build takes them or from draws of another seed."""
    recipe = replace(
        loaded.recipe,
        role="train",
        num_draws=store.build["draws"],
        curvature_rate=store.build["curvature_rate"],
        density=store.source.get("curvature_density"),
        seed=store.spec.seed if seed is None else seed,
        batch_size=batch_size,
    )
    return taking.take(loaded.denoiser, recipe, items)


def _queries(loaded: Loaded, queries: Sequence[tuple[Path, str | None]], seed: int) -> np.ndarray:
    recipe = replace(loaded.recipe, seed=seed)
    paths, prompts = [path for path, _ in queries], [prompt for _, prompt in queries]
    prompts = prompts if loaded.denoiser.conditional else [None] * len(paths)
    changed = Loaded(loaded.denoiser, loaded.spec, recipe)
    return read_queries(changed, "loss", paths, prompts, silent, silent).phi
