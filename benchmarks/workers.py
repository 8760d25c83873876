"""Two workers beside one: seconds of a build with each, in turns, and whether the stores are the same bytes.

A build with the defaults. Every process computes on one thread. It says something only while two cores are free: what
two processes multiply at most, beside one, is measured, too. What comes before the first shard (the metric and λ) a
build does once, in one process, and each worker imports torch and loads the model: some 20 seconds, however many
pictures there are.

    python benchmarks/workers.py
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from store_overhead import world

import influence


def shards(store: Path) -> dict[str, bytes]:
    """Files of the features, by name."""
    return {path.name: path.read_bytes() for path in (store / "shards").iterdir()}


def multiply(_: int) -> float:
    """Seconds of some products of matrices, which fit the cache, on one thread."""
    torch.set_num_threads(1)
    matrix = torch.ones(256, 256)
    start = time.perf_counter()
    for _ in range(10000):
        matrix @ matrix
    return time.perf_counter() - start


def limit() -> float:
    """How many times as much two processes compute as one."""
    seconds = []
    for processes in (1, 2):
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            seconds.append(max(pool.map(multiply, range(processes), chunksize=1)))
    return 2 * seconds[0] / seconds[1]


def main() -> None:
    """Build in turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds: dict[int, list[float]] = {1: [], 2: []}
    made: dict[int, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world(folder, options.count, 32)
        for _ in range(options.rounds):
            for workers, found in seconds.items():
                shutil.rmtree(folder / "store", ignore_errors=True)
                start = time.perf_counter()
                influence.build(
                    folder / "data", model=folder / "model", store=folder / "store", workers=workers,
                    device="cpu",
                )  # fmt: skip
                found.append(time.perf_counter() - start)
                made[workers] = shards(folder / "store")
    ratios = np.array(seconds[1]) / np.array(seconds[2])
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    print(f"two workers: {middle:.2f} ({low:.2f} … {high:.2f}) times as fast as one; seconds {seconds}")
    print(f"products of matrices: {limit():.2f} times")
    print(f"identical bytes: {made[1] == made[2]} ({len(made[1])} files)")


if __name__ == "__main__":
    main()
