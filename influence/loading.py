"""Loads a model for taking features: spec, recipe, engine, device, and a batch size that fits a memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from influence import diffusion, gradients, horizon, models, spec
from influence.devices import chosen
from influence.errors import GradientError, OptionError
from influence.features import Recipe
from influence.memory import parse_size, peak, rows_within
from influence.models import Denoiser
from influence.progress import Message
from influence.projection import PROJECTIONS
from influence.spec import FeatureSpec
from influence.store import Store
from influence.taking import take_arrays

DEFAULT_BATCH, MAX_BATCH = 64, 256


@dataclass(frozen=True)
class Loaded:
    """A model, a store and all that is needed to take features for it."""

    denoiser: Denoiser
    spec: FeatureSpec
    recipe: Recipe

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(next(iter(self.denoiser.parameters.values())).device)


@dataclass(frozen=True)
class BuildOptions:
    """What a worker process needs to do its part; see `build`."""

    dataset: str
    model: str
    lora: str | None = None
    dim: int | None = None
    """k; `None` as long as it is not known how many images there are."""
    projection: str = "countsketch"
    scales: Mapping[str, float] | None = None
    """W: what the gradient of each parameter is multiplied by."""
    draws: int = 40
    seed: int = 0
    engine: str = "auto"
    parameters: str | None = None
    resolution: int | None = None
    batch_size: int = DEFAULT_BATCH
    device: str = "auto"
    dtype: str = "fp32"


def load(options: BuildOptions, message: Message) -> Loaded:
    """Load the model, and say how features are taken from it."""
    return prepared(network(options), options, message)


def network(options: BuildOptions) -> Denoiser:
    """The model alone."""
    for name, value, least in (
        ("dim", options.dim, 1),
        ("draws", options.draws, 1),
        ("batch-size", options.batch_size, 1),
    ):
        if value is not None and not least <= value <= _MOST:
            raise OptionError(f"{name} is {value}; expected {least} to {_MOST}")
    if options.projection not in PROJECTIONS:
        raise OptionError(f"projection {options.projection!r} is unknown; expected one of {', '.join(PROJECTIONS)}")
    if options.dtype not in ("fp32", "bf16"):
        raise OptionError(f"dtype {options.dtype!r} is unknown; expected fp32 or bf16")
    return models.load_denoiser(
        Path(options.model),
        lora=None if options.lora is None else Path(options.lora),
        parameters=options.parameters,
        resolution=options.resolution,
        device=chosen(options.device),
    )


_MOST = 1 << 30
DIMS = (32768, 16384, 8192)
_FEATURE_BYTES = 4 << 30


def with_dim(options: BuildOptions, denoiser: Denoiser, images: int) -> BuildOptions:
    """Options whose k is known: as large as so many images allow, since a larger k makes better scores.

    All features of a store with standard errors, at two points of the way, stay within 4 GiB as long as k is above the
    least of `DIMS`. A gradient that has no more entries than that is kept as it is.
    """
    if options.dim is not None:
        return options
    size = sum(parameter.numel() for parameter in denoiser.parameters.values())
    row = 4 + 2 * diffusion.num_batches(options.draws)
    dim = next((k for k in DIMS if 2 * images * row * k <= _FEATURE_BYTES), DIMS[-1])
    if options.projection == "countsketch" and size <= dim:
        return replace(options, dim=size, projection="identity")
    return replace(options, dim=dim)


def prepared(denoiser: Denoiser, options: BuildOptions, message: Message) -> Loaded:
    """A model with all that says how features are taken from it."""
    assert options.dim is not None
    device = str(next(iter(denoiser.parameters.values())).device)
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.parameters.items()}
    dim = options.dim
    if options.projection == "identity":
        dim = sum(parameter.numel() for parameter in denoiser.parameters.values())
    made = FeatureSpec(
        **denoiser.identity,
        prediction=denoiser.schedule.prediction,
        weighting=denoiser.schedule.weighting,
        sample_shape=tuple(denoiser.sample_shape),
        conditional=denoiser.conditional,
        projection=options.projection,
        dim=dim,
        seed=options.seed,
        dtype=options.dtype,
        metric=horizon.fingerprint(options.scales),
    )
    projection = PROJECTIONS[options.projection]
    recipe = Recipe(
        schedule=denoiser.schedule,
        parameters=denoiser.parameters,
        projection=projection(shapes, dim=dim, seed=options.seed, device=torch.device(device), scales=options.scales),
        seed=options.seed,
        role="train",
        num_draws=options.draws,
        curvature_rate=0.0,
        output="loss",
        bf16=options.dtype == "bf16",
        engine=_engine(options.engine, denoiser, message),
        batch_size=options.batch_size,
    )
    return Loaded(denoiser, made, recipe)


def load_for(
    made: Store,
    *,
    model: str | os.PathLike[str] | None,
    lora: str | os.PathLike[str] | None,
    draws: int,
    engine: str,
    batch_size: int,
    device: str,
    message: Message,
    memory: str | None = None,
) -> tuple[Loaded, BuildOptions]:
    """Load the model of a store, and make sure that it is the one.

    Args:
        made: The store.
        model: Where its model is now, if it was moved.
        lora: Where its LoRA is now.
        draws: S.
        engine: As for `build`.
        batch_size: As for `build`.
        device: As for `build`.
        message: Called with lines that a person must see.
        memory: As for `build`.

    Raises:
        InfluenceError: The model is not there, or is another one.
    """
    source = made.source
    options = BuildOptions(
        dataset=source["dataset"],
        model=source["model"] if model is None else str(Path(model).absolute()),
        lora=source["lora"] if lora is None else str(Path(lora).absolute()),
        dim=made.spec.dim,
        projection=made.spec.projection,
        scales=source["scales"],
        draws=draws,
        seed=made.spec.seed,
        engine=engine,
        parameters=source["parameters"],
        resolution=source["resolution"],
        batch_size=batch_size,
        device=device,
        dtype=made.spec.dtype,
    )
    if not Path(options.model).is_dir():
        raise OptionError(f"the model of the store was at {options.model} and is not there; say where with --model DIR")
    loaded = load(options, message)
    spec.check_equal(
        loaded.spec.to_json(),
        made.spec.to_json(),
        what="the model",
        where=f"store {made.path.name}",
        advice="Pass the model and LoRA that the store was built with.",
    )
    return (loaded, options) if memory is None else within_memory(loaded, options, memory, 0, message)


def within_memory(
    loaded: Loaded, options: BuildOptions, memory: str, held: int, message: Message, workers: int = 1
) -> tuple[Loaded, BuildOptions]:
    """Choose the batch size by a budget, for all workers together; `held` bytes of each are for other things.

    Raises:
        OptionError: The budget is no size, or too small for one row.
    """
    denoiser, device = loaded.denoiser, torch.device(chosen(options.device))
    blank = np.zeros(denoiser.image_size, np.float32)

    def cost(rows: int) -> int:
        recipe = replace(loaded.recipe, num_draws=rows, curvature_rate=float(rows), batch_size=rows)
        return held + peak(lambda: rows and take_arrays(denoiser, recipe, ["blank"], [blank], [""]), device)

    rows = rows_within(parse_size(memory) // workers, cost, MAX_BATCH)
    message(f"batches of {rows} rows (image, draw), for a memory of {memory}")
    return replace(loaded, recipe=replace(loaded.recipe, batch_size=rows)), replace(options, batch_size=rows)


def _engine(name: str, denoiser: Denoiser, message: Message) -> str:
    """Choose an engine; never in silence when it is not the fast one."""
    missing = gradients.uncovered(denoiser.network, denoiser.parameters)
    if name == "auto":
        if not missing:
            return "hooks"
        message(f"the hooks engine has no rule for {missing[0]} ({len(missing)} parameters in all): using vmap, slower")
        return "vmap"
    if name not in gradients.ENGINES:
        raise OptionError(f"engine {name!r} is unknown; expected auto, {' or '.join(gradients.ENGINES)}")
    if name == "hooks" and missing:
        raise GradientError(
            f"the hooks engine has no rule for {missing[0]} ({len(missing)} parameters in all); "
            "use --engine vmap, or leave them out with --parameters"
        )
    return name
