"""A small honest trainer and a deterministic sampler; retraining on a subset is the same call with `members`.

The images of a batch, the timesteps and the noise of step i are functions of (seed, i) alone: two runs that differ only
in what they train, or in `members`, see the same noise at the same place of the same step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence import diffusion, keys
from influence.diffusion import NoiseSchedule
from influence.errors import GradientError, OptionError

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Called with x_t `[rows, *shape]`, t `[rows]` and the condition `[rows, ...]` or None; returns `[rows, *shape]`."""


def initialise(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """Draw keyed initial weights: uniform within 1/√(inputs), as torch's own; norms start as the identity."""
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            values = torch.full(parameter.shape, float("norm" in name and name.endswith("weight")))
        else:
            u = keys.uniform(("initial", seed, name), parameter.numel())
            bound = (parameter.numel() / len(parameter)) ** -0.5
            values = torch.from_numpy((2 * u - 1) * bound).float().reshape(parameter.shape)
        parameter.data.copy_(values)


def member_indices(members: np.ndarray | Tensor | Sequence[int] | Sequence[bool] | None, count: int) -> np.ndarray:
    """Indices of the training images, ascending.

    Args:
        members: A boolean for each of the images, or indices of images, or None for all.
        count: Number of images.

    Raises:
        OptionError: The mask has another length, an index is out of range or repeated, or nothing is left.
    """
    if members is None:
        return np.arange(count)
    chosen = members.detach().cpu().numpy() if isinstance(members, Tensor) else np.asarray(members)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "biu":
        raise OptionError(
            f"members has shape {chosen.shape} and type {chosen.dtype}; expected one boolean for each image, or a "
            "non-empty list of indices; pass None to train on all images"
        )
    if chosen.dtype == bool:
        if len(chosen) != count:
            raise OptionError(
                f"members is a mask of {len(chosen)} booleans; expected {count}, one for each image; "
                "make the mask from the same images"
            )
        chosen = np.flatnonzero(chosen)
    if chosen.size == 0:
        raise OptionError("members is a mask without a True; expected at least one image; choose a larger subset")
    if chosen.min() < 0 or chosen.max() >= count:
        raise OptionError(
            f"members has indices from {chosen.min()} to {chosen.max()}; expected 0 to {count - 1}; "
            "number the images from 0 in the order of x0"
        )
    if len(np.unique(chosen)) != len(chosen):
        raise OptionError("members repeats an index; expected each image at most once; remove the duplicates")
    return np.sort(chosen).astype(np.int64)


def batch_indices(seed: int, step: int, batch_size: int, members: np.ndarray) -> np.ndarray:
    """Images of one step: the members in a new random order each epoch, without a break between epochs."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // len(members)
    chosen = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.argsort(keys.uniform(("train", seed, "order", int(epoch)), len(members)), kind="stable")
        here = epochs == epoch
        chosen[here] = members[order[places[here] % len(members)]]
    return chosen


def timesteps(seed: int, step: int, batch_size: int, num_timesteps: int, stratified: bool) -> np.ndarray:
    """Timesteps of one step: uniform, each for itself or one from each stratum."""
    u = keys.uniform(("train", seed, step, "timesteps"), batch_size)
    if stratified:
        place = np.argsort(keys.uniform(("train", seed, step, "strata"), batch_size), kind="stable")
        u = (place + u) / batch_size
    return np.floor(u * num_timesteps).astype(np.int64)


def train(
    network: nn.Module,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "images *shape"],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    cond: Tensor | None = None,
    members: np.ndarray | Tensor | Sequence[int] | Sequence[bool] | None = None,
    ema_decay: float | None = None,
    weight_decay: float = 0.01,
    learning_rate_schedule: Literal["constant", "cosine"] = "constant",
    stratified: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train the network in place with AdamW on the mean of `diffusion.losses` over the batch.

    Only parameters that require a gradient are trained, where they are. The network is put, and left, in eval mode:
    dropout would draw from torch's global generator.

    Args:
        network: Called as `network(x_t, t, cond)`.
        schedule: Noise schedule and target of the network.
        x0: Clean images or latents, float32.
        steps: Number of optimizer steps.
        batch_size: Rows of a step: each one image with one draw (t, ε), t uniform.
        learning_rate: AdamW's learning rate, at its highest.
        seed: Key of the batches, timesteps and noise. The initial weights are the caller's.
        cond: What the network reads besides, one entry for each image.
        members: Restricts the training to a subset: a mask or a list of indices.
        ema_decay: If given, the weights end as their exponential moving average, whose decay at step i is at most
            (1 + i) / (10 + i), so that the initial weights are soon forgotten.
        weight_decay: AdamW's decoupled weight decay.
        learning_rate_schedule: `constant`, or `cosine` (half a cosine down to 0).
        stratified: Draw the timesteps of a batch one from each of `batch_size` strata, in random order, instead of
            independently: the same density with less noise (Kingma et al., 2021).
        progress: Called after each step with the number of steps done and the step's loss.

    Raises:
        OptionError: An argument has a value that cannot be used, or no parameter requires a gradient.
        GradientError: A loss is not finite.
    """
    _check_positive(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    if weight_decay < 0:
        raise OptionError(f"weight_decay is {weight_decay}; expected 0 or more; pass 0 for none")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise OptionError(f"ema_decay is {ema_decay}; expected a number between 0 and 1; pass None for no average")
    if learning_rate_schedule not in ("constant", "cosine"):
        raise OptionError(
            f"learning_rate_schedule is {learning_rate_schedule!r}; expected 'constant' or 'cosine'; choose one of them"
        )
    if x0.ndim < 2 or len(x0) == 0 or x0.dtype != torch.float32:
        raise OptionError(
            f"x0 has shape {tuple(x0.shape)} and type {x0.dtype}; expected float32 images [images, *shape], at least "
            "one; stack the clean images along a first axis"
        )
    if cond is not None and len(cond) != len(x0):
        raise OptionError(f"cond has {len(cond)} entries for {len(x0)} images; expected one for each; repeat or cut it")
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise OptionError("no parameter of the network requires a gradient; expected at least one; unfreeze some")
    chosen = member_indices(members, len(x0))
    device = parameters[0].device
    network.eval()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    averages = [parameter.detach().clone() for parameter in parameters] if ema_decay is not None else []
    for step in range(steps):
        if learning_rate_schedule == "cosine":
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        batch = torch.from_numpy(batch_indices(seed, step, batch_size, chosen))
        t = torch.from_numpy(timesteps(seed, step, batch_size, schedule.num_timesteps, stratified))
        eps = torch.from_numpy(keys.normal(("train", seed, step, "noise"), (batch_size, *x0.shape[1:])))
        clean, t, eps = x0[batch.to(x0.device)].to(device), t.to(device), eps.to(device)
        rows = None if cond is None else cond[batch.to(cond.device)].to(device)
        prediction = network(diffusion.noised(schedule, clean, t, eps), t, rows)
        loss = diffusion.losses(schedule, prediction, clean, t, eps).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise GradientError(
                f"the loss of step {step} is {value}; expected a finite number; lower the learning rate "
                f"({learning_rate}) or check the images and the initial weights"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if ema_decay is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        if progress is not None:
            progress(step + 1, value)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=False):
            parameter.copy_(average)
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def generate(
    network: Network,
    schedule: NoiseSchedule,
    *,
    count: int,
    shape: tuple[int, ...],
    seed: int,
    steps: int = 50,
    cond: Tensor | None = None,
    names: Sequence[keys.Key] | None = None,
    clip: float | None = 1.0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "count *shape"]:
    """Sample images by deterministic DDIM (Song et al., 2021; η = 0), on evenly spaced timesteps from T − 1 to 0.

    Each image starts from noise that depends on the seed and its name alone.

    Args:
        network: Called as `network(x_t, t, cond)`.
        schedule: Noise schedule and target of the network.
        count: Number of images.
        shape: Shape of one image.
        seed: Key of the initial noise.
        steps: Number of calls of the network for each image, at most T.
        cond: What the network reads besides, one entry for each image.
        names: A key for each image, for its noise; its number by default.
        clip: Bound of |x₀|, to which the estimate of x₀ is clipped in each step; None for latents.
        batch_size: Images that go through the network at once.
        device: Where the network is.

    Returns:
        The images, float32, on the CPU.

    Raises:
        OptionError: An argument has a value that cannot be used.
    """
    _check_positive(count=count, steps=steps, batch_size=batch_size)
    if steps > schedule.num_timesteps:
        raise OptionError(
            f"steps is {steps}; expected at most {schedule.num_timesteps}, the timesteps of the schedule; lower it"
        )
    if clip is not None and not clip > 0:
        raise OptionError(f"clip is {clip}; expected a positive number; pass None not to clip")
    if cond is not None and len(cond) != count:
        raise OptionError(f"cond has {len(cond)} entries for {count} images; expected one for each; repeat or cut it")
    if names is not None and len(names) != count:
        raise OptionError(f"there are {len(names)} names for {count} images; expected one for each")
    last = schedule.num_timesteps - 1
    timesteps = np.round(np.linspace(last, 0, steps)).astype(np.int64)
    images = []
    for first in range(0, count, batch_size):
        rows = range(first, min(first + batch_size, count))
        noise = np.stack([keys.normal(("generate", seed, *((i,) if names is None else names[i])), shape) for i in rows])
        x = torch.from_numpy(noise).to(device)
        c = None if cond is None else cond[rows.start : rows.stop].to(device)
        for k, now in enumerate(timesteps):
            a = schedule.alphas_cumprod[now]
            a_next = schedule.alphas_cumprod[timesteps[k + 1]] if k + 1 < steps else 1.0
            t = torch.full((len(x),), int(now), device=device)
            clean = estimate_x0(schedule, network(x, t, c).float(), x, a)
            if clip is not None:
                clean = clean.clamp(-clip, clip)
            eps = (x - math.sqrt(a) * clean) / math.sqrt(1 - a)
            x = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
        images.append(x.cpu())
    return torch.cat(images)


def estimate_x0(schedule: NoiseSchedule, prediction: Tensor, x: Tensor, a: float) -> Tensor:
    """The clean image that a prediction at x_t implies, where ᾱ_t = a."""
    if schedule.prediction == "sample":
        return prediction
    if schedule.prediction == "v_prediction":
        return math.sqrt(a) * x - math.sqrt(1 - a) * prediction
    return (x - math.sqrt(1 - a) * prediction) / math.sqrt(a)


def _check_positive(**options: int | float) -> None:
    for name, value in options.items():
        if not value > 0 or not math.isfinite(value):
            raise OptionError(f"{name} is {value}; expected a positive number; pass a larger one")
