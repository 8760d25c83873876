"""What a query on an open store costs beside its own gradients: the model's load, the solves, the scans, the table.

    python benchmarks/second_query.py my.store pictures/ --queries 4

The store's controls are left out, in a copy: they are as many more images. Without --method the default one is asked.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import influence
from influence import attribution


def main() -> None:
    """Ask, and print the seconds of each query, with and without those of its gradients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("pictures", type=Path, help="folder of PNG files")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--method", choices=list(influence.METHODS))
    parser.add_argument("--prompt")
    options = parser.parse_args()
    gradients = 0.0
    real = attribution.read_queries

    def timed(*args: Any) -> Any:
        nonlocal gradients
        start = time.perf_counter()
        found = real(*args)
        gradients += time.perf_counter() - start
        return found

    attribution.read_queries = timed
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "s"
        shutil.copytree(options.store, folder, ignore=shutil.ignore_patterns("controls"))
        made = influence.open_store(folder)
        for number, picture in enumerate(sorted(options.pictures.rglob("*.png"))[: options.queries], 1):
            gradients, start = 0.0, time.perf_counter()
            influence.attribute(picture, made, method=options.method, prompt=options.prompt)
            whole = time.perf_counter() - start
            print(
                f"query {number}: {whole:.2f} s, of which gradients {gradients:.2f}, the rest {whole - gradients:.2f}"
            )


if __name__ == "__main__":
    main()
