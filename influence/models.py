"""Diffusers folders and LoRA files → `Denoiser`: the only module that knows which model it is.

Weights are read from safetensors files alone, in float32; nothing is fetched and no code of a folder runs.
"""

import copy
import fnmatch
import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from influence import adapters
from influence.diffusion import TARGETS, NoiseSchedule
from influence.errors import ModelError, one_line
from influence.quiet import quiet

PIPELINES = ("DDPMPipeline", "StableDiffusionPipeline")
_MAX_CAPTIONS = 1024
_PICTURES = 64  # of 32 × 32 pixels that are encoded at once
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_SAME_BETAS = ("DPMSolverSDEScheduler",)  # of the family, but a stand-in where torchsde is not installed
_ENCODERS = (AutoencoderKL, CLIPTextModel)
_PARTS = ("model_index.json", "scheduler", "vae", "text_encoder", "tokenizer", "feature_extractor", "safety_checker",
          "image_encoder")  # fmt: skip
"""What a pipeline folder may hold beside the UNet."""
_PADDING = 128  # a table of vectors may be filled up to a multiple of this


@runtime_checkable
class Denoiser(Protocol):
    """What the stages may know about a model."""

    network: nn.Module
    """Called as `network(x_t, t, cond)`; in evaluation mode, no parameter asks for a gradient."""
    schedule: NoiseSchedule
    parameters: dict[str, nn.Parameter]
    """The parameters that gradients are taken of, in the order of the network."""
    sample_shape: tuple[int, int, int]
    """Shape of a noised image or latent."""
    image_size: tuple[int, int, int]
    """Channels, height and width of the pictures that `encode_images` takes."""
    conditional: bool
    """Whether the network reads captions."""
    identity: dict[str, str | None]
    """SHA-256 of `model`, `config`, `encoders`, `lora`, `parameters` and `schedule`, as in FeatureSpec."""
    latents: str | None
    """SHA-256 of what makes latents of pictures; `None` if nothing does."""
    notes: list[str]
    """Assumptions and warnings that a person must see."""

    def encode_images(self, images: Float[Tensor, "images channels height width"]) -> Tensor:
        """Pictures in −1 … 1 → what is noised, `[images, *sample_shape]`."""

    def decode_images(self, samples: Tensor) -> Float[Tensor, "images channels height width"]:
        """What was noised → pictures, in about −1 … 1."""

    def encode_captions(self, captions: list[str]) -> Float[Tensor, "images tokens width"]:
        """Captions → what the network is conditioned on."""


def between(start: Denoiser, end: Denoiser, part: float) -> Denoiser:
    """A model with the weights (1 − part) start + part end: all of them, whichever parameters are selected.

    So it is with the text encoder, if the fine-tune changed its weights; one of another size has nothing between, and
    that of the end stays, as the VAE does.

    Raises:
        ModelError: The networks have other weights.
    """
    if _shapes(start.network) != _shapes(end.network):
        raise ModelError("the model before the fine-tune has other weights than the fine-tuned one; nothing is between")
    made = copy.copy(end)
    made.network, made.parameters = copy.deepcopy((end.network, end.parameters))
    _move(made.network, start.network, 1 - part)
    if isinstance(made, _StableDiffusion) and isinstance(start, _StableDiffusion):
        made.move_text_encoder(start, 1 - part)
    return made


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in module.state_dict().items()]


@torch.no_grad()
def _move(module: nn.Module, other: nn.Module, part: float) -> None:
    """Move the weights of a module that part of the way to those of another."""
    theirs = other.state_dict()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name].to(value), part)


def pictures_at_once(denoiser: Denoiser) -> int:
    """How many pictures to encode together: a VAE's widest layer takes 128 MiB for one of 512 × 512."""
    _, height, width = denoiser.image_size
    return max(1, min(_PICTURES, _PICTURES * 32 * 32 // (height * width)))


class _Unconditional:
    """A UNet2DModel on pixels."""

    def __init__(self, unet: UNet2DModel, schedule: NoiseSchedule, height: int) -> None:
        self.network: nn.Module = _Network(unet)
        self.schedule = schedule
        self.conditional = False
        self.sample_shape = (unet.config.in_channels, height, height)
        self.image_size = self.sample_shape

    def encode_images(self, images: Tensor) -> Tensor:
        """The pictures themselves."""
        return images

    def decode_images(self, samples: Tensor) -> Tensor:
        """The pictures themselves."""
        return samples

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Refuse.

        Raises:
            ModelError: Always.
        """
        raise ModelError("the model reads no captions")


class _StableDiffusion:
    """A UNet2DConditionModel on the latents of a VAE, conditioned on a CLIP text encoder."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        schedule: NoiseSchedule,
        height: int,
    ) -> None:
        self.network: nn.Module = _Network(unet)
        self.schedule = schedule
        self.conditional = True
        self._vae, self._text_encoder, self._tokenizer = vae, text_encoder, tokenizer
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.sample_shape = (unet.config.in_channels, height // factor, height // factor)
        self.image_size = (vae.config.in_channels, height, height)
        self._captions: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Mode of the VAE's posterior × its scaling factor: training samples it, the mode is its centre."""
        latents = self._vae.encode(images).latent_dist.mode()
        return (latents - (self._vae.config.shift_factor or 0.0)) * self._vae.config.scaling_factor

    @torch.no_grad()
    def decode_images(self, samples: Tensor) -> Tensor:
        """The VAE's decoder on latents / its scaling factor."""
        latents = samples / self._vae.config.scaling_factor + (self._vae.config.shift_factor or 0.0)
        return self._vae.decode(latents).sample

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Tokens padded and cut to the model's length, as the training scripts do; each caption is encoded once."""
        if len(self._captions) > _MAX_CAPTIONS:
            self._captions.clear()
        for caption in set(captions) - set(self._captions):
            tokens = self._tokenizer(
                caption,
                max_length=self._tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            self._captions[caption] = self._text_encoder(tokens.to(self._text_encoder.device))[0]
        return torch.cat([self._captions[caption] for caption in captions])

    def move_text_encoder(self, other: "_StableDiffusion", part: float) -> None:
        """Put a text encoder that part of the way to another model's in place of this one, if both can be compared."""
        mine, theirs = self._text_encoder, other._text_encoder
        if _shapes(mine) != _shapes(theirs):
            return
        values = theirs.state_dict()
        if all(torch.equal(value, values[name].to(value)) for name, value in mine.state_dict().items()):
            return  # shared: a copy would cost its memory again, and every caption its encoding
        self._text_encoder, self._captions = copy.deepcopy(mine), {}
        _move(self._text_encoder, theirs, part)

    def silence_lora(self) -> None:
        """Make the adapters of both networks do nothing, as before they were trained."""
        adapters.silence(self.network, self._text_encoder)
        self._captions = {}

    def attach_lora(self, lora: Path, notes: list[str]) -> str:
        """Put an adapter into both networks; its SHA-256."""
        state, scalings = adapters.attach(self.network.unet, self._text_encoder, lora, notes)
        return _sha([_tensors_sha(state).encode(), scalings.encode()])


class _Network(nn.Module):
    """A diffusers UNet called as `network(x_t, t, cond)`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Predict."""
        if cond is None:
            return self.unet(x_t, t).sample
        return self.unet(x_t, t, encoder_hidden_states=cond).sample


def load_denoiser(
    path: str | Path,
    *,
    lora: str | Path | None = None,
    parameters: str | None = None,
    resolution: int | None = None,
    device: str = "cpu",
) -> Denoiser:
    """Load a fine-tuned model.

    Args:
        path: A DDPMPipeline or StableDiffusionPipeline folder, a training output folder with `checkpoint-*/unet` or
            `unet_ema`, or one such checkpoint; the base pipeline if `lora` is given.
        lora: `pytorch_lora_weights.safetensors`, or a folder that holds it. Gradients are then of the adapter only.
        parameters: Globs over parameter names, separated by commas; all by default.
        resolution: Pixels of a side; the model's own by default.
        device: Where to put it.

    Raises:
        ModelError: The folder is not one of these, lacks a part, or holds something that no stage supports.
    """
    with quiet():
        return _load_denoiser(Path(path), lora, parameters, resolution, device)


def _load_denoiser(
    folder: Path, lora: str | Path | None, parameters: str | None, resolution: int | None, device: str
) -> Denoiser:
    if not folder.is_dir():
        raise ModelError(f"there is no model folder at {folder}; expected a diffusers or training output folder")
    notes: list[str] = []
    unet_folder, parts = _find(folder, notes)
    unet = _load_unet(unet_folder)
    schedule = _schedule(parts, unet, notes)
    base = _tensors_sha(unet.state_dict())
    if isinstance(unet, UNet2DModel):
        denoiser, encoders = _unconditional(unet, schedule, resolution), hashlib.sha256(b"none").hexdigest()
        denoiser.latents = None
    else:
        denoiser, encoders = _stable_diffusion(unet, schedule, parts, resolution)
    config = _configs(unet, *(part for part in vars(denoiser).values() if isinstance(part, _ENCODERS)))
    adapter = None if lora is None else _adapted(denoiser).attach_lora(Path(lora), notes)
    selected = _select(unet, adapter is not None, parameters)
    for module in vars(denoiser).values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False).to(device)
    if schedule.weighting == "uniform":
        notes.append("training loss assumed: plain mean squared error, uniform timesteps, no flips or random crops")
    else:
        notes.append(
            "training loss assumed: mean squared error of x₀ weighted by the signal-to-noise ratio, uniform timesteps, "
            "no flips or random crops"
        )
    denoiser.parameters = selected
    denoiser.notes = notes
    denoiser.identity = {
        "model": base,
        "config": config,
        "encoders": encoders,
        "lora": adapter,
        "parameters": _sha([json.dumps([(name, list(p.shape)) for name, p in selected.items()]).encode()]),
        "schedule": _sha([np.asarray(schedule.alphas_cumprod, "<f8").tobytes()]),
    }
    return denoiser


def save_denoiser(denoiser: Denoiser, path: str | Path, *, base: str | Path) -> None:
    """Write a pipeline folder: the denoiser's UNet as it is now, the other parts as in the `base` pipeline folder.

    Raises:
        ModelError: The folder exists already, or cannot be written.
    """
    folder = Path(path)
    if folder.exists():
        raise ModelError(f"{folder} exists already; choose another folder, or remove it")
    parts, aside = _find(Path(base), [])[1], folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for part in (parts / name for name in _PARTS):
            if part.is_dir():
                shutil.copytree(part, aside / part.name)
            elif part.exists():
                shutil.copy(part, aside / part.name)
        denoiser.network.unet.save_pretrained(aside / "unet")
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ModelError(
            f"{folder} cannot be written: {one_line(error)}; make room, or choose another folder"
        ) from None


def add_fresh_lora(denoiser: Denoiser, *, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Put an untrained adapter into the UNet, as `adapters.add_fresh` does; `denoiser.parameters` becomes its.

    Raises:
        ModelError: The model is unconditional, or no layer has such a name.
    """
    unet = _adapted(denoiser).network.unet
    denoiser.parameters = adapters.add_fresh(unet, rank=rank, alpha=alpha, targets=targets, seed=seed)


def silence_lora(denoiser: Denoiser) -> None:
    """Make the adapter do nothing, as before its training: lora_B = 0. It has gradients as before.

    All of it, whichever parameters are selected, and that of the text encoder too: the base has none of them.

    Raises:
        ModelError: The model takes no adapter.
    """
    _adapted(denoiser).silence_lora()


def _adapted(denoiser: Any) -> _StableDiffusion:
    if not isinstance(denoiser, _StableDiffusion):
        raise ModelError("a LoRA needs a StableDiffusionPipeline as its base; this model is unconditional")
    return denoiser


# Folders ------------------------------------------------------------------------------------------------------------


def _find(folder: Path, notes: list[str]) -> tuple[Path, Path]:
    """The folder of the UNet's weights, and the folder where the other parts lie."""
    if (folder / "model_index.json").exists():
        name = _json(folder / "model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise ModelError(f"{folder} is a {name}; supported: {', '.join(PIPELINES)}")
        if (folder / "unet").is_dir():
            return folder / "unet", folder
    checkpoint = folder
    if not ((folder / "unet").is_dir() or (folder / "unet_ema").is_dir()):
        numbered = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r".*-(\d+)", p.name))]
        usable = [p for _, p in sorted(numbered) if (p / "unet").is_dir() or (p / "unet_ema").is_dir()]
        if not usable:
            raise ModelError(
                f"{folder} holds no model_index.json and no checkpoint-*/unet or unet_ema; "
                "expected a diffusers pipeline or a training output folder"
            )
        checkpoint = usable[-1]
    unet = checkpoint / "unet_ema" if (checkpoint / "unet_ema").is_dir() else checkpoint / "unet"
    notes.append(f"weights taken from {unet.relative_to(folder.parent)}")
    root = folder.parent if checkpoint == folder and folder.name.startswith("checkpoint-") else folder
    origin = Path(str(_json(unet / "config.json").get("_name_or_path") or ""))
    for candidate in (root, origin, origin.parent):
        if candidate != Path() and candidate.is_absolute() | (candidate == root) and (candidate / "scheduler").is_dir():
            return unet, candidate
    return unet, root


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


_SILENT = ("sample_size", "dropout", "force_upcast", "upcast_attention")
"""Arguments of a network that change no output in float32 without training, or are told elsewhere."""
_CLIP = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers")
"""What a CLIP text model does with tensors of the same shapes."""


def _configs(*modules: Any) -> str:
    """SHA-256 of the configs of a model's parts: of what their classes read, where it is not as it is by default.

    A config may hold more: paths and versions, and in a folder `unet_ema` how the average was made.
    """
    found = []
    for module in modules:
        if isinstance(module, CLIPTextModel):
            told = {name: getattr(module.config, name) for name in _CLIP}
        else:
            read = inspect.signature(type(module).__init__).parameters
            values = {name: value for name, value in module.config.items() if name in read and name not in _SILENT}
            told = {name: value for name, value in values.items() if read[name].default != value}
        found.append(json.dumps([type(module).__name__, told], sort_keys=True, default=list).encode())
    return _sha(found)


UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}


def _load_unet(folder: Path) -> UNet2DModel | UNet2DConditionModel:
    name = _json(folder / "config.json").get("_class_name")
    if name not in UNETS:
        raise ModelError(f"{folder} is a {name}; supported: {', '.join(UNETS)}")
    unet = _load(UNETS[name], folder)
    odd = [key for key in ("class_embed_type", "num_class_embeds", "addition_embed_type") if unet.config.get(key)]
    if odd:
        raise ModelError(f"{folder} needs more than an image, a timestep and a caption ({odd[0]}); not supported")
    reads, predicts = unet.config.in_channels, unet.config.out_channels
    if reads != predicts:
        raise ModelError(
            f"{folder} reads {reads} channels and predicts {predicts}; expected as many: a learned variance, and what "
            "inpaint or edit models are shown, are not supported; pass a model that is shown a noised image alone"
        )
    return unet


def _load(kind: Any, folder: Path) -> Any:
    """`from_pretrained` for one part: local, safetensors only, float32, finite."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; expected the {folder.name} of the pipeline")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    names = [file.name for file in folder.glob("*.safetensors")]
    if names and all(re.search(r"\.fp16[.-]", name) for name in names):
        options["variant"] = "fp16"
    if not names:
        raise ModelError(f"{folder} holds no .safetensors file; convert the weights, pickled ones are not read")
    try:
        module, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}") from None
    absent = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    absent += sorted(found["missing_keys"])  # transformers fills these at random
    if absent:
        raise ModelError(f"{folder} has no weights for {absent[0]}; its config.json and its weights do not fit")
    module = module.float()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder}: tensor {name} holds NaN or infinity; the weights are damaged")
    return module


def _schedule(parts: Path, unet: nn.Module, notes: list[str]) -> NoiseSchedule:
    """ᾱ and the prediction type, from the scheduler's config."""
    file = parts / "scheduler" / "scheduler_config.json"
    if file.exists():
        config = _json(file)
    elif isinstance(unet, UNet2DModel):
        config = {"_class_name": "DDPMScheduler"}
        notes.append("no scheduler in the folder: assumed DDPM, 1000 steps, linear betas, epsilon prediction")
    else:
        raise ModelError(f"{file} is missing; copy the scheduler folder of the base model to {parts}")
    name, steps = str(config.get("_class_name")), config.get("num_train_timesteps", 1000)
    if name not in _SAME_BETAS and not _has_betas(getattr(diffusers, name, None)):
        raise ModelError(
            f"scheduler {name} is not supported; expected one of the DDPM family (DDPM, DDIM, PNDM …): "
            f"put the one that the model was trained with into {file.parent}"
        )
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in TARGETS:
        raise ModelError(f"prediction type {prediction!r} is not supported; expected {', '.join(TARGETS)}")
    if not isinstance(steps, int) or steps < 1:
        raise ModelError(f"{file}: num_train_timesteps is {steps!r}; expected a whole number, at least 1")
    try:
        alphas = DDPMScheduler.from_config(config).alphas_cumprod.double()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: {one_line(error)}; expected betas as diffusers' DDPMScheduler takes them") from None
    if not len(alphas):
        raise ModelError(f"{file}: the noise schedule has no timesteps; expected at least one beta in trained_betas")
    if not bool(torch.isfinite(alphas).all()) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ModelError(f"{file}: the noise schedule leaves 0 … 1")
    return NoiseSchedule(tuple(alphas.tolist()), prediction, "snr" if prediction == "sample" else "uniform")


def _has_betas(kind: object) -> bool:
    """Whether this is a scheduler with betas. For others DDPMScheduler takes its own: those of another model."""
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        return False
    return "beta_schedule" in inspect.signature(kind).parameters


def _unconditional(unet: UNet2DModel, schedule: NoiseSchedule, resolution: int | None) -> Any:
    height = _side(unet, resolution, 1)
    return _Unconditional(unet, schedule, height)


def _stable_diffusion(
    unet: UNet2DConditionModel, schedule: NoiseSchedule, parts: Path, resolution: int | None
) -> tuple[Any, str]:
    vae = _load(AutoencoderKL, parts / "vae")
    reads, makes = unet.config.in_channels, vae.config.latent_channels
    if reads != makes:
        raise ModelError(
            f"the unet reads {reads} channels and the VAE makes {makes}; expected as many; "
            f"copy the vae folder of the base model to {parts}, or pass a model that is shown a noised image alone"
        )
    text_encoder = _load(CLIPTextModel, parts / "text_encoder")
    tokenizer = _load_tokenizer(parts / "tokenizer", text_encoder)
    side = _side(unet, resolution, 2 ** (len(vae.config.block_out_channels) - 1))
    facts = (vae.config.scaling_factor, vae.config.shift_factor, tokenizer.model_max_length)
    sha = _sha(
        [
            *(_tensors_sha(module.state_dict()).encode() for module in (vae, text_encoder)),
            repr(facts).encode(),
            json.dumps(sorted(tokenizer.get_vocab().items())).encode(),
        ]
    )
    denoiser = _StableDiffusion(unet, vae, text_encoder, tokenizer, schedule, side)
    denoiser.latents = _sha([_tensors_sha(vae.state_dict()).encode(), repr(facts[:2]).encode()])
    return denoiser, sha


def _load_tokenizer(folder: Path, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """The tokenizer of that text encoder. One without its files loads as well, and then all captions are one to it."""
    advice = f"copy the tokenizer folder of the base model to {folder.parent}"
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; {advice}")
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ModelError(f"{folder} holds no tokenizer.json, nor vocab.json with merges.txt; {advice}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}; {advice}") from None
    vectors, longest = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
    if not vectors - _PADDING < len(tokenizer) <= vectors:
        raise ModelError(f"{folder} has {len(tokenizer)} tokens, and the text encoder vectors for {vectors}; {advice}")
    length = tokenizer.model_max_length
    if not isinstance(length, int) or not 1 <= length <= longest:
        raise ModelError(
            f"{folder}: model_max_length is {length!r}; expected 1 … {longest}, what the text encoder reads; {advice}"
        )
    return tokenizer


def _side(unet: nn.Module, resolution: int | None, factor: int) -> int:
    """Pixels of a side, checked against what the network can take."""
    size = unet.config.sample_size
    if resolution is None:
        if not isinstance(size, int):
            raise ModelError(f"the UNet's config has sample_size {size}; say the pixels of a side with --resolution")
        resolution = size * factor
    step = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution < step or resolution % step:
        raise ModelError(f"resolution is {resolution}; this model takes multiples of {step}")
    return resolution


# Parameters and identity --------------------------------------------------------------------------------------------


def _select(unet: nn.Module, adapter: bool, globs: str | None) -> dict[str, nn.Parameter]:
    named = {n: p for n, p in unet.named_parameters() if p.is_floating_point() and (not adapter or "lora_" in n)}
    if globs is None:
        return named
    chosen = {n: p for n, p in named.items() if any(fnmatch.fnmatchcase(n, g.strip()) for g in globs.split(","))}
    if not chosen:
        raise ModelError(f"--parameters {globs!r} matches none of {len(named)} parameters; one is {next(iter(named))}")
    return chosen


def _sha(parts: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()


def _tensors_sha(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: the same however the tensors were split into files."""

    def parts() -> Iterable[bytes]:
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return _sha(parts())
