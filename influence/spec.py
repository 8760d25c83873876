"""What identifies a feature space. Two features may meet only if their specs are equal, field by field."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from influence.errors import SpecMismatchError

FORMAT = 2


@dataclass(frozen=True)
class FeatureSpec:
    """Everything besides the image itself that changes a feature beyond rounding.

    Batch size, device, sharding, worker count and gradient engine are absent on purpose: they must not matter.
    """

    model: str
    """SHA-256 of the denoiser's base weights: names, shapes, dtypes and bytes."""
    config: str
    """SHA-256 of the configs of the denoiser, VAE and text encoder, where they differ from their classes' defaults."""
    encoders: str
    """SHA-256 of what turns a picture and a caption into the denoiser's inputs (VAE, text encoder, tokenizer)."""
    lora: str | None
    """SHA-256 of the adapter's weights and scaling; `None` for a full fine-tune."""
    parameters: str
    """SHA-256 of the ordered names and shapes of the parameters that gradients are taken of."""
    prediction: str
    """What the denoiser predicts: `epsilon`, `v_prediction` or `sample`."""
    weighting: str
    """w(t) of the training loss: `uniform` or `snr`."""
    schedule: str
    """SHA-256 of ᾱ."""
    sample_shape: tuple[int, ...]
    """Shape of one noised image or latent: (channels, height, width)."""
    conditional: bool
    """Whether the denoiser reads a caption."""
    projection: str
    """Name of the projection P."""
    dim: int
    """k, the number of entries of a feature."""
    seed: int
    """Key of P and of every draw."""
    dtype: str
    """Precision of the forward and backward passes: `fp32` or `bf16`."""
    metric: str = "plain"
    """SHA-256 of W, by which the gradient of each parameter is multiplied (`horizon.py`); `plain` for none."""
    output: str = "loss"
    """What is differentiated: `loss` (the training loss) or `square` (mean f², for D-TRAK)."""
    format: int = FORMAT
    """Version of the rules by which features are made (keys, draws and their batches, projection)."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self) | {"sample_shape": list(self.sample_shape)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "FeatureSpec":
        """Read the fields back.

        Raises:
            SpecMismatchError: The record has other fields than this version writes.
        """
        expected = [field.name for field in dataclasses.fields(cls)]
        if sorted(fields) != sorted(expected):
            odd = sorted(set(fields) ^ set(expected))
            raise SpecMismatchError(
                f"spec has unknown or missing fields: {', '.join(odd)}; made by another version: build another store"
            )
        return cls(**dict(fields) | {"sample_shape": tuple(fields["sample_shape"])})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def check_equal(found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str, where: str, advice: str) -> None:
    """Refuse two records that must describe the same thing and do not.

    Args:
        found: Fields of what is at hand.
        expected: Fields that it must have.
        what: Name of what is at hand, as in `the model given`.
        where: Name of what it is compared with, as in `store fonts.store`.
        advice: What to do about it.

    Raises:
        SpecMismatchError: Some field differs; the message names each and both values.
    """
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong:
        pairs = "; ".join(
            f"{name} is {_short(found.get(name))}, {where} has {_short(expected[name])}" for name in wrong
        )
        raise SpecMismatchError(f"{what} does not fit: {pairs}. {advice}")


def _short(value: Any) -> str:
    """A value for a message; hashes are cut to what a person compares."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return str(value)
