"""What a build costs beside the passes that it contains: one forward and two backwards of plain training.

Prints, for a full UNet2DModel and for a LoRA on a UNet2DConditionModel, the ratio of the time of one batch of features
(φ of the images and a curvature row for every draw, projected) to the plain batched forward and two backwards that
accumulate the same parameters' gradients. Rounds are interleaved; medians and quartiles of process time on one thread
of a CPU, of elapsed time on a GPU. `build` is the whole of `features` for as many rows, as a build calls it by default
for a small shard: 8 images, 40 draws of each in 8 batches, curvature rows divided among them, and the noise and probes
that the host makes. `--width` multiplies the channels of the networks: one that fills a GPU is wider. `--bf16` adds the
same in bfloat16, and how much faster it makes either.

    python benchmarks/build_cost.py
    python benchmarks/build_cost.py --device cuda --width 4 --rows 256 --bf16
"""

import argparse
import time

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import nn

from influence import diffusion, features, gradients, keys
from influence.devices import exact
from influence.diffusion import NoiseSchedule
from influence.features import Recipe
from influence.gradients import Inputs, Output
from influence.projection import countsketch

SCHEDULE = NoiseSchedule(tuple(np.linspace(0.999, 0.01, 1000).tolist()), "epsilon", "uniform")
SIZE, DRAWS = 32, 8
IMAGES, DRAWS_BUILD = 8, 40
DENSITY = np.repeat((2.8, 1.7, 1.2, 0.9, 0.7, 0.5, 0.3, 0.2), 5)  # of curvature rows, much as on our ground truths


class Called(nn.Module):
    """A UNet as the engines call it."""

    def __init__(self, unet: nn.Module) -> None:
        """Keep the UNet."""
        super().__init__()
        self.unet = unet

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predict."""
        if cond is None:
            return self.unet(x_t, t).sample
        return self.unet(x_t, t, encoder_hidden_states=cond).sample


def full(width: int) -> tuple[nn.Module, dict[str, nn.Parameter], None]:
    """A UNet2DModel and all of its parameters."""
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32 * width, 64 * width, 64 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return Called(unet).eval(), dict(unet.named_parameters()), None


def lora(width: int) -> tuple[nn.Module, dict[str, nn.Parameter], int]:
    """A UNet2DConditionModel and a LoRA of rank 8 on its attention."""
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32 * width, 64 * width, 64 * width),
        layers_per_block=1,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    return Called(unet).eval(), {n: p for n, p in unet.named_parameters() if "lora_" in n}, 64


def measure(name: str, rows: int, dim: int, rounds: int, device: torch.device, width: int, bf16: bool) -> None:
    """Interleave the passes and the engines, and print the ratios."""
    network, parameters, tokens = {"full": full, "lora": lora}[name](width)
    network.to(device)
    shape = (rows, 3, SIZE, SIZE)
    x0, eps, xi = (torch.from_numpy(keys.normal((name, what), shape)).to(device) for what in ("x0", "eps", "xi"))
    t = torch.from_numpy(keys.integers((name, "t"), rows, 1000)).to(device)
    cond = torch.from_numpy(keys.normal((name, "cond"), (rows, 77, tokens))).to(device) if tokens else None
    inputs = Inputs(diffusion.noised(SCHEDULE, x0, t, eps), t, cond)
    outputs = [
        Output(lambda f, x0, t, eps: diffusion.losses(SCHEDULE, f, x0, t, eps) / DRAWS, (x0, t, eps), DRAWS),
        Output(lambda f, xi: (f * xi).flatten(1).sum(1), (xi,), 1),
    ]
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    sketch = countsketch(shapes, dim=dim, seed=0, device=device)
    recipe = Recipe(
        schedule=SCHEDULE, parameters=parameters, projection=sketch, seed=0, role="train",
        num_draws=DRAWS_BUILD, curvature_rate=float(DRAWS_BUILD), output="loss", bf16=False, engine="hooks",
        batch_size=rows, density=tuple(DENSITY),
    )  # fmt: skip
    ids = [str(i) for i in range(IMAGES)]
    captions = None if cond is None else cond[:IMAGES]

    def by_default(bf16: bool = False) -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            prediction = network(inputs.x_t, t, cond)
        diffusion.losses(SCHEDULE, prediction, x0, t, eps).mean().backward(retain_graph=True)
        (prediction * xi).mean().backward()

    def plain() -> None:
        with exact():
            by_default()

    def engine(which: str, bf16: bool = False) -> None:
        gradients.per_sample_gradients(network, parameters, inputs, outputs, sketch, engine=which, bf16=bf16)

    def build() -> None:
        features.features(network, recipe, ids, x0[:IMAGES], captions)

    def sketch_alone() -> None:
        out = torch.zeros(rows, dim, device=device)
        for n, grads in stand_in.items():
            sketch.add(out, n, grads)

    stand_in = {n: torch.zeros(1, p.numel(), device=device).expand(rows, -1) for n, p in parameters.items()}
    if device.type == "cpu":
        stand_in = {n: grads.contiguous() for n, grads in stand_in.items()}
    jobs = {
        "plain": plain,
        "hooks": lambda: engine("hooks"),
        "build": build,
        "vmap": lambda: engine("vmap"),
        "sketch": sketch_alone,
    }
    if device.type == "cuda":
        jobs["plain with TF32 in convolutions"] = by_default
    if bf16:
        jobs |= {"plain, bf16": lambda: by_default(bf16=True), "hooks, bf16": lambda: engine("hooks", bf16=True)}
    times: dict[str, list[float]] = {job: [] for job in jobs}
    for i in range(rounds + 1):
        for job, run in jobs.items():
            start = clock(device)
            run()
            if i:  # the first round warms up
                times[job].append((clock(device) - start) * (rows / (IMAGES * DRAWS_BUILD) if job == "build" else 1))
    size = sum(p.numel() for p in parameters.values())
    print(f"{name}: {size:,} parameters, {rows} rows, {DRAWS} draws an image, k = {dim}, {device}", flush=True)
    print(f"  plain: {np.median(times['plain']) / rows * 1000:.2f} ms a row", flush=True)
    for job in list(jobs)[1:]:
        ratios = np.array(times[job]) / np.array(times["plain"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"  {job} / plain forward + 2 backwards: {middle:.2f} ({low:.2f} … {high:.2f})", flush=True)
    if bf16:
        saved = {job: np.median(np.array(times[job]) / np.array(times[f"{job}, bf16"])) for job in ("plain", "hooks")}
        print(f"  fp32 / bf16: plain {saved['plain']:.2f}, hooks {saved['hooks']:.2f}", flush=True)


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("full", "lora"):
        measure(name, options.rows, options.dim, options.rounds, options.device, options.width, options.bf16)


if __name__ == "__main__":
    main()
