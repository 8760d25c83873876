"""Files that are whole or absent: written aside, synced, then put in place by one call that cannot be half done.

`publish` commits a record by a hard link, which fails if the name is taken: the first writer wins. A file system
without hard links gets an exclusive create; the first still wins, but a crash within its one write leaves a torn
record, which its seal betrays. Whatever is read back is a plain file with the size, the hash or the seal that it had.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

import xxhash

from influence.errors import StoreError

STEPS = (
    "write",
    "verify",
    "hash",
    "sync",
    "rename",
    "sync-name",
    "write-record",
    "sync-record",
    "link",
    "unlink",
    "sync-link",
)
"""Names that `step` is called with in the course of one commit, in order."""

_MAX_RECORD = 64 << 20
_MAX_DEPTH = 32
_CHUNK = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
ADVICE = "run influence verify on the store"
_RESTORE = "restore it from a copy, or remove it and build again"


def step(name: str) -> None:
    """Called before each of `STEPS`; does nothing. Tests replace it, to stop there."""


@dataclass(frozen=True)
class Committed:
    """What a record says of its file."""

    file: str
    """Name, in the folder of the record."""
    bytes: int
    xxh3_128: str
    """Checked before each use: quick."""
    sha256: str
    """Names the content in what is derived from it; checked by `verify`."""


# Writing ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(final: Path) -> Iterator[None]:
    """Turn what the system says into an error that names the file that could not be written.

    Raises:
        StoreError: The disk is full or fails, or may not be written to.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{final} could not be written ({error.strerror}); see to the disk and run the same command again"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says into an error that names what could not be read.

    Raises:
        StoreError: The disk fails, or may not be read from.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); see to its permissions or the disk") from error


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Give a path of its own in a folder for temporary files; what is left there afterwards is removed."""
    folder.mkdir(exist_ok=True)
    temporary = folder / uuid.uuid4().hex
    try:
        yield temporary
    finally:
        try:
            drop(temporary)
        except BaseException:  # a signal to stop came at this very moment
            drop(temporary)
            raise


def drop(path: Path) -> None:
    """Remove a file that no record names; garbage that cannot be removed does no harm."""
    with contextlib.suppress(OSError):
        path.unlink()


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a new file; it is not synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_SYNC):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace a file: after a crash it is the old or the new one, never a part.

    Raises:
        OSError: It could not be written; the old one, if any, is untouched.
    """
    final = Path(path)
    temporary = final.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        write(temporary, data)
        sync(temporary)
        temporary.replace(final)
    finally:
        drop(temporary)
    sync(final.parent)


def place(temporary: Path, final: Path) -> None:
    """Move a written file to the name of its content; any file there has the same content."""
    step("sync")
    sync(temporary)
    step("rename")
    temporary.replace(final)
    step("sync-name")
    sync(final.parent)


def publish(folder: Path, final: Path, record: Mapping[str, Any]) -> bool:
    """Commit a record, if there is none of this name: whole and at once.

    Args:
        folder: Folder for temporary files, on the same file system.
        final: Where the record belongs.
        record: Plain JSON values.

    Returns:
        Whether this call was first. (On NFS a lost answer may deny it to the first: compare the records.)

    Raises:
        StoreError: The disk is full or fails.
    """
    data = sealed(record)
    with writing(final):
        with aside(folder) as temporary:
            step("write-record")
            write(temporary, data)
            step("sync-record")
            sync(temporary)
            step("link")
            first = _link(temporary, final, data)
            step("unlink")
        step("sync-link")
        sync(final.parent)
    return first


def _link(temporary: Path, final: Path, data: bytes) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create(final, data)
    return True


def _create(final: Path, data: bytes) -> bool:
    """Do what a file system without hard links allows."""
    try:
        write(final, data)
    except FileExistsError:
        return False
    except OSError:
        drop(final)
        raise
    sync(final)
    return True


# Reading ------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    """Names in a folder, in order; none if there is no folder.

    Raises:
        StoreError: It cannot be read: what is in it must not count as absent.
    """
    with reading(folder):
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted
        except FileNotFoundError:
            return []


def digest(path: Path) -> tuple[int, str, str]:
    """Bytes, XXH3-128 and SHA-256 of a plain file, in one pass."""
    xxh, sha, size = xxhash.xxh3_128(), hashlib.sha256(), 0
    for chunk in _chunks(path):
        xxh.update(chunk)
        sha.update(chunk)
        size += len(chunk)
    return size, xxh.hexdigest(), sha.hexdigest()


def check_size(folder: Path, committed: Committed) -> os.stat_result:
    """Look whether a committed file is there, plain and as long as it was.

    Raises:
        StoreError: It is not.
    """
    path = folder / committed.file
    try:
        facts = path.lstat()
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, though it was committed; {ADVICE}") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise StoreError(f"{path} is a link, folder or device; expected a plain file; {ADVICE}")
    if facts.st_size != committed.bytes:
        raise StoreError(f"{path} is {facts.st_size} bytes, its record says {committed.bytes}; {ADVICE}")
    return facts


def check_hash(folder: Path, committed: Committed, *, thorough: bool = False) -> None:
    """Compare all bytes of a committed file with its record; SHA-256, too, if `thorough`.

    Raises:
        StoreError: They are others.
    """
    path, xxh, sha = folder / committed.file, xxhash.xxh3_128(), hashlib.sha256()
    try:
        for chunk in _chunks(path):
            xxh.update(chunk)
            if thorough:
                sha.update(chunk)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    if xxh.hexdigest() != committed.xxh3_128 or (thorough and sha.hexdigest() != committed.sha256):
        raise StoreError(f"{path} is damaged: its bytes are not those that were committed; {ADVICE}")


def _chunks(path: Path) -> Iterator[bytes]:
    """Read a plain file; neither links are followed nor pipes waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        while chunk := os.read(fd, _CHUNK):
            yield chunk
    finally:
        os.close(fd)


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it will be read back: lists for tuples, text for keys.

    Raises:
        StoreError: It holds something that JSON cannot.
    """
    try:
        return json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"a record of a store must be plain JSON values: {error}") from None


def sealed(record: Mapping[str, Any]) -> bytes:
    """A JSON record with its own SHA-256.

    Raises:
        StoreError: It holds something that JSON cannot, or is too large or too deep to be read back.
    """
    values = plain(record)
    data = _with_seal(values)
    if len(data) > _MAX_RECORD or _too_deep(values):
        raise StoreError(f"a record of a store is at most {_MAX_RECORD >> 20} MiB and {_MAX_DEPTH} levels deep")
    return data


def unsealed(path: Path) -> dict[str, Any]:
    """Read a sealed record; each of its bytes must be as it was written.

    Raises:
        StoreError: It is too large, too deep, not JSON, or not what was written.
    """
    data = bytearray()
    try:
        for chunk in _chunks(path):
            data += chunk
            if len(data) > _MAX_RECORD:
                raise StoreError(f"{path} is larger than {_MAX_RECORD >> 20} MiB; it is not a record of a store")
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); a store holds plain files only") from None
    try:
        record = json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON ({str(error).splitlines()[0]}); {_RESTORE}") from None
    if not isinstance(record, dict) or _too_deep(record):
        raise StoreError(f"{path} is not a record of a store; {_RESTORE}")
    record.pop("seal", None)
    if _with_seal(record) != data:
        raise StoreError(f"{path} is damaged: its contents do not fit its seal; {_RESTORE}")
    return record


def _with_seal(values: dict[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "seal": seal}, indent=1).encode()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


_R = TypeVar("_R", bound=Committed)


def parsed(kind: type[_R], path: Path, names: re.Pattern[str]) -> _R:
    """Make a record of sealed JSON; nothing in it is believed.

    Args:
        kind: Its class; all fields are text, numbers from 0, or text by text.
        path: Where it is; it must name a file called after it and its hash.
        names: What such a file is called.

    Raises:
        StoreError: It is damaged, has other fields, or names something else.
    """
    values = unsealed(path)
    types = {field.name: get_origin(field.type) or field.type for field in fields(kind)}
    texts = [text for value in values.values() if isinstance(value, dict) for text in value.values()]
    right = sorted(values) == sorted(types) and all(type(values[name]) is types[name] for name in types)
    right = right and all(value >= 0 for value in values.values() if type(value) is int)
    if not right or not all(isinstance(text, str) for text in texts):
        raise StoreError(f"{path} does not hold what a record holds; {ADVICE}")
    record = kind(**values)
    stem, _, rest = record.file.rpartition("-")
    if not names.fullmatch(record.file) or stem != path.stem or rest.split(".")[0] != record.xxh3_128:
        raise StoreError(f"{path} names {record.file[:100]!r}; expected a file of this store; {ADVICE}")
    return record
