"""The first real check: do training pictures rank themselves first, and do stores made in different ways agree?

Trains a small DDPM on emoji, fine-tunes it on 240 others by four studios, builds a store with the defaults, and
attributes 16 of the pictures it was fine-tuned on. Then builds the store again with another batch size, in shuffled
order, with two workers, and killed and resumed, and compares all features.

    python data/emoji.py --out emoji --size 16 --count 120
    python benchmarks/self_rank.py --emoji emoji --out self-rank
"""

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import influence
from influence import datasets, keys, training
from influence.diffusion import NoiseSchedule

METHODS = ("gauss-newton", "trak", "grad-dot", "grad-cos")
SIZE = 16


class Called(torch.nn.Module):
    """A UNet as the trainer calls it."""

    def __init__(self, unet: UNet2DModel) -> None:
        """Keep the UNet."""
        super().__init__()
        self.unet = unet

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: None) -> torch.Tensor:
        """Predict."""
        return self.unet(x_t, t).sample


def split(emoji: Path, out: Path) -> tuple[list[Path], Path]:
    """Pictures of the base model, and the folder of the fine-tune data set: the first half of the concepts."""
    with (emoji / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    concepts = sorted({row["concept"] for row in rows}, key=lambda c: keys.digest("split", c))
    chosen = set(concepts[: len(concepts) // 2])
    fine = out / "dataset"
    (fine / "images").mkdir(parents=True)
    write_metadata(fine, [row for row in rows if row["concept"] in chosen])
    for row in rows:
        if row["concept"] in chosen:
            shutil.copy(emoji / row["file_name"], fine / row["file_name"])
    return [emoji / row["file_name"] for row in rows if row["concept"] not in chosen], fine


def write_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write metadata.csv."""
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fine_tuned(base: list[Path], fine: Path, out: Path, steps: int) -> None:
    """Train on the base pictures, then on the others, and save a pipeline."""
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )
    for name, parameter in unet.named_parameters():
        noise = torch.from_numpy(keys.normal(("initial", name), tuple(parameter.shape)))
        scale = 0.5 * (parameter.numel() / len(parameter)) ** -0.5 if parameter.ndim > 1 else 0.0
        parameter.data = float("norm" in name and name.endswith("weight")) * (parameter.ndim == 1) + scale * noise
    scheduler = DDPMScheduler()
    schedule = NoiseSchedule(tuple(scheduler.alphas_cumprod.double().tolist()), "epsilon", "uniform")
    pictures = sorted((fine / "images").iterdir())
    for stage, paths in enumerate((base, pictures)):
        arrays = [datasets.to_array(datasets.decode(p)[0], height=SIZE, width=SIZE, channels=3) for p in paths]
        x0 = torch.from_numpy(np.stack(arrays))
        recent: list[float] = []
        training.train(
            Called(unet), schedule, x0, steps=steps, batch_size=32, learning_rate=1e-3, seed=stage,
            learning_rate_schedule="cosine", progress=lambda _, loss, recent=recent: recent.append(loss),
        )  # fmt: skip
        print(f"stage {stage}: {len(x0)} pictures, {steps} steps, loss {np.mean(recent[-100:]):.4f}", flush=True)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out)


def command(*parts: object) -> list[str]:
    """An `influence` command of this environment."""
    return [str(Path(sys.executable).parent / "influence"), *map(str, parts)]


def ranks(fine: Path, store: Path, count: int, method: str) -> list[int]:
    """Rank of each of some training pictures among all, when it is the query itself."""
    pictures = sorted((fine / "images").iterdir())
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, count).round().astype(int)]
    printed = subprocess.run(
        command("attribute", *chosen, "--store", store, "-k", "all", "--method", method, "--json"),
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [
        next(a["rank"] for a in entry["attributions"] if a["file_name"] == f"images/{Path(entry['query']).name}")
        for entry in json.loads(printed)
    ]


def killed_and_resumed(build: list[str], store: Path) -> None:
    """Kill the build after its third commit, then run it again."""
    process = subprocess.Popen(build)
    while len(list((store / "shards").glob("*.json"))) < 3:
        time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit("the build ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(build, check=True)


def difference(a: Path, b: Path) -> tuple[float, bool]:
    """Largest relative difference of a row of φ or ψ between two stores, and whether their ids are the same."""
    first, second = ({} for _ in range(2))
    for path, rows in ((a, first), (b, second)):
        for content in influence.open_store(path).blocks():
            for item_id, phi in zip(content.item_ids, content.phi, strict=True):
                rows[item_id] = phi
            for item, draw, psi in zip(content.psi_item, content.psi_draw, content.psi, strict=True):
                rows[content.item_ids[item], int(draw)] = psi
    worst = max(float(np.linalg.norm(first[key] - second[key]) / np.linalg.norm(first[key])) for key in first)
    return worst, first.keys() == second.keys()


def main() -> None:
    """Make everything and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each stage")
    options = parser.parse_args()
    out = options.out
    if not (out / "model").exists():
        base, fine = split(options.emoji, out)
        fine_tuned(base, fine, out / "model", options.steps)
    fine, model = out / "dataset", out / "model"

    def build(store: str, dataset: Path = fine, *more: object) -> list[str]:
        shutil.rmtree(out / store, ignore_errors=True)
        return command("build", dataset, "--model", model, "--store", out / store, *more)

    subprocess.run(build("store"), check=True)
    for method in METHODS:
        found = ranks(fine, out / "store", 16, method)
        print(f"{method}: {sum(rank == 1 for rank in found)} of 16 rank themselves first; ranks {found}", flush=True)

    shuffled = out / "shuffled"
    if not shuffled.exists():
        shutil.copytree(fine, shuffled)
        with (fine / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        write_metadata(shuffled, sorted(rows, key=lambda row: keys.digest("shuffle", row["file_name"])))
    subprocess.run(build("batch-17", fine, "--batch-size", 17), check=True)
    subprocess.run(build("order", shuffled), check=True)
    subprocess.run(build("workers", fine, "--workers", 2), check=True)
    killed_and_resumed(build("resumed"), out / "resumed")
    for store in ("batch-17", "order", "workers", "resumed"):
        worst, same = difference(out / "store", out / store)
        print(f"{store}: largest relative difference of a row {worst:.1e}, ids identical: {same}", flush=True)


if __name__ == "__main__":
    main()
