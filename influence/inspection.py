"""What a path is (store, model folder, LoRA, data set, picture), and whether it is whole."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from influence import datasets, shards, store, verification
from influence.adapters import LORA_FILE
from influence.errors import InfluenceError, OptionError

_MAX_JSON = 16 << 20
_MAX_HEADER = 100 << 20  # the limit that safetensors itself sets


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a path, without loading weights.

    Returns:
        Plain values: `path`, `kind` (`store`, `model`, `training output`, `LoRA`, `weights`, `data set`, `picture`),
        `whole`, and what there is to say about a thing of this kind.

    Raises:
        OptionError: There is nothing at this path, or nothing that this program knows.
    """
    target = Path(path)
    if not target.exists():
        raise OptionError(f"there is nothing at {target}; expected a store, model, LoRA, data set or picture")
    facts = _folder(target) if target.is_dir() else _file(target)
    return {"path": str(target), **facts}


def _folder(path: Path) -> dict[str, Any]:
    if (path / "store.json").exists():
        return _store(path)
    if (path / "model_index.json").exists():
        return _pipeline(path)
    checkpoints = sorted(
        p.name for p in path.glob("checkpoint-*") if (p / "unet").is_dir() or (p / "unet_ema").is_dir()
    )
    if checkpoints:
        return {"kind": "training output", "whole": True, "checkpoints": checkpoints}
    if (path / LORA_FILE).is_file():
        return _file(path / LORA_FILE)
    weights = next((path / name for name in ("unet_ema", "unet") if (path / name).is_dir()), None)
    if weights is not None:
        return {"kind": "training output", "whole": True, "weights": weights.name}
    data = datasets.read_dataset(path)
    creators: dict[str, int] = {}
    for item in data.items:
        creators[item.creator] = creators.get(item.creator, 0) + 1
    return {
        "kind": "data set",
        "whole": not data.refused,
        "pictures": len(data.items),
        "creators": creators,
        "refused": [f"{refusal.file_name}: {refusal.reason}" for refusal in data.refused],
        "notes": data.notes,
    }


def _store(path: Path) -> dict[str, Any]:
    made = store.open_store(path)
    problems = [f"{problem.file}: {problem.found}" for problem in verification.verify(made)]
    families: dict[str, Any] = {}
    for family in shards.FAMILIES:
        records = made.records(family)
        if records or family == "loss":
            images, rows = made.num_rows(family)
            families[family] = {
                "shards": f"{len(records)} of {len(records) + len(made.missing(family))}",
                "images": images,
                "curvature rows": rows,
                "refused": [f"{item}: {reason}" for item, reason in made.refused(family).items()],
            }
    controls = None if problems else made.controls()
    unbuilt = [] if controls is None else controls.missing("loss")
    return {
        "kind": "store",
        "whole": not problems and not made.missing("loss") and not unbuilt,
        "spec": made.spec.to_json(),
        "fingerprint": made.spec.fingerprint,
        "build": made.build,
        "source": made.source,
        "features": families,
        "controls": None if controls is None else {"images": controls.num_rows()[0], "missing shards": len(unbuilt)},
        "excluded": {
            "creators": sorted(made.exclusions.creators),
            "items": sorted(made.exclusions.items),
            "images": len(made.excluded),
        },
        "problems": problems,
    }


def _pipeline(path: Path) -> dict[str, Any]:
    index = _json(path / "model_index.json")
    parts = {
        name: value[1]
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1]
    }
    absent = [name for name in parts if "/" in name or not (path / name).is_dir()]
    weights = {}
    for file in sorted(path.glob("*/*.safetensors")):
        weights[f"{file.parent.name}/{file.name}"] = _tensors(file)
    bare = [  # networks have a config.json; schedulers and tokenizers have files of other names
        name
        for name in parts
        if name not in absent and (path / name / "config.json").exists() and not [*(path / name).glob("*.safetensors")]
    ]
    scheduler = path / "scheduler" / "scheduler_config.json"
    prediction = _json(scheduler).get("prediction_type", "epsilon") if scheduler.exists() else "unknown"
    return {
        "kind": "model",
        "whole": not absent and not bare,
        "pipeline": str(index.get("_class_name")),
        "parts": parts,
        "absent": absent,
        "without weights": bare,
        "prediction": prediction,
        "weights": weights,
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise OptionError(f"{path} is larger than {_MAX_JSON >> 20} MiB; it is not a configuration of a model")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise OptionError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise OptionError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def _tensors(path: Path) -> str:
    """Say what a safetensors file holds, from its header alone."""
    header = _header(path)
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    entries = sum(math.prod(shape) for shape in shapes)
    return f"{len(shapes)} tensors, {entries:,} entries"


def _header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file, and check that the file is as long as it says."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if size > _MAX_HEADER:
            raise OptionError(f"{path} is not a safetensors file")
        try:
            header = json.loads(file.read(size))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            numbers = [n for entry in entries for n in (*entry["shape"], *entry["data_offsets"])]
            if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
                raise ValueError
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise OptionError(f"{path} is not a safetensors file") from None
    if path.stat().st_size != 8 + size + end:
        raise OptionError(f"{path} is {path.stat().st_size} bytes; its header says {8 + size + end}: copy it again")
    return header


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        header = _header(path)
        names = [name for name in header if name != "__metadata__"]
        lora = [name for name in names if "lora" in name]
        ranks = sorted({min(header[name]["shape"]) for name in lora if header[name]["shape"]})
        return {
            "kind": "LoRA" if lora else "weights",
            "whole": True,
            "tensors": _tensors(path),
            **({"ranks": ranks} if lora else {}),
            "metadata": header.get("__metadata__", {}),
        }
    try:
        image, notes = datasets.decode(path)
    except InfluenceError as error:
        return {"kind": "picture", "whole": False, "found": str(error)}
    return {"kind": "picture", "whole": True, "width": image.width, "height": image.height, "notes": notes}
