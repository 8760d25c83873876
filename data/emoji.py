"""Makes the emoji data set: the same concepts drawn by four studios, each of which is a creator.

With `--others` it makes the drawings of two more studios instead, all of them: what a base model is trained on.

The drawings are fetched by `npm pack` from the pinned packages below and rasterised by resvg (`pip install resvg-py`,
0.5.0 was used); neither they nor the pictures are kept in the repository:

    python data/emoji.py --out emoji --size 32 --count 100
    python data/emoji.py --out people --size 32 --count 164 --people
    python data/emoji.py --out others --size 32 --others

Concepts are those that all four studios drew under the same name, less symbols and flags (whose look is prescribed) and
people (whose variants differ in number); they are taken in the order of the SHA-256 of their names, so that a smaller
`--count` gives a subset. `--people` takes people and parts of the body instead, without the variants for men and women.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
"""Noto's categories of which concepts are taken."""

PEOPLE = "People & Body"
"""The category that `--people` takes."""

OTHER_CATEGORIES = ("Activities", "Food", "Nature", "Objects", "Places", "Travel")
"""The same in the catalogues of the other studios."""


@dataclass(frozen=True)
class Package:
    """One studio's drawings on npm."""

    name: str
    version: str
    integrity: str
    """SHA-512 of the tarball, as npm writes it."""

    @property
    def tarball(self) -> str:
        """The name that `npm pack` gives it."""
        return f"iconify-json-{self.name}-{self.version}.tgz"


PACKAGES = (
    Package(
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    Package(
        "openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    Package(
        "fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    Package(
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
)

OTHERS = (
    Package(
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    Package(
        "fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
)


@dataclass(frozen=True)
class Studio:
    """A package, read."""

    slug: str
    creator: str
    licence: str
    icons: dict[str, Any]
    """Iconify's record: `icons` by name, and the default `width` and `height`."""
    categories: dict[str, list[str]]


def fetch(package: Package, folder: Path) -> Studio:
    """Download a package into the folder, unless it is there, check it and read it."""
    path = folder / package.tarball
    if not path.exists():
        spec = f"@iconify-json/{package.name}@{package.version}"
        subprocess.run(["npm", "pack", spec, "--silent", "--pack-destination", folder], check=True)
    found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise SystemExit(f"{path} has {found}; expected {package.integrity}; delete it and fetch it again")
    with tarfile.open(path) as archive:
        icons, info, metadata = (
            json.load(archive.extractfile(f"package/{part}.json")) for part in ("icons", "info", "metadata")
        )
    categories = metadata["categories"]
    return Studio(package.name, info["author"]["name"], info["license"]["spdx"], icons, categories)


def concepts(studios: list[Studio], count: int, people: bool) -> list[str]:
    """The first `count` concepts that all studios drew, in the order of the SHA-256 of their names."""
    common = set.intersection(*(drawable(studio, studio.icons["icons"]) for studio in studios))
    categories = (PEOPLE,) if people else CATEGORIES
    common &= {name for category in categories for name in studios[0].categories[category]}
    if people:
        common = {name for name in common if not name.startswith(("man-", "woman-"))}
    if count > len(common):
        raise SystemExit(f"--count is {count}; expected at most {len(common)}, the concepts that all studios drew")
    return sorted(common, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]


def drawable(studio: Studio, names: Iterable[str]) -> set[str]:
    """Those without text, which would be drawn in whatever font the machine has."""
    icons = studio.icons["icons"]
    return {name for name in names if name in icons and "<text" not in icons[name]["body"]}


def rasterise(studio: Studio, concept: str, size: int) -> Image.Image:
    """One drawing on white, RGB, centred."""
    icon = {"left": 0, "top": 0, "width": 16, "height": 16} | studio.icons | studio.icons["icons"][concept]
    width, height = icon["width"], icon["height"]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon["left"]} {icon["top"]} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )
    side = {"width": size} if width >= height else {"height": size}
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True, **side)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return canvas


def main() -> None:
    """Fetch, rasterise and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels (default: 32)")
    parser.add_argument("--count", type=int, default=100, help="concepts of each studio (default: 100)")
    parser.add_argument("--people", action="store_true", help="people and parts of the body instead")
    parser.add_argument("--others", action="store_true", help="the other studios' drawings, all of them")
    parser.add_argument("--tarballs", type=Path, help="folder that keeps the packages (default: a temporary one)")
    options = parser.parse_args()
    if options.size < 1 or options.count < 1:
        raise SystemExit(f"--size is {options.size}, --count is {options.count}; expected positive numbers")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise SystemExit(f"{options.out} exists; expected a new or empty folder; remove it or choose another")
    with tempfile.TemporaryDirectory() as temporary:
        tarballs = options.tarballs or Path(temporary)
        tarballs.mkdir(parents=True, exist_ok=True)
        studios = [fetch(package, tarballs) for package in (OTHERS if options.others else PACKAGES)]
    if options.others:
        chosen = {
            studio.slug: sorted(drawable(studio, (n for c in OTHER_CATEGORIES for n in studio.categories.get(c, ()))))
            for studio in studios
        }
    else:
        chosen = dict.fromkeys((studio.slug for studio in studios), concepts(studios, options.count, options.people))
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    with (options.out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file_name", "text", "creator", "licence", "concept"])
        for studio in studios:
            for concept in chosen[studio.slug]:
                name = f"images/{studio.slug}-{concept}.png"
                rasterise(studio, concept, options.size).save(options.out / name)
                words = concept.replace("-", " ")
                rows.writerow([name, f"emoji of {words}", studio.creator, studio.licence, concept])
    total = sum(map(len, chosen.values()))
    print(f"{options.out}: {total} drawings by {len(studios)} studios, {options.size} × {options.size} pixels")


if __name__ == "__main__":
    main()
