"""Makes the base model of the letters' ground truth: a small StableDiffusionPipeline trained on letters of many fonts.

    python data/letter_base.py --fonts fonts --out letter-base

The fonts are those of `typeface_base.py`, installed into `--fonts` unless they are there. First a VAE is trained on
the pictures, then the UNet on its latents, conditioned on captions that a frozen text encoder of random weights reads
byte by byte. About 15 minutes on one core.
"""

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typeface_base import fetch

from influence import keys, models, training, typefaces

SIZE = 32
TOKENS = 48


def tokenizer(folder: Path) -> tuple[CLIPTokenizer, int]:
    """A CLIP tokenizer over single bytes, and the size of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for place, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + place)
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters.values(), *(letter + "</w>" for letter in letters.values()), *ends]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    return made, len(words)


def parts(folder: Path) -> StableDiffusionPipeline:
    """The pipeline with keyed initial weights."""
    tokens, words = tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=TOKENS, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip
    for seed, part in enumerate((text_encoder, vae, unet)):
        training.initialise(dict(part.named_parameters()), seed)
    with torch.no_grad():  # a Transformer of random weights passes on what it reads if its embeddings are large
        for table in (module for module in text_encoder.modules() if isinstance(module, torch.nn.Embedding)):
            table.weight.copy_(torch.from_numpy(keys.normal(("embedding", len(table.weight)), table.weight.shape)))
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokens, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, report: Callable[[int, float], None]) -> None:
    """Minimise mean squared error + 1e-4 × KL; then set the scaling factor that gives latents unit variance."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = pictures[torch.from_numpy(keys.integers(("vae", step, "batch"), 16, len(pictures)))]
        posterior = vae.encode(batch).latent_dist
        noise = torch.from_numpy(keys.normal(("vae", step, "noise"), tuple(posterior.mean.shape)))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = (decoded - batch).square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def main() -> None:
    """Fetch, draw, train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True, help="folder for the font packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline to write")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recent: list[float] = []

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if step % 200 == 0:
            print(f"step {step}: loss {np.mean(recent):.4f}", flush=True)
            recent.clear()

    drawn, captions = [], []
    for font in fetch(options.fonts):
        name = typefaces.read_typeface(font).name
        for letter, picture in zip(
            string.ascii_uppercase, typefaces.draw(font, string.ascii_uppercase, SIZE), strict=True
        ):
            drawn.append(np.asarray(picture))
            captions.append(f"letter {letter} in {name}")
    pictures = torch.from_numpy(np.stack(drawn)[:, None].astype(np.float32) / 127.5 - 1).expand(-1, 3, -1, -1)
    options.out.mkdir(parents=True)
    pipeline = parts(options.out / "raw")
    print(f"{len(pictures)} pictures", flush=True)
    train_vae(pipeline.vae, pictures, options.vae_steps, report)
    pipeline.save_pretrained(options.out / "base")

    denoiser = models.load_denoiser(options.out / "base")
    latents = torch.cat([denoiser.encode_images(part) for part in pictures.split(64)])
    cond = torch.cat([denoiser.encode_captions(captions[i : i + 64]) for i in range(0, len(captions), 64)])
    denoiser.network.requires_grad_(True)
    training.train(
        denoiser.network, denoiser.schedule, latents, cond=cond, steps=options.steps, batch_size=32, seed=0,
        learning_rate=2e-3, learning_rate_schedule="cosine", ema_decay=0.999, progress=report,
    )  # fmt: skip
    pipeline.unet = denoiser.network.unet
    # Half precision halves the files and costs a fine-tune nothing.
    pipeline.to(torch.float16).save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
