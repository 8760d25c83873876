"""LoRA files and the adapters that they are of, in diffusers' networks by way of peft."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from influence import keys
from influence.errors import ModelError, one_line
from influence.quiet import quiet

with quiet():  # it remarks at import that torchvision, which nothing here needs, is absent
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default_0"  # as diffusers names the first that it loads
_DORA = ("lora_magnitude_vector", "dora_scale")  # in names of tensors: as peft has them, and other trainers


def attach(unet: Any, text_encoder: nn.Module, lora: Path, notes: list[str]) -> tuple[dict[str, Tensor], str]:
    """Put the adapter of a file into the networks.

    Returns:
        Its tensors, and what they are scaled by: all that it depends on.

    Raises:
        ModelError: There is no such file, or it is no LoRA of these networks.
    """
    file = lora / LORA_FILE if lora.is_dir() else lora
    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelError(f"there is no LoRA at {file}; expected a .safetensors file, or a folder with {LORA_FILE}")
    _refuse_dora(file)
    try:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(file), return_lora_metadata=True, local_files_only=True, unet_config=unet.config
        )
        bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise ModelError(f"{file}: tensor {bad[0]} holds NaN or infinity; the weights are damaged")
        known = [name for name in state if name.startswith(("unet.", "text_encoder."))]
        if len(known) < len(state):
            odd = next(name for name in state if name not in known)
            raise ModelError(f"{file}: {odd} belongs to no part of a StableDiffusionPipeline")
        state = _without_alphas(state, file)
        if foreign := [name for name in state if "lora" not in name]:
            raise ModelError(
                f"{file}: {foreign[0]} is no tensor of a LoRA, and diffusers would pass it over or put it in for good; "
                "not supported: save the LoRA alone, as diffusers does"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*alpha_pattern keys did not match")  # refused below
            StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
            if any(name.startswith("text_encoder.") for name in state):
                StableDiffusionPipeline.load_lora_into_text_encoder(
                    state, network_alphas=alphas, text_encoder=text_encoder, metadata=metadata
                )
    except ModelError:
        raise
    except Exception as error:  # diffusers and peft raise many kinds
        raise ModelError(f"{file} does not fit the model: {one_line(error)}") from None
    loaded = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    expected = sum(name.startswith("unet.") and "lora" in name for name in state)
    if not loaded or len(loaded) != expected:
        raise ModelError(
            f"{file} has {expected} UNet tensors, of which {len(loaded)} fit the model; is it of this base?"
        )
    for name, network in (("unet", unet), ("text_encoder", text_encoder)):
        _require_alphas(network, {key: alpha for key, alpha in (alphas or {}).items() if key.startswith(name)}, file)
    if any(name.startswith("text_encoder.") for name in state):
        notes.append("the LoRA also changes the text encoder: applied, but gradients are of the UNet's adapter only")
    if all(not bool(p.any()) for name, p in loaded.items() if "lora_B" in name):
        notes.append("every lora_B is zero: this adapter was never trained, and gradients of lora_A are zero")
    scalings = sorted(
        (name, sorted(module.scaling.items())) for name, module in unet.named_modules() if hasattr(module, "scaling")
    )
    return state, repr(scalings)


def _without_alphas(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Tensors without each `….alpha` beside diffusers' own names: it passes these over, and takes r for α."""
    layers = {name.removesuffix(".alpha"): float(value) for name, value in state.items() if name.endswith(".alpha")}
    for layer, alpha in layers.items():
        ranks = [
            len(value)
            for name, value in state.items()
            if name in (f"{layer}.lora_A.weight", f"{layer}.lora.down.weight")
        ]
        if ranks != [alpha]:
            raise ModelError(
                f"{file}: α of {layer} is {alpha:g} and its rank {ranks[0] if ranks else 'not known'}; diffusers would "
                "take the rank for α; not supported: save the LoRA as diffusers does, with its metadata"
            )
    return {name: value for name, value in state.items() if not name.endswith(".alpha")}


def _require_alphas(network: nn.Module, alphas: Mapping[str, float], file: Path) -> None:
    """Refuse layers that were not put in with their own α: diffusers may keep the commonest for all."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    # as text of five digits: α / r · r is not quite α
    wanted = Counter(f"{float(alpha):.5g}" for alpha in alphas.values())
    odd = wanted - Counter(f"{layer.scaling[_ADAPTER] * layer.r[_ADAPTER]:.5g}" for layer in layers)
    if odd:
        raise ModelError(
            f"{file} has {odd.total()} layers of α = {min(odd)}, say, that diffusers scales by another, as it takes "
            "one for all; not supported: save the LoRA with one α"
        )


def _refuse_dora(file: Path) -> None:
    """Refuse an adapter with magnitudes: it is not its base where lora_B = 0, and diffusers drops some in silence."""
    try:
        with safe_open(file, "pt") as tensors:
            odd = [name for name in tensors.keys() if any(part in name for part in _DORA)]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from None
    if odd:
        raise ModelError(f"{file} is a DoRA ({odd[0]}); not supported: pass a LoRA without magnitudes")


def add_fresh(unet: Any, *, rank: int, alpha: float, targets: str, seed: int) -> dict[str, nn.Parameter]:
    """Put an untrained adapter into a UNet: A keyed, uniform as peft's own, B zero.

    Args:
        unet: Of a StableDiffusionPipeline, without an adapter.
        rank: r.
        alpha: α: the adapter's product is scaled by α/r.
        targets: Ends of the names of the layers that get one, separated by commas.
        seed: Key of A.

    Returns:
        The adapter's parameters, by name.

    Raises:
        ModelError: No layer has such a name.
    """
    wanted = [target.strip() for target in targets.split(",")]
    try:
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted), adapter_name=_ADAPTER)
    except ValueError as error:
        raise ModelError(f"LoRA targets {targets!r}: {one_line(error)}") from None
    parameters = {name: p for name, p in unet.named_parameters() if p.is_floating_point() and "lora_" in name}
    for name, parameter in parameters.items():
        u = torch.from_numpy(keys.uniform(("lora", seed, name), parameter.numel())).float().reshape(parameter.shape)
        bound = (parameter.numel() / len(parameter)) ** -0.5
        parameter.data.copy_(torch.zeros_like(u) if "lora_B" in name else (2 * u - 1) * bound)
    unet.requires_grad_(False)
    return parameters


def silence(*networks: nn.Module) -> None:
    """Make adapters do nothing, as before their training: lora_B = 0."""
    for network in networks:
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()


def save(unet: Any, folder: str | Path) -> Path:
    """Write the adapter of a UNet as diffusers' training scripts do: `pytorch_lora_weights.safetensors`.

    α goes with it, since a reader who is not told takes r for it, which is another model.

    Raises:
        ModelError: There is a LoRA in the folder already, or it cannot be written.
    """
    file = Path(folder) / LORA_FILE
    if file.exists():
        raise ModelError(f"{file} exists already; choose another folder, or remove it")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=_ADAPTER))
    try:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=_metadata(unet), safe_serialization=True
        )
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise ModelError(f"{file} cannot be written: {one_line(error)}; make room, or choose another folder") from None
    return file


def _metadata(unet: Any) -> dict[str, Any]:
    """What the adapter's outputs depend on beside its tensors.

    Not all of peft's config: a reader refuses fields that its own release of peft does not know.
    """
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
    values = {name: getattr(unet.peft_config[_ADAPTER], name) for name in names}
    # a set has another order in each process, and the file would have other bytes
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
