"""Offer `chat`."""


def chat() -> None:
    """Not there yet."""
    raise NotImplementedError
