"""How often are pictures that were never trained on called near copies, and how often changed training pictures?

Letters of the demo's five typefaces at 32 pixels. Never trained on: every typeface in turn, and every letter in turn,
left out of the works. Changed: each letter, edited, against all letters.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from influence import datasets, similarity, typefaces

SIDE = 32


def saved(picture: Image.Image, quality: int) -> Image.Image:
    """Saved as JPEG and read again."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def moved(picture: Image.Image, pixels: int) -> Image.Image:
    """Moved down and to the right."""
    values = np.pad(np.asarray(picture), ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")
    return Image.fromarray(values[:-pixels, :-pixels])


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "itself": lambda picture: picture,
    "JPEG, quality 90": lambda picture: saved(picture, 90),
    "JPEG, quality 50": lambda picture: saved(picture, 50),
    "shifted by 1 pixel": lambda picture: moved(picture, 1),
    "shifted by 4 pixels": lambda picture: moved(picture, 4),
    "contrast × 0.5": lambda picture: ImageEnhance.Contrast(picture).enhance(0.5),
    "shifted, contrast, JPEG 50": lambda picture: saved(ImageEnhance.Contrast(moved(picture, 1)).enhance(0.5), 50),
    "enlarged 1.5 ×, read at 32": lambda picture: picture.resize((48, 48), Image.Resampling.BILINEAR),
    "rotated by 5°": lambda picture: picture.rotate(5, Image.Resampling.BICUBIC, fillcolor="white"),
}


def array(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as the near-copy call reads them."""
    values = [datasets.to_array(picture, height=SIDE, width=SIDE, channels=1) for picture in pictures]
    return torch.from_numpy(np.stack(values))


def called(queries: torch.Tensor, works: torch.Tensor, ids: list[str]) -> tuple[int, int]:
    """How many queries are above the background, and how many are near copies."""
    rows = similarity.sample(ids)
    same = similarity.duplicates(works, works) | np.eye(len(works), dtype=bool)
    null = similarity.background(similarity.similarity(works[rows], works), same[rows])
    found = [similarity.nearest(row, same[row.argmax()], null) for row in similarity.similarity(queries, works)]
    return sum(one.similarity > null.threshold for one in found), sum(one.near_copy for one in found)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        typefaces.render(Path(folder), typefaces.demo_fonts(), size=SIDE)
        items = datasets.read_dataset(folder).items
        pictures = [datasets.decode(item.path)[0] for item in items]
    works, ids = array(pictures), [item.item_id for item in items]
    labels = [str(item.caption).removeprefix("letter ").split(" in ") for item in items]
    print("never trained on                  queries  above background  near copies")
    for kind, place in (("a typeface that was left out", 1), ("a letter that was left out", 0)):
        total = np.zeros(3, dtype=int)
        for name in sorted({label[place] for label in labels}):
            out = np.array([label[place] == name for label in labels])
            rest = [item_id for item_id, is_out in zip(ids, out, strict=True) if not is_out]
            total += (out.sum(), *called(works[out], works[~out], rest))
        print(f"{kind:32}  {total[0]:7}  {total[1]:16}  {total[2]:11}")
    print("\ntrained on, then changed          queries  near duplicates   near copies")
    for name, edit in EDITS.items():
        changed = array([edit(picture) for picture in pictures])
        copies = int(np.diag(similarity.duplicates(changed, works)).sum())
        print(f"{name:32}  {len(works):7}  {copies:15}  {called(changed, works, ids)[1]:12}")


if __name__ == "__main__":
    main()
