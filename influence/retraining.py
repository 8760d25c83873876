"""Ground truth: fine-tune again on subsets of the images, and measure the loss of pictures under each of the models.

Members of a run are files: a picture of which there are two is trained on twice, as in the fine-tune, and each file can
be left out by itself. That is what scores foretell: τ is of one file, and a creator's total is over all of his.

A truth is a folder: `truth.json` says what is retrained and measured, `runs.jsonl` holds one line for each retrained
model, in the order in which they were done. A line is written whole or is not read; running again does what is missing.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from influence import commit, datasets, diffusion, executors, finetuning, keys
from influence.datasets import Item
from influence.devices import exact
from influence.errors import OptionError, one_line
from influence.finetuning import FineTune
from influence.models import Denoiser, pictures_at_once

_ROWS = 256


@dataclass(frozen=True)
class Query:
    """A picture whose loss is measured."""

    path: str
    kind: str
    """What it is: `generated`, `trained`, `unseen`, or another word."""
    caption: str | None = None


@dataclass(frozen=True)
class Run:
    """A model to retrain."""

    name: str
    members: Bool[np.ndarray, " files"]
    seed: int


@dataclass(frozen=True)
class Truth:
    """A folder of retrained models' losses."""

    folder: Path
    recipe: FineTune
    base: str
    dataset: str
    items: list[Item]
    """The files, in the order of a run's members: by item id."""
    queries: list[Query]
    query_ids: list[str]
    draws: int
    """Draws (t, ε) of a query's loss."""
    resolution: int | None

    def runs(self) -> pd.DataFrame:
        """What was retrained so far: name, seed, members (array), loss (array, one for each query)."""
        return read_runs(self.folder, len(self.items))


def read_runs(folder: Path, files: int) -> pd.DataFrame:
    """The journal of a truth: name, seed, members (array), loss (array, one for each query) of each retrained model."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    file = folder / "runs.jsonl"
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else [], 1):
        if not line.endswith(b"\n"):  # a torn last line is done again
            continue
        try:
            row = json.loads(line)
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["members"]), np.uint8), count=files)
            row |= {"members": bits.astype(bool), "loss": np.array(row["loss"], dtype=float)}
            rows[row["name"], row["seed"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"line {number} of {file} is no retrained model ({type(error).__name__}: {one_line(error)}); "
                "remove the line, and that model is retrained"
            ) from None
    return pd.DataFrame(list(rows.values()), columns=["name", "seed", "members", "loss", "weights"])


def read_json(file: Path) -> dict[str, Any]:
    """The `truth.json` of a truth.

    Raises:
        OptionError: It is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read ({one_line(error)}); choose another folder, or remove it") from None
    if not isinstance(found, dict):
        raise OptionError(f"{file} holds a {type(found).__name__}; expected facts of a truth; choose another folder")
    return found


def create(
    folder: str | Path,
    *,
    base: str | Path,
    dataset: str | Path,
    recipe: FineTune,
    queries: Sequence[Query],
    draws: int = 64,
    resolution: int | None = None,
    creator_column: str | None = None,
) -> Truth:
    """Begin a truth, or open the one that is there, if it is the same.

    Raises:
        OptionError: The folder holds another truth, or a query lacks the caption that the model reads.
    """
    denoiser = finetuning.start(base, recipe, resolution=resolution)
    found = datasets.read_dataset(
        dataset, creator_column=creator_column, captions_required=denoiser.conditional, shape=denoiser.image_size[1:]
    )
    items = in_order(found.items)
    bare = next((query.path for query in queries if query.caption is None), None) if denoiser.conditional else None
    if bare is not None:
        raise OptionError(f"{bare} has no caption, and the model reads captions; give the query its prompt")
    ids = [datasets.item_id(datasets.decode(Path(query.path))[0], query.caption) for query in queries]
    facts = {
        "format": 2,
        "recipe": asdict(recipe),
        "base": denoiser.identity["model"],
        "encoders": denoiser.identity["encoders"],
        "schedule": denoiser.identity["schedule"],
        "prediction": denoiser.schedule.prediction,
        "weighting": denoiser.schedule.weighting,
        "sample_shape": list(denoiser.sample_shape),
        "items": [{"item_id": item.item_id, "file_name": item.file_name, "creator": item.creator} for item in items],
        "queries": [
            {"item_id": i, "file_name": Path(q.path).name, "kind": q.kind, "caption": q.caption}
            for i, q in zip(ids, queries, strict=True)
        ],
        "draws": draws,
    }
    folder, text = Path(folder), json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "truth.json"
    if not file.exists():
        commit.write_atomic(file, text.encode())
    there = read_json(file)
    if there.get("format") != facts["format"]:
        raise OptionError(
            f"{file} is of format {there.get('format')}, which does not say of which set-up it is; expected "
            f"{facts['format']}; choose another folder"
        )
    here = json.loads(text)  # as a file gives it back
    odd = [name for name in here if there.get(name) != here[name]]
    if odd:
        raise OptionError(f"{file} is of other {', '.join(odd)}; expected the same; choose another folder")
    return Truth(folder, recipe, str(base), str(dataset), items, list(queries), ids, draws, resolution)


def halves(seed: int, count: int, files: int) -> list[np.ndarray]:
    """Exact halves, independent: masks `[count][files]`, each with ⌊files/2⌋ True."""
    masks = []
    for i in range(count):
        order = np.argsort(keys.uniform(("half", seed, i), files), kind="stable")
        mask = np.zeros(files, dtype=bool)
        mask[order[: files // 2]] = True
        masks.append(mask)
    return masks


MOST_OWNERS = 12


def coalitions(owners: Sequence[str]) -> dict[frozenset[str], np.ndarray]:
    """Masks of all sets of owners, the empty one and the whole included, by who owns each file."""
    names = sorted(set(owners))
    if len(names) > MOST_OWNERS:
        raise OptionError(
            f"{len(names)} creators have 2^{len(names)} coalitions, each to be retrained; expected at most "
            f"{MOST_OWNERS} creators: take a data set of fewer, or name them by groups in a --creator-column"
        )
    owner = np.array(owners)
    return {
        frozenset(chosen): np.isin(owner, chosen)
        for size in range(len(names) + 1)
        for chosen in combinations(names, size)
    }


class Retrainer:
    """A base, its pictures and the queries, loaded once; models are retrained in its memory one after the other."""

    def __init__(self, truth: Truth, device: str = "cpu") -> None:
        """Load everything."""
        self.truth = truth
        self.denoiser = finetuning.start(truth.base, truth.recipe, resolution=truth.resolution, device=device)
        self.x0, self.cond = encode_items(self.denoiser, truth.items)
        self.query_x0, self.query_cond = encode(
            self.denoiser, [q.path for q in truth.queries], [q.caption for q in truth.queries]
        )
        self.initial = finetuning.weights(self.denoiser)

    def retrain(self, run: Run) -> None:
        """Fine-tune from the base on the members of a run."""
        finetuning.set_weights(self.denoiser, self.initial)
        finetuning.fine_tune(self.denoiser, self.truth.recipe, self.x0, self.cond, seed=run.seed, members=run.members)

    def measure(self) -> Float64[np.ndarray, " queries"]:
        """Losses of the queries under the model as it is now."""
        return losses(self.denoiser, self.query_x0, self.query_cond, self.truth.query_ids, self.truth.draws)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Retrain and measure: a line of the journal."""
        self.retrain(run)
        hasher = hashlib.sha256()
        for parameter in self.denoiser.parameters.values():
            hasher.update(parameter.detach().cpu().numpy().tobytes())
        return {
            "name": run.name,
            "seed": run.seed,
            "members": np.packbits(run.members).tobytes().hex(),
            "loss": [float(f"{value:.9g}") for value in self.measure()],
            "weights": hasher.hexdigest()[:16],
        }


def in_order(items: Iterable[Item]) -> list[Item]:
    """The files in the order in which they are trained on: by item id, files of one picture by name."""
    return sorted(items, key=lambda item: (item.item_id, item.file_name))


def encode_items(denoiser: Denoiser, items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
    """One row for each file, as the network takes them; a picture of which there are several is encoded once."""
    once = list({item.item_id: item for item in items}.values())
    x0, cond = encode(denoiser, [item.path for item in once], [item.caption for item in once])
    place = {item.item_id: row for row, item in enumerate(once)}
    rows = torch.tensor([place[item.item_id] for item in items], device=x0.device)
    return x0[rows], None if cond is None else cond[rows]


def encode(
    denoiser: Denoiser, paths: Sequence[str | Path], captions: Sequence[str | None]
) -> tuple[Tensor, Tensor | None]:
    """Pictures and captions as the network takes them; the pixels of few pictures at a time are in memory."""
    channels, height, width = denoiser.image_size
    device = next(iter(denoiser.parameters.values())).device
    # Not always one: a latent's last bits depend on what it is encoded with, and with them a truth's hashes of weights.
    size = pictures_at_once(denoiser)
    parts = []
    for start in range(0, len(paths), size):
        arrays = [
            datasets.to_array(datasets.decode(Path(path))[0], height=height, width=width, channels=channels)
            for path in paths[start : start + size]
        ]
        parts.append(denoiser.encode_images(torch.from_numpy(np.stack(arrays)).to(device)))
    x0 = torch.cat(parts)
    if not denoiser.conditional:
        return x0, None
    return x0, torch.cat([denoiser.encode_captions([caption or ""]) for caption in captions])


@torch.no_grad()
@exact()
def losses(
    denoiser: Denoiser, x0: Tensor, cond: Tensor | None, ids: Sequence[str], draws: int
) -> Float64[np.ndarray, " queries"]:
    """Mean loss of each picture over draws that only truths use: the same for every model, stratified, antithetic."""
    shape, schedule = tuple(x0.shape[1:]), denoiser.schedule
    drawn = [diffusion.draws(0, "truth", item, draws, schedule.num_timesteps, shape) for item in ids]
    t, eps = torch.cat([t for t, _ in drawn]).to(x0.device), torch.cat([eps for _, eps in drawn]).to(x0.device)
    index = torch.arange(len(ids), device=x0.device).repeat_interleave(draws)
    found: list[Float32[np.ndarray, " rows"]] = []
    for rows in torch.arange(len(index), device=x0.device).split(_ROWS):
        clean, here, noise = x0[index[rows]], t[rows], eps[rows]
        c = None if cond is None else cond[index[rows]]
        prediction = denoiser.network(diffusion.noised(schedule, clean, here, noise), here, c)
        found.append(diffusion.losses(schedule, prediction, clean, here, noise).cpu().numpy())
    return np.concatenate(found).astype(np.float64).reshape(len(ids), draws).mean(1)


def retrain(
    truth: Truth,
    runs: Iterable[Run],
    *,
    workers: int = 1,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> pd.DataFrame:
    """Do the runs that are missing, in order, and return all that are there.

    Args:
        truth: What to retrain.
        runs: Models wanted.
        workers: Processes, each with one thread: a run's result does not depend on their number.
        progress: Called with `retrain`, runs done and runs in all.
    """
    wanted = list(runs)
    done = {(row.name, row.seed): row.members for row in truth.runs().itertuples(index=False)}
    todo = list({(run.name, run.seed): run for run in wanted if (run.name, run.seed) not in done}.values())
    for run in wanted:
        if not np.array_equal(done.get((run.name, run.seed), run.members), run.members):
            raise OptionError(
                f"{truth.folder / 'runs.jsonl'} has {run.name!r} of other images than are to be trained on; expected "
                "the same; choose another folder"
            )
    if not todo:
        return truth.runs()
    progress("retrain", len(wanted) - len(todo), len(wanted))
    count = len(wanted) - len(todo)
    with (truth.folder / "runs.jsonl").open("ab") as journal:
        _end_torn_line(truth.folder / "runs.jsonl", journal)

        def keep(row: dict[str, Any]) -> None:
            nonlocal count
            journal.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
            count += 1
            progress("retrain", count, len(wanted))

        if workers == 1:
            with _one_thread():
                executors.run_here(_prepare(truth, todo, 1), range(len(todo)), keep)
        else:
            prepare = functools.partial(_prepare, truth, todo)
            executors.run_processes(prepare, range(len(todo)), workers, keep)
    return truth.runs()


def _prepare(truth: Truth, runs: Sequence[Run], workers: int) -> executors.Work:
    """Load what is retrained; in a process of several with one thread, so that the sums come out the same."""
    if workers > 1:
        torch.set_num_threads(1)
    retrainer = Retrainer(truth)
    return lambda number: retrainer(runs[number])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _end_torn_line(path: Path, journal: Any) -> None:
    """Cut off what a killed process left of a line."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
        journal.seek(0, os.SEEK_END)
