"""What a stranger sends to be inspected: an answer or an error of the package, in bounded memory."""

import json
import struct

import pytest
from tiny_models import tiny_lora, tiny_stable_diffusion

import influence


def header(value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8 + b"{}",
        header(b"[" * 100_000),
        header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        header([]),
        header({"a": 3}),
        header({"a": {"shape": 3, "data_offsets": [0, 4]}}),
        header({"a": {"shape": ["x"], "data_offsets": [0, 4]}}),
        header({"a": {"shape": [10**40], "data_offsets": [0, 4]}}),
        header({"a": {"shape": [-1], "data_offsets": [0, 4]}}),
        header({"a": {"shape": [1], "data_offsets": [0, 10**30]}}),
        header({"a": {"shape": [1], "data_offsets": [0]}}),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(influence.OptionError, match="x.safetensors") as caught:
        influence.inspect(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "\ud800"])
def test_a_model_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(influence.OptionError, match="model_index.json"):
        influence.inspect(tmp_path)


def test_folders_that_build_takes_are_known(tmp_path):
    tiny_stable_diffusion(tmp_path / "sd")
    tiny_lora(tmp_path / "sd", tmp_path / "lora")
    facts = influence.inspect(tmp_path / "lora")
    assert facts["kind"] == "LoRA" and facts["ranks"] == [2]
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "sd" / "unet").rename(tmp_path / "checkpoint-5" / "unet")
    assert influence.inspect(tmp_path / "checkpoint-5")["weights"] == "unet"


def test_a_model_index_of_a_terabyte_is_refused_unread(tmp_path):
    with (tmp_path / "model_index.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing on the disk
    with pytest.raises(influence.OptionError, match="is larger than 16 MiB"):
        influence.inspect(tmp_path)


def test_a_model_index_leads_to_no_other_folder(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    index = {"_class_name": "X", "unet": ["diffusers", "A"], "../secret": ["diffusers", "B"]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    facts = influence.inspect(tmp_path / "model")
    assert facts["absent"] == ["../secret"] and not facts["whole"]
