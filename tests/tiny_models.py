"""Tiny real diffusers pipelines in a folder, with keyed weights."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from networks import fill
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from influence import keys


def tiny_ddpm(path, *, seed=0, prediction_type="epsilon", channels=3, size=8, width=8):
    """A DDPMPipeline."""
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    DDPMPipeline(unet=fill(unet, seed), scheduler=scheduler).save_pretrained(path)
    return Path(path)


def _bytes_to_unicode():
    """The printable stand-in of every byte in CLIP's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    for n, b in enumerate(b for b in range(256) if b not in letters):
        letters[b] = chr(256 + n)
    return letters


def tiny_tokenizer(path, length=16):
    """A CLIP tokenizer over single bytes: any text can be told apart."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    letters = list(_bytes_to_unicode().values())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=length), len(words)


def tiny_stable_diffusion(path, *, seed=0, prediction_type="epsilon", size=16):
    """A StableDiffusionPipeline: CLIP text model and tokenizer, VAE, conditional UNet."""
    path = Path(path)
    tokenizer, vocabulary = tiny_tokenizer(path / "raw_tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=size,
    )
    unet = UNet2DConditionModel(
        sample_size=size // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    StableDiffusionPipeline(
        vae=fill(vae, f"{seed} vae"),
        text_encoder=fill(text_encoder, f"{seed} text"),
        tokenizer=tokenizer,
        unet=fill(unet, seed),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def tiny_lora(base, path, *, seed=0, rank=2, alpha=4, zero=False, text_encoder=False):
    """A LoRA written by peft through diffusers, as the training scripts write it; lora_B zero on request."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = {"unet_lora_layers": _keyed(get_peft_model_state_dict(unet), seed, zero)}
    if text_encoder:
        text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
        text.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        layers["text_encoder_lora_layers"] = _keyed(get_peft_model_state_dict(text), f"{seed} text", zero)
    StableDiffusionPipeline.save_lora_weights(path, **layers, safe_serialization=True)
    return Path(path) / "pytorch_lora_weights.safetensors"


def _keyed(state, seed, zero):
    return {
        name: torch.zeros_like(tensor)
        if zero and "lora_B" in name
        else 0.2 * torch.from_numpy(keys.normal(("tiny-lora", str(seed), name), tuple(tensor.shape)))
        for name, tensor in state.items()
    }


def pictures(path, *, count=12, size=16, captions=True, key=0):
    """A data set of keyed noise pictures by three creators."""
    from PIL import Image

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text,creator"]
    for i in range(count):
        pixels = keys.integers(("picture", key, i), size * size * 3, 256).astype("uint8").reshape(size, size, 3)
        Image.fromarray(pixels).save(path / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{'picture ' + str(i) if captions else ''},creator {i % 3}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
