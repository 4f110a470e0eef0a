"""Offer `generate`."""


def generate() -> None:
    """Not there yet."""
    raise NotImplementedError
