"""Small networks with keyed weights, called as the engines call a denoiser."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import nn

from influence import keys
from influence.diffusion import NoiseSchedule

SCHEDULE = NoiseSchedule(tuple(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64).tolist()), "epsilon", "uniform")


class Called(nn.Module):
    """A diffusers UNet called as `network(x_t, t, cond)`."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x_t, t, cond=None):
        if cond is None:
            return self.unet(x_t, t).sample
        return self.unet(x_t, t, encoder_hidden_states=cond).sample


def fill(module, seed):
    """Keyed weights, so that no global generator and no library version changes them."""
    for name, parameter in module.named_parameters():
        noise = torch.from_numpy(keys.normal(("test-weights", seed, name), tuple(parameter.shape)))
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = base + noise / fan_in**0.5
    return module


def unconditional(seed=0):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    network = Called(fill(unet, seed)).eval().requires_grad_(False)
    return network, dict(unet.named_parameters()), None


def conditional(seed=0):
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    network = Called(fill(unet, seed)).eval().requires_grad_(False)
    return network, dict(unet.named_parameters()), 12


def lora(seed=0):
    network, _, width = conditional(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"])
    network.unet.add_adapter(config)
    adapter = {name: p for name, p in network.unet.named_parameters() if "lora_" in name}
    for name, parameter in adapter.items():
        parameter.data = torch.from_numpy(keys.normal(("test-lora", seed, name), tuple(parameter.shape))) * 0.1
    network.eval().requires_grad_(False)
    return network, adapter, width


NETWORKS = {"UNet2DModel": unconditional, "UNet2DConditionModel": conditional, "LoRA": lora}


def rows(num_images, num_draws, width, key=0):
    """Random clean images, timesteps, noise and captions: `num_images × num_draws` rows."""
    n = num_images * num_draws
    images = torch.from_numpy(keys.normal(("test-images", key), (num_images, 3, 8, 8))).clamp(-1, 1)
    x0 = images.repeat_interleave(num_draws, 0)
    t = torch.from_numpy(keys.integers(("test-t", key), n, 1000))
    eps = torch.from_numpy(keys.normal(("test-eps", key), (n, 3, 8, 8)))
    cond = None
    if width:
        cond = torch.from_numpy(keys.normal(("test-cond", key), (num_images, 5, width))).repeat_interleave(num_draws, 0)
    return x0, t, eps, cond
