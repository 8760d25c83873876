"""Training folders: pictures, captions and creators, read as the diffusers training scripts read them.

A folder follows the imagefolder convention: `metadata.csv` or `metadata.jsonl` in it or in its `train` folder, or just
pictures, each with an optional caption in a `.txt` file of the same name. A picture that cannot be used is refused by
name and the rest go on; metadata that can be understood in two ways stop the reading. Names and captions are kept as
they are, control characters included.
"""

import hashlib
import io
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32
from PIL import Image, ImageOps, UnidentifiedImageError

from influence.errors import DatasetError

UNKNOWN_CREATOR = "_unknown_creator"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_TEXT_BYTES = 2**30
MAX_RESIZED_PIXELS = 2**29
_QUIET = threading.RLock()


@dataclass(frozen=True)
class Item:
    """One training picture."""

    item_id: str
    """Hash of pixels and caption; see `item_id`."""
    file_name: str
    """Path relative to the data set's root, with forward slashes."""
    caption: str | None
    """`None` if the data set gives none; a blank caption is a caption."""
    creator: str
    """Who made it, or `UNKNOWN_CREATOR`."""
    licence: str | None
    """Its licence, if the metadata name one."""
    path: Path
    picture_id: str = ""
    """Hash of the pixels alone: the same picture with another caption has it, too."""


@dataclass(frozen=True)
class Refusal:
    """One picture that cannot be used, and why, on one line."""

    file_name: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A training folder, read; items and refusals in the order of the metadata, or by name in a bare folder."""

    root: Path
    items: list[Item]
    refused: list[Refusal]
    notes: list[str]
    """Counted remarks that a person must see."""


def read_dataset(
    root: str | Path,
    *,
    creator_column: str | None = None,
    captions_required: bool = False,
    shape: tuple[int, int] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Dataset:
    """Read a training folder and decode every picture once.

    Args:
        root: The folder.
        creator_column: Metadata column that names the creator; `creator`, if there is one, by default.
        captions_required: Whether the model needs a caption with every picture.
        shape: Height and width that the model reads: pictures too elongated for it are refused.
        progress: Called with (pictures done, pictures in all).

    Raises:
        DatasetError: The metadata cannot be used, a needed caption or column is missing, or no picture is usable.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{str(root)!r} is not a folder; expected the folder with the training pictures")
    metadata, inside = _metadata(root), root.resolve()
    drafts, notes = _listed(root, metadata, creator_column) if metadata else _bare(root, creator_column)
    missing = [draft.file_name for draft in drafts if draft.caption is None]
    if captions_required and missing:
        found = f"{len(missing)} of {len(drafts)} pictures have no caption, first {missing[0]!r}"
        where = f"in column 'text' of {metadata.name}" if metadata else "in a .txt file beside it"
        raise DatasetError(f"{found}; this model is trained with captions: give each one {where} (blank is allowed)")
    items, refused, remarks = [], [], Counter()
    with _quiet(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for done, (result, said) in enumerate(pool.map(lambda draft: _examine(draft, inside, shape), drafts), 1):
            (items if isinstance(result, Item) else refused).append(result)
            remarks.update(said)
            if progress is not None:
                progress(done, len(drafts))
    if not items:
        first = f", first {refused[0].file_name!r}: {refused[0].reason}" if refused else ""
        found = f"{str(root)!r} has no usable picture ({len(refused)} refused{first})"
        raise DatasetError(f"{found}; expected {', '.join(FORMATS)} files: add some")
    copies = Counter(item.item_id for item in items).values()
    remarks["occur more than once (same pixels and caption)"] = sum(count > 1 for count in copies)
    return Dataset(root, items, refused, notes + _notes(remarks))


def decode(path: str | Path) -> tuple[Image.Image, list[str]]:
    """Decode a picture as `Image.open(…).convert("RGB")` does, turned upright by its EXIF orientation.

    Returns:
        The RGB picture, and remarks on what the conversion left out.

    Raises:
        DatasetError: The file is no picture of a known format, damaged, too large, or of more than 8 bits in a way
            that `convert` would clip.
    """
    try:
        with _quiet():
            return _decode(Path(path))
    except DatasetError as error:
        raise DatasetError(f"{str(path)!r}: {error}") from error


def item_id(image: Image.Image, caption: str | None) -> str:
    """Identity of a training example: 32 hex digits that depend on its pixels and caption, and on nothing else."""
    return item_ids(image, [caption])[0]


def item_ids(image: Image.Image, captions: Iterable[str | None]) -> list[str]:
    """`item_id` of one picture with each of several captions: its pixels are hashed once."""
    hasher = hashlib.sha256(f"influence.item.1 {image.width}x{image.height};".encode())
    hasher.update((image if image.mode == "RGB" else image.convert("RGB")).tobytes())
    found = []
    for caption in captions:
        # The size fixes the number of pixel bytes, so one byte suffices to tell no caption from a blank one.
        of_both = hasher.copy()
        of_both.update(b"\0" if caption is None else b"\1" + caption.encode("utf-8", "surrogatepass"))
        found.append(of_both.hexdigest()[:32])
    return found


def to_array(
    image: Image.Image, *, height: int, width: int, channels: int
) -> Float32[np.ndarray, "{channels} {height} {width}"]:
    """Resize, crop and normalise as torchvision's Resize, CenterCrop, ToTensor and Normalize(0.5, 0.5) do.

    The picture is resized (bilinear, aspect kept) until it just covers height × width, which for a square is
    `Resize(size)`: the shorter side becomes `size`. What overhangs is cropped on both sides alike.

    Returns:
        Values in [−1, 1].

    Raises:
        DatasetError: The shape asked for is not possible, or the picture is too elongated for it.
    """
    if channels not in (1, 3) or min(height, width) < 1:
        raise DatasetError(f"pictures of {channels} × {height} × {width} are not supported; expected 1 or 3 channels")
    image = image.convert("L" if channels == 1 else "RGB")
    size = _covering(image, height, width)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    values = (pixels.reshape(height, width, channels) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _covering(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Width and height at which a picture just covers a shape."""
    if image.width * height <= image.height * width:
        size = width, int(width * image.height / image.width)
    else:
        size = int(height * image.width / image.height), height
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        found = f"a picture of {image.width} × {image.height} pixels is too elongated for {width} × {height}"
        raise DatasetError(f"{found}; expected one that covers it with at most {MAX_RESIZED_PIXELS} pixels: crop it")
    return size


def to_png(values: Float32[np.ndarray, "channels height width"]) -> bytes:
    """A PNG file of values in [−1, 1], which are clipped and rounded to 8 bits: grey for 1 channel, RGB for 3."""
    levels = np.round((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def load(item: Item, *, height: int, width: int, channels: int) -> Float32[np.ndarray, "{channels} {height} {width}"]:
    """Decode a picture again, for the model; see `to_array`.

    Raises:
        DatasetError: The file is not what it was when the data set was read, or cannot have that shape.
    """
    image, _ = decode(item.path)
    if item_id(image, item.caption) != item.item_id:
        found = f"{item.file_name!r} changed while it was in use"
        raise DatasetError(f"{found}; expected the picture that was read first: leave the folder alone, start again")
    try:
        return to_array(image, height=height, width=width, channels=channels)
    except DatasetError as error:
        raise DatasetError(f"{item.file_name!r}: {error}") from error


def dataset_fingerprint(items: Iterable[Item]) -> str:
    """SHA-256 of which pictures a data set has, each with its number of copies; order and names do not matter."""
    copies = Counter(item.item_id for item in items)
    return hashlib.sha256("".join(f"{key} {copies[key]}\n" for key in sorted(copies)).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings: each is either a remark, a refusal, or what the trainer saw too."""
    # Python's filters are global to the process, so that two threads must not set and restore them at a time.
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _decode(path: Path) -> tuple[Image.Image, list[str]]:
    """`decode` with errors that do not name the file, for callers that have silenced Pillow."""
    try:
        if not path.is_file():
            raise DatasetError("is not a file" if path.exists() else "the file is missing")
        if path.stat().st_size == 0:
            raise DatasetError("the file is empty")
        with Image.open(path, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise DatasetError(f"{image.width} × {image.height} pixels; at most {Image.MAX_IMAGE_PIXELS} are read")
            if image.mode.startswith(("I", "F")):
                raise DatasetError(f"mode {image.mode} has more than 8 bits, which are clipped; convert it to 8 bits")
            several = getattr(image, "is_animated", False) and image.format != "MPO"  # A camera's preview is no frame.
            image.load()
            alpha, cmyk = image.has_transparency_data, image.mode == "CMYK"
            frame = "several pages, first page used" if image.format == "TIFF" else "animated, first frame used"
            remarks = {frame: several, "alpha channel dropped": alpha, "CMYK converted to RGB": cmyk}
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB"), [remark for remark, applies in remarks.items() if applies]
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"not a picture that can be read; expected {', '.join(FORMATS)}") from error
    # Given damaged files, Pillow's plugins raise nearly every builtin error (OSError, SyntaxError, struct.error,
    # IndexError, MemoryError, …), and which ones changes with its version: any of them refuses this picture only.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"cannot be decoded: {reason or type(error).__name__}") from error


def _examine(draft: Item, inside: Path, shape: tuple[int, int] | None) -> tuple[Item | Refusal, list[str]]:
    """Complete an item by its id, or refuse it; also the remarks on it."""
    name = PurePosixPath(draft.file_name)
    try:
        draft.file_name.encode()
        if name.is_absolute() or ".." in name.parts or not _is_inside(draft.path, inside):
            raise DatasetError("leads out of the data set folder; copy the picture into it")
        image, notes = _decode(draft.path)
        if shape is not None:
            _covering(image, *shape)
    except UnicodeEncodeError:
        return Refusal(draft.file_name.encode("utf-8", "backslashreplace").decode(), "the name is not UTF-8"), []
    except DatasetError as error:
        return Refusal(draft.file_name, str(error)), []
    unknown = [f"no creator given, credited to {UNKNOWN_CREATOR}"] * (draft.creator == UNKNOWN_CREATOR)
    ids = {"item_id": item_id(image, draft.caption), "picture_id": item_id(image, None)}
    return replace(draft, **ids), notes + unknown


def _is_inside(path: Path, inside: Path) -> bool:
    """Whether a path stays in a folder (given resolved) once its links are followed."""
    try:
        return path.resolve().is_relative_to(inside)
    except (OSError, RuntimeError, ValueError):  # A loop of links, a name too long, a NUL.
        return False


def _metadata(root: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    names = [f"{folder}metadata.{suffix}" for folder in ("", "train/") for suffix in ("csv", "jsonl", "parquet")]
    found = [name for name in names if (root / name).exists()]
    if len(found) > 1 or any(name.endswith("parquet") for name in found):
        raise DatasetError(f"found {' and '.join(found)}; expected one metadata.csv or metadata.jsonl: keep only that")
    return root / found[0] if found else None


def _listed(root: Path, metadata: Path, creator_column: str | None) -> tuple[list[Item], list[str]]:
    """Items without ids from a metadata file."""
    text, folder = _text(metadata, root), metadata.parent
    rows = _csv(metadata.name, text) if metadata.suffix == ".csv" else _jsonl(metadata.name, text)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    for column in ("file_name", creator_column or "file_name"):
        if rows and column not in columns:
            found = ", ".join(repr(name[:60]) for name in columns[:20])
            raise DatasetError(f"{metadata.name} has no column {column!r}, only {found}; add it or name another")
    drafts = []
    for where, row in rows:
        name = _cell(row, "file_name", where)
        if name is None:
            raise DatasetError(f"{where} has no 'file_name'; expected the path of a picture: add it")
        creator = _cell(row, creator_column or "creator", where, numbers=True) or ""
        licences = [_cell(row, column, where, numbers=True) or "" for column in ("licence", "license")]
        drafts.append(
            Item(
                item_id="",
                file_name=str(PurePosixPath(folder.relative_to(root).as_posix(), name)),
                caption=_cell(row, "text", where),
                creator=creator if creator.strip() else UNKNOWN_CREATOR,
                licence=next((licence for licence in licences if licence.strip()), None),
                path=folder / name,
            )
        )
    counts = Counter(draft.file_name for draft in drafts if draft.path != folder)  # Blank names are refused later.
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DatasetError(f"{metadata.name} lists {twice[0]!r} {counts[twice[0]]} times; expected once: remove rows")
    unlisted = sum(path.relative_to(root).as_posix() not in counts for path in _pictures(folder)[0])
    return drafts, _notes({f"in the folder but not in {metadata.name}, left out": unlisted})


_TRAINED = {"train", "training"}
_TESTED = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


def _bare(root: Path, creator_column: str | None) -> tuple[list[Item], list[str]]:
    """Items without ids from a folder without metadata."""
    if creator_column is not None:
        found = f"{str(root)!r} has no metadata file, hence no column {creator_column!r}"
        raise DatasetError(f"{found}; expected metadata.csv or metadata.jsonl: add one, or name no creator column")
    paths, notes = _pictures(root)
    parts = [path.relative_to(root).parts[0].lower() if path.parent != root else "" for path in paths]
    if not _TRAINED.isdisjoint(parts):  # as image folders have it: a part to test with was not trained on
        notes += _notes({"not in train/ but in a part to test with, left out": sum(part in _TESTED for part in parts)})
        paths = [path for path, part in zip(paths, parts, strict=True) if part not in _TESTED]
    drafts = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = _text(beside, root).strip() if beside.exists() else None
        drafts.append(Item("", path.relative_to(root).as_posix(), caption, UNKNOWN_CREATOR, None, path))
    return drafts, notes


def _pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """Files with a picture's suffix in a folder and those below it, sorted, hidden ones passed over; and remarks."""
    paths, links, unreadable = [], 0, []
    for top, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += sum(Path(top, name).is_symlink() for name in folders)
        paths += [Path(top, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    notes = _notes({"a link, not entered": links, "cannot be read, left out": len(unreadable)}, "folder")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix()), notes


def _text(path: Path, root: Path) -> str:
    """Content of a UTF-8 file of the data set, line ends kept."""
    if not path.is_file() or not _is_inside(path, root.resolve()):
        raise DatasetError(f"{str(path)!r} is not a file in the data set folder; expected a plain file: copy it there")
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise DatasetError(f"{str(path)!r} has {size} bytes; at most {MAX_TEXT_BYTES} are read: split the data set")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read ({error}); expected UTF-8 text: save it as that") from error


def _csv(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file, each with words for where it is."""
    try:
        # Without a header, pandas refuses a row with too many cells; with one, it would shift the columns in silence.
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, header=None).to_numpy().tolist()
    except ValueError as error:  # ParserError and EmptyDataError are ValueErrors.
        reason = " ".join(str(error).split())
        raise DatasetError(f"{name} is not a CSV table ({reason}); put cells with commas in quotes") from error
    if len(set(table[0])) < len(table[0]):
        raise DatasetError(f"{name} has column {Counter(table[0]).most_common(1)[0][0]!r} twice; rename one")
    return [(f"{name} row {number}", dict(zip(table[0], row, strict=True))) for number, row in enumerate(table[1:], 1)]


def _jsonl(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a file of JSON lines, each with words for where it is."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # A lone surrogate could not be stored.
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{name} line {number} is broken ({error}); expected one JSON object a line") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{name} line {number} is a {type(row).__name__}; expected one JSON object a line")
        rows.append((f"{name} line {number}", row))
    return rows


def _cell(row: Mapping[str, Any], column: str, where: str, *, numbers: bool = False) -> str | None:
    """Text in a row, `None` if there is none; numbers become text where they are allowed."""
    value = row.get(column)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DatasetError(f"{where}: {column!r} is a {type(value).__name__}; expected text: put it in quotes")
    return value


def _notes(counts: Mapping[str, int], noun: str = "picture") -> list[str]:
    """Remarks with their counts, those that do not occur left out."""
    return [f"{count} {noun}{'s' * (count != 1)}: {remark}" for remark, count in counts.items() if count]
