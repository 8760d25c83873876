"""bf16 beside fp32: how scores change, and what it saves, on this CPU.

The model and images are those of `peers.py`; `--width` multiplies its channels. Rank correlation of scores, mean over
queries; CPU seconds of the training images' features, and of plain training passes of the same rows, fp32 over bf16,
medians over rounds in turns. Only a CPU with AMX or AVX-512 BF16 is faster in bf16, and only where layers are wide.

    python benchmarks/bf16.py
    python benchmarks/bf16.py --width 4 --train 16 --queries 4 --rounds 1 --methods gauss-newton
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from peers import World, ours, world
from scipy import stats


def plain(w: World, bf16: bool) -> float:
    """CPU seconds of a forward and a backward over all training rows."""
    start = time.process_time()
    w.unet.requires_grad_(True)
    x_t, eps, t = w.rows("train").tensors
    for first in range(0, len(x_t), 64):
        part = slice(first, first + 64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            prediction = w.unet(x_t[part], t[part]).sample
        (prediction.float() - eps[part]).square().mean().backward()
        w.unet.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Take turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=64, help="training images")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["gauss-newton", "trak", "grad-dot"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    w = world(options.train, query=options.queries, draws=8, dim=4096, width=options.width)
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    print(f"amx_bf16: {'amx_bf16' in flags}, avx512_bf16: {'avx512_bf16' in flags}")
    for method in options.methods:
        found = [[ours(w, method, bf16=bf16) for bf16 in (False, True)] for _ in range(options.rounds)]
        speed = np.median([first[0] / second[0] for first, second in found])
        pairs = zip(found[0][0][1], found[0][1][1], strict=True)
        like = [stats.spearmanr(a, b).statistic for a, b in pairs]
        print(f"{method}: rank correlation {np.mean(like):.4f} ({min(like):.4f} at least); fp32 / bf16 {speed:.2f}")
    passes = [plain(w, False) / plain(w, True) for _ in range(options.rounds)]
    print(f"plain passes: fp32 / bf16 {np.median(passes):.2f} ({min(passes):.2f} … {max(passes):.2f})")


if __name__ == "__main__":
    main()
