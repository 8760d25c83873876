"""Kill, race and starve builders: whole or absent, always. The builders are in `store_worker.py`."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from stores import files, fill, filled, make

from influence import commit, store, verification
from influence.errors import InfluenceError, StoreError


def worker(mode, folder):
    """Run a mode of `store_worker.py`, in a process that never loads torch."""
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "store_worker.py", mode, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    return worker("kills", tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("step", commit.STEPS)
def test_killed_before_any_step_a_builder_loses_only_the_shard_in_hand(kills, step):
    outcomes = [good for name, good in kills if name == step]
    assert outcomes and all(outcomes)


def test_the_steps_come_in_the_order_that_is_announced(kills):
    names = [name for name, _ in kills]
    first, *rest = commit.STEPS
    assert names[-len(commit.STEPS) :] == [first, *rest]
    assert set(names) == set(commit.STEPS)


def test_killed_at_random_times_two_builders_come_to_the_same_store(tmp_path):
    result = worker("random_kills", tmp_path)
    assert result["killed"] >= 20 and result["same"] == [True] * 4


def test_three_builders_at_once_make_the_store_of_one(tmp_path):
    assert worker("races", tmp_path) == [[0, 0, 0, True, True]] * 12


def test_of_two_builders_with_different_seeds_one_is_refused_by_name(tmp_path):
    assert worker("rivals", tmp_path) == [[0, 7]] * 12


def test_images_added_by_two_builders_at_once_get_one_shard_each(tmp_path):
    assert worker("growth", tmp_path) == [True] * 8


def test_a_file_that_may_not_grow_is_a_clear_error_and_the_build_goes_on_later(tmp_path):
    result = worker("file_limit", tmp_path)
    assert result["code"] == 7 and result["again"] == 0 and result["left"] == 0
    assert "could not be written (File too large)" in result["error"]


def test_a_disk_that_is_full_is_a_clear_error_and_the_build_goes_on_when_there_is_room(tmp_path):
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', tmp_path]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    parts = [sys.executable, Path(__file__).parent / "store_worker.py", "full_disk", tmp_path]
    run = subprocess.run([*mounted, *parts], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["code"] == 7 and "could not be written (No space left on device); see to the disk" in result["error"]
    assert len(result["error"].splitlines()) == 1
    assert 1 <= result["left"] <= 2 and result["problems"] == 0 and result["garbage"] == 0
    assert result["again"] == 0 and result["whole"]


def test_builders_need_no_torch(tmp_path):
    assert worker("imports", tmp_path) is False


def no_links(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "mkdir")


class Faults:
    """Counts the system calls that change something, and fails one of them."""

    def __init__(self, monkeypatch, number, code, once=True, calls=CALLS):
        self.seen, self.number, self.code, self.once = 0, number, code, once
        for name in calls:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call):
        def faulty(*args, **kwargs):
            self.seen += 1
            if self.seen == self.number or (self.seen > self.number and not self.once):
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return faulty


@pytest.mark.parametrize(
    ("code", "once", "links"),
    [(errno.EIO, True, True), (errno.EACCES, True, True), (errno.ENOSPC, False, True), (errno.ENOSPC, True, False)],
)
def test_whichever_system_call_fails_the_error_is_typed_and_the_build_goes_on_later(
    tmp_path, monkeypatch, code, once, links
):
    whole = files(filled(tmp_path / "whole", 4).path)
    failed = 0
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no test here can lose what was not synced
    for number in range(1, 400):
        path = tmp_path / f"{number}.store"
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code, once)
            try:
                filled(path, 4)
            except InfluenceError as error:
                failed += 1
                assert os.strerror(code) in str(error)
        if faults.seen < number:
            break
        if (path / "store.json").exists():
            assert verification.verify(path) == []
        filled(path, 4)
        found = files(path)
        assert {name: found.get(name) for name in whole} == whole
    assert faults.seen < number and failed > 25


def test_writes_that_stop_short_are_gone_on_with(tmp_path, monkeypatch):
    whole = files(filled(tmp_path / "whole", 12).path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data, write=os.write: write(fd, data[:100]))
        filled(tmp_path / "s", 12)
    assert files(tmp_path / "s") == whole


def test_without_hard_links_the_store_is_the_same_and_the_first_writer_wins(tmp_path, monkeypatch):
    whole = files(filled(tmp_path / "whole", 12).path)
    monkeypatch.setattr(os, "link", no_links)
    made = filled(tmp_path / "s", 12)
    assert files(tmp_path / "s") == whole
    assert commit.publish(tmp_path, made.path / "store.json", {"other": 1}) is False
    filled(tmp_path / "s", 12)
    assert files(tmp_path / "s") == whole


def test_without_hard_links_a_torn_record_is_noticed_and_can_be_removed(tmp_path):
    made = filled(tmp_path / "s", 12)
    whole = files(tmp_path / "s")
    path = tmp_path / "s" / "shards" / "loss-000001.json"
    for length in (0, 1, 100):
        os.truncate(path, length)
        with pytest.raises(StoreError, match="remove it and build again"):
            made.missing()
    path.unlink()
    fill(made)
    assert files(tmp_path / "s") == whole


def test_a_folder_that_cannot_be_synced_is_tolerated_and_a_file_is_not(tmp_path, monkeypatch):
    def fsync(fd, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert filled(tmp_path / "s", 12).complete()

    def failing(fd):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match="could not be written"):
        make(tmp_path / "t")


def test_data_are_on_the_disk_before_their_name_and_their_name_before_the_record(tmp_path, monkeypatch):
    made, calls = make(tmp_path / "s", 4), []

    def name(path):
        path = Path(path)
        return f"{path.parent.name}/{path.suffix or '*'}" if path.is_file() else path.name

    def fsync(fd, call=os.fsync):
        calls.append(("fsync", name(Path(f"/proc/self/fd/{fd}").readlink())))
        call(fd)

    def renamed(kind, call):
        def logged(source, target, **options):
            calls.append((kind, name(source), Path(target).parent.name + "/" + Path(target).suffix))
            return call(source, target, **options)

        return logged

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed("replace", os.replace))
    monkeypatch.setattr(os, "link", renamed("link", os.link))
    fill(made)
    assert calls == [
        ("fsync", "tmp/*"), ("replace", "tmp/*", "shards/.h5"), ("fsync", "shards"),
        ("fsync", "tmp/*"), ("link", "tmp/*", "shards/.json"), ("fsync", "shards"),
    ]  # fmt: skip


READS = ("open", "read", "listdir", "lstat", "stat", "fstat")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_whichever_call_fails_while_a_store_is_read_the_error_is_typed_and_no_value_is_wrong(
    tmp_path, monkeypatch, code
):
    path, failed = filled(tmp_path / "s", 12).path, 0

    def read():
        made = store.open_store(path)
        return [made.missing(), *((c.item_ids, c.phi.tobytes(), c.psi.tobytes()) for c in made.blocks())]

    whole = read()
    for number in range(1, 400):
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code, calls=READS)
            try:
                assert read() == whole
            except InfluenceError as error:
                failed += 1
                assert os.strerror(code) in str(error) or "there is no store" in str(error) or "not a" in str(error)
        if faults.seen < number:
            break
    assert faults.seen < number and failed > 20


def test_a_signal_in_the_middle_of_a_removal_leaves_no_file(tmp_path, monkeypatch):
    real, dropped = commit.drop, []

    def drop(path):
        dropped.append(path)
        if len(dropped) == 1:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(commit, "drop", drop)
    with pytest.raises(KeyboardInterrupt), commit.aside(tmp_path / "tmp") as path:
        path.write_bytes(b"x")
    assert dropped == [path, path] and not list((tmp_path / "tmp").iterdir())
