"""Builders that get killed, race, or meet a full disk: one process without torch, which forks each of them.

Run as `python store_worker.py MODE FOLDER`; prints one JSON value.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

package = types.ModuleType("influence")  # the package's own __init__ loads torch
package.__path__ = [str(Path(__file__).parent.parent / "influence")]
sys.modules["influence"] = package
sys.path.insert(0, str(Path(__file__).parent))

import independent_reader  # noqa: E402
import stores  # noqa: E402

from influence import commit, store, verification  # noqa: E402
from influence.errors import InfluenceError, SpecMismatchError, StoreError  # noqa: E402

COUNT = 12  # two shards
os.fsync = lambda fd: None  # a killed process loses nothing that was not synced, so waiting would show nothing


def forked(work):
    """Start a process; its exit status is 0, 1 for an unexpected error, or what `work` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work() or 0
    except BaseException as error:  # the child must never return into the parent's loop
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def outcome(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def build(path, count=COUNT, **options):
    stores.fill(stores.make(path, count, **options))


def kill_at(path, number):
    """Build, and die before the given step; names each step passed in a file beside the store."""
    passed = 0

    def step(name):
        nonlocal passed
        passed += 1
        if passed == number:
            path.with_suffix(".step").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    commit.step = step
    build(path)


def survivors(path):
    """What a killed builder left: nothing wrong, and no values but the right ones. Then resume."""
    if (path / "store.json").exists():
        assert verification.verify(path) == []
        left = store.open_store(path)
        if len(left.items):
            for content in left.blocks():
                wanted = stores.content_of(left, content.shard)
                found = independent_reader.read(path / "shards" / left.records()[content.shard].file)
                assert content.phi.tobytes() == wanted.phi.tobytes() == found["phi"].tobytes()
    build(path)
    assert verification.verify(path) == []


def same(path, whole):
    """Whether a store is byte for byte the one that was built in peace; orphans are no part of it."""
    found, wanted = stores.files(path), stores.files(whole)
    return {name: found.get(name) for name in wanted} == wanted and all(
        name.endswith(".h5") for name in {*found} - {*wanted}
    )


def peaceful(folder, **options):
    whole = folder / "whole"
    assert outcome(forked(lambda: build(whole, **options))) == 0
    return whole


def kills(folder):
    """Kill at each step in turn, until a build ends alive."""
    whole, results = peaceful(folder), []
    for number in range(1, 1000):
        path = folder / f"{number}.store"
        code = outcome(forked(lambda: kill_at(path, number)))  # noqa: B023
        if code == 0:
            break
        resumed = outcome(forked(lambda: survivors(path)))  # noqa: B023
        step = path.with_suffix(".step").read_text()
        results.append([step, code == -signal.SIGKILL and resumed == 0 and same(path, whole)])
    return results


def random_kills(folder):
    """Two builders, both killed at a random time, again and again until the store is complete; four times over."""
    count, draw, killed, results = 160, random.Random(0), 0, []
    whole = peaceful(folder, count=count)
    for number in range(4):
        path = folder / f"{number}.store"
        for _ in range(12):
            pids = [forked(lambda: build(path, count)) for _ in range(2)]  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.05))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            killed += sum(outcome(pid) == -signal.SIGKILL for pid in pids)
            if (path / "store.json").exists():
                assert verification.verify(path) == []
        pid = forked(lambda: build(path, count))  # noqa: B023
        results.append(outcome(pid) == 0 and same(path, whole))
    return {"killed": killed, "same": results}


def races(folder):
    """Three builders at once; all must succeed, and the store be that of one."""
    whole, results = peaceful(folder), []
    for number in range(12):
        path = folder / f"{number}.store"
        start = time.time() + 0.02

        def work(path=path, start=start):
            time.sleep(max(0.0, start - time.time()))
            build(path)

        results.append([outcome(pid) for pid in [forked(work) for _ in range(3)]] + [same(path, whole)])
        results[-1].append(verification.verify(path) == [] and not list((path / "tmp").iterdir()))
    return results


def rivals(folder):
    """Two builders with different seeds: one has the store, the other is told why not."""
    results = []
    for number in range(12):
        path = folder / f"{number}.store"
        start = time.time() + 0.02

        def work(seed, path=path, start=start):
            time.sleep(max(0.0, start - time.time()))
            try:
                build(path, spec=stores.with_spec(seed=seed))
            except SpecMismatchError as error:
                return 7 if "seed is" in str(error) else 1

        pids = [forked(lambda: work(0)), forked(lambda: work(1))]
        results.append(sorted(outcome(pid) for pid in pids))
    return results


def growth(folder):
    """Two builders that add different images to one store, which hold each other's: no image gets two shards."""
    results = []
    for number in range(8):
        path = folder / f"{number}.store"
        build(path)
        start = time.time() + 0.02

        def work(count, path=path, start=start):
            time.sleep(max(0.0, start - time.time()))
            try:
                build(path, count)
            except StoreError as error:
                return 7 if "the data set has not" in str(error) else 1

        codes = [outcome(pid) for pid in [forked(lambda: work(20)), forked(lambda: work(30))]]
        results.append(
            codes[0] in (0, 7)
            and codes[1] == 0
            and verification.verify(path) == []
            and store.open_store(path).complete()
        )
    return results


def file_limit(folder):
    """A limit on the size of files, which stops a write half-way as a full disk does."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            build(folder / "s", spec=stores.with_spec(dim=4096))
        except InfluenceError as error:
            (folder / "error").write_text(str(error))
            return 7

    code = outcome(forked(work))
    left = len(list((folder / "s" / "tmp").iterdir()))
    again = outcome(forked(lambda: build(folder / "s", spec=stores.with_spec(dim=4096))))
    return {"code": code, "error": (folder / "error").read_text(), "left": left, "again": again}


def full_disk(folder):
    """A small file system of its own (the caller mounts it), which is full after a shard or two, and is made larger."""
    wide = stores.with_spec(dim=4096)

    def work():
        try:
            build(folder / "s", 40, spec=wide)
        except InfluenceError as error:
            sys.stdout.write(str(error))
            sys.stdout.flush()
            return 7

    read, write = os.pipe()

    def told():
        os.dup2(write, 1)
        return work()

    code = outcome(forked(told))
    os.close(write)
    error = os.fdopen(read).read()
    made = store.open_store(folder / "s")
    left, problems = len(made.records()), len(verification.verify(folder / "s"))
    garbage = len(list((folder / "s" / "tmp").iterdir()))
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    again = outcome(forked(lambda: build(folder / "s", 40, spec=wide)))
    return {
        "code": code, "error": error, "left": left, "problems": problems, "garbage": garbage, "again": again,
        "whole": store.open_store(folder / "s").complete() and verification.verify(folder / "s") == [],
    }  # fmt: skip


def imports(folder):
    """Whether torch was loaded."""
    return "torch" in sys.modules


if __name__ == "__main__":
    mode, folder = sys.argv[1:]
    print(json.dumps(globals()[mode](Path(folder))))
