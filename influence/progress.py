"""How a caller hears of what goes on: progress by counts, and lines that a person must see."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], Any]
"""`progress(what, done, total)`."""
Message = Callable[[str], Any]
"""Called with one line that a person must see."""


def silent(*_: Any) -> None:
    """The default for progress and messages."""
