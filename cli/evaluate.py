"""`influence evaluate`: scores against retrained models, and checks of a store without any."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pandas as pd
from influence_cli.printing import clean, options_of, progress, say
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import influence

_common = options_of(
    click.option("--store", required=True, type=click.Path(path_type=Path)),
    click.option("--method", "methods", multiple=True, type=click.Choice(list(influence.METHODS)),
                 help="May be given several times.  [default: that of attribute; for doctor gauss-newton]"),
    click.option("--damping", type=float, help="λ in units of tr(H)/k.  [default: that of the fine-tune's steps]"),
    click.option("--draws", type=int, default=256, show_default=True, help="Draws (t, ε) of each picture's gradient."),
    click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)  # fmt: skip
_retraining = options_of(
    click.option("--truth", required=True, type=click.Path(path_type=Path),
                 help="Folder that keeps the losses of retrained models; run again, it goes on."),
    click.option("--base", required=True, type=click.Path(path_type=Path), help="Where the fine-tune started from."),
    click.option("--queries", "queries", multiple=True, required=True, metavar="KIND=DIR",
                 help="Pictures to ask about, as a data set folder; KIND: generated, trained, unseen or another word."),
    click.option("--recipe", type=click.Path(path_type=Path),
                 help="finetune.json: how the model was fine-tuned.  [default: beside the model or LoRA]"),
    click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, a thread each."),
)  # fmt: skip


@click.group()
def evaluate() -> None:
    """How far can the scores be believed? Retrain without images and compare, or examine a store (doctor).

    \b
    Example:
      influence evaluate doctor --store my.store
      influence evaluate lds --store my.store --base base/ --truth truth/ --queries generated=pictures/
    """  # noqa: D301


def _begin(
    store: Path,
    truth: Path,
    base: Path,
    queries: tuple[str, ...],
    recipe: Path | None,
    methods: tuple[str, ...],
    dataset: Path | None,
    show: Callable[[str, int, int], None],
    **options: Any,
) -> tuple[influence.Truth, dict[str, Any]]:
    """The truth, and the scores of each method."""
    odd = next((query for query in queries if "=" not in query), None)
    if odd is not None:
        raise click.UsageError(f"--queries {odd!r}; expected KIND=DIR, as in generated=pictures")
    kinds = [query.split("=", 1)[0] for query in queries]
    if len(set(kinds)) < len(kinds):
        raise click.UsageError(
            f"--queries names {max(kinds, key=kinds.count)} twice; expected one folder for each kind"
        )
    folders = dict(query.split("=", 1) for query in queries)
    made = influence.open_store(store)
    opened = influence.truth_of(made, truth, base=base, queries=folders, recipe=recipe, dataset=dataset, message=say)
    scores = {
        method: influence.score_matrix(
            made, opened, method=method, dataset=dataset, progress=show, message=say, **options
        )
        for method in methods or [influence.default_method(made.source)]
    }
    return opened, scores


@evaluate.command()
@_common
@_retraining
@click.option("--subsets", type=click.IntRange(2), default=64, show_default=True, help="Exact halves to retrain on.")
@click.option("--seeds", type=click.IntRange(2), default=2, show_default=True, help="Training seeds of each.")
def lds(subsets: int, seeds: int, workers: int, as_json: bool, **options: Any) -> None:
    """Linear datamodeling score: do summed scores foretell the losses of models retrained on halves?

    Beside it the 95 % interval, a control that scores every image alike, and the ceiling that training noise sets.
    """
    with progress() as show:
        truth, scores = _begin(show=show, **options)
        table = influence.evaluate_lds(truth, scores, subsets=subsets, seeds=seeds, workers=workers, progress=show)
    _print(table, as_json)


@evaluate.command()
@_common
@_retraining
@click.option(
    "--fraction",
    "fractions",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=(0.01, 0.05, 0.2),
    show_default=True,
)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Training seeds of each removal.")
@click.option("--limit", type=click.IntRange(1), default=4, show_default=True, help="Queries of each kind.")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG: the same seeds sampled after each removal.")
def deletion(
    fractions: tuple[float, ...], seeds: int, limit: int, picture: Path | None, workers: int, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Retrain without each picture's top images: does its loss rise more than without others?

    Beside the method: as many images at random, and the images that look most like the picture.
    """
    if picture is not None and not picture.parent.is_dir():
        raise click.UsageError(f"--picture is {picture}, and {picture.parent} is no folder; make it first")
    with progress() as show:
        truth, scores = _begin(show=show, **options)
        table = influence.evaluate_deletion(
            truth, scores, limit=limit, fractions=fractions, seeds=seeds, picture=picture, workers=workers,
            progress=show,
        )  # fmt: skip
    keys = ["kind", "fraction", "method"]
    _print(table.groupby(keys, sort=False)["rise"].agg(["mean", "sem", "count"]).reset_index(), as_json)


@evaluate.command()
@_common
@_retraining
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training seeds of each coalition.")
def shapley(seeds: int, workers: int, as_json: bool, **options: Any) -> None:
    """Retrain on every coalition of owners: are their summed scores their Shapley values?"""
    with progress() as show:
        truth, scores = _begin(show=show, **options)
        table = influence.evaluate_shapley(truth, scores, seeds=seeds, workers=workers, progress=show)
    _print(table, as_json)


@evaluate.command()
@_common
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--prompt", help="What the pictures were made with; needed if the model reads captions.")
def doctor(
    store: Path, methods: tuple[str, ...], images: tuple[Path, ...], prompt: str | None, as_json: bool, **options: Any
) -> None:
    """Examine a store without retraining; exit code 1 if a check fails."""
    if len(methods) > 1:
        raise click.UsageError("doctor examines one --method at a time.")
    prompts = None if prompt is None else [prompt] * len(images)
    with progress() as show:
        table = influence.doctor(
            influence.open_store(store), images, prompts=prompts, progress=show, message=say,
            **options, **({"method": methods[0]} if methods else {}),
        )  # fmt: skip
    _print(table, as_json)
    if not table["ok"].all():
        raise click.exceptions.Exit(1)


def _print(table: pd.DataFrame, as_json: bool) -> None:
    """A table on stdout."""
    if as_json:
        click.echo(json.dumps(json.loads(table.to_json(orient="records", double_precision=15)), indent=2))
        return
    shown = Table()
    for name in table.columns:
        shown.add_column(name, justify="right" if table[name].dtype.kind in "fi" else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else escape(clean(str(cell))) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(shown)
