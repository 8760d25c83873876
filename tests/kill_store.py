"""Kill builders with SIGKILL, again and again, and see whether anything that was committed is lost or wrong.

    python tests/kill_store.py --kills 1000 --real 30

One, two and four builders at once write made-up features, keyed by shard, and are killed at random moments until their
store is complete. What was committed is kept outside of the store: after every kill each committed shard must still be
there, with the bytes that it must have. The finished store must be that of a build in peace, byte for byte. Then a kill
at every step of the protocol, and kills of `influence build` on a tiny model. Prints figures as JSON; exit 1 on a loss.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import independent_reader
import store_worker
import stores

from influence import shards, store, verification

COUNT = 80  # images: 10 shards


class Kept:
    """What a store has shown to be committed: it must never look otherwise again."""

    def __init__(self):
        self.records, self.lost, self.wrong, self.checked = {}, 0, 0, 0

    def look(self, path, expected):
        """Compare all that is committed with what it must be, by a reader without HDF5."""
        if not (path / "store.json").exists():
            self.lost += len(self.records)
            return
        made = store.open_store(path)
        self.wrong += len(verification.verify(path))
        found = {record.file: shard for shard, record in made.records().items()} if len(made.items) else {}
        self.lost += len(set(self.records) - set(found))
        for file, shard in found.items():
            arrays = independent_reader.read(path / "shards" / file)
            if {name: array.tobytes() for name, array in arrays.items()} != expected(made, shard):
                self.wrong += 1
        self.checked += len(found)
        self.records |= found


def fake(made, shard):
    """The bytes of a made-up shard."""
    return {name: array.tobytes() for name, array in shards.arrays(stores.content_of(made, shard)).items()}


def kill_all(start, builders, draw, longest):
    """Start builders, and kill each at a moment of its own; how many were still alive."""
    moments = sorted((draw.uniform(0, longest), start()) for _ in range(builders))
    begin = time.monotonic()
    for moment, pid in moments:
        time.sleep(max(0.0, moment - (time.monotonic() - begin)))
        os.kill(pid, signal.SIGKILL)
    return [store_worker.outcome(pid) for _, pid in moments].count(-signal.SIGKILL)


def random_kills(folder, builders, kills, seed=0):
    """Kill builders of made-up features so many times; they start a new store when theirs is complete."""
    begin = time.monotonic()
    whole, draw = store_worker.peaceful(folder, count=COUNT), random.Random(seed)
    longest = builders * (time.monotonic() - begin)
    result = {
        "builders": builders,
        "kills": 0,
        "stores": 0,
        "checked": 0,
        "lost": 0,
        "wrong": 0,
        "unfinished": 0,
        "different": 0,
    }
    while result["kills"] < kills:
        path, kept = folder / f"{result['stores']}.store", Kept()
        for _ in range(12):
            start = lambda: store_worker.forked(lambda: store_worker.build(path, COUNT))  # noqa: B023, E731
            result["kills"] += kill_all(start, builders, draw, longest)
            kept.look(path, fake)
            if len(kept.records) == COUNT // 8:
                break
        end = [store_worker.forked(lambda: store_worker.build(path, COUNT)) for _ in range(builders)]  # noqa: B023
        result["unfinished"] += sum(store_worker.outcome(pid) != 0 for pid in end)
        kept.look(path, fake)
        result["checked"] += kept.checked
        result["lost"] += kept.lost
        result["wrong"] += kept.wrong
        result["different"] += not store_worker.same(path, whole)
        result["stores"] += 1
    return result


def real_kills(folder, kills, seed=0):
    """Kill `influence build` on a tiny model; each build is a fork of this process, which has torch loaded."""
    for name in [name for name in sys.modules if name == "influence" or name.startswith("influence.")]:
        del sys.modules[name]  # the package without its __init__ has served
    import torch
    from influence_cli.main import cli
    from tiny_models import pictures, tiny_ddpm

    torch.set_num_threads(1)
    model, data = tiny_ddpm(folder / "model"), pictures(folder / "data", count=40)

    def build(path):
        options = ["--dim", "64", "--draws", "4", "--batch-size", "16"]
        with Path(os.devnull).open("w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
        cli.main(["build", str(data), "--model", str(model), "--store", str(path), *options], standalone_mode=False)

    whole, draw = folder / "whole", random.Random(seed)
    begin = time.monotonic()
    if store_worker.outcome(store_worker.forked(lambda: build(whole))) != 0:
        raise SystemExit("the build in peace failed")
    longest = time.monotonic() - begin
    wanted = {}
    made = store.open_store(whole)
    for shard, record in made.records().items():
        arrays = independent_reader.read(whole / "shards" / record.file)
        wanted[shard] = {name: array.tobytes() for name, array in arrays.items()}
    result = {
        "kills": 0,
        "stores": 0,
        "checked": 0,
        "lost": 0,
        "wrong": 0,
        "unfinished": 0,
        "different": 0,
        "seconds": longest,
    }
    while result["kills"] < kills:
        path, kept = folder / f"{result['stores']}.store", Kept()
        for _ in range(6):
            start = partial(store_worker.forked, partial(build, path))
            result["kills"] += kill_all(start, 1, draw, longest)
            kept.look(path, lambda _, shard: wanted[shard])
        result["unfinished"] += store_worker.outcome(store_worker.forked(lambda: build(path))) != 0  # noqa: B023
        kept.look(path, lambda _, shard: wanted[shard])
        result["checked"] += kept.checked
        result["lost"] += kept.lost
        result["wrong"] += kept.wrong
        names = [name for name in stores.files(whole) if name.startswith("shards")]
        found = stores.files(path)
        result["different"] += any(found.get(name) != stores.files(whole)[name] for name in names)
        result["stores"] += 1
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="of builders of made-up features, in all")
    parser.add_argument("--real", type=int, default=30, help="of influence build")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for builders in (1, 2, 4):
            (folder / str(builders)).mkdir()
            kills = -(-options.kills // 3)
            report[f"{builders} builders"] = random_kills(folder / str(builders), builders, kills, options.seed)
            print(report, file=sys.stderr)
        (folder / "steps").mkdir()
        steps = store_worker.kills(folder / "steps")
        report["steps"] = {"kills": len(steps), "bad": sum(not good for _, good in steps)}
        (folder / "real").mkdir()
        if options.real:
            report["influence build"] = real_kills(folder / "real", options.real, options.seed)
    print(json.dumps(report, indent=1))
    bad = sum(value for part in report.values() for name, value in part.items() if name in BAD)
    sys.exit(bool(bad))


BAD = ("lost", "wrong", "unfinished", "different", "bad")

if __name__ == "__main__":
    main()
