"""Makes the base model of the emoji ground truth: a small DDPM trained on the emoji of two other studios.

    python data/emoji.py --out others --size 16 --others
    python data/emoji_base.py --pictures others --out base

About 10 minutes on one core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from influence import datasets, training
from influence.diffusion import NoiseSchedule

SIZE = 16


def unet() -> UNet2DModel:
    """The network."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


class Called(nn.Module):
    """A UNet as the trainer calls it."""

    def __init__(self, unet: UNet2DModel) -> None:
        """Keep the UNet."""
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Predict."""
        return self.unet(x_t, t).sample


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder that data/emoji.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted((options.pictures / "images").iterdir())
    arrays = [datasets.to_array(datasets.decode(f)[0], height=SIZE, width=SIZE, channels=3) for f in files]
    x0 = torch.from_numpy(np.stack(arrays))
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    schedule = NoiseSchedule(tuple(scheduler.alphas_cumprod.double().tolist()), "epsilon", "uniform")
    network = unet()
    training.initialise(dict(network.named_parameters()), 0)
    recent: list[float] = []

    def progress(step: int, loss: float) -> None:
        recent.append(loss)
        if step % 200 == 0:
            print(f"step {step}: loss {np.mean(recent):.4f}", flush=True)
            recent.clear()

    training.train(
        Called(network), schedule, x0, steps=options.steps, batch_size=options.batch_size, seed=0,
        learning_rate=options.learning_rate, learning_rate_schedule="cosine", ema_decay=0.999, progress=progress,
    )  # fmt: skip
    # Half precision halves the file and costs a fine-tune nothing.
    DDPMPipeline(unet=network.half(), scheduler=scheduler).save_pretrained(options.out)


if __name__ == "__main__":
    main()
