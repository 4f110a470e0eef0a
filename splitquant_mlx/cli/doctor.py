"""Offer `doctor`."""


def doctor() -> None:
    """Not there yet."""
    raise NotImplementedError
