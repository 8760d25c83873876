"""Pairs of pictures as one picture: what was generated beside the training picture that it is most similar to."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 96, 8, 30
_PAPER, _INK, _COPY = "white", "#333333", "#c8102e"


@dataclass(frozen=True)
class Pair:
    """One pair, and what is written under it."""

    generated: Image.Image
    trained: Image.Image
    label: str
    """At most two lines."""
    near_copy: bool
    """Whether the pair gets a red border."""


def contact_sheet(pairs: Sequence[Pair], title: str, *, columns: int = 4) -> bytes:
    """Draw pairs in reading order, each generated | nearest training picture, with a label under it.

    Returns:
        A PNG file.
    """
    rows = -(-len(pairs) // columns)
    width, height = 2 * CELL + 3 * GAP, CELL + LABEL + 2 * GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + 4 * GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((GAP, GAP), _plain(title), fill=_INK, font=font)
    for place, pair in enumerate(pairs):
        left, top = place % columns * width + GAP, place // columns * height + 4 * GAP
        frame = (left - 4, top - 4, left + 2 * CELL + GAP + 3, top + CELL + 3)
        if pair.near_copy:
            draw.rectangle(frame, outline=_COPY, width=3)
        for picture, x in ((pair.generated, left), (pair.trained, left + CELL + GAP)):
            sheet.paste(_fitted(picture), (x, top))
        lines = [_cut(_plain(line), font, width - GAP) for line in pair.label.split("\n")]
        draw.text((left, top + CELL + 4), "\n".join(lines), fill=_COPY if pair.near_copy else _INK, font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _fitted(picture: Image.Image) -> Image.Image:
    """A picture in a square cell; small ones are enlarged without blur, so that each pixel is seen."""
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    cell = Image.new("RGB", (CELL, CELL), "#eeeeee")
    cell.paste(picture.convert("RGB").resize(size, resampling), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """What of a line fits."""
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text
