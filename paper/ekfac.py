"""EK-FAC influence, unprojected: the reference that the comparison holds the projected methods against.

τ(q, i) = (1/N) Σ_l ⟨Q_Gᵀ g_q Q_A / (Λ + δ_l), Q_Gᵀ g_i Q_A⟩ over layers l (George et al., 2018; for diffusion models
Mlodozeniec et al., 2025): Q_A and Q_G are the eigenvectors of the second moments of a layer's inputs and of the
pseudo-gradients at its outputs, Λ the second moments of pseudo-gradients in that basis, δ_l = ρ · mean(Λ). Linear and
convolution layers, biases as an input of ones; other layers have no part, as published.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rows = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""x_t, t, cond and ξ of rows (image, draw)."""


class Ekfac:
    """Factors of every layer, and the rotation of flat gradients into their eigenbasis."""

    def __init__(self, network: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Find the layers."""
        own = {id(parameter): name for name, parameter in parameters.items()}
        self.network = network
        self.layers = [
            (module, own[id(module.weight)], own.get(id(module.bias)))
            for module in network.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) in own
        ]
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.starts, total = {}, 0
        for name, parameter in parameters.items():
            self.starts[name] = slice(total, total + parameter.numel())
            total += parameter.numel()
        self.dim = total
        self.q_a: dict[str, Tensor] = {}
        self.q_g: dict[str, Tensor] = {}
        self.eigenvalues: dict[str, Tensor] = {}

    def fit_bases(self, batches: Iterable[Rows]) -> None:
        """Q_A and Q_G from pseudo-gradients: one forward and one backward for each batch."""
        a: dict[str, Tensor] = {}
        g: dict[str, Tensor] = {}

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str, bias: bool) -> None:
            rows = _positions(module, inputs[0].detach())
            if bias:
                rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
            a[name] = a.get(name, 0) + (rows.T @ rows).double()

            def backward(gradient: Tensor) -> None:
                at = gradient.detach()
                at = (at.movedim(1, -1) if isinstance(module, nn.Conv2d) else at).flatten(0, -2)
                g[name] = g.get(name, 0) + (at.T @ at).double()

            output.register_hook(backward)

        handles = [
            module.register_forward_hook(lambda m, i, o, n=name, b=bias is not None: hook(m, i, o, n, b))
            for module, name, bias in self.layers
        ]
        for module, _, _ in self.layers:
            module.weight.requires_grad_(True)
        for x_t, t, cond, xi in batches:
            (self.network(x_t, t, cond) * xi).sum().backward()
            self.network.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        for module, _, _ in self.layers:
            module.weight.requires_grad_(False)
        self.q_a = {name: torch.linalg.eigh(matrix)[1].float() for name, matrix in a.items()}
        self.q_g = {name: torch.linalg.eigh(matrix)[1].float() for name, matrix in g.items()}

    def rotate(self, gradients: Tensor) -> dict[str, Tensor]:
        """Flat gradients `[rows, parameters]` → `[rows, outputs, inputs]` of each layer, in its eigenbasis."""
        result = {}
        for _, name, bias in self.layers:
            weight = gradients[:, self.starts[name]].reshape(len(gradients), self.shapes[name][0], -1)
            if bias is not None:
                weight = torch.cat([weight, gradients[:, self.starts[bias]].unsqueeze(2)], dim=2)
            result[name] = self.q_g[name].T @ weight @ self.q_a[name]
        return result

    def fit_eigenvalues(self, batches: Iterable[Tensor]) -> None:
        """Λ from flat pseudo-gradients, one row for each draw."""
        sums: dict[str, Tensor] = {}
        count = 0
        for gradients in batches:
            for name, rotated in self.rotate(gradients).items():
                sums[name] = sums.get(name, 0) + rotated.square().sum(0).double()
            count += len(gradients)
        self.eigenvalues = {name: (value / count).float() for name, value in sums.items()}

    def scorer(self, queries: Tensor, train: Tensor) -> Callable[[float], Tensor]:
        """Rotate once; the function returned gives τ `[query, train]` at a damping ρ."""
        rotated_q, rotated = self.rotate(queries), [self.rotate(part) for part in train.split(16)]

        def scores(rho: float) -> Tensor:
            total = torch.zeros(len(queries), len(train))
            for name, value in self.eigenvalues.items():
                v = (rotated_q[name] / (value + rho * value.mean())).flatten(1)
                total += torch.cat([v @ part[name].flatten(1).T for part in rotated], dim=1)
            return total / len(train)

        return scores


def _positions(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer's weight meets: `[rows × positions, inputs]`."""
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    return x.flatten(0, -2)
