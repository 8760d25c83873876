"""Tombstones: images that no command may use, by creator or one by one. Added, never changed: an undo is one more.

Record n is `exclusions/n.json`, sealed, and names the hash of record n − 1: none can be left out between two others,
or put in. What is excluded is what the last record about it says.
"""

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from influence import commit
from influence.errors import StoreError

_FIELDS = {"number": int, "previous": str, "kind": str, "name": str, "excluded": bool, "time": str}
_ADVICE = "restore it from a copy: without it, images that were excluded might be used"


@dataclass(frozen=True)
class Exclusions:
    """What is excluded."""

    creators: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()

    def cover(self, table: pd.DataFrame) -> pd.Series:
        """Which rows of a table of images are excluded."""
        return table["creator"].isin(self.creators) | table["item_id"].isin(self.items)


def read(folder: Path) -> Exclusions:
    """What is excluded now.

    Raises:
        StoreError: A record is damaged, or missing between others.
    """
    return _read(folder)[0]


def add(folder: Path, temporary: Path, kind: str, name: str, *, excluded: bool) -> bool:
    """Exclude a `creator` or an `item`, or take it back.

    Returns:
        Whether anything changed.

    Raises:
        StoreError: The records are damaged, or the disk fails.
    """
    with commit.writing(folder):
        folder.mkdir(exist_ok=True)
    while True:  # another process may add a record at this very moment
        now, number, previous = _read(folder)
        if (name in (now.creators if kind == "creator" else now.items)) == excluded:
            return False
        record = {
            "number": number,
            "previous": previous,
            "kind": kind,
            "name": name,
            "excluded": excluded,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if commit.publish(temporary, folder / f"{number:06d}.json", record):
            return True


def _read(folder: Path) -> tuple[Exclusions, int, str]:
    """What is excluded, the number of records, and the hash of the last."""
    found = [name for name in commit.names(folder) if name.endswith(".json")]
    state: dict[tuple[str, str], bool] = {}
    previous = ""
    for number, name in enumerate(found):
        path = folder / name
        if not re.fullmatch(r"[0-9]{6}\.json", name) or int(name[:6]) != number:
            raise StoreError(f"{path} is there, expected {number:06d}.json: a record of exclusions is lost; {_ADVICE}")
        record = commit.unsealed(path)
        if (
            sorted(record) != sorted(_FIELDS)
            or any(type(record[field]) is not kind for field, kind in _FIELDS.items())
            or record["kind"] not in ("creator", "item")
        ):
            raise StoreError(f"{path} does not hold what a record of exclusions holds; {_ADVICE}")
        if record["number"] != number or record["previous"] != previous:
            raise StoreError(f"{path} does not follow the record before it; {_ADVICE}")
        state[record["kind"], record["name"]] = record["excluded"]
        previous = hashlib.sha256(commit.sealed(record)).hexdigest()
    of = {kind: frozenset(n for (k, n), on in state.items() if on and k == kind) for kind in ("creator", "item")}
    return Exclusions(of["creator"], of["item"]), len(found), previous
