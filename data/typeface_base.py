"""Trains the base model of the demo, `influence/demo_base`: capital letters of 73 font families.

The model that is in the repository was made by

    python data/typeface_base.py --fonts base-fonts --out influence/demo_base --threads 1

with the versions of `constraints.txt`. None of the fonts is one of the demo's
(`influence.typefaces.DEMO_FONTS`), nor of their families. Fonts are fetched by pip and never kept in the repository.
"""

import argparse
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from influence import training, typefaces
from influence.diffusion import NoiseSchedule

SIZE = 24
FONTS = """
    abeezee==1.3 abril-fatface==1.1 acme==1.2 alegreya-sans==2.4 alfa-slab-one==2.0 antic-slab==1.2 anton==2.116
    archivo-black==1.6 arvo==1.6 barlow-condensed==1.408 bebas-neue==2.0 bitter==3.21 black-ops-one==1.4
    bodoni-moda==2.5 bungee==2.0 cabin==3.1 cardo==1.45 caveat==2.0 chakra-petch==1.0 changa-one==1.3 cinzel==2.0
    comfortaa==3.105 cormorant-garamond==4.1 crimson-text==1.100 dancing-script==2.1 delius==1.1
    dm-serif-display==5.200 dosis==3.2 eb-garamond==1.3 exo-2==2.10 fira-sans==4.203 fjalla-one==1.2 gravitas-one==1.1
    hammersmith-one==1.3 ibm-plex-mono==2.3 indie-flower==2.0 instrument-serif==1.0 josefin-sans==2.1 kalam==2.1
    lato==2.15 lilita-one==1.2 lobster-two==1.6 lora==3.8 luckiest-guy==1.1 marcellus==1.0 merriweather==2.100
    montserrat==9.0 nunito==3.602 oleo-script==1.2 orbitron==2.1 oswald==4.103 pacifico==3.1 permanent-marker==1.1
    play==2.101 playfair-display==1.203 poppins==4.4 pt-serif==1.0 questrial==2.0 quicksand==3.6 righteous==1.0
    roboto-slab==2.2 rowdies==1.0 russo-one==1.0 satisfy==1.1 shadows-into-light==1.0 space-mono==1.3 syne==2.200
    titan-one==1.1 unbounded==1.701 varela-round==3.10 yanone-kaffeesatz==2.3 zeyada==1.2 zilla-slab==1.2
"""
"""PyPI packages `fontpkg-…` and their versions."""


def fetch(folder: Path) -> list[Path]:
    """Install the font packages into a folder of their own, unless it is there; the paths of all font files."""
    if not folder.exists():
        packages = [f"fontpkg-{font}" for font in FONTS.split()]
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *packages], check=True)
    return sorted(folder.rglob("*.ttf"), key=lambda path: path.name)


def pictures(fonts: list[Path]) -> Tensor:
    """The letters of all fonts, `[fonts × 26, 1, SIZE, SIZE]`, in [−1, 1]."""
    drawn = [np.asarray(letter) for font in fonts for letter in typefaces.draw(font, string.ascii_uppercase, SIZE)]
    return torch.from_numpy(np.stack(drawn)[:, None].astype(np.float32) / 127.5 - 1)


def unet() -> UNet2DModel:
    """The network: 0.87 million parameters, 6 ms for each row forward and backward on 2 cores."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def main() -> None:
    """Fetch, draw, train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True, help="folder for the font packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline to write")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fonts = fetch(options.fonts)
    x0 = pictures(fonts)
    print(f"{len(fonts)} fonts, {len(x0)} pictures", flush=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    schedule = NoiseSchedule(tuple(scheduler.alphas_cumprod.double().tolist()), "epsilon", "uniform")
    denoiser = unet()
    training.initialise(dict(denoiser.named_parameters()), options.seed)
    start, recent = time.monotonic(), []

    def progress(step: int, loss: float) -> None:
        recent.append(loss)
        if step % 100 == 0:
            print(f"step {step} loss {np.mean(recent):.4f} after {time.monotonic() - start:.0f} s", flush=True)
            recent.clear()

    training.train(
        _Called(denoiser),
        schedule,
        x0,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        ema_decay=0.999,
        learning_rate_schedule="cosine",
        progress=progress,
    )
    # Half precision halves the file and costs the fine-tune nothing.
    DDPMPipeline(unet=denoiser.half(), scheduler=scheduler).save_pretrained(options.out)


class _Called(nn.Module):
    """A UNet as the trainer calls it."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.unet(x_t, t).sample


if __name__ == "__main__":
    main()
