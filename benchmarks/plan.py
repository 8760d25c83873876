"""What a plan foretells beside what then happens: seconds, bytes on disk, memory at the highest, each in a new process.

The model is a UNet2DModel of 1.1 M parameters with random weights, the pictures are keyed noise, the options the
defaults. Plans and builds alternate; medians over the rounds, and ratios planned / found.

    python benchmarks/plan.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from store_overhead import world

import influence


def run(what: str, folder: Path, store: Path, options: dict[str, object]) -> dict[str, float]:
    """Plan or build, and say what was foretold or found."""
    torch.set_num_threads(1)
    clock = time.perf_counter
    if options.pop("busy"):
        clock = time.perf_counter = time.process_time
    if what == "plan":
        found = influence.plan(folder / "data", model=folder / "model", **options)
        return {key: found[key] for key in ("seconds", "disk_bytes", "memory_bytes")}
    start = clock()
    influence.build(folder / "data", model=folder / "model", store=store, **options)
    seconds = clock() - start
    status = Path("/proc/self/status").read_text().splitlines()
    return {
        "seconds": seconds,
        "disk_bytes": sum(path.stat().st_size for path in store.rglob("*") if path.is_file()),
        "memory_bytes": 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1]),
    }


def main() -> None:
    """Alternate, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="choose the batch size by this budget")
    parser.add_argument("--busy", action="store_true", help="CPU seconds, for a machine that others use as well")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = {"busy": options.busy} | ({} if options.memory is None else {"memory": options.memory})
    if options.only:
        what, folder, store = options.only
        print(json.dumps(run(what, Path(folder), Path(store), chosen)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world(folder, options.count, 32)
        rounds: dict[str, list[dict[str, float]]] = {"plan": [], "build": []}
        for i in range(options.rounds):
            for what, found in rounds.items():
                command = [sys.executable, *sys.argv, "--only", what, str(folder), str(folder / f"{i}.store")]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        for key in ("seconds", "disk_bytes", "memory_bytes"):
            planned, found = (float(np.median([f[key] for f in rounds[what]])) for what in ("plan", "build"))
            spread = [p[key] / b[key] for p, b in zip(rounds["plan"], rounds["build"], strict=True)]
            print(f"{key}: planned {planned:,.4g}, found {found:,.4g}, {planned / found:.2f} ({np.round(spread, 2)})")


if __name__ == "__main__":
    main()
