import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from influence import datasets
from influence.datasets import (
    UNKNOWN_CREATOR,
    Refusal,
    dataset_fingerprint,
    decode,
    item_id,
    load,
    read_dataset,
    to_array,
)
from influence.errors import DatasetError

ORIENTATION = 0x0112
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def noise(seed=0, width=9, height=7, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def picture(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(path, **options)
    return path


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image)


def listed(root, rows, folder=""):
    """Write metadata.jsonl, with a picture for each name that is plain."""
    for seed, row in enumerate(rows):
        picture(root / folder / row["file_name"], seed)
    (root / folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def table(root, text, names=("a.png", "b.png"), encoding="utf-8"):
    for seed, name in enumerate(names):
        picture(root / name, seed)
    (root / "metadata.csv").write_bytes(text.encode(encoding))
    return root


def refuses(match, root, **options):
    with pytest.raises(DatasetError, match=match) as caught:
        read_dataset(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(width, height, data=b"", color=2, depth=8):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------- metadata


def test_an_item_has_exactly_the_agreed_fields():
    names = [field.name for field in fields(datasets.Item)]
    assert names == ["item_id", "file_name", "caption", "creator", "licence", "path", "picture_id"]


def test_a_csv_gives_captions_creators_and_licences_in_its_own_order(tmp_path):
    root = table(tmp_path, 'file_name,text,creator,licence\nb.png,"a cat, sitting",Ann,CC0\na.png,,Bo,\n')
    dataset = read_dataset(root)
    assert [(i.file_name, i.caption, i.creator, i.licence) for i in dataset.items] == [
        ("b.png", "a cat, sitting", "Ann", "CC0"),
        ("a.png", "", "Bo", None),
    ]
    assert [i.path for i in dataset.items] == [tmp_path / "b.png", tmp_path / "a.png"]
    assert (dataset.root, dataset.refused, dataset.notes) == (tmp_path, [], [])


def test_a_csv_is_never_interpreted(tmp_path):
    text = 'file_name,text,creator\na.png,NA,007\nb.png,"null\r\n\x1b[31m ""q"" \x00",1e3\n'
    one, two = read_dataset(table(tmp_path, text)).items
    assert (one.caption, one.creator) == ("NA", "007")
    assert (two.caption, two.creator) == ('null\r\n\x1b[31m "q" \x00', "1e3")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    picture(tmp_path / "a.png")
    text = "file_name,text\na.png,ä\n" if name.endswith("csv") else '{"file_name": "a.png", "text": "ä"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [i.caption for i in read_dataset(tmp_path).items] == ["ä"]


def test_a_short_csv_row_has_blank_cells(tmp_path):
    item, *_ = read_dataset(table(tmp_path, "file_name,text,creator\na.png\nb.png,x,Bo\n")).items
    assert (item.caption, item.creator) == ("", UNKNOWN_CREATOR)


@pytest.mark.parametrize("rows", ["a.png,a cat, sitting\nb.png,x", "b.png,x\na.png,a cat, sitting"])
def test_an_unquoted_comma_in_a_csv_is_an_error_and_shifts_no_column(tmp_path, rows):
    assert "quotes" in refuses("not a CSV table.*line", table(tmp_path, f"file_name,text\n{rows}\n"))


@pytest.mark.parametrize("text", ["", "\n", 'file_name,text\na.png,"x\n'])
def test_a_csv_that_is_empty_or_breaks_off_is_an_error(tmp_path, text):
    refuses("not a CSV table", table(tmp_path, text))


def test_a_csv_with_a_column_twice_is_an_error(tmp_path):
    refuses("'text' twice", table(tmp_path, "file_name,text,text\na.png,x,y\n"))


def test_a_csv_with_nothing_but_a_header_has_no_usable_picture(tmp_path):
    refuses("no usable picture", table(tmp_path, "file_name,text\n", names=[]))


def test_json_lines_give_text_null_and_numbers_for_creators(tmp_path):
    rows = [
        {"file_name": "a.png", "text": None, "creator": 7, "license": "CC0"},
        {"file_name": "b.png", "text": "\u2028 é\r\n", "creator": 1.5},
        {"file_name": "c.png", "creator": "Cy", "licence": "MIT", "license": "other"},
    ]
    items = read_dataset(listed(tmp_path, rows)).items
    assert [i.caption for i in items] == [None, "\u2028 é\r\n", None]
    assert [i.creator for i in items] == ["7", "1.5", "Cy"]
    assert [i.licence for i in items] == ["CC0", None, "MIT"]


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '"a"', "nul", "[" * 100_000, '{"file_name": "a\\ud800.png"}', '{"file_name": "a", "n": ' + "9" * 5000],
)
def test_a_broken_json_line_is_named_by_its_number(tmp_path, line):
    listed(tmp_path, [{"file_name": "a.png"}])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    refuses("metadata.jsonl line 3 ", tmp_path)


@pytest.mark.parametrize(
    "field", [{"text": 3}, {"text": ["x"]}, {"text": True}, {"creator": ["x"]}, {"creator": True}, {"license": {}}]
)
def test_a_json_value_of_another_type_is_an_error(tmp_path, field):
    refuses("line 1: .* expected text", listed(tmp_path, [{"file_name": "a.png"} | field]))


@pytest.mark.parametrize("line", ['{"file_name": 3}', '{"file_name": null}', '{"text": "x"}'])
def test_a_json_line_without_a_file_name_in_text_is_an_error(tmp_path, line):
    listed(tmp_path, [{"file_name": "a.png"}])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(line)
    refuses("line 2.*file_name", tmp_path)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_metadata_may_lie_in_the_folder_or_in_train_and_names_are_relative_to_them(tmp_path, folder):
    listed(tmp_path, [{"file_name": "a.png"}, {"file_name": "sub/b.png"}], folder)
    items = read_dataset(tmp_path).items
    assert [i.file_name for i in items] == [f"{folder}a.png", f"{folder}sub/b.png"]
    assert [i.path for i in items] == [tmp_path / i.file_name for i in items]


@pytest.mark.parametrize("other", ["metadata.csv", "train/metadata.jsonl", "train/metadata.csv"])
def test_two_metadata_files_are_an_error(tmp_path, other):
    listed(tmp_path, [{"file_name": "a.png"}])
    (tmp_path / "train").mkdir()
    (tmp_path / other).write_text("file_name\na.png\n")
    refuses(f"(metadata.jsonl and {other}|{other} and metadata.jsonl).*keep only that", tmp_path)


def test_metadata_in_parquet_are_an_error_and_not_passed_over(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").touch()
    refuses("metadata.parquet; expected one metadata.csv or metadata.jsonl", tmp_path)


@pytest.mark.parametrize("again", ["a.png", "./a.png", ".//a.png"])
def test_a_picture_listed_twice_is_an_error(tmp_path, again):
    refuses("'a.png' 2 times", table(tmp_path, f"file_name,text\na.png,x\n{again},y\n"))


def test_metadata_without_a_file_name_column_are_an_error_that_names_the_columns(tmp_path):
    refuses("no column 'file_name', only 'file', 'text'", table(tmp_path, "file,text\na.png,x\n"))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.txt"])
def test_text_that_is_not_utf_8_is_an_error(tmp_path, name):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes("file_name,text\na.png,é\n".encode("latin-1"))
    refuses(f"{name}' cannot be read .*UTF-8", tmp_path)


def test_metadata_above_the_size_limit_are_an_error(tmp_path):
    picture(tmp_path / "a.png")
    with (tmp_path / "metadata.csv").open("wb") as file:
        file.truncate(2**30 + 1)  # Sparse: it takes no space.
    refuses("1073741825 bytes; at most 1073741824", tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "a.txt"])
def test_text_that_is_linked_from_outside_or_no_file_is_an_error(tmp_path, name):
    (tmp_path / "secret").write_text("file_name\na.png\n")
    root = tmp_path / "root"
    picture(root / "a.png")
    (root / name).symlink_to(tmp_path / "secret")
    refuses("not a file in the data set folder", root)
    (root / name).unlink()
    (root / name).mkdir()
    refuses("not a file in the data set folder", root)


def test_a_root_that_is_no_folder_is_an_error(tmp_path):
    refuses("not a folder", tmp_path / "none")
    refuses("not a folder", picture(tmp_path / "a.png"))


def test_a_folder_without_a_usable_picture_is_an_error_that_says_why(tmp_path):
    refuses(r"no usable picture \(0 refused\)", tmp_path)
    (tmp_path / "a.png").touch()
    refuses(r"no usable picture \(1 refused, first 'a.png': the file is empty\)", str(tmp_path))


# ---------------------------------------------------------------------------------------- creators, captions, remarks


def test_the_creator_column_can_be_named(tmp_path):
    root = table(tmp_path, "file_name,creator,by\na.png,Ann,Bo\nb.png,Ann,Cy\n")
    assert [i.creator for i in read_dataset(root, creator_column="by").items] == ["Bo", "Cy"]
    assert [i.creator for i in read_dataset(root).items] == ["Ann", "Ann"]


def test_a_named_creator_column_that_is_missing_is_an_error_that_names_the_columns(tmp_path):
    root = table(tmp_path, "file_name,artist\na.png,Ann\nb.png,Bo\n")
    refuses("no column 'creator', only 'file_name', 'artist'", root, creator_column="creator")
    (root / "metadata.csv").unlink()
    refuses("no metadata file, hence no column 'artist'", root, creator_column="artist")


def test_pictures_without_a_creator_are_counted(tmp_path):
    root = table(tmp_path, "file_name,creator\na.png,\nb.png,  \nc.png,Cy\n", names=("a.png", "b.png", "c.png"))
    dataset = read_dataset(root)
    assert [i.creator for i in dataset.items] == [UNKNOWN_CREATOR, UNKNOWN_CREATOR, "Cy"]
    assert dataset.notes == [f"2 pictures: no creator given, credited to {UNKNOWN_CREATOR}"]


def test_without_a_creator_column_every_picture_is_credited_to_the_unknown_creator(tmp_path):
    dataset = read_dataset(table(tmp_path, "file_name\na.png\nb.png\n"))
    assert {i.creator for i in dataset.items} == {UNKNOWN_CREATOR}
    assert dataset.notes == [f"2 pictures: no creator given, credited to {UNKNOWN_CREATOR}"]


def test_needed_captions_that_are_missing_are_an_error_that_says_what_to_do(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    picture(tmp_path / "b.png")
    refuses("1 of 2 pictures have no caption, first 'b.png'.*a .txt file beside", tmp_path, captions_required=True)
    (tmp_path / "b.txt").write_text("")
    assert [i.caption for i in read_dataset(tmp_path, captions_required=True).items] == ["x", ""]
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    refuses("column 'text' of metadata.csv", tmp_path, captions_required=True)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\n")
    assert [i.caption for i in read_dataset(tmp_path, captions_required=True).items] == [""]


def test_pictures_outside_the_metadata_are_counted_and_left_out(tmp_path):
    listed(tmp_path, [{"file_name": "a.png", "creator": "Ann"}, {"file_name": "sub/b.png", "creator": "Ann"}], "train")
    for name in ("train/c.png", "train/sub/d.JPEG", "train/.hidden.png", "train/.git/e.png", "train/notes.txt"):
        picture(tmp_path / name, format="PNG")
    dataset = read_dataset(tmp_path)
    assert [i.file_name for i in dataset.items] == ["train/a.png", "train/sub/b.png"]
    assert dataset.notes == ["2 pictures: in the folder but not in metadata.jsonl, left out"]


def test_pictures_that_occur_more_than_once_are_counted(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": "x", "creator": "Ann"} for n in range(6)]
    rows[5]["text"] = "another caption makes another example"
    listed(tmp_path, rows)
    for n, seed in enumerate([0, 0, 0, 1, 1, 0]):
        picture(tmp_path / f"{n}.png", seed)
    dataset = read_dataset(tmp_path)
    assert len(dataset.items) == 6
    assert dataset.notes == ["2 pictures: occur more than once (same pixels and caption)"]


def test_remarks_on_pictures_are_counted(tmp_path):
    for name in ("a.gif", "b.gif", "c.webp"):
        noise(len(name)).save(tmp_path / name, save_all=True, append_images=[noise(7), noise(8)])
    noise(9, mode="RGBA").save(tmp_path / "d.png")
    notes = read_dataset(tmp_path).notes
    assert "3 pictures: animated, first frame used" in notes
    assert "1 picture: alpha channel dropped" in notes


def test_a_bare_folder_is_read_with_its_subfolders_in_the_order_of_names(tmp_path):
    for seed, name in enumerate(("b.PNG", "a/z.jpg", "a.webp", ".x.png", ".cache/y.png", "__MACOSX/._a.png", "c.pdf")):
        picture(tmp_path / name, seed, format="PNG")
    (tmp_path / "a.txt").write_text("\ufeff  näher \n", encoding="utf-8")
    (tmp_path / "dir.png").mkdir()
    dataset = read_dataset(tmp_path)
    assert [(i.file_name, i.caption) for i in dataset.items] == [
        ("a.webp", "näher"),
        ("a/z.jpg", None),
        ("b.PNG", None),
    ]
    assert dataset.refused == []


def test_of_a_bare_folder_with_parts_to_test_with_only_train_is_read(tmp_path):
    for seed, name in enumerate(("Training/a.png", "test/b.png", "Validation/c.png", "evaluation/d.png")):
        picture(tmp_path / name, seed)
    dataset = read_dataset(tmp_path)
    assert [i.file_name for i in dataset.items] == ["Training/a.png"]
    assert "3 pictures: not in train/ but in a part to test with, left out" in dataset.notes
    shutil.rmtree(tmp_path / "Training")
    names = [i.file_name for i in read_dataset(tmp_path).items]
    assert names == ["Validation/c.png", "evaluation/d.png", "test/b.png"]


def test_links_to_folders_are_counted_and_not_entered(tmp_path):
    picture(tmp_path / "other" / "b.png")
    picture(tmp_path / "root" / "a.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    dataset = read_dataset(tmp_path / "root")
    assert [i.file_name for i in dataset.items] == ["a.png"]
    assert "1 folder: a link, not entered" in dataset.notes


def test_progress_is_told_after_each_picture(tmp_path):
    told = []
    read_dataset(table(tmp_path, "file_name\na.png\nb.png\nnone.png\n"), progress=lambda *seen: told.append(seen))
    assert told == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_missing_and_broken_files_are_refused_by_name_in_order_and_the_rest_goes_on(tmp_path):
    root = table(tmp_path, "file_name,creator\nz.png,A\na.png,A\nb.png,A\n,A\nc.png,A\nsub,A\n")
    (root / "sub").mkdir()
    (root / "b.png").write_text("<html>not found</html>")
    (root / "c.png").touch()
    dataset = read_dataset(root)
    assert [i.file_name for i in dataset.items] == ["a.png"]
    assert dataset.refused == [
        Refusal("z.png", "the file is missing"),
        Refusal("b.png", "not a picture that can be read; expected PNG, JPEG, WEBP, BMP, GIF, TIFF"),
        Refusal(".", "is not a file"),
        Refusal("c.png", "the file is empty"),
        Refusal("sub", "is not a file"),
    ]
    assert dataset.notes == []


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    outside = picture(tmp_path / "outside.png")
    root = tmp_path / "root"
    names = [
        "../outside.png",
        "sub/../../outside.png",
        "sub/../a.png",
        str(outside),
        "link.png",
        "loop.png",
        "dir/o.png",
    ]
    names += ["x" * 5000 + ".png", "nul\x00.png"]
    listed(root, [{"file_name": "a.png"}])
    lines = [json.dumps({"file_name": name}) for name in ["a.png", *names]]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    (root / "link.png").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "dir").symlink_to(tmp_path)
    (tmp_path / "o.png").write_bytes(outside.read_bytes())
    dataset = read_dataset(root)
    assert [i.file_name for i in dataset.items] == ["a.png"]
    assert [r.file_name for r in dataset.refused] == names
    assert all("data set folder" in r.reason for r in dataset.refused[:5] + dataset.refused[6:7]), dataset.refused


def test_links_that_stay_in_the_folder_are_followed_even_below_a_linked_root(tmp_path):
    picture(tmp_path / "real" / "pool" / "a.png")
    (tmp_path / "real" / "b.png").symlink_to("pool/a.png")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert [i.file_name for i in read_dataset(tmp_path / "root").items] == ["b.png", "pool/a.png"]


def test_a_link_out_of_a_bare_folder_is_refused(tmp_path):
    outside = picture(tmp_path / "outside.png")
    picture(tmp_path / "root" / "a.png")
    (tmp_path / "root" / "b.png").symlink_to(outside)
    assert [r.file_name for r in read_dataset(tmp_path / "root").refused] == ["b.png"]


def test_a_name_that_is_not_utf_8_is_refused_under_a_name_that_can_be_stored(tmp_path):
    picture(tmp_path / "a.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(saved(noise(), "PNG"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert read_dataset(tmp_path).refused == [Refusal("\\udcff.png", "the name is not UTF-8")]


def test_a_pipe_is_refused_and_does_not_block(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert read_dataset(tmp_path).refused == [Refusal("b.png", "is not a file")]


# ---------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})])
def test_lossless_formats_decode_to_their_pixels(tmp_path, kind, options):
    path = picture(tmp_path / "a", 3, format=kind, **options)
    image, notes = decode(path)
    assert (image.mode, notes) == ("RGB", [])
    np.testing.assert_array_equal(pixels(image), pixels(noise(3)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_without_alpha_decode_without_a_remark(tmp_path, mode):
    source = noise(4).convert(mode)
    source.save(tmp_path / "a.png")
    image, notes = decode(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels(image), pixels(source.convert("RGB")))
    assert notes == []


@pytest.mark.parametrize(("mode", "colours"), [("RGBA", slice(0, 3)), ("LA", [0, 0, 0])])
def test_alpha_is_dropped_with_a_remark_and_not_blended(tmp_path, mode, colours):
    source = noise(5, mode=mode)
    source.save(tmp_path / "a.png")
    image, notes = decode(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(image), pixels(source)[..., colours])
    assert notes == ["alpha channel dropped"]


@pytest.mark.parametrize("transparency", [3, bytes(range(200))])
def test_a_transparent_palette_decodes_to_its_colours_without_a_warning(tmp_path, transparency):
    source = noise(6).quantize(200)
    source.save(tmp_path / "a.png", transparency=transparency)
    image, notes = decode(tmp_path / "a.png")
    palette = np.asarray(source.getpalette(), dtype=np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(pixels(image), palette[pixels(source)])
    assert notes == ["alpha channel dropped"]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_changes_no_pixel(tmp_path, mode):
    source = noise(6).convert(mode)
    source.save(tmp_path / "a.png", transparency=source.getpixel((0, 0)))
    image, notes = decode(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(image), pixels(source.convert("RGB")))
    assert notes == ["alpha channel dropped"]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_with_a_remark(tmp_path, kind):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a", kind)
    image, notes = decode(tmp_path / "a")
    assert (np.abs(pixels(image).astype(int) - (255, 0, 0)) <= 3).all()
    assert notes == ["CMYK converted to RGB"]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "a", "TIFF")
    with pytest.raises(DatasetError, match="more than 8 bits"):
        decode(tmp_path / "a")


def test_a_grey_png_of_16_bits_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 1, b"\0" + bytes(4), color=0, depth=16))
    with pytest.raises(DatasetError, match="more than 8 bits"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})], ids=lambda v: str(v)
)
def test_of_several_frames_the_first_is_used_with_a_remark(tmp_path, kind, options):
    first = noise(1).quantize(60).convert("RGB")
    first.save(tmp_path / "a", kind, save_all=True, append_images=[noise(2), noise(3)], **options)
    image, notes = decode(tmp_path / "a")
    np.testing.assert_array_equal(pixels(image), pixels(first))
    assert notes == ["several pages, first page used" if kind == "TIFF" else "animated, first frame used"]


def test_the_preview_in_a_camera_jpeg_is_no_frame(tmp_path):
    noise(1).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise(2)])
    image, notes = decode(tmp_path / "a.jpg")
    assert (image.size, notes) == ((9, 7), [])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_exif_orientation_turns_the_picture_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(1).save(tmp_path / "a", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image, notes = decode(tmp_path / "a")
    np.testing.assert_array_equal(pixels(image), UPRIGHT[orientation](pixels(noise(1))))
    assert notes == []


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_exif_orientation_without_a_meaning_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise(1).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(decode(tmp_path / "a.png")[0]), pixels(noise(1)))


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DatasetError, match="pixels"):
        decode(tmp_path / "a.png")


def test_the_limit_on_pixels_is_pillows_own(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    assert decode(path)[0].size == (9, 7)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 62)
    with pytest.raises(DatasetError, match="9 × 7 pixels; at most 62"):
        decode(path)


def test_formats_outside_the_list_are_refused(tmp_path):
    for kind in ("PPM", "TGA", "ICO", "PDF"):
        noise().save(tmp_path / "a.png", kind)
        with pytest.raises(DatasetError, match="not a picture that can be read"):
            decode(tmp_path / "a.png")


FILES = {
    "PNG": saved(noise(1, 40, 30), "PNG"),
    "APNG": saved(noise(1, 40, 30), "PNG", save_all=True, append_images=[noise(2, 40, 30)]),
    "JPEG": saved(noise(1, 40, 30), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "MPO": saved(noise(1, 40, 30), "MPO", save_all=True, append_images=[noise(2, 40, 30)]),
    "WEBP": saved(noise(1, 40, 30), "WEBP", save_all=True, append_images=[noise(2, 40, 30)]),
    "BMP": saved(noise(1, 40, 30), "BMP"),
    "GIF": saved(noise(1, 40, 30), "GIF", save_all=True, append_images=[noise(2, 40, 30)], transparency=3),
    "TIFF": saved(noise(1, 40, 30), "TIFF"),
    "TIFF-lzw": saved(noise(1, 40, 30), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused_at_any_length_unless_no_pixel_is_lost(tmp_path, kind):
    path, whole = tmp_path / "a", FILES[kind]
    path.write_bytes(whole)
    expected = pixels(decode(path)[0])
    refused = 0
    for length in {*range(0, 200), *range(0, len(whole), 37), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        try:
            image, _ = decode(path)
        except DatasetError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels(image), expected)
    assert refused > 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False), st.integers(1, 30), st.booleans())
def test_a_damaged_file_is_decoded_or_refused_and_nothing_else(folder, kind, chance, count, header):
    data = bytearray(FILES[kind])
    for _ in range(count):
        data[chance.randrange(min(len(data), 120) if header else len(data))] = chance.randrange(256)
    (folder / "a").write_bytes(data)
    try:
        image, _ = decode(folder / "a")
    except DatasetError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    "error", [SyntaxError("x"), struct.error("x"), MemoryError(), EOFError(), KeyError("x"), RuntimeError("x\ny")]
)
def test_whatever_a_plugin_raises_refuses_the_picture(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DatasetError, match=r"a\.png': cannot be decoded: .") as caught:
        decode(path)
    assert "\n" not in str(caught.value)


def test_pillows_settings_and_the_warning_filters_are_left_as_they_are(tmp_path):
    noise(6).quantize(200).save(tmp_path / "a.png", transparency=bytes(200))
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(tmp_path / "a.png"), range(200)))
    read_dataset(tmp_path, progress=lambda *_: decode(tmp_path / "a.png"))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


# ---------------------------------------------------------------------------------------------------------- identity


@st.composite
def examples(draw):
    width, height = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    data = draw(st.sampled_from([bytes([value]) * (width * height * 3) for value in (0, 1, 48)]))
    caption = draw(st.none() | st.text("01x;\0 ", max_size=3))
    return width, height, data, caption


@settings(max_examples=500)
@given(examples(), examples())
def test_two_examples_share_an_id_only_if_size_pixels_and_caption_are_equal(one, two):
    ids = [item_id(Image.frombytes("RGB", (w, h), data), caption) for w, h, data, caption in (one, two)]
    assert (ids[0] == ids[1]) == (one == two)


@given(st.none() | st.text(st.characters(codec=None)))
def test_an_id_is_32_hex_digits_for_any_caption(caption):
    key = item_id(noise(), caption)
    assert len(key) == 32 and int(key, 16) >= 0


def test_ids_never_change():
    assert item_id(Image.new("RGB", (2, 1), (1, 2, 3)), None) == "48c0736c1e3da59d5b56288839f34e03"
    assert item_id(Image.new("RGB", (2, 1), (1, 2, 3)), "é") == "85cfab9c516724550cffee14e4fdfcf1"


def test_no_caption_is_not_a_blank_one_and_width_is_not_height():
    assert item_id(noise(), None) != item_id(noise(), "")
    flat = bytes(18)
    assert item_id(Image.frombytes("RGB", (3, 2), flat), "") != item_id(Image.frombytes("RGB", (2, 3), flat), "")


def test_ids_and_fingerprint_outlive_renaming_reordering_and_lossless_encoding(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    one = read_dataset(listed(tmp_path / "one", [{"file_name": n, "text": n, "creator": "A"} for n in names]))
    (tmp_path / "two").mkdir()
    rows = []
    for seed, (name, kind) in reversed(list(enumerate(zip(names, ("BMP", "TIFF", "WEBP"), strict=True)))):
        noise(seed).save(tmp_path / "two" / f"x{name}", kind, **({"lossless": True} if kind == "WEBP" else {}))
        rows.append(json.dumps({"file_name": f"x{name}", "text": name}))
    (tmp_path / "two" / "metadata.jsonl").write_text("\n".join(rows))
    two = read_dataset(tmp_path / "two")
    assert [i.item_id for i in two.items] == [i.item_id for i in reversed(one.items)]
    assert dataset_fingerprint(two.items) == dataset_fingerprint(one.items)


def test_the_fingerprint_counts_copies_and_ignores_order(tmp_path):
    a, b = read_dataset(table(tmp_path, "file_name\na.png\nb.png\n")).items
    keys = [dataset_fingerprint(items) for items in ([a, b], [b, a], [a, a, b], [a, b, b], [a], [])]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
    assert {len(key) for key in keys} == {64}
    renamed = replace(a, file_name="z", creator="other", path=Path("z"))
    assert dataset_fingerprint(iter([renamed, b])) == keys[0]


# ------------------------------------------------------------------------------------------------------------ arrays


def triangle(source, target):
    """Weights `[target, source]` of a bilinear filter that widens when it shrinks."""
    scale = source / target
    support = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(source)[None] + 0.5 - centre[:, None]) / support)
    return weights / weights.sum(1, keepdims=True)


def half_up(values):
    return np.floor(values + 0.5 + 1e-9)


def oracle(values, height, width):
    """The training transform in numpy: values `[h, w, channels]` in 0 … 255."""
    h, w, _ = values.shape
    if height == width:
        short, long = sorted((w, h))
        new_short, new_long = height, int(height * long / short)
        new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    else:
        new_w, new_h = (width, int(width * h / w)) if width / w >= height / h else (int(height * w / h), height)
    values = half_up(np.einsum("xw,hwc->hxc", triangle(w, new_w), values.astype(np.float64)))
    values = half_up(np.einsum("yh,hxc->yxc", triangle(h, new_h), values))
    top, left = round((new_h - height) / 2.0), round((new_w - width) / 2.0)
    return (values[top : top + height, left : left + width] / 255 - 0.5).transpose(2, 0, 1) / 0.5


@pytest.mark.parametrize("target", [(8, 8), (16, 16), (33, 33), (64, 64), (1, 1), (20, 12), (12, 20)])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (50, 23), (7, 90), (64, 64), (1, 5), (33, 34)])
def test_arrays_are_those_of_the_training_scripts(size, target):
    image = noise(1, *size)
    array = to_array(image, height=target[0], width=target[1], channels=3)
    # One level of 8 bits: Pillow's weights are rounded to fixed point.
    np.testing.assert_allclose(array, oracle(pixels(image), *target), atol=2.001 / 255)
    grey = to_array(image, height=target[0], width=target[1], channels=1)
    expected = oracle(pixels(image.convert("L"))[..., None], *target)
    np.testing.assert_allclose(grey, expected, atol=2.001 / 255)


def test_a_picture_of_the_right_size_is_only_normalised():
    image = noise(1, 12, 12)
    expected = (pixels(image).transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_array_equal(to_array(image, height=12, width=12, channels=3), expected)


@pytest.mark.parametrize(("wide", "left"), [(5, 0), (6, 1), (7, 2), (8, 2), (9, 2), (10, 3), (11, 4)])
def test_an_odd_overhang_is_cropped_as_torchvision_rounds(wide, left):
    image = noise(1, wide, 4)
    expected = pixels(image)[:, left : left + 4].transpose(2, 0, 1)
    np.testing.assert_allclose(to_array(image, height=4, width=4, channels=3) * 127.5 + 127.5, expected, atol=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])
)
def test_arrays_have_the_shape_and_range_asked_for(size, height, width, channels):
    array = to_array(noise(2, *size), height=height, width=width, channels=channels)
    assert (array.shape, array.dtype) == ((channels, height, width), np.float32)
    assert array.flags.c_contiguous and array.min() >= -1 and array.max() <= 1
    flat = to_array(Image.new("RGB", size, (255, 255, 255)), height=height, width=width, channels=channels)
    assert (flat == 1).all()  # A black border would show where the resized picture does not cover the crop.


@pytest.mark.parametrize("shape", [(4, 4, 2), (4, 4, 4), (4, 4, 0), (0, 4, 3), (4, -1, 3)])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(DatasetError, match="expected 1 or 3 channels"):
        to_array(noise(), height=shape[0], width=shape[1], channels=shape[2])


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_picture_too_elongated_to_resize_is_an_error_and_fills_no_memory(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    item = read_dataset(tmp_path).items[0]
    with pytest.raises(DatasetError, match=r"'thin\.png': .*too elongated"):
        load(item, height=512, width=512, channels=3)


def test_a_picture_too_elongated_for_the_model_is_refused_by_name_and_the_others_are_read(tmp_path):
    picture(tmp_path / "a.png")
    Image.new("RGB", (140_000, 1)).save(tmp_path / "line.png")
    dataset = read_dataset(tmp_path, shape=(64, 64))
    assert [i.file_name for i in dataset.items] == ["a.png"]
    assert [r.file_name for r in dataset.refused] == ["line.png"] and "too elongated" in dataset.refused[0].reason


def test_loading_gives_the_array_of_the_picture(tmp_path):
    item = read_dataset(table(tmp_path, "file_name,text\na.png,x\nb.png,y\n")).items[1]
    expected = to_array(noise(1), height=8, width=8, channels=3)
    np.testing.assert_array_equal(load(item, height=8, width=8, channels=3), expected)


def test_loading_a_picture_that_changed_or_vanished_is_an_error(tmp_path):
    a, b = read_dataset(table(tmp_path, "file_name,text\na.png,x\nb.png,y\n")).items
    picture(tmp_path / "a.png", 5)
    with pytest.raises(DatasetError, match=r"'a\.png' changed while"):
        load(a, height=8, width=8, channels=3)
    with pytest.raises(DatasetError, match=r"'b\.png' changed while"):
        load(replace(b, caption=None), height=8, width=8, channels=3)
    b.path.unlink()
    with pytest.raises(DatasetError, match=r"b\.png': the file is missing"):
        load(b, height=8, width=8, channels=3)


def test_order_survives_pictures_that_take_unequal_time(tmp_path):
    sizes = random.Random(0).sample(range(1, 900), 40)
    for n, side in enumerate(sizes):
        Image.new("RGB", (side, side), (n, 0, 0)).save(tmp_path / f"{n:02}.png")
    items = read_dataset(tmp_path).items
    assert [i.item_id for i in items] == [item_id(decode(i.path)[0], None) for i in items]
    assert [i.file_name for i in items] == [f"{n:02}.png" for n in range(40)]


def test_reading_data_sets_needs_no_torch():
    code = (  # the module without the package's own __init__, which imports all stages
        "import sys, types; package = types.ModuleType('influence'); package.__path__ = ['influence'];"
        "sys.modules['influence'] = package; import influence.datasets; sys.exit('torch' in sys.modules)"
    )
    root = Path(datasets.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
