"""CSV that a spreadsheet may open: text stays text, and stays in its cell (CWE-1236)."""

import csv

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\0", "＝", "＋", "－", "＠")


def csv_bytes(table: pd.DataFrame) -> bytes:
    """A table as CSV, UTF-8; text that a spreadsheet would read as a formula gets an apostrophe.

    All text is quoted: Python's csv leaves a carriage return bare otherwise, which ends a row for whoever reads it.
    """
    cells = table.map(_harmless)
    return cells.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).encode("utf-8", "replace")


def _harmless(value: object) -> object:
    """Text that no spreadsheet takes for a formula; what is no text as it is."""
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value
