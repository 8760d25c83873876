"""TRAK scores against the reference implementation of Park et al.: same dense matrix, same gradients, same scores.

traker projects by its `BasicProjector` on the CPU in float32; the matrix that it draws is read out by projecting the
unit vectors and applied to gradients by our engine, so both sides see the same P. Scores are compared up to the one
global scale that traker divides by.

    python -m venv peer && peer/bin/pip install -c constraints.txt -e . traker
    peer/bin/python benchmarks/traker.py
"""

import numpy as np
import torch
from torch import nn
from trak.projectors import BasicProjector, ProjectionType
from trak.score_computers import BasicScoreComputer

from influence import gradients, keys, scoring
from influence.curvature import Curvature
from influence.gradients import Inputs, Output
from influence.projection import Projection

TRAIN, QUERY, DIM, WIDTH = 512, 24, 64, 12


class Network(nn.Module):
    """A small convolutional network with a scalar loss, called as a denoiser is."""

    def __init__(self) -> None:
        """Draw keyed weights."""
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.SiLU(), nn.GroupNorm(3, WIDTH))
        self.head = nn.Conv2d(WIDTH, 3, 3, padding=1)
        for name, parameter in self.named_parameters():
            parameter.data = 0.3 * torch.from_numpy(keys.normal(("traker", name), tuple(parameter.shape)))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: None) -> torch.Tensor:
        """Predict."""
        return self.head(self.body(x_t))


def dense_projection(shapes: dict[str, tuple[int, ...]], matrix: torch.Tensor) -> Projection:
    """A Projection with traker's own matrix."""
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += int(np.prod(shape))

    def add(out: torch.Tensor, name: str, grads: torch.Tensor) -> None:
        out.addmm_(grads, matrix[starts[name] : starts[name] + grads.shape[1]])

    return Projection(DIM, add)


def main() -> None:
    """Compare and print."""
    network = Network().requires_grad_(False)
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    size = sum(p.numel() for p in parameters.values())
    projector = BasicProjector(
        grad_dim=size, proj_dim=DIM, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu"),
        block_size=DIM, dtype=torch.float32,
    )  # fmt: skip
    matrix = projector.project(torch.eye(size), model_id=0)  # [p, k]
    images = torch.from_numpy(keys.normal(("traker", "images"), (TRAIN + QUERY, 3, 8, 8)))
    wanted = torch.from_numpy(keys.normal(("traker", "targets"), (TRAIN + QUERY, 3, 8, 8)))
    output = Output(lambda f, y: (f - y).square().flatten(1).mean(1), (wanted,), 1)
    inputs = Inputs(images, torch.zeros(len(images), dtype=torch.long))

    ours = gradients.per_sample_gradients(
        network, parameters, inputs, [output], dense_projection(shapes, matrix), engine="hooks"
    )[0].features
    plain = []
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for i in range(len(images)):  # the peer's features: plain autograd, its own projector
        loss = (network(images[i : i + 1], None, None) - wanted[i : i + 1]).square().mean()
        grads = torch.autograd.grad(loss, list(parameters.values()))
        plain.append(projector.project(torch.cat([g.flatten() for g in grads])[None], model_id=0)[0])
    theirs = torch.stack(plain)
    difference = float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())
    print(f"features: largest relative difference of a row {difference:.1e}")

    for damping in (0.0, 0.01, 0.1):
        lam = damping * float((theirs[:TRAIN] ** 2).sum()) / DIM
        computer = BasicScoreComputer(dtype=torch.float32, device=torch.device("cpu"), lambda_reg=lam)
        xtx = computer.get_xtx(theirs[:TRAIN])
        features = computer.get_x_xtx_inv(theirs[:TRAIN], xtx)
        peer = computer.get_scores(features, theirs[TRAIN:], accumulator=torch.zeros(TRAIN, QUERY))
        peer = peer if peer is not None else theirs[TRAIN:] @ features.T
        peer = peer.T if peer.shape == (TRAIN, QUERY) else peer

        phi = ours[:TRAIN].double()
        h = phi.T @ phi / TRAIN
        lam_h = lam / TRAIN
        solver = Curvature(
            torch.linalg.cholesky(h + lam_h * torch.eye(DIM)), lam_h, float(TRAIN), unit=float(h.trace()) / DIM
        )
        method = scoring.METHODS["trak"]
        v = scoring.precondition(method, ours[TRAIN:], solver, float(TRAIN))
        ids = [str(i) for i in range(TRAIN)]
        scores = np.concatenate([tau for _, tau in scoring.scores(method, v, [(ids, ours[:TRAIN].numpy())])], axis=1)
        scale = float((peer.numpy() * scores).sum() / (scores**2).sum())
        worst = np.abs(peer.numpy() - scale * scores).max() / np.abs(peer.numpy()).max()
        print(f"damping {damping:g}: scores differ by {worst:.1e} of the largest, up to the global scale {scale:.4g}")
        if worst > 1e-4:
            raise SystemExit("the scores differ")


if __name__ == "__main__":
    main()
