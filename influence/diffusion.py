"""The denoising loss of given draws, exactly as the model was trained, with the noise as an argument.

A *draw* is one pair (t, ε). For a clean image x₀ the noised image is x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε and the loss of the
draw is ℓ(x₀; t, ε) = w(t) · mean((f_θ(x_t, t, c) − y)²) with the target y that the network was trained to predict
(Ho et al., 2020; v-prediction: Salimans & Ho, 2022). Rows `[rows]` are (image, draw) pairs; the caller reduces.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from influence import keys
from influence.devices import onto
from influence.errors import ModelError

MAX_BATCHES = 8


@dataclass(frozen=True)
class NoiseSchedule:
    """Forward process and training target of a diffusion model with discrete timesteps."""

    alphas_cumprod: tuple[float, ...]
    """ᾱ_t for t = 0 … T − 1."""
    prediction: str
    """What the network predicts: `epsilon`, `v_prediction` or `sample`."""
    weighting: str
    """w(t) of the training loss: `uniform` (1), or `snr` (ᾱ_t / (1 − ᾱ_t))."""

    def __post_init__(self) -> None:
        """Refuse what no formula below covers.

        Raises:
            ModelError: The prediction type or the weighting is unknown.
        """
        if self.prediction not in TARGETS:
            raise ModelError(f"prediction type {self.prediction!r} is not supported; expected {', '.join(TARGETS)}")
        if self.weighting not in ("uniform", "snr"):
            raise ModelError(f"loss weighting {self.weighting!r} is not supported; expected uniform or snr")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)


def _table(schedule: NoiseSchedule, device: torch.device) -> Float64[Tensor, " timesteps"]:
    """ᾱ of all t."""
    return onto(device, torch.tensor(schedule.alphas_cumprod, dtype=torch.float64))


def _alpha_bar(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """ᾱ_t, shaped to broadcast against `like` `[rows, ...]`; gathered in float64 and rounded once."""
    return _table(schedule, like.device)[t].reshape(-1, *[1] * (like.ndim - 1))


def noised(
    schedule: NoiseSchedule,
    x0: Float[Tensor, "rows *shape"],
    t: Int[Tensor, " rows"],
    eps: Float[Tensor, "rows *shape"],
) -> Float[Tensor, "rows *shape"]:
    """x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε."""
    a = _alpha_bar(schedule, t, x0)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


def _epsilon(a: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    return eps


def _velocity(a: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    return a.sqrt().to(x0.dtype) * eps - (1 - a).sqrt().to(x0.dtype) * x0


def _sample(a: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    return x0


TARGETS = {"epsilon": _epsilon, "v_prediction": _velocity, "sample": _sample}


def target(
    schedule: NoiseSchedule,
    x0: Float[Tensor, "rows *shape"],
    t: Int[Tensor, " rows"],
    eps: Float[Tensor, "rows *shape"],
) -> Float[Tensor, "rows *shape"]:
    """What the network should predict for these draws: y."""
    return TARGETS[schedule.prediction](_alpha_bar(schedule, t, x0), x0, eps)


def weight(schedule: NoiseSchedule, t: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """w(t), float32."""
    if schedule.weighting == "uniform":
        return torch.ones(t.shape, device=t.device)
    a = _table(schedule, t.device)[t]
    return (a / (1 - a)).float()


def bits(schedule: NoiseSchedule, t: Int[Tensor, " rows"]) -> Float64[Tensor, " rows"]:
    """Weights of ℓ that make its mean over t the evidence bound, in bits per dimension.

    T · ½ (SNR(t − 1) − SNR(t)) · mean((x₀ − x̂₀)²) / ln 2 with SNR = ᾱ / (1 − ᾱ) (Kingma et al., 2021, for the bound of
    Ho et al., 2020), where the error of x̂₀ is that of the target times 1/SNR (epsilon), 1 − ᾱ (v) or 1 (sample). Left
    out are the prior's term, in which no network stands, that of t = 0, which depends on how pixels are read out, and
    that of a t where x_t is noise alone (SNR = 0) if ℓ does not tell the error of x̂₀ there: for epsilon, from which no
    x̂₀ follows, and where the weighting is by SNR, so that ℓ = 0 whatever was predicted.
    """
    a = _table(schedule, t.device)
    snr = a / (1 - a)
    fallen = torch.cat([torch.zeros_like(snr[:1]), snr[:-1] - snr[1:]])
    inverse = torch.where(snr > 0, 1 / snr, torch.zeros_like(snr))
    error = {"epsilon": inverse, "v_prediction": 1 - a, "sample": torch.ones_like(a)}[schedule.prediction]
    whole = schedule.num_timesteps * fallen * error / (2 * math.log(2))
    w = weight(schedule, t).double()
    return torch.where(w > 0, whole[t] / w, torch.zeros_like(w))


def losses(
    schedule: NoiseSchedule,
    prediction: Float[Tensor, "rows *shape"],
    x0: Float[Tensor, "rows *shape"],
    t: Int[Tensor, " rows"],
    eps: Float[Tensor, "rows *shape"],
) -> Float[Tensor, " rows"]:
    """ℓ of each row: w(t) · mean((f − y)²), in float32."""
    return weighted_errors(prediction, target(schedule, x0, t, eps), weight(schedule, t))


def weighted_errors(
    prediction: Float[Tensor, "rows *shape"], y: Float[Tensor, "rows *shape"], w: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """ℓ = w · mean((f − y)²) of each row, in float32, from its target and weight."""
    return w * (prediction.float() - y).flatten(1).square().mean(1)


def draws(
    seed: int,
    role: str,
    item_id: str,
    num_draws: int,
    num_timesteps: int,
    shape: tuple[int, ...],
    which: Sequence[int] | np.ndarray | None = None,
) -> tuple[Int[Tensor, " draws"], Float[Tensor, "draws *shape"]]:
    """The draws (t, ε) of one image: t stratified over the schedule, ε in antithetic pairs.

    Draw s takes t = ⌊(s + u_s) · T / S⌋, uniform in its own stratum; draws 2p and 2p + 1, neighbours in t, share one ε
    with opposite signs. They depend on the arguments alone: never on the batch, the order or the device.

    Args:
        seed: The store's seed.
        role: What the draws are for (`train` or `query`): a picture that plays both roles gets independent noise.
        item_id: Identity of the image.
        num_draws: S.
        num_timesteps: T.
        shape: Shape of one noised image or latent.
        which: Indices s of the draws wanted; all S by default.
    """
    wanted = np.arange(num_draws) if which is None else np.asarray(which, dtype=np.int64)
    u = keys.uniform(("timestep", seed, role, item_id, num_draws), num_draws)[wanted]
    t = np.floor((wanted + u) * num_timesteps / num_draws).astype(np.int64).clip(max=num_timesteps - 1)
    pairs = {p: keys.normal(("noise", seed, role, item_id, num_draws, int(p)), shape) for p in set(wanted // 2)}
    eps = np.empty((len(wanted), *shape), dtype=np.float32)
    for row, s in enumerate(wanted):
        eps[row] = pairs[s // 2] if s % 2 == 0 else -pairs[s // 2]
    return torch.from_numpy(t), torch.from_numpy(eps)


def num_batches(num_draws: int) -> int:
    """Into how many disjoint batches the draws of an image are divided: 8 or fewer, of equally many antithetic pairs.

    0 if the draws cannot be divided: then there is no standard error.
    """
    pairs, odd = divmod(num_draws, 2)
    fitting = [] if odd else [b for b in range(2, MAX_BATCHES + 1) if pairs % b == 0]
    return max(fitting, default=0)


def batch_of(num_draws: int) -> Int64[np.ndarray, " draws"]:
    """The batch of each draw; all in batch 0 if they cannot be divided.

    Pairs go round the batches, there and back: the means of batches differ by what their noise is, and not by where in
    each round they stand. With an even number of rounds whatever is linear in t has the same mean in all of them.
    """
    batches, pair = max(num_batches(num_draws), 1), np.arange(num_draws) // 2
    turn, place = np.divmod(pair, batches)
    return np.where(turn % 2 == 0, place, batches - 1 - place)


def curvature_draws(
    seed: int, item_id: str, num_draws: int, rate: float, density: Sequence[float] | None = None
) -> np.ndarray:
    """Draws of an image that give a curvature row, ascending; those that give several are there as often.

    The count is ⌊rate⌋, or one more with probability rate − ⌊rate⌋, decided by the image's own key: a pure function of
    the image, so that adding images to a data set never changes the rows of the others. They are evenly spread: over
    the schedule, or over the draws in proportion to `density`.
    """
    whole = int(np.floor(rate))
    u = keys.uniform(("curvature-draws", seed, item_id), 2)
    count = min(whole + int(u[0] < rate - whole), num_draws)
    edges = np.cumsum(np.ones(num_draws) if density is None else density)
    points = (np.arange(count) + u[1]) / max(count, 1)
    return np.searchsorted(edges / edges[-1], points, side="right").clip(max=num_draws - 1)


def probes(
    seed: int, item_id: str, draw_indices: np.ndarray, shape: tuple[int, ...], number: int = 0
) -> Float[Tensor, "rows *shape"]:
    """ξ ~ N(0, I) at the network's output for each of these draws: the first, or another one by its number."""
    more = (number,) if number else ()
    rows = [keys.normal(("probe", seed, item_id, int(s), *more), shape) for s in draw_indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))
