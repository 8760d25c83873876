"""Small stores of made-up features, for tests; imports neither pytest nor torch."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from influence import store
from influence.shards import ShardContent
from influence.spec import FeatureSpec

SPEC = FeatureSpec(
    model="a" * 64,
    config="e" * 64,
    encoders="b" * 64,
    lora=None,
    parameters="c" * 64,
    prediction="epsilon",
    weighting="uniform",
    schedule="d" * 64,
    sample_shape=(3, 8, 8),
    conditional=False,
    projection="countsketch",
    dim=6,
    seed=0,
    dtype="fp32",
)
BUILD = {"draws": 4, "batches": 2, "curvature_rows": 12, "curvature_rate": 1.5}


def with_spec(**changes):
    return FeatureSpec(**vars(SPEC) | changes)


def table(count, start=0):
    rows = [(f"{i:032x}", f"{i}.png", None, f"creator {i % 2}", None) for i in range(start, start + count)]
    return pd.DataFrame(rows, columns=list(store.ITEM_COLUMNS))


def make(path, count=20, **changes):
    options = {"spec": SPEC, "build": BUILD, "source": {"model": "m"}, "items": table(count)} | changes
    return store.create(path, **options)


def content_of(made, shard, refuse=(), family="loss", **changes):
    """What the images of a shard are: a pure function of the store's shape and the shard."""
    ids = [i for i in made.shard_items(shard) if i not in refuse]
    seed = int.from_bytes(hashlib.sha256(f"{family} {shard}".encode()).digest()[:4], "little")
    bits = np.random.Philox(seed)
    rng = np.random.Generator(bits)
    n, k = len(ids), made.spec.dim
    rows = 0 if family == "square" else n
    values = {
        "family": family,
        "shard": shard,
        "item_ids": ids,
        "phi": rng.standard_normal((n, k), dtype=np.float32),
        "phi_batch": rng.random((n, made.build["batches"], k), dtype=np.float32).astype(np.float16),
        "phi_scale": rng.random((n, made.build["batches"]), dtype=np.float32),
        "loss": rng.random(n, dtype=np.float32),
        "psi": rng.standard_normal((2 * rows, k), dtype=np.float32),
        "psi_item": np.repeat(np.arange(rows), 2).astype(np.int32),
        "psi_draw": np.tile([0, 2], rows).astype(np.int32),
        "refused": dict.fromkeys(refuse, "its gradient is not finite"),
    }
    return ShardContent(**values | changes)


def fill(made, family="loss"):
    for shard in made.missing(family):
        made.commit(content_of(made, shard, family=family))
    return made


def filled(path, count=20):
    return fill(make(path, count))


def files(path):
    """Every file of a store that matters, by name; tmp is garbage."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(Path(path).rglob("*"))
        if p.is_file() and p.parent.name != "tmp"
    }
