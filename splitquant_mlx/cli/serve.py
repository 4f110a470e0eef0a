"""Offer `serve`."""


def serve() -> None:
    """Not there yet."""
    raise NotImplementedError
