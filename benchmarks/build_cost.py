"""What a build costs beside the passes that it contains: one forward and two backwards of plain training.

Prints, for a full UNet2DModel and for a LoRA on a UNet2DConditionModel, the ratio of the time of one batch of features
(φ of the images and a curvature row for every draw, projected) to the plain batched forward and two backwards that
accumulate the same parameters' gradients. Rounds are interleaved; medians and quartiles of process time, one thread.

    python benchmarks/build_cost.py
"""

import argparse
import time

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import nn

from influence import diffusion, gradients, keys
from influence.diffusion import NoiseSchedule
from influence.gradients import Inputs, Output
from influence.projection import countsketch

SCHEDULE = NoiseSchedule(tuple(np.linspace(0.999, 0.01, 1000).tolist()), "epsilon", "uniform")
SIZE, DRAWS = 32, 8


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


def full() -> tuple[nn.Module, dict[str, nn.Parameter], None]:
    """A UNet2DModel and all of its parameters."""
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return Called(unet).eval(), dict(unet.named_parameters()), None


def lora() -> tuple[nn.Module, dict[str, nn.Parameter], int]:
    """A UNet2DConditionModel and a LoRA of rank 8 on its attention."""
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
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


def measure(name: str, rows: int, dim: int, rounds: int) -> None:
    """Interleave the passes and the engines, and print the ratios."""
    network, parameters, width = {"full": full, "lora": lora}[name]()
    shape = (rows, 3, SIZE, SIZE)
    x0, eps, xi = (torch.from_numpy(keys.normal((name, what), shape)) for what in ("x0", "eps", "xi"))
    t = torch.from_numpy(keys.integers((name, "t"), rows, 1000))
    cond = torch.from_numpy(keys.normal((name, "cond"), (rows, 77, width))) if width else None
    inputs = Inputs(diffusion.noised(SCHEDULE, x0, t, eps), t, cond)
    outputs = [
        Output(lambda f, x0, t, eps: diffusion.losses(SCHEDULE, f, x0, t, eps) / DRAWS, (x0, t, eps), DRAWS),
        Output(lambda f, xi: (f * xi).flatten(1).sum(1), (xi,), 1),
    ]
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    sketch = countsketch(shapes, dim=dim, seed=0, device=torch.device("cpu"))

    def plain() -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        prediction = network(inputs.x_t, t, cond)
        diffusion.losses(SCHEDULE, prediction, x0, t, eps).mean().backward(retain_graph=True)
        (prediction * xi).mean().backward()

    def engine(which: str) -> None:
        gradients.per_sample_gradients(network, parameters, inputs, outputs, sketch, engine=which)

    def sketch_alone() -> None:
        out = torch.zeros(rows, dim)
        for n, grads in stand_in.items():
            sketch.add(out, n, grads)

    stand_in = {n: torch.zeros(1, p.numel()).expand(rows, -1).contiguous() for n, p in parameters.items()}
    jobs = {"plain": plain, "hooks": lambda: engine("hooks"), "vmap": lambda: engine("vmap"), "sketch": sketch_alone}
    times: dict[str, list[float]] = {job: [] for job in jobs}
    for i in range(rounds + 1):
        for job, run in jobs.items():
            start = time.process_time()
            run()
            if i:  # the first round warms up
                times[job].append(time.process_time() - start)
    size = sum(p.numel() for p in parameters.values())
    print(f"{name}: {size:,} parameters, {rows} rows, {DRAWS} draws an image, k = {dim}", flush=True)
    for job in ("hooks", "vmap", "sketch"):
        ratios = np.array(times[job]) / np.array(times["plain"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"  {job} / plain forward + 2 backwards: {middle:.2f} ({low:.2f} … {high:.2f})", flush=True)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("full", "lora"):
        measure(name, options.rows, options.dim, options.rounds)


if __name__ == "__main__":
    main()
