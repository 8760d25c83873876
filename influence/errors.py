"""The package's errors: one root, and the few that a caller may want to catch. Each is also the fitting builtin.

Every message says what was found, what was expected and what to do, on one line.
"""


class InfluenceError(Exception):
    """Root of all errors that this package raises on purpose."""

    def __str__(self) -> str:
        """One line without control characters: names in it come from strangers' files."""
        return "".join(c if c.isprintable() else " " for c in super().__str__())


class SpecMismatchError(InfluenceError, ValueError):
    """Two things that must describe the same feature space do not."""


class DatasetError(InfluenceError, ValueError):
    """A data set folder, its metadata or one of its pictures cannot be used."""


class ModelError(InfluenceError, ValueError):
    """A model folder or LoRA file cannot be used."""


class StoreError(InfluenceError, OSError):
    """A store is missing, incomplete or damaged."""


class GradientError(InfluenceError, RuntimeError):
    """A per-sample gradient cannot be taken: an uncovered layer, or a parameter that no gradient reached."""


class OptionError(InfluenceError, ValueError):
    """An option has a value that cannot be used."""


def one_line(error: Exception) -> str:
    """What an error says, in one line; some say nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
