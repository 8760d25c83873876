"""Two workers beside one: seconds of a build with each, in turns, and whether the stores are the same bytes.

Every process computes on one thread. It says something only while two cores are free; the model is small, so that
loading it in each worker counts for more than it would.

    python benchmarks/workers.py
"""

import argparse
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


def main() -> None:
    """Build in turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="pictures")
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
                    folder / "data", model=folder / "model", store=folder / "store", dim=2048, draws=8,
                    workers=workers, device="cpu",
                )  # fmt: skip
                found.append(time.perf_counter() - start)
                made[workers] = shards(folder / "store")
    ratios = np.array(seconds[1]) / np.array(seconds[2])
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    print(f"two workers: {middle:.2f} ({low:.2f} … {high:.2f}) times as fast as one; load {os.getloadavg()[0]:.1f}")
    print(f"identical bytes: {made[1] == made[2]} ({len(made[1])} files)")


if __name__ == "__main__":
    main()
