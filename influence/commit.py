"""Files that are whole or absent: written aside, synced, then put in place by one call that cannot be half done.

`publish` commits a record by a hard link, which fails if the name is taken: the first writer wins. A file system without
hard links gets an exclusive create; the first still wins, but a crash within its one write leaves a torn record, which
its seal betrays. Whatever is read back is a plain file with the size, the hash or the seal that was written.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ADVICE = "run influence inspect on the store"
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
def aside(folder: Path) -> Iterator[Path]:
    """Give a path of its own in a folder for temporary files; what is left there afterwards is removed."""
    folder.mkdir(exist_ok=True)
    temporary = folder / uuid.uuid4().hex
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


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
        os.replace(temporary, final)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync(final.parent)


def place(temporary: Path, final: Path) -> None:
    """Move a written file to the name of its content; any file there has the same content."""
    step("sync")
    sync(temporary)
    step("rename")
    os.replace(temporary, final)
    step("sync-name")
    sync(final.parent)


def publish(folder: Path, final: Path, record: dict[str, Any]) -> bool:
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
        with contextlib.suppress(OSError):
            os.unlink(final)
        raise
    sync(final)
    return True


# Reading ------------------------------------------------------------------------------------------------------------


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
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}) though it is committed; {ADVICE}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise StoreError(f"{path} is a link, folder or device; expected a plain file; {ADVICE}")
    if facts.st_size != committed.bytes:
        raise StoreError(f"{path} is {facts.st_size} bytes, its record says {committed.bytes}; {ADVICE}")
    return facts


def check_hash(folder: Path, committed: Committed) -> None:
    """Compare all bytes of a committed file with its record.

    Raises:
        StoreError: They are others.
    """
    path, xxh = folder / committed.file, xxhash.xxh3_128()
    try:
        for chunk in _chunks(path):
            xxh.update(chunk)
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    if xxh.hexdigest() != committed.xxh3_128:
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


def sealed(record: dict[str, Any]) -> bytes:
    """A JSON record with its own SHA-256.

    Raises:
        StoreError: It holds something that JSON cannot.
    """
    try:
        plain = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"a record of a store must be plain JSON values: {error}") from None
    data = json.dumps({**plain, "seal": _seal(plain)}, indent=1).encode()
    if len(data) > _MAX_RECORD or _too_deep(plain):
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
    seal = record.pop("seal", None)
    if seal != _seal(record) or sealed(record) != data:
        raise StoreError(f"{path} is damaged: its contents do not fit its seal; {_RESTORE}")
    return record


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
