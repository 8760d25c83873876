"""The demo."""


def demo(*args, **kwargs):
    """Do it."""
