"""Click commands: parse, call one public function, print. Results go to stdout, progress and remarks to stderr."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pandas as pd
from influence_cli.answers import check, export, replay
from influence_cli.evaluate import evaluate
from influence_cli.extract import extract
from influence_cli.printing import clean, compute, options_of, progress, say
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import influence

_WIDTH = 160  # of tables that go to a file or a pipe


class Group(click.Group):
    """Shows the package's own errors as one line; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command.

        Raises:
            ClickException: The library refused something, exit code 1; or the program was told to stop, 128 + signal.
        """
        try:
            with _stoppable():
                return super().invoke(ctx)
        except influence.InfluenceError as error:
            raise click.ClickException(clean(str(error))) from error
        except BrokenPipeError:  # whoever read the output has had enough
            raise
        except OSError as error:
            raise click.ClickException(clean(f"{error.filename or 'a file'}: {error.strerror or error}")) from error
        except _Stopped as stopped:
            name = signal.Signals(stopped.args[0]).name
            error = click.ClickException(f"stopped by {name}; what was committed is kept: run the same command again")
            error.exit_code = 128 + stopped.args[0]
            raise error from None


class _Stopped(BaseException):
    """A signal to stop has come; its number. Not an Exception: nothing on the way may take it for a failure."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM an exception, so that everything that is open is closed and temporary files removed."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=Group)
@click.version_option(package_name="influence")
def cli() -> None:
    """Whose work made this picture? Training data attribution for fine-tuned diffusion models.

    \b
    Example:
      influence build images/ --model my-finetune/ --store my.store
      influence attribute picture.png --store my.store -k 10
    """  # noqa: D301


@cli.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Diffusers or training output folder.")
@click.option("--lora", type=click.Path(path_type=Path), help="pytorch_lora_weights.safetensors; adapter only.")
@click.option("--store", "store", type=click.Path(path_type=Path), help="Folder to write; needed without --plan.")
@click.option("--dim", type=int, help="k, entries of a projected gradient.  [default: 32768, less for many images]")
@click.option("--projection", type=click.Choice(list(influence.PROJECTIONS)), default="countsketch", show_default=True)
@click.option(
    "--metric",
    type=click.Choice(["adamw", "plain"]),
    help="That in which AdamW moved, or gradients as they are.  [default: adamw]",
)
@click.option("--draws", type=int, default=40, show_default=True, help="Draws (t, ε) of each image.")
@click.option("--curvature-rows", type=int, help="Curvature rows over all images.  [default: 16384]")
@click.option("--seed", type=int, default=0, show_default=True, help="Key of the projection and of all draws.")
@click.option("--parameters", metavar="GLOB", help="Parameters to take gradients of.  [default: all trained ones]")
@click.option("--creator-column", help="Column that names the creator.  [default: creator]")
@click.option("--resolution", type=int, help="Pixels of a side.  [default: the model's own]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option(
    "--controls",
    type=click.Path(path_type=Path),
    help="Pictures that were never trained on, best of the same kind: scores are compared with theirs.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The pipeline that all weights were fine-tuned from; a LoRA's is known.",
)
@click.option(
    "--half",
    type=click.Path(path_type=Path),
    help="The same fine-tune in half of its epochs (see halve): scores foretell retraining better with it.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="finetune.json: its steps decide the damping.  [default: the one beside the model]",
)
@click.option("--plan", is_flag=True, help="Say what it would cost, from two measured batches, and write nothing.")
@compute
def build(
    dataset: Path,
    store: Path | None,
    plan: bool,
    workers: int,
    controls: Path | None,
    **options: Any,
) -> None:
    """Take the gradients of every image of DATASET and keep them in a store.

    Run again, it goes on where it stopped, and takes only images that were added.

    \b
    Example:
      influence build images/ --model base/ --lora pytorch_lora_weights.safetensors --store my.store
    """  # noqa: D301
    if plan:
        with progress() as show:
            costs = influence.plan(dataset, controls=controls, progress=show, message=say, **options)
        for name, value in costs.items():
            click.echo(f"{name:16}{_quantity(name, value)}")
        return
    if store is None:
        raise click.UsageError("Missing option '--store': the folder to write to.")
    with progress() as show:
        made = influence.build(
            dataset, store=store, workers=workers, controls=controls, progress=show, message=say, **options
        )
    rows, psi_rows = made.num_rows()
    left_out = f", {len(made.excluded)} excluded" if made.excluded else ""
    inside = made.controls()
    compared = "" if inside is None else f", {inside.num_rows()[0]} controls"
    click.echo(f"{store}: {rows} images, {psi_rows} curvature rows, {len(made.refused())} refused{left_out}{compared}")


_again = options_of(
    click.argument("dataset", type=click.Path(path_type=Path)),
    click.option("--base", required=True, type=click.Path(path_type=Path), help="The pipeline that it started from."),
    click.option(
        "--recipe", required=True, type=click.Path(path_type=Path), help="finetune.json, or the model's folder with it."
    ),
    click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write."),
    click.option("--resolution", type=int, help="Pixels of a side.  [default: the model's own]"),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"),
)
"""What a fine-tune that is done again needs."""


@cli.command()
@_again
def halve(out: Path, **options: Any) -> None:
    """Do a fine-tune again for half of its epochs, for build --half.

    \b
    Example:
      influence halve images/ --base base/ --recipe my-finetune/ -o half/
      influence build images/ --model my-finetune/ --base base/ --half half/ --store my.store
    """  # noqa: D301
    with progress() as show:
        influence.halve(out=out, progress=show, message=say, **options)
    click.echo(f"{out}: pass it to influence build --half")


@cli.command()
@_again
@click.option("--creator-column", help="Column that names the creator.  [default: creator]")
def solo(out: Path, **options: Any) -> None:
    """Do a fine-tune again on the works of each creator alone, for export --solo.

    All of these together have about as many steps as the fine-tune. Run again, it trains those that are missing.

    \b
    Example:
      influence solo images/ --base base/ --recipe my-finetune/ -o solo/
      influence export picture.png --store my.store --solo solo/ -o tables
    """  # noqa: D301
    with progress() as show:
        influence.solo(out=out, progress=show, message=say, **options)
    click.echo(f"{out}: pass it to influence export --solo")


def _quantity(name: str, value: Any) -> str:
    if name == "seconds":
        return f"{value:,.0f} (one process)"
    if name in ("disk_bytes", "memory_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,}" if isinstance(value, int) else str(value)


class _Count(click.ParamType):
    """A number of rows, or `all`."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it; `all` is 0, since click keeps None for an option that is absent."""
        if value == "all":
            return 0
        try:
            count = int(value)
        except ValueError:
            count = 0
        if count < 1:
            self.fail(f"{value!r} is not a number above 0, nor all", param, ctx)
        return count


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--store",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Several, of models retrained on the same data set, give means.",
)
@click.option("-k", "k", type=_Count(), default="10", show_default=True, help="Rows for each picture, or all.")
@click.option(
    "--method",
    type=click.Choice(list(influence.METHODS)),
    help="[default: two-length if build had --half, or else two-point if the base is known, or else gauss-newton]",
)
@click.option("--damping", type=float, help="λ in units of tr(H)/k.  [default: that of the fine-tune's steps]")
@click.option("--draws", type=int, default=256, show_default=True, help="Draws (t, ε) of each picture.")
@click.option("--prompt", help="What the picture was made with; needed if the model reads captions.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model is now, if it was moved.")
@click.option("--lora", type=click.Path(path_type=Path), help="Where the LoRA is now, if it was moved.")
@click.option("--base", type=click.Path(path_type=Path), help="The pipeline before the fine-tune, if build named none.")
@click.option("--half", type=click.Path(path_type=Path), help="Where the model of half the length is now, if moved.")
@click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved.")
@click.option("--controls", type=click.Path(path_type=Path), help="Where the controls are now, if they were moved.")
@click.option("--intervals/--no-intervals", default=True, show_default=True, help="Standard errors of the scores.")
@click.option("--output", type=click.Path(path_type=Path), help="FILE.csv, .parquet or .json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@compute
def attribute(
    images: tuple[Path, ...], store: tuple[Path, ...], k: int, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Name the training images that most lowered the denoising loss of each picture.

    A score above 0 says that training on the image helped to make the picture; it is an estimate.

    \b
    Example:
      influence attribute picture.png --store my.store -k 10 --output picture.csv
    """  # noqa: D301
    if output is not None and output.suffix not in _WRITERS:
        raise click.UsageError(f"--output ends in {output.suffix!r}; expected one of {', '.join(_WRITERS)}")
    if output is not None and not output.parent.is_dir():
        raise click.UsageError(f"--output is {output}, and {output.parent} is no folder; make it first")
    with progress() as show:
        table = influence.attribute(images, store, k=k or None, progress=show, message=say, **options)
    if output is not None:
        output.write_bytes(_WRITERS[output.suffix](table))
    if as_json:
        click.echo(json.dumps(_nested(table), ensure_ascii=False, indent=2))
        return
    for query, rows in table.groupby("query", sort=False):
        _print_table(str(query), rows, table.attrs)


def _nested(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One object for each query."""
    columns = [name for name in table.columns if name != "query"]
    return [
        {"query": query, "attributions": json.loads(rows[columns].to_json(orient="records", double_precision=15))}
        for query, rows in table.groupby("query", sort=False)
    ]


_WRITERS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    ".csv": influence.csv_bytes,
    ".parquet": lambda table: table.to_parquet(index=False),
    ".json": lambda table: json.dumps(_nested(table), ensure_ascii=False, indent=2).encode(),
}


def _print_table(query: str, rows: pd.DataFrame, attrs: dict[str, Any]) -> None:
    """Print the top contributors of one query, and the creators' totals under them."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    click.echo(clean(f"{query} · {attrs['method']}"))
    top = Table()
    text = ("creator", "file", "caption")
    for name in ("rank", "score", "95 % interval", "p", "q", *text):
        top.add_column(name, justify="left" if name in text else "right", overflow="fold")
    for row in rows.itertuples():
        interval = f"{row.score_low:+.3g} … {row.score_high:+.3g}" if row.score_se == row.score_se else ""
        numbers = (str(row.rank), f"{row.score:+.4g}", interval, _number(row.p_value), _number(row.q_value))
        cells = (*numbers, row.creator, row.file_name, row.caption or "")
        top.add_row(*(escape(clean(cell)) for cell in cells))
    console.print(top)
    click.echo("by creator, signed sum over all images:")
    totals = Table()
    held_out = any(entry["gap"] is not None for entry in attrs["creators"])
    styles = ("trained less held-out works",) if held_out else ()
    for name in ("total", "p", "q", "images", *styles, "creator"):
        totals.add_column(name, justify="left" if name == "creator" else "right", overflow="fold")
    for entry in attrs["creators"]:
        if entry["query"] == query:
            numbers = f"{entry['total']:+.4g}", _number(entry["p_value"]), _number(entry["q_value"])
            gap = "" if entry["gap"] is None else "{gap:+.2g} ({gap_low:+.2g} … {gap_high:+.2g})".format(**entry)
            shown = (gap,) if held_out else ()
            totals.add_row(*numbers, str(entry["images"]), *shown, escape(clean(entry["creator"])))
    console.print(totals)
    if held_out:
        click.echo(
            "mean score, with 95 % interval: around 0, a recognised style does not show that these works contributed"
        )
    for entry in attrs["queries"]:
        if entry["query"] == query and entry["gain"] is not None:
            click.echo(
                f"loss under the base {entry['loss_base']:.4g}, under the fine-tune {entry['loss_finetuned']:.4g}: "
                f"gain {entry['gain']:+.3g}" + (f" ± {entry['gain_se']:.2g}" if entry["gain_se"] is not None else "")
            )
    if not attrs["controls"]:
        click.echo("no controls: nothing here says whether a score is more than chance (build --controls DIR)")


def _number(value: float) -> str:
    """A p- or q-value; nothing where there is none."""
    return "" if value != value else f"{value:.3f}"


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is (store, model folder, LoRA, data set or picture), and whether it is whole.

    \b
    Example:
      influence inspect my.store
    """  # noqa: D301
    facts = influence.inspect(path)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _print_facts(facts)
    if not facts["whole"]:
        sys.exit(1)


def _print_facts(facts: dict[str, Any], indent: int = 0) -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{'  ' * indent}{clean(name)}:")
            _print_facts(value, indent + 1)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for entry in value or ["none"]:
                click.echo(f"{'  ' * indent}{clean(name)}: {clean(str(entry))}")
        else:
            click.echo(f"{'  ' * indent}{clean(name)}: {clean(str(value))}")


@cli.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Drop the shards that are damaged, and build those again.")
@click.option("--dataset", type=click.Path(path_type=Path), help="Where the data set is now, if it was moved.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model is now, if it was moved.")
@click.option("--lora", type=click.Path(path_type=Path), help="Where the LoRA is now, if it was moved.")
@click.option("--base", type=click.Path(path_type=Path), help="Where the base is now, if it was moved.")
@click.option("--half", type=click.Path(path_type=Path), help="Where the model of half the length is now, if moved.")
@click.option("--controls", type=click.Path(path_type=Path), help="Where the controls are now, if they were moved.")
@compute
def verify(store: Path, repair: bool, **options: Any) -> None:
    """Check every byte of STORE, and say which shards and which images are affected by what is wrong.

    \b
    Example:
      influence verify my.store --repair
    """  # noqa: D301
    with progress() as show:
        if repair:
            problems = influence.repair(store, progress=show, message=say, **options)
        else:
            problems = influence.verify(store, show)
    for problem in problems:
        click.echo(clean(f"{problem.file}: {problem.found}"))
        for name in problem.file_names:
            click.echo(clean(f"  affects {name}"))
    images = len({item_id for problem in problems for item_id in problem.item_ids})
    if problems and not repair:
        advice = "influence verify --repair builds again what can be"
        raise click.ClickException(f"{store}: {len(problems)} problems, {images} images affected; {advice}")
    made = influence.open_store(store)
    missing = sum(len(part.missing()) for part in (made, made.controls()) if part is not None)
    click.echo(
        f"{store}: every byte is as it was committed"
        + (f"; {len(problems)} problems repaired, {images} images built again" if problems else "")
        + (f"; {missing} shards are not built yet: run the same influence build to go on" if missing else "")
    )


@cli.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--creator", help="All images of this creator, also those added later.")
@click.option("--item", help="One image, by its id; influence attribute tells it.")
@click.option("--undo", is_flag=True, help="Bring back what was excluded.")
def exclude(store: Path, creator: str | None, item: str | None, undo: bool) -> None:
    """Leave images out of everything that STORE is used for, at once; nothing is erased, and it can be undone.

    \b
    Example:
      influence exclude my.store --creator "Ann Other"
    """  # noqa: D301
    if (creator is None) == (item is None):
        raise click.UsageError("Give one of --creator and --item.")
    changed = influence.exclude(store, creator=creator, item=item, undo=undo)
    made = influence.open_store(store)
    state = "included again" if undo else "excluded" if changed else "already excluded"
    images = made.items["item_id"].nunique()
    click.echo(clean(f"{store}: {creator or item} {state}; {images} images left, {len(made.excluded)} excluded"))


@cli.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--holdout", "fraction", type=float, default=0.1, show_default=True, help="Part to hold out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Key of the choice.")
@click.option("--creator-column", help="Column that names the creator.  [default: creator]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
def split(dataset: Path, out: Path, **options: Any) -> None:
    """Copy DATASET into two, before a fine-tune: train for it, and controls that it never sees.

    \b
    Example:
      influence split images/ --holdout 0.1 -o parts
    """  # noqa: D301
    train, controls = influence.hold_out(dataset, out, **options)
    click.echo(f"{out / 'train'}: {train} pictures to fine-tune on")
    click.echo(f"{out / 'controls'}: {controls} pictures held out, for influence build --controls")


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("influence-demo"), show_default=True)
def demo(out: Path) -> None:
    """Fine-tune a small model on several designers' letters, generate letters, and attribute them.

    \b
    Example:
      influence demo --out influence-demo
    """  # noqa: D301
    with progress() as show:
        made = influence.demo(out, progress=show, message=say)
    _print_facts(made)


for command in (check, evaluate, export, replay):
    cli.add_command(command)
cli.add_command(extract)
