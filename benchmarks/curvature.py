"""What the first query of a store pays for H: the Gram matrix, its Cholesky factor, and one solve.

Seconds of wall time on all threads that OMP_NUM_THREADS gives, medians over rounds, and the rate of the Gram matrix
beside that of one float32 matrix product of the same shape (half its operations are not needed).

    python benchmarks/curvature.py --dim 8192     # the primal: k × k
    python benchmarks/curvature.py --dim 32768    # the dual: rows × rows
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from influence import curvature, keys


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the call gave."""
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


def main() -> None:
    """Measure in rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=16384, help="curvature rows (default: 16384, as build has)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    k, count, block = options.dim, options.rows, 2048
    rows = keys.bits(("curvature",), count * k // 2).view("<i4").astype(np.float32).reshape(count, k)
    rows *= np.float32(2.0**-31)
    parts = [(rows[i : i + block], np.ones(len(rows[i : i + block]))) for i in range(0, len(rows), block)]
    queries = torch.from_numpy(rows[:32])
    real = curvature._cholesky
    found = []
    for _ in range(options.rounds):
        factors: list[float] = []

        def cholesky(*args: Any, factors: list[float] = factors) -> torch.Tensor:
            seconds, made = timed(lambda: real(*args))
            factors.append(seconds)
            return made

        curvature._cholesky = cholesky
        whole, made = timed(lambda: curvature.curvature(parts, dim=k, damping=0.1, num_rows=count))
        solve, _ = timed(lambda made=made: curvature.solve(made, queries))
        if count < k:
            left = np.ascontiguousarray(rows[:, :block])
            right = left.copy()  # another array, in which numpy sees no symmetry
            product, _ = timed(lambda left=left, right=right: left @ right.T)
        else:
            product, _ = timed(lambda: rows[:block].T @ rows[block : 2 * block])
        found.append((whole - factors[0], factors[0], solve, product * (k if count < k else count) / block))
    gram, factor, solve, product = np.median(found, axis=0)
    print(f"k = {k}, {count} rows: Gram {gram:.1f} s, factor {factor:.1f} s, solve for 32 queries {solve:.2f} s")
    print(f"the same rows as plain float32 products: {product:.1f} s; Gram / product {gram / product:.2f}")


if __name__ == "__main__":
    main()
