"""Letters of fonts as a data set folder: every picture has a creator, the designer named in the font itself.

Fonts come from installed packages and are only read; nothing here downloads or ships one.
"""

import csv
import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from influence.datasets import UNKNOWN_CREATOR
from influence.errors import DatasetError

DEMO_FONTS = {
    "font-amatic-sc": "AmaticSC-Bold.ttf",
    "font-caladea": "Caladea-Regular.ttf",
    "font-fredoka-one": "FredokaOne-Regular.ttf",
    "font-manrope": "Manrope-ExtraLight.ttf",
    "font-source-serif-pro": "SourceSerifPro-BlackIt.ttf",
}
"""Package and file of the fonts of the demo: five designers whose letters differ at a glance."""

_PLACEHOLDERS = {"", "multiple designers", "various", "unknown"}
_OVERSAMPLING = 8


@dataclass(frozen=True)
class Typeface:
    """A font file and what its name table says."""

    path: Path
    name: str
    """Name of family and style, as in `Source Serif Pro Black`."""
    creator: str
    licence: str


def find_fonts(package_names: Iterable[str]) -> list[Path]:
    """Locate the .ttf and .otf files of installed packages, in the order of the packages, then of the file names.

    Raises:
        DatasetError: A package is not installed or has no font.
    """
    fonts = []
    for package in package_names:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            raise DatasetError(
                f"package {package} is not installed; expected a package with fonts; run pip install {package}"
            ) from None
        found = sorted(Path(str(file.locate())) for file in files if file.suffix.lower() in (".ttf", ".otf"))
        if not found:
            raise DatasetError(
                f"package {package} has no .ttf or .otf file; expected at least one; name a package with fonts"
            )
        fonts += found
    return fonts


def demo_fonts() -> list[Path]:
    """The font files of the demo.

    Raises:
        DatasetError: One of them is not installed.
    """
    fonts = []
    for package, name in DEMO_FONTS.items():
        found = [path for path in find_fonts([package]) if path.name == name]
        if not found:
            raise DatasetError(
                f"package {package} has no file {name}; expected the pinned version; reinstall the extra `demo`"
            )
        fonts += found
    return fonts


def read_typeface(path: Path) -> Typeface:
    """Read a font's name, designer and licence from its name table.

    The creator is the designer (nameID 9), else the manufacturer (8), else the copyright's holder (0), else
    `_unknown_creator`. The licence is its description (13), else its address (14), else empty.

    Raises:
        DatasetError: The file is not a font, or fontTools is not installed.
    """
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise DatasetError(
            "fontTools is not installed; expected it to read a font's designer; run pip install fonttools"
        ) from None
    try:
        with Path(path).open("rb") as file, TTFont(file, lazy=True) as font:
            table = font["name"]
            names = {number: _tidy(table.getDebugName(number)) for number in (0, 1, 4, 8, 9, 13, 14)}
    except (TTLibError, KeyError, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as a font ({error}); expected a .ttf or .otf file; remove it"
        ) from error
    people = (names[9], names[8], _copyright_holder(names[0]))
    name = names[4] or names[1] or Path(path).stem
    return Typeface(
        path=Path(path),
        name=name.removesuffix(" Regular"),
        creator=next((text for text in people if text.lower() not in _PLACEHOLDERS), UNKNOWN_CREATOR),
        licence=_licence(names[13]) or names[14],
    )


def draw(path: Path, letters: str, size: int) -> list[Image.Image]:
    """Draw letters of a font, black on white, each centred; all as large as the largest of them allows.

    Args:
        path: The font file.
        letters: Characters to draw.
        size: Width and height in pixels.

    Returns:
        One grey picture for each letter.

    Raises:
        DatasetError: The font cannot be drawn from, or has no such letter.
    """
    # Drawn large and averaged, as small letters would depend on the font's hinting.
    scale = size * _OVERSAMPLING
    room = scale - 2 * _OVERSAMPLING * max(1, size // 16)
    try:
        trial = ImageFont.truetype(path, scale, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DatasetError(f"{path} cannot be drawn from ({error}); expected a .ttf or .otf file; remove it") from error
    largest = 0
    for letter in letters:
        ink = _ink(trial, letter)
        if ink is None:
            raise DatasetError(f"{path} draws nothing for {letter!r}; expected a visible letter; leave the letter out")
        largest = max(largest, *ink.size)
    font = trial.font_variant(size=int(scale * room / largest))
    pictures = []
    for letter in letters:
        ink = _ink(font, letter)
        canvas = Image.new("L", (scale, scale), 255)
        canvas.paste(ink, ((scale - ink.width) // 2, (scale - ink.height) // 2))
        pictures.append(canvas.reduce(_OVERSAMPLING))
    return pictures


def render(out: Path, fonts: Iterable[Path], letters: str = string.ascii_uppercase, size: int = 24) -> list[Typeface]:
    """Write a data set folder: `images/*.png` and `metadata.csv`, one row for each letter of each font.

    Args:
        out: Folder to make; it may exist if it is empty.
        fonts: Font files.
        letters: Characters to draw of each font.
        size: Width and height of the pictures in pixels.

    Returns:
        The typefaces, in the order of the fonts.

    Raises:
        DatasetError: The folder is not empty, a font cannot be used, or two fonts have the same name.
    """
    out = Path(out)
    if not letters or len(set(letters)) != len(letters):
        raise DatasetError(f"letters is {letters!r}; expected different characters, at least one; remove duplicates")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} exists; expected a new or empty folder; remove it or choose another")
    typefaces = [read_typeface(path) for path in fonts]
    slugs = [_slug(typeface.name) for typeface in typefaces]
    if not slugs or len(set(slugs)) != len(slugs):
        raise DatasetError(f"fonts are named {slugs}; expected different names, at least one; leave duplicates out")
    (out / "images").mkdir(parents=True, exist_ok=True)
    with (out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "text", "creator", "licence", "typeface"])
        for typeface, slug in zip(typefaces, slugs, strict=True):
            for letter, picture in zip(letters, draw(typeface.path, letters, size), strict=True):
                name = f"images/{slug}-{_letter_name(letter)}.png"
                picture.save(out / name)
                text = f"letter {letter} in {typeface.name}"
                rows.writerow([name, text, typeface.creator, typeface.licence, typeface.name])
    return typefaces


def _ink(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image | None:
    """A letter, black on white, cut to what is drawn of it: `font.getbbox` would add the room beside it."""
    side = int(3 * font.size)
    canvas = Image.new("L", (side, side), 0)
    ImageDraw.Draw(canvas).text((side // 3, 2 * side // 3), letter, fill=255, font=font, anchor="ls")
    box = canvas.getbbox()
    return ImageOps.invert(canvas.crop(box)) if box else None


def _tidy(text: str | None) -> str:
    """A name on one line."""
    return " ".join((text or "").replace("\0", "").split())


def _copyright_holder(notice: str) -> str:
    """Who a copyright notice names: what is left without the words, the years, the addresses and what follows."""
    text = re.sub(r"(?i)copyright|\(c\)|©|all rights reserved\.?", " ", notice)
    text = re.sub(r"^[\s\d,.–-]*(by\b)?", "", text)
    return _tidy(re.split(r"[(,;<]|\bwith\b|\. ", text)[0]).rstrip(" .")


def _licence(text: str) -> str:
    """A licence's description; some fonts put all of a licence's text there, of which its own name is enough."""
    if len(text) <= 200:
        return text
    known = re.search(r"(SIL Open Font|Apache) License( \(OFL\))?,? Version \d\.\d", text, re.IGNORECASE)
    return known[0] if known else text[:199] + "…"


def _slug(name: str) -> str:
    """A name as part of a file name."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def _letter_name(letter: str) -> str:
    """A letter as part of a file name; `a` and `A` must differ where file names ignore case."""
    return letter if letter in string.ascii_uppercase + string.digits else f"u{ord(letter):04x}"
