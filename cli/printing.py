"""What all commands print with: names come from strangers' files, progress goes to stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import influence

_STDERR = Console(stderr=True, soft_wrap=True, highlight=False)


def clean(text: str) -> str:
    """One line without control characters: names and captions come from strangers' files."""
    return "".join(c if c.isprintable() else " " for c in text)


def say(line: str) -> None:
    """A line on stderr."""
    click.echo(clean(line), err=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; nothing when stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_STDERR, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def options_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Apply several click options as one decorator."""

    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


compute = options_of(
    click.option("--engine", type=click.Choice(["auto", *influence.ENGINES]), default="auto", show_default=True,
                 help="How gradients are taken; auto: hooks where they cover every parameter."),
    click.option("--batch-size", type=int, default=influence.DEFAULT_BATCH, show_default=True,
                 help="Rows (image, draw) in one forward; changes speed and memory; values by rounding."),
    click.option("--memory", metavar="SIZE", help="Choose --batch-size so that a process stays within 8GiB, say."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"),
)  # fmt: skip
