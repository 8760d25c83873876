import csv

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from influence import typefaces
from influence.errors import DatasetError

OPEN = "This Font Software is licensed under the SIL Open Font License, Version 1.1."


def rectangle(left, bottom, right, top):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for point in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


def make_font(path, **names):
    """A font whose A is a wide bar, B a high one off the centre, and whose space is empty."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "space", "A", "B"])
    builder.setupCharacterMap({32: "space", 65: "A", 66: "B"})
    empty = TTGlyphPen(None).glyph()
    builder.setupGlyf(
        {".notdef": empty, "space": empty, "A": rectangle(0, 0, 800, 200), "B": rectangle(300, -100, 500, 700)}
    )
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "space": (1000, 0), "A": (1000, 0), "B": (1000, 300)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"} | names)
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.mark.parametrize(
    ("names", "creator"),
    [
        ({"designer": "Ada  Bar", "manufacturer": "Bars Inc", "copyright": "Copyright 2020 C"}, "Ada Bar"),
        ({"manufacturer": "Bars Inc", "copyright": "Copyright 2020 C"}, "Bars Inc"),
        ({"designer": "Multiple Designers", "manufacturer": "Bars Inc"}, "Bars Inc"),
        ({"designer": " ", "copyright": "Copyright (c) 2011, Ada Bar (ada@bars.example), with Reserved"}, "Ada Bar"),
        ({"copyright": "© 2014 - 2018 Bars Foundry. All rights reserved."}, "Bars Foundry"),
        (
            {"copyright": "Copyright 2019 by The Bars Project Authors (bars.example)"},
            "The Bars Project Authors",
        ),
        ({"copyright": "(c) 2020"}, "_unknown_creator"),
        ({}, "_unknown_creator"),
    ],
)
def test_creator_is_the_best_name_in_the_font(tmp_path, names, creator):
    assert typefaces.read_typeface(make_font(tmp_path / "bars.ttf", **names)).creator == creator


@pytest.mark.parametrize(
    ("names", "licence"),
    [
        ({"licenseDescription": OPEN, "licenseInfoURL": "https://ofl.example"}, OPEN),
        ({"licenseInfoURL": "https://ofl.example"}, "https://ofl.example"),
        ({"licenseDescription": OPEN + " And so on." * 30}, "SIL Open Font License, Version 1.1"),
        ({"licenseDescription": "x" * 300}, "x" * 199 + "…"),
        ({}, ""),
    ],
)
def test_licence_is_what_the_font_says(tmp_path, names, licence):
    assert typefaces.read_typeface(make_font(tmp_path / "bars.ttf", **names)).licence == licence


def test_name_leaves_out_regular_only(tmp_path):
    regular = make_font(tmp_path / "regular.ttf", fullName="Bars Regular")
    black = make_font(tmp_path / "black.ttf", fullName="Bars Black")
    assert typefaces.read_typeface(regular).name == "Bars"
    assert typefaces.read_typeface(black).name == "Bars Black"


def test_letters_are_centred_and_black_on_white(tmp_path):
    wide, high = (np.asarray(letter) for letter in typefaces.draw(make_font(tmp_path / "bars.ttf"), "AB", 24))
    assert wide.shape == high.shape == (24, 24)
    for letter in (wide, high):
        assert letter.min() == 0
        assert letter.max() == 255
        ink = 255.0 - letter
        for axis in (0, 1):
            profile = ink.sum(axis)
            assert (profile * np.arange(24)).sum() / profile.sum() == pytest.approx(11.5, abs=0.1)
    # Both bars are as long as the margin of one pixel allows, and a quarter as wide.
    assert (255.0 - wide)[12].sum() / 255 == pytest.approx(22, abs=0.3)
    assert (255.0 - high)[:, 12].sum() / 255 == pytest.approx(22, abs=0.3)
    assert (255.0 - wide)[:, 12].sum() / 255 == pytest.approx(5.5, abs=0.3)


def test_render_writes_a_folder(tmp_path):
    fonts = [
        make_font(tmp_path / "one.ttf", fullName="Bars", designer="Ada Bär", licenseDescription=OPEN),
        make_font(tmp_path / "two.ttf", fullName="Bars Black"),
    ]
    found = typefaces.render(tmp_path / "out", fonts, "AB", 16)
    assert [typeface.name for typeface in found] == ["Bars", "Bars Black"]
    with (tmp_path / "out/metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_name", "text", "creator", "licence", "typeface"]
    assert list(rows[0].values()) == ["images/bars-A.png", "letter A in Bars", "Ada Bär", OPEN, "Bars"]
    assert list(rows[3].values()) == [
        "images/bars-black-B.png",
        "letter B in Bars Black",
        "_unknown_creator",
        "",
        "Bars Black",
    ]
    for row in rows:
        with Image.open(tmp_path / "out" / row["file_name"]) as picture:
            assert (picture.mode, picture.size) == ("L", (16, 16))


def test_render_is_deterministic(tmp_path):
    font = make_font(tmp_path / "bars.ttf")
    typefaces.render(tmp_path / "one", [font], "AB")
    typefaces.render(tmp_path / "two", [font], "AB")
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_render_refuses_a_folder_with_something_in_it(tmp_path):
    font = make_font(tmp_path / "bars.ttf")
    with pytest.raises(DatasetError, match="new or empty folder"):
        typefaces.render(tmp_path, [font], "AB")


@pytest.mark.parametrize("letters", ["", "AA"])
def test_render_refuses_letters_that_repeat_or_lack(tmp_path, letters):
    with pytest.raises(DatasetError, match="different characters"):
        typefaces.render(tmp_path / "out", [make_font(tmp_path / "bars.ttf")], letters)


def test_render_refuses_two_fonts_of_one_name(tmp_path):
    font = make_font(tmp_path / "bars.ttf")
    with pytest.raises(DatasetError, match="leave duplicates out"):
        typefaces.render(tmp_path / "out", [font, font], "AB")
    assert not (tmp_path / "out").exists()


def test_a_letter_that_draws_nothing_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="draws nothing for ' '"):
        typefaces.draw(make_font(tmp_path / "bars.ttf"), "A ", 24)


def test_what_is_not_a_font_is_refused(tmp_path):
    path = tmp_path / "bars.ttf"
    path.write_bytes(b"not a font")
    with pytest.raises(DatasetError, match="cannot be read as a font"):
        typefaces.read_typeface(path)
    with pytest.raises(DatasetError, match="cannot be drawn from"):
        typefaces.draw(path, "A", 24)


def test_find_fonts_of_installed_packages(tmp_path, monkeypatch):
    package = tmp_path / "bars_fonts-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: bars-fonts\nVersion: 1\n")
    (package / "RECORD").write_text("bars/b.OTF,,\nbars/a.ttf,,\nbars/readme.txt,,\n")
    empty = tmp_path / "no_fonts-1.dist-info"
    empty.mkdir()
    (empty / "METADATA").write_text("Metadata-Version: 2.1\nName: no-fonts\nVersion: 1\n")
    (empty / "RECORD").write_text("none/readme.txt,,\n")
    (tmp_path / "bars").mkdir()
    for name in ("a.ttf", "b.OTF", "readme.txt"):
        (tmp_path / "bars" / name).touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/readme.txt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert typefaces.find_fonts(["bars-fonts"]) == [tmp_path / "bars/a.ttf", tmp_path / "bars/b.OTF"]
    with pytest.raises(DatasetError, match=r"no-fonts has no \.ttf"):
        typefaces.find_fonts(["bars-fonts", "no-fonts"])
    with pytest.raises(DatasetError, match="pip install absent-fonts"):
        typefaces.find_fonts(["absent-fonts"])
    monkeypatch.setattr(typefaces, "DEMO_FONTS", {"bars-fonts": "a.ttf"})
    assert typefaces.demo_fonts() == [tmp_path / "bars/a.ttf"]
    monkeypatch.setattr(typefaces, "DEMO_FONTS", {"bars-fonts": "c.ttf"})
    with pytest.raises(DatasetError, match=r"no file c\.ttf"):
        typefaces.demo_fonts()
