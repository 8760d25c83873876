"""One picture to understand at a glance: each query beside its top contributors, and the creators' totals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from influence import datasets
from influence.errors import OptionError

_TOTALS = 5


def draw(table: pd.DataFrame, root: str | Path, out: str | Path, *, top: int = 6) -> None:
    """Draw a table of `attribute` as a PNG.

    Args:
        table: What `attribute` returned.
        root: Folder of the data set.
        out: PNG file to write.
        top: Contributors of each query.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("drawing needs matplotlib; run pip install 'influence[demo]'") from None
    queries = list(table.groupby("query", sort=False))
    figure = Figure(figsize=(1.5 * (top + 3.7), 1.75 * len(queries) + 0.9), dpi=110)
    FigureCanvasAgg(figure)
    widths = [1.25, *[1] * top, 1.9]
    grid = figure.add_gridspec(
        len(queries), top + 2, width_ratios=widths, left=0.01, right=0.91, top=1 - 0.62 / figure.get_figheight(),
        bottom=0.3 / figure.get_figheight(), wspace=0.12, hspace=0.62,
    )  # fmt: skip
    figure.text(0.01, 1 - 0.3 / figure.get_figheight(), "picture", fontsize=11, weight="bold")
    figure.text(
        0.16, 1 - 0.3 / figure.get_figheight(),
        f"training images that most lowered its denoising loss ({table.attrs['method']}), with score and creator",
        fontsize=11,
    )  # fmt: skip
    totals = pd.DataFrame(table.attrs["creators"])
    for row, (query, ranked) in enumerate(queries):
        axes = figure.add_subplot(grid[row, 0])
        _show(axes, datasets.decode(Path(str(query)))[0], Path(str(query)).name, "black", 2.0)
        for column, entry in enumerate(ranked.head(top).to_dict("records"), 1):
            axes = figure.add_subplot(grid[row, column])
            title = f"{entry['score']:+.3g}\n{_short(entry['creator'])}"
            _show(axes, datasets.decode(Path(root) / entry["file_name"])[0], title, "0.6", 0.8)
        _bars(figure.add_subplot(grid[row, top + 1]), totals[totals["query"] == query].to_dict("records"))
    figure.savefig(out, metadata={"Software": None})


def _show(axes: Any, image: Image.Image, title: str, colour: str, width: float) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=7.5, pad=3)
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(width)


def _bars(axes: Any, totals: list[Mapping[str, Any]]) -> None:
    """Signed totals of the creators, the highest on top."""
    shown = totals[:_TOTALS][::-1]
    axes.barh(range(len(shown)), [entry["total"] for entry in shown], color="0.45")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [_short(entry["creator"]) for entry in shown], fontsize=6.5)
    axes.yaxis.tick_right()
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.xaxis.get_offset_text().set_fontsize(6.5)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=6.5)
    axes.tick_params(length=0)
    axes.set_title("total over all images", fontsize=7.5, pad=3)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str) -> str:
    """A name for a small place, without characters that matplotlib would read as mathematics."""
    plain = "".join(c if c.isprintable() else " " for c in name).replace("$", r"\$")
    return plain if len(plain) <= 20 else plain[:19] + "…"
