"""Hold out a part of a data set before a fine-tune: pictures of the same kind that it never sees, as controls."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np

from influence import datasets, keys
from influence.errors import OptionError

PARTS = ("train", "controls")


def hold_out(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fraction: float = 0.1,
    seed: int = 0,
    creator_column: str | None = None,
) -> tuple[int, int]:
    """Copy a data set into two: `train` for the fine-tune, `controls` for `build --controls`.

    Which images are held out is decided by a key of each picture alone, so that images that are added later do not
    move the others; files of the same pixels go together, whatever their captions. Originals stay as they are.

    Args:
        dataset: Image folder, as for `build`.
        out: Folder to make.
        fraction: Part to hold out.
        seed: Of the key.
        creator_column: Column of the metadata that names the creator.

    Returns:
        Files in each.

    Raises:
        OptionError: The fraction leaves one of them empty, or the folder is there already.
        DatasetError: The data set cannot be read.
    """
    target = Path(out)
    if not 0 < fraction < 1:
        raise OptionError(f"holdout is {fraction}; expected a part between 0 and 1, as 0.1")
    if target.exists():
        raise OptionError(f"{target} is there already; choose another folder")
    data = datasets.read_dataset(dataset, creator_column=creator_column)
    pictures = {item.picture_id for item in data.items}
    held = {picture for picture in pictures if keys.uniform(("holdout", seed, picture), 1)[0] < fraction}
    parts = {name: [i for i in data.items if (i.picture_id in held) == (name == "controls")] for name in PARTS}
    if not all(parts.values()):
        counts = np.array([len(part) for part in parts.values()])
        raise OptionError(f"holdout {fraction} gives {counts[0]} and {counts[1]} pictures; expected some in each")
    captions = any(item.caption is not None for item in data.items)
    try:
        for name, items in parts.items():
            for item in items:
                place = target / name / item.file_name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(item.path, place)
            with (target / name / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
                text = ["text"] if captions else []
                writer.writerow(["file_name", *text, "creator", "licence"])
                for item in items:
                    caption = [item.caption or ""] if captions else []
                    writer.writerow([item.file_name, *caption, item.creator, item.licence or ""])
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror}") from None
    return len(parts["train"]), len(parts["controls"])
