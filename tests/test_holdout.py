"""Holding out: a choice by image, of all that a data set says."""

import shutil

import pytest
from tiny_models import pictures

import influence
from influence import datasets
from influence.errors import OptionError


def test_parts_are_disjoint_whole_and_keep_ids(tmp_path):
    pictures(tmp_path / "all", count=40)
    counts = influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=0.3)
    train, held = (datasets.read_dataset(tmp_path / "parts" / name).items for name in ("train", "controls"))
    assert (len(train), len(held)) == counts and sum(counts) == 40 and 4 <= counts[1] <= 20
    before = {(item.item_id, item.file_name, item.creator, item.caption)
              for item in datasets.read_dataset(tmp_path / "all").items}  # fmt: skip
    assert {(i.item_id, i.file_name, i.creator, i.caption) for i in [*train, *held]} == before


def test_images_that_are_added_do_not_move_the_others_and_copies_stay_together(tmp_path):
    pictures(tmp_path / "a", count=20)
    pictures(tmp_path / "b", count=40)
    with (tmp_path / "b" / "metadata.csv").open("a") as file:
        file.write("copy.png,picture 3,creator 0\n")
    shutil.copy(tmp_path / "b" / "003.png", tmp_path / "b" / "copy.png")
    for name in "ab":
        influence.hold_out(tmp_path / name, tmp_path / f"{name}-parts", fraction=0.5)
    held = [
        {item.file_name for item in datasets.read_dataset(tmp_path / f"{n}-parts" / "controls").items} for n in "ab"
    ]
    assert {name for name in held[1] if name[:3] < "020"} == held[0] and ("copy.png" in held[1]) == (
        "003.png" in held[1]
    )


def test_captions_stay_absent_if_there_are_none(tmp_path):
    pictures(tmp_path / "all", count=10)
    (tmp_path / "all" / "metadata.csv").unlink()
    influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=0.5)
    ids = {item.item_id for n in ("train", "controls") for item in datasets.read_dataset(tmp_path / "parts" / n).items}
    assert ids == {item.item_id for item in datasets.read_dataset(tmp_path / "all").items}


def test_what_leaves_a_part_empty_is_refused(tmp_path):
    pictures(tmp_path / "all", count=3)
    for fraction, message in ((0.0, "expected a part between"), (1e-9, "gives 3 and 0 pictures")):
        with pytest.raises(OptionError, match=message):
            influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=fraction)
    (tmp_path / "parts").mkdir()
    with pytest.raises(OptionError, match="is there already"):
        influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=0.5)


def test_a_picture_with_two_captions_is_on_one_side_only(tmp_path):
    pictures(tmp_path / "all", count=30)
    with (tmp_path / "all" / "metadata.csv").open("a") as file:
        for i in range(30):
            shutil.copy(tmp_path / "all" / f"{i:03d}.png", tmp_path / "all" / f"again{i}.png")
            file.write(f"again{i}.png,another caption,creator 0\n")
    influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=0.4)
    train, held = (datasets.read_dataset(tmp_path / "parts" / name).items for name in ("train", "controls"))
    assert len(train) + len(held) == 60
    assert not {item.picture_id for item in train} & {item.picture_id for item in held}


def test_names_with_carriage_returns_come_back(tmp_path):
    pictures(tmp_path / "all", count=10)
    text = (tmp_path / "all" / "metadata.csv").read_text().replace("creator 0", '"A\rB"')
    (tmp_path / "all" / "metadata.csv").write_bytes(text.encode())
    influence.hold_out(tmp_path / "all", tmp_path / "parts", fraction=0.5)
    names = {i.creator for n in ("train", "controls") for i in datasets.read_dataset(tmp_path / "parts" / n).items}
    assert "A\rB" in names
