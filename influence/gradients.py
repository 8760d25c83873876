"""Per-sample gradients of scalars of the denoiser's prediction, projected as they appear. Two engines, one meaning.

For rows r = (image, draw) with scalars m_r(f_θ(x_r, t_r, c_r)), both engines return P · Σ_{r ∈ group} ∇_θ m_r for each
group of consecutive rows. `vmap` is the reference: any module, any parameter, all gradients of a chunk in memory.
`hooks` does one forward and one backward for each output, and never holds more than one layer's gradients.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.devices import exact, passes
from influence.errors import GradientError
from influence.projection import Projection

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Inputs:
    """What the network is called with: `network(x_t, t, cond)`."""

    x_t: Float[Tensor, "rows *shape"]
    t: Int[Tensor, " rows"]
    cond: Float[Tensor, "rows tokens width"] | None = None


@dataclass(frozen=True)
class Output:
    """A scalar of each row, whose gradient is taken."""

    value: Callable[..., Float[Tensor, " rows"]]
    """m: `value(prediction, *tensors)`; row by row."""
    tensors: tuple[Tensor, ...]
    """What `value` needs beside the prediction, `[rows, ...]` each."""
    group: int
    """Number of consecutive rows whose gradients are summed."""


@dataclass(frozen=True)
class Result:
    """Of one `Output`."""

    features: Float[Tensor, "groups k"]
    values: Float[Tensor, " rows"]


def uncovered(network: nn.Module, parameters: Parameters) -> list[str]:
    """Names of the parameters for which the hooks engine has no rule."""
    covered = {id(p) for module, names in _holders(network, parameters) if _covers(module) for p, _ in names}
    return [name for name, parameter in parameters.items() if id(parameter) not in covered]


def per_sample_gradients(
    network: nn.Module,
    parameters: Parameters,
    inputs: Inputs,
    outputs: Sequence[Output],
    projection: Projection,
    *,
    engine: str,
    bf16: bool = False,
) -> list[Result]:
    """Project the gradients of every output, by the engine named.

    Args:
        network: Called as `network(x_t, t, cond)`; its flags (training, requires_grad) are restored afterwards.
        parameters: What the gradients are of.
        inputs: The rows.
        outputs: Scalars of the rows; they share one forward.
        projection: P.
        engine: `hooks` or `vmap`.
        bf16: Run the forward and backward passes in bfloat16 autocast; features stay float32.

    Raises:
        GradientError: A parameter has no rule (hooks), or no gradient reached it.
    """
    with _frozen(network), exact(), passes(inputs.x_t.device, bf16):
        return ENGINES[engine](network, parameters, inputs, outputs, projection)


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter asking for its own gradient; both as before at the end."""
    flags = [(p, p.requires_grad) for p in network.parameters()]
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _empty(outputs: Sequence[Output], inputs: Inputs, projection: Projection) -> list[Tensor]:
    """Zeroed features for each output, to be added to."""
    rows = len(inputs.x_t)
    for output in outputs:
        if rows % output.group:
            raise GradientError(f"{rows} rows do not split into groups of {output.group}")
    return [torch.zeros(rows // o.group, projection.dim, device=inputs.x_t.device) for o in outputs]


# The reference ------------------------------------------------------------------------------------------------------

_VMAP_BYTES = 1 << 30


def _vmap(
    network: nn.Module, parameters: Parameters, inputs: Inputs, outputs: Sequence[Output], projection: Projection
) -> list[Result]:
    """`vmap(grad(functional_call))` over groups; the rows of a group are an ordinary batch inside."""
    _check_reached(network, parameters, inputs)
    own = {id(parameter): name for name, parameter in network.named_parameters()}
    theta = {own[id(parameter)]: parameter for parameter in parameters.values()}
    names = dict(zip(theta, parameters, strict=True))
    size = 4 * sum(p.numel() for p in theta.values())
    results = []
    for output, features in zip(outputs, _empty(outputs, inputs, projection), strict=True):

        def scalar(
            theta: dict[str, Tensor],
            x_t: Tensor,
            t: Tensor,
            cond: Tensor | None,
            *tensors: Tensor,
            output: Output = output,
        ) -> tuple[Tensor, Tensor]:
            prediction = torch.func.functional_call(network, theta, (x_t, t, cond), tie_weights=True)
            values = output.value(prediction, *tensors)
            return values.sum(), values.detach()

        def grouped(tensor: Tensor, group: int = output.group) -> Tensor:
            return tensor.unflatten(0, (-1, group))

        cond = None if inputs.cond is None else grouped(inputs.cond)
        per_group = torch.func.vmap(
            torch.func.grad(scalar, has_aux=True),
            in_dims=(None, 0, 0, None if cond is None else 0, *[0] * len(output.tensors)),
        )
        step = max(1, _VMAP_BYTES // size)
        arguments = [grouped(inputs.x_t), grouped(inputs.t), cond, *map(grouped, output.tensors)]
        values = []
        for start in range(0, len(features), step):
            part = [None if a is None else a[start : start + step] for a in arguments]
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule for their backward
                grads, value = per_group(theta, *part)
            values.append(value.flatten())
            for name, grad in grads.items():
                projection.add(features[start : start + step], names[name], grad.flatten(1).float())
        results.append(Result(features, torch.cat(values)))
    return results


def _check_reached(network: nn.Module, theta: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Refuse a parameter that the prediction does not depend on: vmap would give it zeros in silence."""
    for parameter in theta.values():
        parameter.requires_grad_(True)
    cond = None if inputs.cond is None else inputs.cond[:1]
    prediction = network(inputs.x_t[:1], inputs.t[:1], cond)
    grads = torch.autograd.grad(prediction.sum(), list(theta.values()), allow_unused=True)
    for parameter in theta.values():
        parameter.requires_grad_(False)
    refuse_missing([name for name, grad in zip(theta, grads, strict=True) if grad is None])


def refuse_missing(names: Sequence[str]) -> None:
    """Refuse parameters that no gradient reached, by name.

    Raises:
        GradientError: There are some.
    """
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise GradientError(
            f"no gradient reached {shown}: the network does not use it in this forward; leave it out with --parameters"
        )


# The fast engine ----------------------------------------------------------------------------------------------------


def _hooks(
    network: nn.Module, parameters: Parameters, inputs: Inputs, outputs: Sequence[Output], projection: Projection
) -> list[Result]:
    """Form each layer's per-group gradients from its input and its output's gradient, sketch them, drop them."""
    missing = uncovered(network, parameters)
    if missing:
        raise GradientError(
            f"the hooks engine has no rule for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; "
            "use --engine vmap, or leave them out with --parameters"
        )
    rows = len(inputs.x_t)
    state = _Pass()
    leaves: list[Tensor] = []
    handles = [
        module.register_forward_hook(_forward_hook(names, rows, state, leaves, projection))
        for module, names in _holders(network, parameters)
    ]
    try:
        with torch.enable_grad():
            prediction = network(inputs.x_t, inputs.t, inputs.cond)
    finally:
        for handle in handles:
            handle.remove()
    if not leaves:
        refuse_missing(list(parameters))
    results = []
    for last, (output, features) in enumerate(zip(outputs, _empty(outputs, inputs, projection), strict=True), 1):
        state.group, state.features, state.reached = output.group, features, set()
        point = prediction.detach().requires_grad_()
        values = output.value(point, *output.tensors)
        (cotangent,) = torch.autograd.grad(values.sum(), point)
        torch.autograd.grad(prediction, leaves, cotangent, retain_graph=last < len(outputs), allow_unused=True)
        refuse_missing([name for name in parameters if name not in state.reached])
        results.append(Result(features, values.detach()))
    return results


@dataclass
class _Pass:
    """What the tensor hooks of a backward pass write to; set anew before each."""

    group: int = 1
    features: Tensor | None = None
    reached: set[str] = field(default_factory=set)


def _holders(network: nn.Module, parameters: Parameters) -> list[tuple[nn.Module, list[tuple[nn.Parameter, str]]]]:
    """Modules that hold selected parameters themselves, with those parameters and their selected names."""
    selected = {id(parameter): name for name, parameter in parameters.items()}
    holders = []
    for module in network.modules():
        names = [(p, selected[id(p)]) for p in module.parameters(recurse=False) if id(p) in selected]
        if names:
            holders.append((module, names))
    return holders


def _forward_hook(
    names: list[tuple[nn.Parameter, str]], rows: int, state: _Pass, leaves: list[Tensor], projection: Projection
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Keep the module's input, and act when its output's gradient arrives; a module called twice acts twice."""

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        for tensor, side in ((x, "input"), (output, "output")):
            if tensor.shape[0] != rows:
                raise GradientError(
                    f"{names[0][1]}: its layer's {side} has {tensor.shape[0]} rows where {rows} were expected; "
                    "the hooks engine cannot tell images apart here, use --engine vmap"
                )
        if not output.requires_grad:
            # Autograd prunes what does not depend on an input that asks for gradients, such as time embeddings.
            output.requires_grad_(True)
            leaves.append(output)
        version = x._version

        def backward(grad: Tensor) -> None:
            if x._version != version:
                raise GradientError(f"{names[0][1]}: its layer's input was changed in place; use --engine vmap")
            rule = RULES[type(module)]
            wanted = {id(parameter) for parameter, _ in names}
            lookup = {id(parameter): name for parameter, name in names}
            for start, stop in _chunks(rule.bytes(module, x), rows, state.group, x.device):
                for parameter, grads in rule.gradients(module, x[start:stop], grad[start:stop], state.group):
                    if id(parameter) in wanted:
                        part = slice(start // state.group, stop // state.group)
                        projection.add(state.features[part], lookup[id(parameter)], grads.flatten(1).float())
            state.reached.update(lookup.values())

        output.register_hook(backward)

    return forward


def _chunk_bytes(device: torch.device) -> int:
    """Little for a CPU, whose allocator keeps no larger blocks; more for a GPU, which wants few launches."""
    return 1 << (25 if device.type == "cpu" else 28)


def _chunks(row_bytes: int, rows: int, group: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of whole groups whose temporaries fit in a constant amount of memory."""
    step = max(1, _chunk_bytes(device) // max(1, row_bytes * group)) * group
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


# Rules: the gradient of one layer's parameters, per group of rows ---------------------------------------------------

Gradients = Iterator[tuple[nn.Parameter | None, Tensor]]


@dataclass(frozen=True)
class Rule:
    """How to form the per-group parameter gradients of one kind of layer."""

    gradients: Callable[[nn.Module, Tensor, Tensor, int], Gradients]
    """`gradients(module, input, output gradient, group)` → pairs (parameter, gradients [groups, *shape])."""
    covers: Callable[[nn.Module], bool] = lambda module: True
    """Whether this module's settings are ones the rule is right for."""
    bytes: Callable[[nn.Module, Tensor], int] = lambda module, x: 4 * x[0].numel()
    """Size of the temporaries of one row."""


def _covers(module: nn.Module) -> bool:
    rule = RULES.get(type(module))
    return rule is not None and rule.covers(module)


def _linear(module: nn.Linear, x: Tensor, grad: Tensor, group: int) -> Gradients:
    x = x.reshape(len(x) // group, -1, x.shape[-1])  # [groups, draws × positions, in]
    grad = grad.reshape(len(x), -1, grad.shape[-1])  # [groups, draws × positions, out]
    yield module.weight, torch.bmm(grad.mT, x.to(grad.dtype))
    if module.bias is not None:
        yield module.bias, grad.sum(1)


def _weight_bytes(module: nn.Linear | nn.Embedding, x: Tensor) -> int:
    return 4 * module.weight.numel()


def _conv2d(module: nn.Conv2d, x: Tensor, grad: Tensor, group: int) -> Gradients:
    if module.bias is not None:
        yield module.bias, grad.sum((2, 3)).unflatten(0, (-1, group)).sum(1)
    form = _conv2d_by_group if x.device.type == "cpu" else _conv2d_by_product
    yield module.weight, form(module, x.to(grad.dtype), grad, group)


def _conv2d_by_group(module: nn.Conv2d, x: Tensor, grad: Tensor, group: int) -> Tensor:
    """The library's own weight gradient, once for each group: on a CPU several times faster than unfolding.

    They are put together in float32, which bfloat16 has to become in any case.
    """
    rest = (None, module.stride, module.padding, module.dilation, False, (0, 0), module.groups, (False, True, False))
    dtype = torch.promote_types(grad.dtype, torch.float32)
    found = grad.new_empty(len(grad) // group, *module.weight.shape, dtype=dtype)
    for i, (g, rows) in enumerate(zip(grad.split(group), x.split(group), strict=True)):
        found[i] = torch.ops.aten.convolution_backward(g, rows, module.weight, *rest)[1]
    return found


def _conv2d_by_product(module: nn.Conv2d, x: Tensor, grad: Tensor, group: int) -> Tensor:
    """One batched product over draws × positions, for a GPU: few launches, whatever the number of groups and draws."""
    (rows, columns), (high, wide) = module.padding, module.kernel_size
    x = F.pad(x, (columns, columns, rows, rows))
    for axis, size in ((2, high), (3, wide)):  # a view: what each position sees, [rows, in, positions, offsets]
        span = (size - 1) * module.dilation[axis - 2] + 1
        x = x.unfold(axis, span, module.stride[axis - 2])[..., :: module.dilation[axis - 2]]
    # [groups, draws, blocks, channels, …], with the convolution's own groups as blocks
    x, grad = (part.unflatten(0, (-1, group)).unflatten(2, (module.groups, -1)) for part in (x, grad))
    seen = x.permute(0, 2, 3, 6, 7, 1, 4, 5).flatten(5).flatten(2, 4)  # [groups, blocks, in × offsets, positions]
    weight = grad.permute(0, 2, 3, 1, 4, 5).flatten(3) @ seen.mT
    return weight.reshape(-1, *module.weight.shape)


def _conv2d_bytes(module: nn.Conv2d, x: Tensor) -> int:
    return 4 * max(x[0].numel() * math.prod(module.kernel_size), module.weight.numel())


def _conv2d_covers(module: nn.Conv2d) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _affine(normalised: Tensor, module: nn.Module, grad: Tensor, group: int, axes: tuple[int, ...]) -> Gradients:
    """Scale and shift after a normalisation; `axes` are those that the parameters do not have."""
    total = (grad * normalised).sum(axes) if axes else grad * normalised
    yield module.weight, total.unflatten(0, (-1, group)).sum(1)
    if getattr(module, "bias", None) is not None:
        total = grad.sum(axes) if axes else grad
        yield module.bias, total.unflatten(0, (-1, group)).sum(1)


def _group_norm(module: nn.GroupNorm, x: Tensor, grad: Tensor, group: int) -> Gradients:
    normalised = F.group_norm(x, module.num_groups, eps=module.eps)
    return _affine(normalised, module, grad, group, tuple(range(2, x.ndim)))


def _layer_norm(module: nn.LayerNorm, x: Tensor, grad: Tensor, group: int) -> Gradients:
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _affine(normalised, module, grad, group, tuple(range(1, x.ndim - len(module.normalized_shape))))


def _rms_norm(module: nn.RMSNorm, x: Tensor, grad: Tensor, group: int) -> Gradients:
    normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return _affine(normalised, module, grad, group, tuple(range(1, x.ndim - len(module.normalized_shape))))


def _embedding(module: nn.Embedding, x: Tensor, grad: Tensor, group: int) -> Gradients:
    groups = len(x) // group
    index = x.reshape(groups, -1)  # [groups, draws × tokens]
    grad = grad.reshape(groups, -1, grad.shape[-1])
    total = torch.zeros(groups, *module.weight.shape, dtype=grad.dtype, device=grad.device)
    total.scatter_add_(1, index[..., None].expand_as(grad), grad)
    yield module.weight, total


def _embedding_covers(module: nn.Embedding) -> bool:
    return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(_linear, bytes=_weight_bytes),
    nn.Conv2d: Rule(_conv2d, covers=_conv2d_covers, bytes=_conv2d_bytes),
    nn.GroupNorm: Rule(_group_norm),
    nn.LayerNorm: Rule(_layer_norm),
    nn.RMSNorm: Rule(_rms_norm),
    nn.Embedding: Rule(_embedding, covers=_embedding_covers, bytes=_weight_bytes),
}

ENGINES = {"hooks": _hooks, "vmap": _vmap}
