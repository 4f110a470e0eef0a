"""Find what nothing else beats in size and in quality at once."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Tell which points (less is better in both) no other point dominates.

    A point dominates another when it is as low in both and lower in at least one; so equal points
    are on the front together. None, something not measured, is never on it.
    """
    known = [point for point in points if point is not None]
    return [
        point is not None and not any(dominates(other, point) for other in known)
        for point in points
    ]


def dominates(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Tell whether `first` is as low as `second` in both, and lower in one."""
    return first != second and first[0] <= second[0] and first[1] <= second[1]
