"""How a store grows: time and memory of open, verify, attribute and exclude over synthetic stores of ever more rows.

Rows are keyed bits, k = 4096, with 2k curvature rows in all and 100 creators. `attribute` is what remains of it once
the queries' gradients are there, without standard errors: the scan for 32 queries, the best ten of each, the totals of
the creators, the table. Every operation runs in a process of its own: seconds, and by how much its resident memory rose
at its highest, mapped pages of shards included. `scan` is a second `attribute` in the same process, when hashes have
been checked; `read` a plain copy of the same mapped rows into a small buffer; `product` the arithmetic alone, on rows
that stay in the cache. The `cold` ones begin with none of the shards in the page cache, where the system can be asked
to drop them. The exponent is the slope of log seconds over log N; the ratios below the table are those of the bandwidth
of `attribute` and `scan` to that of `read`, cold to cold.

    python benchmarks/scale.py --rows 10000 100000 1000000 --folder FOLDER
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch

import influence
from influence import derived, keys, scanning, scoring, store
from influence.shards import ShardContent
from influence.spec import FeatureSpec

DIM, QUERIES = 4096, 32
SPEC = FeatureSpec(
    model="a" * 64, config="e" * 64, encoders="b" * 64, lora=None, parameters="c" * 64, prediction="epsilon",
    weighting="uniform",
    schedule="d" * 64, sample_shape=(3, 32, 32), conditional=False, projection="countsketch", dim=DIM, seed=0,
    dtype="fp32",
)  # fmt: skip


def rows(key: object, count: int) -> np.ndarray:
    """Float32 rows of keyed bits, about −1 … 1."""
    made = keys.bits(("scale", str(key)), count * DIM // 2).view("<i4").astype(np.float32).reshape(count, DIM)
    made *= np.float32(2.0**-31)
    return made


def make(folder: Path, count: int) -> None:
    """Commit a store of `count` images."""
    rate = 2 * DIM / count
    items = pd.DataFrame(
        [(f"{i:032x}", f"{i:09d}.png", None, f"creator {i % 100:02d}", None) for i in range(count)],
        columns=list(store.ITEM_COLUMNS),
    )
    build = {"draws": 40, "curvature_rows": 2 * DIM, "curvature_rate": rate}
    made = store.create(folder, spec=SPEC, build=build, source={}, items=items)
    for shard in made.missing():
        ids = made.shard_items(shard)
        number = np.array([int(item_id, 16) for item_id in ids])
        per_image = np.floor((number + 1) * rate).astype(int) - np.floor(number * rate).astype(int)
        draws = [np.arange(n) for n in per_image]
        content = ShardContent(
            "loss", shard, ids,
            phi=rows(shard, len(ids)),
            phi_batch=np.empty((len(ids), 0, DIM), np.float16),
            phi_scale=np.empty((len(ids), 0), np.float32),
            loss=np.ones(len(ids), np.float32),
            psi=rows(f"psi {shard}", int(per_image.sum())),
            psi_item=np.repeat(np.arange(len(ids)), per_image).astype(np.int32),
            psi_draw=np.concatenate(draws).astype(np.int32),
        )  # fmt: skip
        made.commit(content)


def drop(folder: Path) -> None:
    """Ask the system to forget the shards, so that they are read from the disk."""
    for path in (folder / "shards").glob("*.h5"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peak:
    """By how much resident memory rises at its highest, looked at every few milliseconds."""

    def __enter__(self) -> "Peak":
        """Start looking."""
        self.before = self.highest = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._done.set()
        self._thread.join()

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, self._now())


def measure(folder: Path, operation: str, clock: Callable[[], float]) -> dict[str, float]:
    """Run one operation, in a process of its own."""
    made = None if operation in ("open", "verify", "exclude") else influence.open_store(folder)
    asked = SimpleNamespace(paths=[f"query {i}" for i in range(QUERIES)])
    method = scoring.METHODS["gauss-newton"]
    v = torch.from_numpy(rows("queries", QUERIES)).double()

    def attribute() -> None:
        groups = scanning.groups_of(made, "loss")
        h, own = np.zeros(len(groups.ids)), np.ones(len(groups.ids))
        scanning.rank(made, method, v, asked, 10, groups, h, own, None)

    def read() -> None:
        buffer = np.empty((64, DIM), np.float32)
        for content in made.blocks():
            for start in range(0, len(content.phi), 64):
                part = content.phi[start : start + 64]
                np.copyto(buffer[: len(part)], part)

    def product() -> None:
        block = [(["x"] * 1024, rows("block", 1024))]
        for _ in range(made.num_rows()[0] // 1024):
            next(scoring.scores(method, v, block))

    def exclude() -> None:
        influence.exclude(folder, creator="creator 07")
        influence.exclude(folder, creator="creator 07", undo=True)

    jobs: dict[str, Callable[[], Any]] = {
        "open": lambda: influence.open_store(folder),
        "verify": lambda: influence.verify(folder),
        "exclude": exclude,
        "factor": lambda: derived.solver(made, method, 0.1),
        "attribute": attribute,
        "scan": attribute,
        "read": read,
        "product": product,
        "cold attribute": attribute,
        "cold scan": attribute,
        "cold read": read,
    }
    if operation == "factor":
        for kept in (folder / "derived").iterdir():
            kept.unlink()
    if operation.endswith(("scan", "read", "product")):
        attribute()  # hashes are checked at the first use
    if operation.startswith("cold"):
        drop(folder)
    with Peak() as peak:
        start = clock()
        jobs[operation]()
        seconds = clock() - start
    return {"seconds": seconds, "MB": (peak.highest - peak.before) / 1e6}


COLD = ("cold attribute", "cold scan", "cold read") if hasattr(os, "posix_fadvise") else ()
OPERATIONS = ("open", "verify", "exclude", "factor", "attribute", "scan", "read", "product", *COLD)


def main() -> None:
    """Make stores, measure in rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the stores, and to leave them")
    parser.add_argument("--busy", action="store_true", help="CPU seconds, for a machine that others use as well")
    parser.add_argument("--operation", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.busy else time.perf_counter
    if options.operation:
        print(json.dumps(measure(options.folder, options.operation, clock)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        table: dict[str, dict[int, tuple[float, float]]] = {operation: {} for operation in OPERATIONS}
        for count in options.rows:
            folder = (options.folder or Path(temporary)) / f"{count}.store"
            if not folder.exists():
                make(folder, count)
            for operation in OPERATIONS:
                command = [sys.executable, __file__, "--folder", str(folder), "--operation", operation]
                command += ["--busy"] * options.busy
                found = [
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    for _ in range(options.rounds)
                ]
                table[operation][count] = tuple(float(np.median([f[key] for f in found])) for key in ("seconds", "MB"))
        print("| | " + " | ".join(f"{count:,} rows" for count in options.rows) + " | exponent |")
        print("|---" * (len(options.rows) + 2) + "|")
        for operation, cells in table.items():
            slope = np.polyfit(np.log(options.rows), np.log([cells[count][0] for count in options.rows]), 1)[0]
            shown = " | ".join(f"{seconds:.3g} s, {mb:.0f} MB" for seconds, mb in cells.values())
            print(f"| {operation} | {shown} | {slope:.2f} |")
        for count in options.rows:
            rate = {name: 4e-9 * DIM * count / cells[count][0] for name, cells in table.items()}
            for name in ("attribute", "scan", *COLD[:-1]):
                read = "cold read" if name in COLD else "read"
                shown = f"{rate[name]:.2f} GB/s, {read} {rate[read]:.2f} GB/s, ratio {rate[name] / rate[read]:.2f}"
                print(f"{count:,} rows: {name} {shown}", flush=True)


if __name__ == "__main__":
    main()
