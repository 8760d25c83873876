"""Models of a fine-tune that methods ask beside its end: its base, points between, one of half the length."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence import models
from influence.errors import OptionError, StoreError
from influence.loading import Loaded
from influence.models import Denoiser

MIDDLE, LATE = 0.5, 0.75
"""Points between the base and the fine-tune, as parts of the way: of `path`, in the middle, and of `two-point`, where
half of the steps have brought it, since they slow down."""


def base_is_known(source: Mapping[str, Any]) -> bool:
    """Whether a store knows which weights its fine-tune started from: those of a LoRA, or what build was told."""
    return source["lora"] is not None or source.get("base_model") is not None


def base_identity(source: Mapping[str, Any], finetuned: Denoiser) -> str | None:
    """Hash of the weights that a store's fine-tune started from; `None` if nothing says which they are."""
    return finetuned.identity["model"] if source["lora"] is not None else source.get("base_model")


def default_method(source: Mapping[str, Any]) -> str:
    """The method that foretells retraining best of those that a store's source allows."""
    if source.get("half") is not None:
        return "two-length"
    return "two-point" if base_is_known(source) else "gauss-newton"


def load_base(
    source: Mapping[str, Any],
    finetuned: Denoiser,
    base: str | os.PathLike[str] | None,
    device: str,
    *,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> Denoiser | None:
    """The model before the fine-tune, `None` if nothing says which it is.

    That of a LoRA is the same network with an adapter that does nothing (lora_B = 0), so that it has gradients of the
    same parameters.

    Args:
        source: Where the store's fine-tuned model came from.
        finetuned: The model after the fine-tune.
        base: Where the base is; by default as the store says.
        device: Where to put it.
        model: Where the model that a LoRA was put on is now, if it was moved.
        lora: Where the LoRA is now.

    Raises:
        ModelError: It is not there, or cannot be loaded.
        OptionError: It is another than at build, or predicts something else than the fine-tuned model.
    """
    path = source.get("base") if base is None else str(Path(base).absolute())
    options = {"parameters": source["parameters"], "resolution": source["resolution"], "device": device}
    if source["lora"] is not None:
        found = models.load_denoiser(
            Path(source["model"] if path is None else path) if model is None else Path(model),
            lora=Path(source["lora"] if lora is None else lora), **options,
        )  # fmt: skip
        models.silence_lora(found)
    elif path is not None:
        found = models.load_denoiser(Path(path), **options)
    else:
        return None
    known = base_identity(source, finetuned)
    encoders = finetuned.identity["encoders"] if source["lora"] is not None else source.get("base_encoders")
    if known not in (None, found.identity["model"]) or encoders not in (None, found.identity["encoders"]):
        raise OptionError(f"the base at {path or source['model']} is not the one that the store was built with")
    _require_alike(found, finetuned, f"the base at {path}", "pass the pipeline that the fine-tune started from")
    return found


def load_half(
    source: Mapping[str, Any],
    finetuned: Denoiser,
    device: str,
    *,
    half: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
) -> Denoiser:
    """The model of a fine-tune of half as many epochs.

    Args:
        source: Where the store's models came from.
        finetuned: The model after the whole fine-tune.
        device: Where to put it.
        half: Where it is now, if it was moved.
        model: Where the model that a LoRA was put on is now.

    Raises:
        ModelError: It cannot be loaded.
        OptionError: It is not there, another than at build, or not of this fine-tune.
    """
    path = Path(source["half"] if half is None else half)
    if not path.exists():
        raise OptionError(f"the model of half the length was at {path} and is not there; say where with --half DIR")
    found = _sibling(source, path, device, model)
    known = source.get("half_model")
    if known is not None and half_identity(found) != known:
        raise OptionError(f"the model of half the length at {path} is not the one that the store was built with")
    advice = "pass what the same fine-tune made in half of its epochs, as influence halve does"
    if half_identity(found) == half_identity(finetuned):
        raise OptionError(f"the model of half the length at {path} is the fine-tuned model itself; {advice}")
    _require_alike(found, finetuned, f"the model of half the length at {path}", advice)
    require_same_parameters(found, finetuned, "the model of half the length", advice)
    return found


def load_alone(
    source: Mapping[str, Any],
    finetuned: Denoiser,
    path: Path,
    device: str,
    *,
    model: str | os.PathLike[str] | None = None,
) -> Denoiser:
    """The model of one creator's works alone; arguments as for `load_half`, `path` of a model that `solo` made.

    Raises:
        ModelError: It cannot be loaded.
        OptionError: It is not of this fine-tune.
    """
    found = _sibling(source, path, device, model)
    advice = "pass what influence solo makes with the base and the recipe of this fine-tune"
    _require_alike(found, finetuned, f"the model at {path}", advice)
    require_same_parameters(found, finetuned, f"the model at {path}", advice)
    return found


def _sibling(source: Mapping[str, Any], path: Path, device: str, model: str | os.PathLike[str] | None) -> Denoiser:
    """Another model, or another LoRA on the same one."""
    options = {"parameters": source["parameters"], "resolution": source["resolution"], "device": device}
    if source["lora"] is None:
        return models.load_denoiser(path, **options)
    return models.load_denoiser(Path(source["model"] if model is None else model), lora=path, **options)


def half_identity(denoiser: Denoiser) -> str:
    """What tells the model of half the length from another: hash of its LoRA, or of its weights."""
    return denoiser.identity["lora"] or denoiser.identity["model"]


def _require_alike(found: Denoiser, finetuned: Denoiser, what: str, advice: str) -> None:
    here, there = (
        (each.identity["schedule"], each.schedule.prediction, tuple(each.sample_shape), each.conditional, each.latents)
        for each in (found, finetuned)
    )
    names = ("schedule", "prediction", "sample shape", "captions", "VAE")
    for name, a, b in zip(names, here, there, strict=True):
        if a != b:
            raise OptionError(f"{what} has another {name} ({a}) than the fine-tuned model ({b}); {advice}")


def require_same_parameters(found: Denoiser, finetuned: Denoiser, what: str, advice: str) -> None:
    """Refuse a model that is not of the same fine-tune.

    Raises:
        OptionError: Their parameters differ in number or shape, or their configs do.
    """
    here, there = ({name: tuple(p.shape) for name, p in each.parameters.items()} for each in (found, finetuned))
    differ = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differ:
        raise OptionError(
            f"{what} has other parameters than the fine-tuned model: {differ[0]} is {here.get(differ[0])} and "
            f"{there.get(differ[0])} ({len(differ)} differ); {advice}"
        )
    if found.identity["config"] != finetuned.identity["config"]:
        raise OptionError(
            f"{what} has another config.json than the fine-tuned model, and computes something else with parameters "
            f"of the same shapes; {advice}"
        )


def where_now(source: Mapping[str, Any], **given: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Where models are: as the store has it, but for those that are given as `model`, `lora`, `base` or `half`.

    The base of a LoRA is the model that it was put on, and was moved with it.
    """
    now = {name: str(Path(path).absolute()) for name, path in given.items() if path is not None}
    with_it = {"base": None} if source["lora"] is not None and "model" in now else {}
    return {**source, **with_it, **now}


def model_of(
    family: str,
    source: Mapping[str, Any],
    loaded: Loaded,
    *,
    before: Denoiser | None = None,
    half: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> Loaded:
    """The model that a family of features is taken of.

    It is the fine-tuned one (`loss`, `square`), its base (`base`), one between these (`middle`, `late`), or one of half
    as many epochs (`half`).

    Args:
        family: Name in `FAMILIES`.
        source: Where the store's models came from.
        loaded: The fine-tuned model, and how features are taken.
        before: The base, if it is loaded already.
        half: Where the model of half the length is now, if it was moved.
        model: Where the model is now, if it was moved.
        lora: Where the LoRA is now.

    Raises:
        InfluenceError: A model cannot be loaded, or is of another fine-tune.
        StoreError: It is not known where the base is.
    """
    if family in ("loss", "square"):
        return loaded
    moved = {"model": model if source["lora"] is not None else None}
    if family == "half":
        found = load_half(source, loaded.denoiser, loaded.device, half=half, **moved)
    else:
        if before is None:
            before = load_base(source, loaded.denoiser, None, loaded.device, lora=lora, **moved)
        if before is None:
            raise StoreError("the store does not say where its model was before the fine-tune")
        part = {"base": 0.0, "middle": MIDDLE, "late": LATE}[family]
        found = models.between(before, loaded.denoiser, part) if part else before
    return Loaded(found, loaded.spec, replace(loaded.recipe, parameters=found.parameters))


def way(source: Mapping[str, Any], finetuned: Denoiser) -> Iterator[tuple[float, Denoiser]]:
    """Models on the way of a fine-tune, and the part of its steps that each stands for, by the trapezoidal rule.

    The end alone, if the base is not known. Models are loaded as they are asked for, one beside the fine-tuned one.
    """
    if not base_is_known(source):
        yield 1.0, finetuned
        return
    device = str(next(iter(finetuned.parameters.values())).device)
    base = load_base(source, finetuned, None, device)
    assert base is not None
    yield 0.25, base
    yield 0.5, models.between(base, finetuned, LATE)
    del base
    yield 0.25, finetuned
