"""Feed the store what a stranger might send: mutated files, with records that fit them again, or without.

    python tests/fuzz_store.py --minutes 10

Each input is opened, read and verified in a process of its own that may use little memory and little time. Whatever
comes of it must be the values that were written, or other finite values of the right shape that a record vouches for,
or one error of the package on one line. A crash, another error, or too much time or memory is a finding: the input is
kept and the exit status is 1. An input is a function of `--seed` and its number.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import store_worker  # noqa: F401 - makes the package importable without torch
import stores

from influence import commit, shards, store, verification
from influence.errors import InfluenceError

MEMORY = 3 << 30  # address space: libraries take 2 GB of it before anything happens
SECONDS = 10
_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"../../etc/passwd",
    b"/etc/passwd",
    b"TREE",
    b"HEAP",
    b"SNOD",
    b"OHDR",
    b"phi\0",
    b'{"a":',
    b"[[[[[[",
    b"NaN",
)


def mutated(data, draw):
    """A few changes of the kinds that parsers stumble over."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        kind, at = draw.randrange(8), draw.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:  # a number in the little-endian form of HDF5 headers
            size = draw.choice((1, 2, 4, 8))
            data[at : at + size] = (draw.choice(_NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            del data[at : at + draw.choice((1, 2, 8, 64, 4096))]
        elif kind == 4:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 8, 64)))
        elif kind == 5:
            word = draw.choice(_WORDS)
            data[at : at + len(word)] = word
        elif kind == 6:  # a piece of the file in another place: headers that lead into each other
            start, size = draw.randrange(len(data) + 1), draw.choice((8, 16, 40, 512))
            data[at : at + size] = data[start : start + size]
        else:  # an address becomes another one
            at -= at % 8
            start = draw.randrange(len(data) + 1)
            data[at : at + 8] = start.to_bytes(8, "little")
    return bytes(data)


def _vouch(path, name):
    """Make the record fit the mutated file, as a stranger would who sends both."""
    folder, stem = (path / name).parent, name.split("/")[1].rsplit("-", 1)[0]
    record = folder / f"{stem}.json"
    fields = commit.unsealed(record)
    size, xxh, sha = commit.digest(path / name)
    fields |= {"file": f"{stem}-{xxh}{Path(name).suffix}", "bytes": size, "xxh3_128": xxh, "sha256": sha}
    (path / name).rename(folder / fields["file"])
    record.write_bytes(commit.sealed(fields))


def _reseal(path, draw):
    """Change a value of a record, and seal it again."""
    fields = commit.unsealed(path)
    holder = fields
    while isinstance(holder, dict) and holder:
        name = draw.choice(sorted(holder))
        if isinstance(holder[name], dict) and holder[name] and draw.random() < 0.7:
            holder = holder[name]
            continue
        number, text = draw.choice(_NUMBERS), draw.choice(_WORDS).decode()
        holder[name] = draw.choice([number, -number, text, None, [], {}, [text], {text: number}, number / 3, True])
        break
    with contextlib.suppress(InfluenceError):
        path.write_bytes(commit.sealed(fields))


def damage(path, draw):
    """Mutate one file of a store; says what was done."""
    name = draw.choice(sorted(stores.files(path)))
    if name.endswith(".json") and draw.random() < 0.5:
        _reseal(path / name, draw)
        return f"{name}, sealed again"
    (path / name).write_bytes(mutated((path / name).read_bytes(), draw))
    if not name.endswith(".json") and draw.random() < 0.9:
        _vouch(path, name)
        return f"{name}, vouched for"
    return name


def _try(path):
    """Open, read and verify."""
    said = 0
    for work in (_read, verification.verify):
        try:
            work(path)
        except InfluenceError as error:
            said += 1
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"not one line: {error}") from error
    return said


def _read(path):
    made = store.open_store(path)
    for family in shards.FAMILIES:
        made.missing(family)
        for content in made.blocks(family):
            n, rows, k = len(content.item_ids), len(content.psi), made.spec.dim
            assert {*content.item_ids, *content.refused} == set(made.shard_items(content.shard)) - made.excluded
            assert content.phi.shape == (n, k) and content.psi.shape == (rows, k)
            float(content.phi.sum()) + float(content.psi.sum()) + float(content.loss.sum())  # every page is there
            assert all(0 <= i < n for i in content.psi_item.tolist())


def attempt(whole, folder, seed, number):
    """Damage a copy of a store, and try it; what was damaged."""
    shutil.rmtree(folder / "s", ignore_errors=True)
    shutil.copytree(whole, folder / "s")
    what = damage(folder / "s", random.Random(f"{seed} {number}"))
    (folder / "at").write_text(f"{number}\n{what}", encoding="utf-8")
    signal.alarm(SECONDS)
    _try(folder / "s")
    signal.alarm(0)


def run(whole, folder, seed, numbers):
    """Try inputs in a process of its own until one does harm: that number, what was damaged, what came of it."""
    pid = os.fork()
    if not pid:
        code = 9
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number in numbers:
                attempt(whole, folder, seed, number)
            code = 0
        except BaseException as error:
            (folder / "found").write_text(repr(error)[:2000], encoding="utf-8")
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return None
    number, what = (folder / "at").read_text(encoding="utf-8").split("\n", 1)
    killed = f"killed by {signal.Signals(-status).name}" if status < 0 else (folder / "found").read_text()
    return int(number), what, killed


def fuzz(*, seed, count=None, minutes=None, keep=None):
    """Try inputs until there were so many, or so long.

    Returns:
        How many, and what was found: number of the input, what was damaged, what came of it.
    """
    findings, number = [], 0
    end = time.monotonic() + (60 * minutes if minutes is not None else 10**9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = stores.fill(stores.make(folder / "whole", 5))
        stores.fill(made, "square")
        store.exclude(folder / "whole", creator="creator 1")
        while time.monotonic() < end and (count is None or number < count):
            after = number + min(50, (count or 10**9) - number)
            found = run(folder / "whole", folder, seed, range(number, after))
            number = after
            if found is not None:
                number = found[0] + 1
                findings.append(found)
                if keep is not None:
                    shutil.copytree(folder / "s", keep / f"input-{found[0]}", dirs_exist_ok=True)
    return number, findings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--count", type=int, help="inputs, whatever time they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs that did harm are kept")
    options = parser.parse_args()
    minutes = options.minutes if options.count is None else None
    number, findings = fuzz(seed=options.seed, count=options.count, minutes=minutes, keep=options.keep)
    print(json.dumps({"inputs": number, "seed": options.seed, "findings": findings}, indent=1))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
