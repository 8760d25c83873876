"""Can the model be prompted to return a training picture? Generate with the training captions, and compare.

Generate and filter, as Carlini et al. (2023); what counts as returned is the near-copy rule of `similarity`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from influence import commit, datasets, nearcopies, training
from influence import store as stores
from influence.contactsheet import Pair, contact_sheet
from influence.errors import OptionError
from influence.loading import load_for
from influence.models import Denoiser
from influence.nearcopies import near_copies
from influence.progress import Message, Progress, silent
from influence.spreadsheet import csv_bytes
from influence.store import Store

PER_CAPTION, UNCONDITIONAL = 4, 64
GUIDANCE = 7.5  # diffusers' default for StableDiffusionPipeline
SHOWN = 48
RUN_FILE, TABLE_FILE, SHEET_FILE, PICTURES = "extract.json", "pairs.csv", "pairs.png", "generated"


@dataclass(frozen=True)
class _Wanted:
    """One picture to generate: it depends on these and the options of the run alone."""

    path: Path
    caption: str | None
    index: int


def extract(
    store: str | os.PathLike[str] | Store,
    out: str | os.PathLike[str],
    *,
    count: int | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    dataset: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> pd.DataFrame:
    """Generate pictures, with each training caption if the model reads captions, and find near copies among them.

    A picture is a function of model, seed, caption, its number, steps and guidance. Run again, it goes on where it
    stopped. In the folder: `generated/`, `pairs.csv` (what is returned), `pairs.png` (the pairs, near copies in red).

    Args:
        store: A store, or its folder; its model generates, and its training pictures are compared with.
        out: Folder to write to.
        count: Pictures for each distinct caption (4 by default), or in all if the model reads none (64).
        steps: Steps of the deterministic DDIM sampler.
        guidance: Scale of classifier-free guidance (Ho & Salimans, 2021), 7.5 by default; 1 for none. Only for a
            model that reads captions.
        seed: Key of the initial noise.
        dataset: Where the data set is now, if it was moved since the store was built.
        model: Where the model is now.
        lora: Where the LoRA is now.
        batch_size: Pictures that are generated at once.
        device: As for `build`.
        progress: Called as work gets done.
        message: Called with lines that a person must see.

    Returns:
        The columns of `near_copies` with `query` the file in the folder, then caption, index, seed, and hits: how many
        of the generated pictures are near copies of this training picture. Near copies first, by similarity.

    Raises:
        InfluenceError: An option or input cannot be used, or the folder holds something else.
    """
    made = store if isinstance(store, Store) else stores.open_store(store)
    made.refresh()
    if guidance is not None and not made.spec.conditional:
        raise OptionError(f"store {made.path.name} is of a model that reads no captions; leave out --guidance")
    if batch_size < 1 or (count is not None and count < 1):
        raise OptionError(f"count is {count} and batch-size {batch_size}; expected at least 1")
    items = nearcopies.training_items(made, dataset, progress)
    captions = sorted({str(item.caption) for item in items}) if made.spec.conditional else [None]
    count = count or (PER_CAPTION if made.spec.conditional else UNCONDITIONAL)
    guidance = GUIDANCE if guidance is None and made.spec.conditional else guidance
    folder = Path(out)
    run = {"spec": made.spec.to_json(), "captions": captions, "count": count, "steps": steps, "guidance": guidance}
    _begin(folder, run | {"seed": seed})
    wanted = [
        _Wanted(folder / PICTURES / f"{number:05d}-{index:04d}.png", caption, index)
        for number, caption in enumerate(captions)
        for index in range(count)
    ]
    loaded, _ = load_for(
        made, model=model, lora=lora, draws=1, engine="auto", batch_size=1, device=device, message=message
    )
    denoiser = loaded.denoiser
    missing = [one for one in wanted if not one.path.exists()]
    for first in range(0, len(missing), batch_size):
        progress("pictures", len(wanted) - len(missing) + first, len(wanted))
        _generate(denoiser, missing[first : first + batch_size], steps=steps, guidance=guidance, seed=seed)
    progress("pictures", len(wanted), len(wanted))

    found = near_copies(
        [one.path for one in wanted], made, metrics=nearcopies.metrics_of(denoiser), dataset=dataset,
        denoiser=denoiser, progress=progress, message=message,
    )  # fmt: skip
    table = _described(found, wanted, seed)
    commit.write_atomic(folder / TABLE_FILE, csv_bytes(table))
    commit.write_atomic(folder / SHEET_FILE, _sheet(table, folder, made.pictures(dataset)))
    return table


def _begin(folder: Path, run: dict[str, object]) -> None:
    """Make the folder, or make sure that it holds the same run."""
    text = json.dumps(run, ensure_ascii=False, indent=1) + "\n"
    file = folder / RUN_FILE
    try:
        known = file.read_text(encoding="utf-8") if file.exists() else None
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"
        ) from None
    if known is not None:
        if known != text:
            raise OptionError(f"{folder} holds another run (see {RUN_FILE}); choose another -o folder, or remove it")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} exists and is no run of extract; choose another -o folder, or empty it")
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        commit.write_atomic(file, text.encode())
    except OSError as error:
        raise OptionError(f"{folder} cannot be written: {error.strerror}") from None


def _generate(denoiser: Denoiser, wanted: Sequence[_Wanted], *, steps: int, guidance: float | None, seed: int) -> None:
    """Generate some pictures and write them."""
    captions = [one.caption for one in wanted if one.caption is not None]
    samples = training.generate(
        _guided(denoiser, guidance),
        denoiser.schedule,
        count=len(wanted),
        shape=tuple(denoiser.sample_shape),
        seed=seed,
        steps=steps,
        cond=denoiser.encode_captions(captions) if captions else None,
        names=[(one.caption, one.index) if one.caption is not None else (one.index,) for one in wanted],
        clip=1.0 if tuple(denoiser.sample_shape) == tuple(denoiser.image_size) else None,
        batch_size=len(wanted),
        device=next(iter(denoiser.parameters.values())).device,
    )
    pictures = denoiser.decode_images(samples.to(next(iter(denoiser.parameters.values())).device))
    for one, picture in zip(wanted, pictures, strict=True):
        commit.write_atomic(one.path, datasets.to_png(picture.float().cpu().numpy()))


def _guided(denoiser: Denoiser, guidance: float | None) -> training.Network:
    """The network, or the network guided away from the empty caption."""
    if guidance is None or guidance == 1:
        return denoiser.network

    def network(x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        blank = denoiser.encode_captions([""]).expand(len(x_t), -1, -1)
        without = denoiser.network(x_t, t, blank)
        return without + guidance * (denoiser.network(x_t, t, cond) - without)

    return network


def _described(found: pd.DataFrame, wanted: Sequence[_Wanted], seed: int) -> pd.DataFrame:
    """The rows of `near_copies` with what each picture was made of, and how often each training picture comes back."""
    by_path = {str(one.path): one for one in wanted}
    made_of = [by_path[query] for query in found["query"]]
    table = found.assign(
        query=[f"{PICTURES}/{one.path.name}" for one in made_of],
        caption=[one.caption for one in made_of],
        index=[one.index for one in made_of],
        seed=seed,
    )
    hits = table[table["near_copy"]].groupby("item_id")["query"].nunique()
    table["hits"] = table["item_id"].map(hits).fillna(0).astype(int)
    order = ["near_copy", "similarity", "query", "metric"]
    return table.sort_values(order, ascending=[False, False, True, True], ignore_index=True)


def _sheet(table: pd.DataFrame, folder: Path, root: Path) -> bytes:
    """The pairs as a picture: each generated picture once, in the order of the table."""
    firsts = table.drop_duplicates("query")
    pairs = [
        Pair(
            generated=datasets.decode(folder / row.query)[0],
            trained=datasets.decode(root / row.file_name)[0],
            label=f"{'near copy · ' * row.near_copy}similarity {row.similarity:.3f} · ratio {row.ratio:.2f}\n"
            f"{Path(row.query).stem} | {Path(row.file_name).name}",
            near_copy=row.near_copy,
        )
        for row in firsts.head(SHOWN).itertuples()
    ]
    copies = int(firsts["near_copy"].sum())
    shown = f", first {SHOWN}" if len(firsts) > SHOWN else ""
    title = f"generated | most similar training picture: {copies} of {len(firsts)} are near copies (red){shown}"
    return contact_sheet(pairs, title)
