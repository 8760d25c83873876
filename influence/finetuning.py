"""Fine-tunes that can be repeated on any subset of their images: all weights, or a LoRA, from a base pipeline.

A subset gets as many epochs as the whole (as in D-TRAK's protocol: Zheng et al., 2024), so that leaving images out
takes away their steps and leaves those of the others.
"""

import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from influence import adapters, commit, models, training
from influence.errors import ModelError, OptionError
from influence.models import Denoiser

RECIPE_FILE = "finetune.json"


@dataclass(frozen=True)
class FineTune:
    """How a model is fine-tuned; with the base, the images and a seed it determines the weights."""

    epochs: int | float
    batch_size: int
    learning_rate: int | float
    learning_rate_schedule: str = "cosine"
    weight_decay: int | float = 0.01
    ema_decay: float | None = None
    stratified: bool = True
    """Whether the timesteps of a batch are stratified."""
    lora_rank: int | None = None
    """r of the adapter; `None` trains all weights."""
    lora_alpha: int | float | None = None
    """α; r by default."""
    lora_targets: str = "to_q,to_k,to_v,to_out.0"
    """Ends of names of the layers that get an adapter, separated by commas."""

    def steps(self, images: int) -> int:
        """Optimizer steps for that many images."""
        return math.ceil(self.epochs * images / self.batch_size)

    def total_learning_rate(self, images: int) -> float:
        """Σ η_t over the steps."""
        steps = self.steps(images)
        return self.learning_rate * (steps if self.learning_rate_schedule == "constant" else (steps + 1) / 2)


def read_recipe(path: str | Path) -> FineTune:
    """Read a `finetune.json`, or the one in a folder.

    Raises:
        OptionError: It is missing, not one, or has a value that no fine-tune can have.
    """
    file = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        inspect.signature(FineTune).bind(**content)  # a field that is missing, or is none, is a TypeError
    except (OSError, ValueError, TypeError) as error:
        names = ", ".join(field.name for field in fields(FineTune))
        raise OptionError(f"{file} is no fine-tune recipe ({error}); expected a JSON object of {names}") from None
    for name, value in content.items():
        fits, expected = _VALUES[name]
        if not fits(value):
            raise OptionError(f"{file}: {name} is {json.dumps(value)}; expected {expected}; correct it there")
    return FineTune(**content)


def _is_number(value: Any) -> bool:
    """Whether JSON gave a finite number: a `true` is none, although Python counts with it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return _is_positive(value) and isinstance(value, int)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (_is_positive, "a positive number"),
    "batch_size": (_is_count, "a whole number of 1 or more"),
    "learning_rate": (_is_positive, "a positive number"),
    "learning_rate_schedule": (
        lambda value: value in ("cosine", "constant"),
        "cosine or constant, whichever has learning rates that add up to about the same (linear to 0: cosine)",
    ),
    "weight_decay": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
    "ema_decay": (lambda value: value is None or (_is_number(value) and 0 < value < 1), "a number in 0 … 1, or null"),
    "stratified": (lambda value: isinstance(value, bool), "true or false"),
    "lora_rank": (lambda value: value is None or _is_count(value), "a whole number of 1 or more, or null"),
    "lora_alpha": (lambda value: value is None or _is_positive(value), "a positive number, or null"),
    "lora_targets": (
        lambda value: isinstance(value, str) and all(part.strip() for part in value.split(",")),
        "ends of names of layers, separated by commas",
    ),
}
"""What a field of a recipe may be, and how to say so."""


def find_recipe(model: str | Path, lora: str | Path | None) -> Path | None:
    """The `finetune.json` beside a fine-tuned model or LoRA, if there is one."""
    place = Path(model if lora is None else lora)
    file = (place if place.is_dir() else place.parent) / RECIPE_FILE
    return file if file.is_file() else None


def start(base: str | Path, recipe: FineTune, *, resolution: int | None = None, device: str = "cpu") -> Denoiser:
    """Load the base, with an untrained adapter if the recipe has one; the trained parameters ask for gradients.

    Raises:
        ModelError: The base cannot be loaded or takes no such adapter.
    """
    denoiser = models.load_denoiser(base, resolution=resolution, device=device)
    if recipe.lora_rank is not None:
        alpha = float(recipe.lora_rank if recipe.lora_alpha is None else recipe.lora_alpha)
        models.add_fresh_lora(denoiser, rank=recipe.lora_rank, alpha=alpha, targets=recipe.lora_targets, seed=0)
    for parameter in denoiser.parameters.values():
        parameter.requires_grad_(True)
    return denoiser


def weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """A copy of the trained parameters."""
    return {name: parameter.detach().clone() for name, parameter in denoiser.parameters.items()}


def set_weights(denoiser: Denoiser, values: dict[str, Tensor]) -> None:
    """Put such a copy back."""
    for name, parameter in denoiser.parameters.items():
        parameter.data.copy_(values[name])


def fine_tune(
    denoiser: Denoiser,
    recipe: FineTune,
    x0: Tensor,
    cond: Tensor | None,
    *,
    seed: int,
    members: np.ndarray | None = None,
    progress: Callable[[int, float], Any] | None = None,
) -> None:
    """Train the denoiser in place, from where it is; no members leave it as it is.

    Args:
        denoiser: As `start` gives it.
        recipe: How.
        x0: Images or latents, as the denoiser encodes them.
        cond: Encoded captions, or `None`.
        seed: Key of the order of the images, the timesteps and the noise.
        members: A boolean for each image: which are trained on; all by default.
        progress: Called after each step with the number of steps done and the step's loss.
    """
    count = len(x0) if members is None else int(np.asarray(members).sum())
    if count == 0:
        return
    training.train(
        denoiser.network,
        denoiser.schedule,
        x0,
        cond=cond,
        steps=recipe.steps(count),
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        learning_rate_schedule=recipe.learning_rate_schedule,
        weight_decay=recipe.weight_decay,
        ema_decay=recipe.ema_decay,
        stratified=recipe.stratified,
        seed=seed,
        members=members,
        progress=progress,
    )


def require_absent(folder: str | Path, recipe: FineTune) -> None:
    """Refuse a folder where `save` would find a model, or that cannot be made, before it is trained.

    Raises:
        ModelError: There is one, or it cannot be made.
    """
    taken = Path(folder) if recipe.lora_rank is None else Path(folder) / adapters.LORA_FILE
    if taken.exists():
        raise ModelError(f"{taken} exists already; choose another folder, or remove it")
    try:
        taken.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{taken.parent} cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(taken.parent, os.W_OK | os.X_OK):
        raise ModelError(f"{taken.parent} cannot be written to; choose another folder")


def save(denoiser: Denoiser, recipe: FineTune, folder: str | Path, *, base: str | Path) -> None:
    """Write what was trained: a pipeline folder, or a folder with the LoRA; and the recipe beside it.

    Raises:
        ModelError: There is such a model already, or it cannot be written.
        StoreError: The recipe cannot be written.
    """
    folder = Path(folder)
    if recipe.lora_rank is None:
        models.save_denoiser(denoiser, folder, base=base)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        adapters.save(denoiser.network.unet, folder)
    with commit.writing(folder / RECIPE_FILE):
        (folder / RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")
