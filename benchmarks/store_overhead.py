"""What the store costs beside the gradients: seconds of a build in `Store.commit` (encode, write, read back, sync).

Builds a store with the default options (k = 8192, 40 draws, 2k curvature rows) of keyed noise pictures and a
UNet2DModel with random weights, and times both in one run: wall-clock time of the commits, since they wait for the
disk, and process time of the gradients, which a busy machine does not make longer: the share is an upper bound. The
fewer the pictures, the more curvature rows each of them has, and the larger the share; the model is small, which makes
it larger too.

    python benchmarks/store_overhead.py
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import influence
from influence import building, keys, taking
from influence.store import Store


def world(folder: Path, count: int, size: int) -> None:
    """Write a model of 1.1 M parameters, and pictures."""
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for i in range(count):
        pixels = keys.integers(("overhead", i), size * size * 3, 256).astype("uint8").reshape(size, size, 3)
        Image.fromarray(pixels).save(folder / "data" / f"{i:04d}.png")


def timed(call: Callable[..., Any], seconds: list[float], clock: Callable[[], float]) -> Callable[..., Any]:
    """The same call, which notes how long it takes."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(clock() - start)

    return wrapped


def main() -> None:
    """Build, and print the two times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gradients: list[float] = []
    commits: list[float] = []
    decoding: list[float] = []
    taking.decode = timed(taking.decode, decoding, time.process_time)
    building.take = timed(building.take, gradients, time.process_time)
    Store.commit = timed(Store.commit, commits, time.perf_counter)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world(folder, options.count, options.size)
        made = influence.build(folder / "data", model=folder / "model", store=folder / "store")
        size = sum(record.bytes for record in made.records().values())
    result = {
        "images": options.count,
        "shards": len(commits),
        "MB": round(size / 1e6, 1),
        "gradient seconds": round(sum(gradients), 2),
        "store seconds": round(sum(commits), 3),
        "decoding / gradients": round(sum(decoding) / sum(gradients), 4),
        "store / gradients": round(sum(commits) / sum(gradients), 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
