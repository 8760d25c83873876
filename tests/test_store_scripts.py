"""The scripts that kill builders and fuzz the reader, in short; each runs in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(name, *parts):
    done = subprocess.run([sys.executable, HERE / name, *map(str, parts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_builders_lose_nothing_and_resume_to_the_same_store(tmp_path):
    report = run("kill_store.py", "--kills", 36, "--real", 3)
    for name in ("1 builders", "2 builders", "4 builders"):
        assert report[name]["kills"] >= 12 and report[name]["checked"] > 10
    assert report["steps"]["kills"] > 30 and report["influence build"]["kills"] >= 3


@pytest.mark.slow
def test_files_of_strangers_give_typed_errors_in_bounded_memory_and_time(tmp_path):
    assert run("fuzz_store.py", "--count", 200, "--keep", tmp_path)["inputs"] == 200


def test_the_fuzzer_sees_what_goes_wrong(tmp_path):
    """An oracle that always agrees is none: with a reader that trusts everything it must find something."""
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import fuzz_store
from influence import shards
shards.check_rows = lambda *_: None
fuzz_store.damage = lambda path, draw: (fuzz_store.stores.files(path), wrong(path))[1]
def wrong(path):
    made = fuzz_store.store.open_store(path)
    (name,) = [p.name for p in (path / "shards").glob("loss-000000-*.h5")]
    arrays = shards.arrays(fuzz_store.stores.content_of(made, 0))
    arrays["psi_item"][-1] = 99
    (path / "shards" / name).write_bytes(shards.encode(arrays))
    fuzz_store._vouch(path, f"shards/{{name}}")
    return name
print(len(fuzz_store.fuzz(seed=0, count=2)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr
