"""A fine-tune done again for each creator alone: what his works bring by themselves, measured and not foretold."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence import datasets, finetuning, retraining
from influence.devices import chosen
from influence.errors import OptionError
from influence.finetuning import FineTune
from influence.progress import Message, Progress, silent

INDEX = "solo.json"
_PART = ".part"


@dataclass(frozen=True)
class Alone:
    """A creator's own fine-tune."""

    creator: str
    works: str
    """Hash of the images that it was trained on."""
    base: str
    """Hash of the model that it started from."""
    path: Path
    """A pipeline folder, or a folder with the LoRA."""


def solo(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    creator_column: str | None = None,
    resolution: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
    message: Message = silent,
) -> Path:
    """Fine-tune the base on the works of each creator alone, as a recipe says, and save each of these models.

    Each gets as many epochs as the whole fine-tune, so that all of them together have about its steps. Run again, it
    trains those that are missing.

    Args:
        dataset: The fine-tune data set, with creators.
        out: Folder to write: a folder for each creator, and `solo.json`, which says whose is which.
        base: The pipeline that the fine-tune started from.
        recipe: `finetune.json` of the whole fine-tune, or a folder that holds it.
        creator_column: Column of the metadata that names the creator; `creator` if there is one.
        resolution: Pixels of a side; the model's own by default.
        seed: Key of the order of the images, the timesteps and the noise.
        device: Where to train: `auto`, `cpu`, `cuda` …
        progress: Called with `fine-tunes`, creators done and creators in all.
        message: Called with assumptions, refusals and warnings, one line each.

    Returns:
        `out`.

    Raises:
        InfluenceError: An input cannot be used, or the folder is of another fine-tune.
    """
    how = finetuning.read_recipe(recipe)
    denoiser = finetuning.start(base, how, resolution=resolution, device=chosen(device))
    data = datasets.read_dataset(
        dataset, creator_column=creator_column, captions_required=denoiser.conditional, shape=denoiser.image_size[1:]
    )
    for line in [*denoiser.notes, *data.notes, *(f"refused {r.file_name}: {r.reason}" for r in data.refused)]:
        message(line)
    items = retraining.in_order(data.items)
    creators = np.array([item.creator for item in items], dtype=object)
    names = sorted(set(creators))
    index = {
        "base": denoiser.identity["model"],
        "recipe": asdict(how),
        "resolution": resolution,
        "seed": seed,
        "creators": [
            {"creator": name, "works": works_hash(i.item_id for i in items if i.creator == name), "folder": f"{n:05d}"}
            for n, name in enumerate(names)
        ],
    }
    folder = _begin(Path(out), index)
    x0, cond = retraining.encode_items(denoiser, items)
    fresh = finetuning.weights(denoiser)
    for n, name in enumerate(names):
        progress("fine-tunes", n, len(names))
        if not (folder / f"{n:05d}").exists():
            finetuning.set_weights(denoiser, fresh)
            finetuning.fine_tune(denoiser, how, x0, cond, seed=seed, members=creators == name)
            _save(denoiser, how, folder / f"{n:05d}", base)
    progress("fine-tunes", len(names), len(names))
    return folder


def read_solo(folder: str | os.PathLike[str]) -> list[Alone]:
    """The fine-tunes of a folder that `solo` made, by creator.

    Raises:
        OptionError: It is none, or not complete.
    """
    index, place = _read(Path(folder)), Path(folder)
    try:
        base = str(index["base"])
        found = [Alone(str(e["creator"]), str(e["works"]), base, place / str(e["folder"])) for e in index["creators"]]
    except (KeyError, TypeError) as error:
        raise OptionError(f"{place / INDEX} lacks {error}; expected what influence solo makes") from None
    missing = [one.creator for one in found if not one.path.is_dir()]
    if missing:
        raise OptionError(f"{folder} lacks the models of {len(missing)} creators; run the same influence solo again")
    return found


def read_solos(folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[list[Alone]]:
    """The fine-tunes of one or several folders, as `read_solo` finds them, each of another seed.

    Raises:
        OptionError: One is none, or they differ in more than the seed, or not in it.
    """
    places = [Path(f) for f in ([folders] if isinstance(folders, (str, os.PathLike)) else folders)]
    found = [read_solo(place) for place in places]
    indices = [_read(place) for place in places]
    seeds: dict[str, Path] = {}
    for place, index in zip(places, indices, strict=True):
        seed = json.dumps(index.pop("seed", None))
        if seed in seeds:
            raise OptionError(
                f"the fine-tunes in {seeds[seed]} and {place} are one training, of seed {seed}; pass each once, and "
                "more of another influence solo --seed"
            )
        if index != indices[0]:
            raise OptionError(
                f"the fine-tunes in {places[0]} and {place} differ in more than the seed; run influence solo with the "
                "same data set, base and recipe"
            )
        seeds[seed] = place
    return found


def require_same(alone: Sequence[Alone], base: str | None, creators: Iterable[str], item_ids: Iterable[str]) -> None:
    """Refuse fine-tunes of another base or of other works than a store has.

    Args:
        alone: What `read_solo` found.
        base: Hash of the model that the store's fine-tune started from.
        creators: Of each file of the store.
        item_ids: Of each file of the store.

    Raises:
        OptionError: A creator has none, or one of other works, or of another base.
    """
    if any(one.base != base for one in alone):
        raise OptionError(
            "the fine-tunes of creators alone started from another model than the fine-tune of this store; run "
            "influence solo with its base, to another folder"
        )
    theirs: dict[str, list[str]] = {}
    for creator, item_id in zip(creators, item_ids, strict=True):
        theirs.setdefault(creator, []).append(item_id)
    known = {one.creator: one.works for one in alone}
    differ = [name for name, ids in sorted(theirs.items()) if known.get(name) != works_hash(ids)]
    if differ:
        raise OptionError(
            f"the fine-tunes of creators alone are not of the works of this store: those of {differ[0]!r} and of "
            f"{len(differ) - 1} more differ; run influence solo on its data set, without what is excluded from the "
            "store, to another folder"
        )


def works_hash(item_ids: Iterable[str]) -> str:
    """What tells the works of a creator from others: hash of their ids, each as often as there are files of it."""
    return hashlib.sha256(json.dumps(sorted(Counter(item_ids).items())).encode()).hexdigest()


def _begin(folder: Path, index: dict[str, Any]) -> Path:
    """Write what is to be trained, or find the same there."""
    if (folder / INDEX).exists():
        if _read(folder) != index:
            raise OptionError(f"{folder} holds fine-tunes of other works, or of another recipe; choose another folder")
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / (INDEX + _PART)
        aside.write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        aside.rename(folder / INDEX)
    except OSError as error:
        raise OptionError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None
    return folder


def _save(denoiser: Any, recipe: FineTune, folder: Path, base: str | os.PathLike[str]) -> None:
    """Save a model whole: what a run that was stopped left is none."""
    aside = folder.with_name(folder.name + _PART)
    if aside.exists():
        shutil.rmtree(aside)
    finetuning.save(denoiser, recipe, aside, base=base)
    aside.rename(folder)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read ({error}); expected what influence solo makes") from None
    if not isinstance(found, dict):
        raise OptionError(f"{file} holds a {type(found).__name__}; expected what influence solo makes")
    return found
