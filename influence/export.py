"""An export: tables on pictures in one folder, with what they mean and all that is needed to make them again."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from influence import store as stores
from influence import tables
from influence.answers import Answers, answer
from influence.errors import OptionError
from influence.pipeline import LIBRARIES
from influence.progress import Message, Progress, silent
from influence.royalties import ESTIMATORS

_OPTIONS = ("k", "method", "damping", "draws", "prompt", "usage", "pool", "currency", "embedding", "dataset",
            "controls", "model", "lora", "base", "half", "solo")  # fmt: skip
_KINDS = {"k": (int,), "draws": (int,), "batch_size": (int,), "damping": (int, float), "pool": (str, int, float),
          "prompt": (str, list), "usage": (list,), "solo": (str, list)}  # fmt: skip
_COMPUTE = ("engine", "batch_size", "device")  # as they were chosen: they change the last bits of a number


def limits(models: int) -> list[str]:
    """What the tables of an export do not say."""
    again = (
        "They do not cover that training again, with another seed, gives another model."
        if models == 1
        else f"They cover that training again gives another model, by what {models} models differ in."
    )
    return [
        "Scores are first-order estimates of what training on an image did to the loss of a picture, for the "
        "fine-tune's images only: all that the base model was trained on is one lump, _base_model.",
        f"Intervals cover the random draws of noise and timesteps, and for shares which works a creator had. {again}",
        "A score depends on the prompt. Similarity, membership, influence and near copies are different things, and "
        "each has columns of its own.",
        "Shares are research estimates: how an estimator divides what the fine-tune did. They are no licence, no proof "
        "of copying, and nothing here says that anything is due.",
    ]


@dataclass(frozen=True)
class Replayed:
    """Whether an export came out the same."""

    folder: Path
    changed: dict[str, str]
    """Tables whose bytes differ, and how."""


def export(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    form: str = "csv",
    truth: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
    message: Message = silent,
    **options: Any,
) -> Answers:
    """Write all tables on pictures to a new folder, whole or not at all.

    Args:
        images: One picture file, or several.
        store: The store's folder, or several, as for `attribute`.
        out: Folder to make.
        form: Of the tables: one of `tables.FORMATS`.
        truth: Folder of a truth, for exact Shapley values.
        progress: Called as work gets done.
        message: Called with lines that a person must see.
        options: As for `answer`; `pool` may be text.

    Raises:
        InfluenceError: An input cannot be used, or the folder is there already.
    """
    target = Path(out)
    if target.exists():
        raise OptionError(f"{target} is there already; choose another folder, so that no export is overwritten")
    if form not in tables.FORMATS:
        raise OptionError(f"format {form!r} is unknown; expected one of {', '.join(tables.FORMATS)}")
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    folders = [store] if isinstance(store, (str, os.PathLike)) else list(store)
    wanted = {name: value for name, value in options.items() if name in _OPTIONS and value is not None}
    pool = _pool(options.pop("pool", None))
    made = answer(
        paths, folders, pool=pool, truth=truth, progress=progress, message=message, **options,
    )  # fmt: skip
    contents = {name: tables.write(name, getattr(made, name), form) for name in tables.SCHEMA}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    opened = [stores.open_store(folder) for folder in folders]
    inside = [made_of.controls() for made_of in opened]
    run = {
        "tool": "influence",
        "version": importlib.metadata.version("influence"),
        "images": [{"file": str(path), "sha256": _sha256(Path(path))} for path in paths],
        "stores": [str(folder) for folder in folders],
        "truth": None if truth is None else str(truth),
        "format": form,
        "options": {name: _plain(value) for name, value in wanted.items()} | {n: made.facts[n] for n in _COMPUTE},
        "facts": made.facts,
        "estimators": {name: found.formula for name, found in ESTIMATORS.items()},
        "specs": [made_of.spec.to_json() for made_of in opened],
        "builds": [made_of.build for made_of in opened],
        "features": [made_of.family_hash("loss") for made_of in opened],
        "controls": [None if part is None else part.family_hash("loss") for part in inside],
        "dataset_sha256": opened[0].source["dataset_sha256"],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "tables": {f"{name}.{form}": f"sha256:{digest}" for name, digest in hashes.items()},
        "limits": limits(len(folders)),
    }
    files = {f"{name}.{form}": data for name, data in contents.items()}
    files["datapackage.json"] = _json(tables.datapackage(form, hashes))
    files["run.json"] = _json(run)
    files["README.md"] = _readme(made, form, len(folders)).encode()
    _write(target, files)
    return made


def replay(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress = silent,
    message: Message = silent,
    **changes: Any,
) -> Replayed:
    """Make an export again from its `run.json`, and compare.

    Args:
        run: `run.json` of an export; paths in it are as they were given then, from the folder it was made in.
        out: Folder to make.
        progress: Called as work gets done.
        message: Called with lines that a person must see.
        changes: Options in place of those recorded: where the store (`store`), model or data set is now.

    Raises:
        InfluenceError: The record cannot be read, or a picture or the store is not what it was.
    """
    record = _record(Path(run))
    for file, digest in record.images.items():
        if not Path(file).is_file():
            where = "" if Path(file).is_absolute() else ", and run replay in the folder that export ran in"
            raise OptionError(f"{file} is not there; put the picture that was exported back where it was{where}")
        if _sha256(Path(file)) != digest:
            raise OptionError(f"{file} is another picture than was exported; put that one back where it was")
    features, written = record.features, record.tables
    folders = changes.pop("store", None) or record.stores
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    if len(folders) != len(features):
        raise OptionError(f"the export was made of {len(features)} stores, and {len(folders)} are given; name them all")
    for folder, known in zip(folders, features, strict=True):
        if stores.open_store(folder).family_hash("loss") != known:
            raise OptionError(f"store {Path(folder).name} has other features than the export was made of")
    export(list(record.images), folders, out, form=record.form, truth=record.truth, progress=progress, message=message,
           **record.options | changes)  # fmt: skip
    again = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
    changed = {name: f"{digest} became {again['tables'][name]}" for name, digest in written.items()
               if again["tables"].get(name) != digest}  # fmt: skip
    return Replayed(Path(out), changed)


@dataclass(frozen=True)
class _Record:
    """What `replay` reads of a run.json."""

    images: dict[str, str]
    """SHA-256 of each file."""
    stores: list[str]
    features: list[str]
    form: str
    truth: str | None
    options: dict[str, Any]
    tables: dict[str, str]


def _record(path: Path) -> _Record:
    """Read a run.json: a stranger may have written it."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        record = _Record(
            images={str(image["file"]): str(image["sha256"]) for image in read["images"]},
            stores=[str(folder) for folder in read["stores"]],
            features=[str(digest) for digest in read["features"]],
            form=str(read["format"]),
            truth=None if read["truth"] is None else str(read["truth"]),
            options=dict(read["options"]),
            tables={str(name): str(digest) for name, digest in read["tables"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OptionError(f"{path} is no run.json of an export: {type(error).__name__}") from None
    for name, value in record.options.items():
        if name not in _OPTIONS and name not in _COMPUTE:
            raise OptionError(f"{path} has option {name!r}, which export has not; expected {', '.join(_OPTIONS)}")
        kinds = _KINDS.get(name, (str,))
        if isinstance(value, bool) or not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise OptionError(f"{path} has {value!r} as option {name}; expected {expected}")
    for name, kinds, expected in (("usage", (int, float), "numbers"), ("prompt", str, "texts"), ("solo", str, "texts")):
        if not all(isinstance(part, kinds) for part in record.options.get(name, [])):
            raise OptionError(f"{path} has {record.options[name]!r} as option {name}; expected {expected}")
    return record


def _pool(value: Any) -> Decimal | None:
    if value is None:
        return None
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise OptionError(f"pool is {value!r}; expected a sum of money, as 1000 or 1000.50") from None


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else str(value)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from None


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def _readme(made: Answers, form: str, models: int) -> str:
    lines = ["# Export of influence", "", *(f"{limit}\n" for limit in limits(models)), "## Tables", ""]
    for name, schema in tables.SCHEMA.items():
        lines.append(f"- `{name}.{form}`: {schema.title.lower()}; {len(getattr(made, name))} rows")
    lines += [
        "", "`datapackage.json` says what every column is and in which unit; empty is missing. `run.json` has all that",
        "is needed to make the tables again, in the folder that export ran in: `influence replay .../run.json -o",
        "again`.", "", "## Estimators", "",
        *(f"- `{name}`: {found.formula}" + ("" if found.attribution else " (a baseline, not attribution)")
          for name, found in ESTIMATORS.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _write(target: Path, files: dict[str, bytes]) -> None:
    """A folder that is whole or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for name, data in files.items():
                (aside / name).write_bytes(data)
            aside.chmod(0o755)
            aside.rename(target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(aside)
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror}") from None
