"""Ours beside traker, dattri, kronfluence and bergson: the same model, images, draws and k, to the same kind of scores.

Every tool gets the same noised images in memory and is called as its documentation says, on one thread: `features` is
what it makes of the training images, `scores` the queries and the scores. CPU seconds, medians over rounds in which the
tools take turns; `ratio` is the sum of both over that of ours for the same job, with its range over the rounds. `rank
correlation` is that of a tool's scores with those of ours, mean over queries: projections and λ are not the same.

    python -m venv peers && peers/bin/pip install -c constraints.txt -e .
    peers/bin/pip install --no-deps -r benchmarks/peers.txt
    peers/bin/python benchmarks/peers.py
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DModel
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence import curvature, diffusion, features, keys, scoring
from influence.diffusion import NoiseSchedule
from influence.features import Recipe
from influence.projection import PROJECTIONS

SCHEDULE = NoiseSchedule(tuple(np.linspace(0.999, 0.01, 1000).tolist()), "epsilon", "uniform")
SIZE, BATCH = 16, 32

Scores = np.ndarray
"""τ `[query, train]`."""


class Called(nn.Module):
    """A UNet as our engines call it."""

    def __init__(self, unet: nn.Module) -> None:
        """Keep the UNet."""
        super().__init__()
        self.unet = unet

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predict."""
        return self.unet(x_t, t).sample


@dataclass(frozen=True)
class World:
    """The model, and for both roles clean images `[n, …]` and their draws: x_t, ε `[n, S, …]`, t `[n, S]`."""

    unet: UNet2DModel
    draws: int
    dim: int
    clean: dict[str, torch.Tensor]
    drawn: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def ids(self, role: str) -> list[str]:
        """Names of the images of a role."""
        return [f"{role} {i}" for i in range(len(self.clean[role]))]

    def batches(self, role: str) -> DataLoader:
        """One item for each image, with all of its draws."""
        return DataLoader(TensorDataset(*self.drawn[role]), batch_size=BATCH)

    def rows(self, role: str) -> TensorDataset:
        """One item for each (image, draw)."""
        return TensorDataset(*(part.flatten(0, 1) for part in self.drawn[role]))

    def images(self, rows: torch.Tensor) -> Scores:
        """Scores of (image, draw) rows, summed up to images: the losses are means over the draws."""
        return rows.unflatten(0, (-1, self.draws)).unflatten(2, (-1, self.draws)).sum((1, 3)).numpy() / self.draws**2


def world(train: int, query: int, draws: int, dim: int, width: int = 1) -> World:
    """A UNet2DModel of 0.7 M keyed weights (more if it is wider), and keyed images."""
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32 * width, 64 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    ).eval()
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            scale = (parameter.numel() / len(parameter)) ** -0.5
            parameter.data = scale * torch.from_numpy(keys.normal(("peers", name), tuple(parameter.shape)))
    clean, drawn = {}, {}
    for role, count in (("train", train), ("query", query)):
        clean[role] = torch.from_numpy(keys.normal(("peers", role), (count, 3, SIZE, SIZE)))
        parts = []
        for i, x0 in enumerate(clean[role]):
            t, eps = diffusion.draws(0, role, f"{role} {i}", draws, 1000, (3, SIZE, SIZE))
            parts.append((diffusion.noised(SCHEDULE, x0.expand(draws, -1, -1, -1), t, eps), eps, t))
        drawn[role] = tuple(torch.stack(part) for part in zip(*parts, strict=True))
    return World(unet, draws, dim, clean, drawn)


# Ours ---------------------------------------------------------------------------------------------------------------


def ours(
    w: World, method: str, projection: str = "countsketch", only: str = "", bf16: bool = False
) -> tuple[float, Scores]:
    """Features of both roles, the solve, the scan; `only` parameters with this in their names."""
    start = time.process_time()
    network = Called(w.unet)
    parameters = {name: p for name, p in w.unet.named_parameters() if only in name}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    dim = sum(p.numel() for p in parameters.values()) if projection == "identity" else w.dim
    chosen = scoring.METHODS[method]

    def taken(role: str, rate: float) -> features.Features:
        recipe = Recipe(
            schedule=SCHEDULE, parameters=parameters, seed=0, role=role, num_draws=w.draws, curvature_rate=rate,
            projection=PROJECTIONS[projection](shapes, dim=dim, seed=0, device=torch.device("cpu")), output="loss",
            bf16=bf16, engine="hooks", batch_size=64,
        )  # fmt: skip
        return features.features(network, recipe, w.ids(role), w.clean[role], None)

    made = taken("train", float(w.draws) if chosen.curvature == "psi" else 0.0)
    seconds = time.process_time() - start
    solver = None
    if chosen.curvature:
        rows = made.psi if chosen.curvature == "psi" else made.phi
        solver = curvature.curvature([(rows, np.ones(len(rows)))], dim=dim, damping=0.1, num_rows=len(rows))
    phi_q = torch.from_numpy(taken("query", 0.0).phi)
    v = scoring.precondition(chosen, phi_q, solver, float(len(made.phi)))
    return seconds, np.concatenate([tau for _, tau in scoring.scores(chosen, v, [(w.ids("train"), made.phi)])], axis=1)


# Theirs -------------------------------------------------------------------------------------------------------------


def mean_loss(prediction: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """ℓ of one image: the mean over its draws."""
    return F.mse_loss(prediction, eps)


def traker(w: World) -> tuple[float, Scores]:
    """TRAKer with its BasicProjector, float32."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Loss(AbstractModelOutput):
        """The loss of an image as the output."""

        def __init__(self) -> None:
            """Nothing to keep."""

        @staticmethod
        def get_output(model, weights, buffers, x_t, eps, t):
            """One image."""
            return mean_loss(torch.func.functional_call(model, (weights, buffers), (x_t, t)).sample, eps)

        @staticmethod
        def get_out_to_loss_grad(model, weights, buffers, batch):
            """1: the output is the loss."""
            return torch.ones(len(batch[0]), 1)

    size, count = sum(p.numel() for p in w.unet.parameters()), {role: len(x) for role, x in w.clean.items()}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        projector = BasicProjector(size, w.dim, 0, ProjectionType.rademacher, torch.device("cpu"))
        tool = TRAKer(
            model=w.unet, task=Loss(), train_set_size=count["train"], save_dir=folder, device="cpu",
            projector=projector, use_half_precision=False, lambda_reg=1e-3, logging_level=logging.ERROR,
        )  # fmt: skip
        tool.load_checkpoint(w.unet.state_dict(), model_id=0)
        for batch in w.batches("train"):
            tool.featurize(batch=batch, num_samples=len(batch[0]))
        tool.finalize_features()
        seconds = time.process_time() - start
        tool.start_scoring_checkpoint("q", w.unet.state_dict(), model_id=0, num_targets=count["query"])
        for batch in w.batches("query"):
            tool.score(batch=batch, num_samples=len(batch[0]))
        return seconds, np.asarray(tool.finalize_scores("q")).T


def dattri_task(w: World) -> object:
    """The loss of an image for dattri, whose vmap takes the batch axis away."""
    from dattri.task import AttributionTask

    def loss(params, image):
        x_t, eps, t = image
        return mean_loss(torch.func.functional_call(w.unet, params, (x_t, t)).sample, eps)

    return AttributionTask(loss_func=loss, model=w.unet, checkpoints=w.unet.state_dict())


def dattri_trak(w: World) -> tuple[float, Scores]:
    """TRAKAttributor with a Rademacher projection."""
    from dattri.algorithm.trak import TRAKAttributor

    start = time.process_time()
    tool = TRAKAttributor(
        task=dattri_task(w),
        correct_probability_func=lambda *_: torch.zeros(1),
        projector_kwargs={
            "proj_dim": w.dim, "proj_type": "rademacher", "proj_seed": 0, "device": "cpu", "proj_max_batch_size": BATCH,
        },
        regularization=1e-3,
    )  # fmt: skip
    tool.cache(w.batches("train"))
    seconds = time.process_time() - start
    return seconds, tool.attribute(w.batches("query")).detach().numpy().T


def dattri_dot(w: World) -> tuple[float, Scores]:
    """TracInAttributor without a projection: dattri's fastest way to dot products; it keeps no features."""
    from dattri.algorithm.tracin import TracInAttributor

    tool = TracInAttributor(
        task=dattri_task(w), weight_list=torch.ones(1), normalized_grad=False,
        projector_kwargs={
            "proj_dim": w.dim, "proj_type": "identity", "proj_seed": 0, "device": "cpu", "proj_max_batch_size": BATCH,
        },
    )  # fmt: skip
    return 0.0, tool.attribute(w.batches("train"), w.batches("query")).detach().numpy().T


def kronfluence(w: World, strategy: str) -> tuple[float, Scores]:
    """Pairwise scores of (image, draw) rows; factors are its features."""
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Denoising(Task):
        """The loss of rows, summed."""

        def compute_train_loss(self, batch, model, sample=False):
            """Of the noise, or of a sample of the prediction."""
            x_t, eps, t = batch
            prediction = model(x_t, t).sample
            if sample:
                eps = prediction.detach() + torch.randn_like(prediction)
            return (prediction - eps).square().mean((1, 2, 3)).sum()

        def compute_measurement(self, batch, model):
            """The same loss."""
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> None:
            """All that it can."""

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        task = Denoising()
        tool = Analyzer(
            "peers", model=prepare_model(copy.deepcopy(w.unet), task), task=task, output_dir=folder, cpu=True,
            disable_tqdm=True, log_level=logging.ERROR,
        )  # fmt: skip
        arguments = FactorArguments(strategy=strategy)
        tool.fit_all_factors("f", dataset=w.rows("train"), per_device_batch_size=64, factor_args=arguments)
        seconds = time.process_time() - start
        tool.compute_pairwise_scores(
            "s", factors_name="f", query_dataset=w.rows("query"), train_dataset=w.rows("train"),
            per_device_query_batch_size=len(w.rows("query")), per_device_train_batch_size=64,
        )  # fmt: skip
        return seconds, w.images(tool.load_pairwise_scores("s")["all_modules"])


def bergson(w: World) -> tuple[float, Scores]:
    """TraceCollector on the linear layers of the attention, which is what it covers of a UNet; gradients of rows."""
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import GradientProcessor

    names = {name for name, m in w.unet.named_modules() if isinstance(m, nn.Linear) and "attentions" in name}
    w.unet.requires_grad_(True)

    def taken(role: str) -> dict[str, torch.Tensor]:
        collector = TraceCollector(
            model=w.unet, processor=GradientProcessor(projection_dim=None), target_modules=names, device="cpu",
            dtype=torch.float32,
        )  # fmt: skip
        for x_t, eps, t in DataLoader(w.rows(role), batch_size=64):
            with collector:
                (w.unet(x_t, t).sample - eps).square().mean((1, 2, 3)).sum().backward()
            w.unet.zero_grad()
        return {name: torch.cat(grads) for name, grads in collector.mod_grads.items()}

    start = time.process_time()
    train = taken("train")
    seconds = time.process_time() - start
    query = taken("query")
    return seconds, w.images(sum(query[name].flatten(1) @ train[name].flatten(1).T for name in train))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or warnings of the peers."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


JOBS: dict[str, tuple[str, Callable[[World], tuple[float, Scores]]]] = {
    "TRAK, projected": ("ours", lambda w: ours(w, "trak")),
    "traker, BasicProjector": ("TRAK, projected", traker),
    "dattri, TRAK": ("TRAK, projected", dattri_trak),
    "grad-dot, projected": ("ours", lambda w: ours(w, "grad-dot")),
    "grad-dot, exact": ("ours", lambda w: ours(w, "grad-dot", "identity")),
    "dattri, TracIn": ("grad-dot, projected", dattri_dot),
    "kronfluence, identity": ("grad-dot, projected", lambda w: kronfluence(w, "identity")),
    "gauss-newton, projected": ("ours", lambda w: ours(w, "gauss-newton")),
    "kronfluence, EK-FAC": ("gauss-newton, projected", lambda w: kronfluence(w, "ekfac")),
    "grad-dot, attention": ("ours", lambda w: ours(w, "grad-dot", "identity", only="attentions")),
    "bergson, TraceCollector": ("grad-dot, attention", bergson),
}


def main() -> None:
    """Take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=64, help="training images")
    parser.add_argument("--query", type=int, default=8, help="queries")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS), metavar="JOB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    w = world(options.train, options.query, options.draws, options.dim)
    found: dict[str, list[tuple[float, float, Scores]]] = {job: [] for job in options.jobs}
    for _ in range(options.rounds):
        for job in options.jobs:
            start = time.process_time()
            with quiet():
                seconds, scores = JOBS[job][1](w)
            whole = time.process_time() - start
            found[job].append((seconds, whole, scores))
            print(f"{job}: {seconds:.1f} of {whole:.1f} s", file=sys.stderr, flush=True)
    size = sum(p.numel() for p in w.unet.parameters())
    print(
        f"UNet2DModel of {size:,} parameters, {SIZE} × {SIZE} pixels, {options.train} training images and "
        f"{options.query} queries, {options.draws} draws of each, k = {options.dim}, {options.rounds} rounds\n"
    )
    print("| job | features, s | scores, s | ratio | rank correlation |\n|---|---|---|---|---|")
    for job, rounds in found.items():
        features_s, whole = (float(np.median([r[i] for r in rounds])) for i in (0, 1))
        base = JOBS[job][0]
        shown, like = "1", ""
        if base in found:
            ratios = [r[1] / b[1] for r, b in zip(rounds, found[base], strict=True)]
            shown = f"{np.median(ratios):.1f} ({min(ratios):.1f} … {max(ratios):.1f})"
            pairs = zip(rounds[0][2], found[base][0][2], strict=True)
            like = f"{np.mean([stats.spearmanr(a, b).statistic for a, b in pairs]):.3f}"
        name = f"**ours**, {job}" if base == "ours" else job
        print(f"| {name} | {features_s:.1f} | {whole - features_s:.1f} | {shown} | {like} |")


if __name__ == "__main__":
    main()
