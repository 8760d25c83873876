"""Stores of a tiny real model, for tests."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tiny_models import pictures, tiny_ddpm

import influence

DRAWS = 4
BATCH_SIZE = 12  # rows: three images, so that each shard takes several batches
INFLUENCE = str(Path(sys.executable).parent / "influence")


def new_world(path):
    """A model, its base, one of half the length, a data set, and a store of them without the latter."""
    tiny_ddpm(path / "ddpm")
    tiny_ddpm(path / "base", seed=1)
    tiny_ddpm(path / "half", seed=2)
    pictures(path / "data", count=12)
    build(path, path / "built.store")
    return path


def build(world, store, *, data=None, **options):
    defaults = {"dim": 16, "draws": DRAWS, "curvature_rows": 24, "batch_size": BATCH_SIZE, "base": world / "base"}
    return influence.build(data or world / "data", model=world / "ddpm", store=store, **defaults | options)


def copy(world, tmp_path, name="s"):
    return Path(shutil.copytree(world / "built.store", tmp_path / name))


def without(world, tmp_path, creators=(), names=()):
    """The data set without some of its pictures."""
    folder = Path(shutil.copytree(world / "data", tmp_path / "less"))
    table = pd.read_csv(folder / "metadata.csv")
    table = table[~table["creator"].isin(creators) & ~table["file_name"].isin(names)]
    table.to_csv(folder / "metadata.csv", index=False)
    for file in set(folder.glob("*.png")) - {folder / name for name in table["file_name"]}:
        file.unlink()
    return folder, len(table)


def scores(world, store, method, **options):
    queries = [world / "data" / "000.png", world / "data" / "001.png"]
    table = influence.attribute(queries, store, k=None, method=method, draws=4, **options)
    by_file = table.set_index(["query", "file_name"])["score"].sort_index()
    totals = {(e["query"], e["creator"]): (e["total"], e["images"]) for e in table.attrs["creators"]}
    return by_file, totals


def rows_of(store):
    """The bytes of φ, ψ and loss by image."""
    found = {}
    for content in influence.open_store(store).blocks():
        for i, item_id in enumerate(content.item_ids):
            psi = content.psi[content.psi_item == i]
            found[item_id] = (content.phi[i].tobytes(), content.loss[i].tobytes(), psi.tobytes())
    return found


def stacked(store, family="loss"):
    """Ids, φ and ψ of all shards of a family."""
    parts = [(content.item_ids, content.phi, content.psi) for content in influence.open_store(store).blocks(family)]
    return [item_id for ids, _, _ in parts for item_id in ids], *(
        np.concatenate([p[i] for p in parts]).astype(float) for i in (1, 2)
    )
