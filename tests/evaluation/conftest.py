"""Fixtures of the evaluation tests."""

from contextlib import nullcontext

import pytest

from splitquant_mlx.progress import Silent


class Recorder(Silent):
    """A progress reporter that records, of each task, minus its total and all amounts."""

    def __init__(self):
        self.reported = []

    def task(self, label, total=None):
        self.reported.append(-(total or 0))
        return nullcontext(lambda amount, note="": self.reported.append(amount))


@pytest.fixture
def recorder():
    return Recorder()
