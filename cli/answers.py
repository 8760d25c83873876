"""`influence check`, `export`, `replay`: verdicts, and tables of all that they rest on."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import click
import pandas as pd
from influence_cli.printing import clean, compute, options_of, progress, say
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import influence

EXIT_CODES = {"attributable": 0, "near_copy": 10, "not_from_model": 11, "not_attributable": 12, "weak": 13}
_LISTED = 50

_query = options_of(
    click.option("--store", required=True, multiple=True, type=click.Path(path_type=Path),
                 help="Several, of models retrained on the same data set: intervals then cover training again."),
    click.option("--prompt", help="What the pictures were made with; needed if the model reads captions."),
    click.option("--list", "listed", type=click.Path(path_type=Path),
                 help="CSV of more pictures: columns file and, if wanted, prompt and usage (weight in the statement)."),
    click.option("--method", type=click.Choice(list(influence.METHODS)),
                 help="[default: as attribute has]"),
    click.option("--damping", type=float, help="λ in units of tr(H)/k.  [default: that of the fine-tune's steps]"),
    click.option("--draws", type=int, default=256, show_default=True, help="Draws (t, ε) of each picture."),
    click.option("--embedding", type=click.Path(path_type=Path),
                 help="Parquet file of your own embeddings (file_name, embedding), for near copies."),
    click.option("--base", type=click.Path(path_type=Path), help="The pipeline before the fine-tune."),
    click.option("--half", type=click.Path(path_type=Path), help="Where the model of half the length is now."),
    click.option("--solo", multiple=True, type=click.Path(path_type=Path),
                 callback=lambda context, option, folders: list(folders) or None,
                 help="Fine-tunes of each creator alone (see solo): shares are nearer to Shapley values with them. "
                      "Several, of other seeds, are averaged."),
    click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved."),
    click.option("--controls", type=click.Path(path_type=Path), help="Where the controls are now, if they were moved."),
    click.option("--model", type=click.Path(path_type=Path), help="Where the model is now, if it was moved."),
    click.option("--lora", type=click.Path(path_type=Path), help="Where the LoRA is now, if it was moved."),
    compute,
)  # fmt: skip


def _pictures(
    images: tuple[Path, ...], listed: Path | None, prompt: str | None
) -> tuple[list[Path], str | list[str] | None, list[float] | None]:
    """Pictures, prompts and usage, of the arguments and of a list."""
    if listed is None:
        if not images:
            raise click.UsageError("Missing pictures: name some, or give --list FILE.csv.")
        return list(images), prompt, None
    try:
        with listed.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        files = [listed.parent / row["file"] for row in rows]
        usage = [float(row.get("usage") or 1) for row in rows]
    except (OSError, UnicodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise click.ClickException(f"{listed} is no CSV with a column file (and numbers in usage): {error}") from None
    own = [row.get("prompt") for row in rows]
    every = [prompt] * len(images) + [prompt if text is None else text for text in own]
    prompts = [text for text in every if text is not None]
    if prompts and len(prompts) < len(every):
        raise click.UsageError(f"{len(every) - len(prompts)} pictures have no prompt, others have; give all one.")
    return [*images, *files], prompts or None, [1.0] * len(images) + usage


@click.command(epilog="Exit code: of the first in " + ", ".join(
    f"{name} {code}" for name, code in sorted(EXIT_CODES.items(), key=lambda pair: pair[1] or 99)
) + " that is among the verdicts; 1 for an error.")  # fmt: skip
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@_query
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(images: tuple[Path, ...], listed: Path | None, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Say in one word what can be said of each picture, and why.

    The words: near_copy, attributable, weak, not_attributable, not_from_model.

    \b
    Example:
      influence check picture.png --store my.store
    """  # noqa: D301
    paths, prompts, usage = _pictures(images, listed, prompt)
    with progress() as show:
        made = influence.answer(paths, prompt=prompts, usage=usage, k=_LISTED, progress=show, message=say, **options)
    if as_json:
        rows = made.queries.to_json(orient="records", double_precision=15)
        click.echo(json.dumps(json.loads(rows), ensure_ascii=False, indent=2))
    else:
        _print(made)
    found = set(made.queries["verdict"])
    sys.exit(next((code for name, code in sorted(EXIT_CODES.items(), key=lambda p: p[1] or 99) if name in found), 0))


def _print(made: influence.Answers) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    shown = Table()
    for name in ("picture", "verdict", "why", "gain", "similarity", "creators more than chance (share)"):
        shown.add_column(name, overflow="fold", justify="right" if name in ("gain", "similarity") else "left")
    names = made.contributors.set_index("contributor_id")["name"]
    shares = made.shares[made.shares["estimator"] == "gated_group_sum"]
    for row in made.queries.itertuples():
        mine = shares[(shares["query_id"] == row.query_id) & (shares["share"] > 0)]
        mine = mine[mine["n_works"].notna()].sort_values("share", ascending=False)
        who = ", ".join(
            f"{names[share.contributor_id]} {share.share:.0%} ({share.share_low:.0%} … {share.share_high:.0%})"
            for share in mine.itertuples()
        )
        gain = "" if pd.isna(row.finetune_gain) else f"{row.finetune_gain:+.3g}"
        cells = (row.file, row.verdict, row.reason, gain, f"{row.max_similarity:.2f}", who)
        shown.add_row(*(escape(clean(cell)) for cell in cells))
    console.print(shown)
    click.echo("Research estimates: no proof of copying, and nothing here says that anything is due.")


@click.command()
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@_query
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--format", "form", type=click.Choice(list(influence.FORMATS)), default="csv", show_default=True)
@click.option("--pool", metavar="AMOUNT", help="Money to divide over all pictures, by every estimator.")
@click.option("--currency", default="EUR", show_default=True, help="Code of ISO 4217.")
@click.option("--truth", type=click.Path(path_type=Path), help="Truth of influence evaluate shapley: exact values.")
@click.option("-k", "k", type=click.IntRange(1), help="Rows of scores for each picture.  [default: all]")
def export(
    images: tuple[Path, ...],
    listed: Path | None,
    prompt: str | None,
    store: tuple[Path, ...],
    out: Path,
    **options: Any,
) -> None:
    """Write tables on pictures for research on royalties: scores, shares, controls, and all that they rest on.

    \b
    Example:
      influence export picture.png --store my.store -o tables --pool 1000 --currency EUR
    """  # noqa: D301
    paths, prompts, usage = _pictures(images, listed, prompt)
    with progress() as show:
        made = influence.export(paths, store, out, prompt=prompts, usage=usage, progress=show, message=say, **options)
    verdicts = ", ".join(f"{count} {name}" for name, count in made.queries["verdict"].value_counts().items())
    click.echo(f"{out}: {len(made.queries)} pictures ({verdicts}), {len(made.attributions)} scores")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--store", multiple=True, type=click.Path(path_type=Path), help="Where the store is now, if it was moved."
)
@click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved.")
@click.option("--controls", type=click.Path(path_type=Path), help="Where the controls are now, if they were moved.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model is now, if it was moved.")
@click.option("--lora", type=click.Path(path_type=Path), help="Where the LoRA is now, if it was moved.")
@click.option("--base", type=click.Path(path_type=Path), help="Where the base is now, if it was moved.")
@click.option("--half", type=click.Path(path_type=Path), help="Where the model of half the length is now, if moved.")
@click.option(
    "--solo",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Where the fine-tunes of each creator alone are now, if they were moved.",
)
@click.option("--embedding", type=click.Path(path_type=Path), help="Where the embeddings are now, if they were moved.")
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the same as then]")
def replay(run: Path, out: Path, **changes: Any) -> None:
    """Make an export again from its run.json, in the folder it was made in, and compare the tables byte by byte.

    \b
    Example:
      influence replay tables/run.json -o again
    """  # noqa: D301
    several = {name: [str(path) for path in changes.pop(name)] for name in ("store", "solo")}
    changes = {name: str(value) for name, value in changes.items() if value is not None}
    changes |= {name: paths for name, paths in several.items() if paths}
    with progress() as show:
        made = influence.replay(run, out, progress=show, message=say, **changes)
    for name, how in made.changed.items():
        click.echo(f"{name}: {how}")
    if made.changed:
        raise click.ClickException(f"{len(made.changed)} tables differ from those of {run}")
    click.echo(f"{out}: every table has the bytes that {run} names")
