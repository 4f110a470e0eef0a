"""Offer `inspect`."""


def inspect() -> None:
    """Not there yet."""
    raise NotImplementedError
