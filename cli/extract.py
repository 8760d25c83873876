"""`influence extract`: can the model be prompted to return a training picture?"""

import json
import sys
from pathlib import Path
from typing import Any

import click
import pandas as pd
from influence_cli.printing import clean, progress, say
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import influence

_SHOWN = 10


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; goes on if run again."
)
@click.option("--count", type=int, help="Pictures for each caption, or in all without captions.  [default: 4, 64]")
@click.option("--steps", type=int, default=50, show_default=True, help="Steps of the sampler.")
@click.option("--guidance", type=float, help="Classifier-free guidance; 1 for none.  [default: 7.5 with captions]")
@click.option("--seed", type=int, default=0, show_default=True, help="Key of the initial noise.")
@click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model is now, if it was moved.")
@click.option("--lora", type=click.Path(path_type=Path), help="Where the LoRA is now, if it was moved.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Pictures that are generated at once.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def extract(store: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Generate pictures with each training caption, and report training pictures that come back nearly unchanged.

    DIR gets the pictures, pairs.csv and pairs.png: generated | most similar training picture.

    \b
    Example:
      influence extract --store my.store -o extracted
    """  # noqa: D301
    with progress() as show:
        table = influence.extract(store, out, progress=show, message=say, **options)
    if as_json:
        click.echo(
            json.dumps(json.loads(table.to_json(orient="records", double_precision=15)), ensure_ascii=False, indent=2)
        )
        return
    copies = table[table["near_copy"]]
    click.echo(
        f"{table['query'].nunique()} generated pictures: {copies['query'].nunique()} are near copies of "
        f"{copies['item_id'].nunique()} training pictures; see {out / 'pairs.png'}"
    )
    _print(table.drop_duplicates("query").head(_SHOWN))


def _print(table: pd.DataFrame) -> None:
    """The most similar pairs."""
    shown = Table()
    for name in ("near copy", "similarity", "ratio", "generated", "training picture", "creator", "hits"):
        shown.add_column(name, justify="right" if name in ("similarity", "ratio", "hits") else "left", overflow="fold")
    for row in table.itertuples():
        cells = ("yes" if row.near_copy else "no", f"{row.similarity:.3f}", f"{row.ratio:.2f}", row.query)
        shown.add_row(*(escape(clean(cell)) for cell in (*cells, row.file_name, row.creator, str(row.hits))))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(shown)
