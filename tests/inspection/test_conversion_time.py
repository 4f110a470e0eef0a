"""Estimates of a conversion's time, compared with real conversions."""

import time

import mlx.core as mx
import pytest
from threadpoolctl import threadpool_limits

from splitquant_mlx import Recipe, convert
from splitquant_mlx.inspection import conversion_time
from splitquant_mlx.inspection.estimate import estimate
from splitquant_mlx.recipe import Calibration

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="compares CPU time")
FEW = Calibration(num_samples=64, sequence_length=64)


@on_cpu
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gptq"},
        {"method": "auto"},
        pytest.param({"method": "omniquant"}, marks=pytest.mark.slow),
        pytest.param({"method": "efficientqat"}, marks=pytest.mark.slow),
        pytest.param({"method": "gptq", "refine": True}, marks=pytest.mark.slow),
        pytest.param({"method": "auto", "refine": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_estimate_matches_a_conversion(stories, tmp_path, monkeypatch, settings):
    """Within a factor of three, in CPU time, which other programs hardly affect."""
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    group = {} if settings["method"] == "auto" else {"group_size": 32}
    recipe = Recipe(**settings, **group, calibration=FEW)
    expected = estimate(stories, recipe).seconds
    with threadpool_limits(1):
        started = time.process_time()
        convert(stories, tmp_path / "out", recipe=recipe)
        actual = time.process_time() - started
    assert actual / 3 < expected < 3 * actual


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"calibration": FEW}, {"calibration": Calibration(num_samples=128, sequence_length=64)}),
        ({"method": "omniquant", "sweeps": 1}, {"method": "omniquant", "sweeps": 2}),
        ({}, {"refine": True}),
        ({}, {"method": "auto"}),
    ],
)
def test_more_work_has_a_longer_estimate(stories, monkeypatch, less, more):
    monkeypatch.setattr(conversion_time, "_timed", lambda *_: 1e-3)
    seconds = [
        estimate(stories, Recipe(**{"method": "gptq", "calibration": FEW, **settings})).seconds
        for settings in (less, more)
    ]
    assert seconds[1] > seconds[0]


@pytest.mark.parametrize(
    ("less", "more", "share"),
    [
        ({"method": "omniquant", "sweeps": 1}, {"method": "omniquant", "sweeps": 2}, 1),
        ({"method": "gptq"}, {"method": "gptq", "refine": True}, 1 / 4),
    ],
)
def test_refinement_is_faster_on_more_cores_and_learning_is_not(
    stories, monkeypatch, less, more, share
):
    monkeypatch.setattr(conversion_time, "_timed", lambda *_: 1e-3)
    text = Calibration(num_samples=64, sequence_length=64, text="text.txt")
    added = []
    for cores in (1, 4):
        monkeypatch.setattr(conversion_time, "cores", lambda cores=cores: cores)
        first, second = (
            estimate(stories, Recipe(**settings, calibration=text)).seconds
            for settings in (less, more)
        )
        added.append(second - first)
    assert added[1] == pytest.approx(share * added[0])


def test_long_runs_are_timed_once(monkeypatch):
    monkeypatch.setattr(conversion_time, "LONG_S", -1.0)
    calls = []
    conversion_time._timed(lambda: calls.append(1))
    assert len(calls) == 1


@on_cpu
def test_other_programs_do_not_affect_the_estimate(stories, monkeypatch):
    """With wall time, the estimate on a busy machine was hours instead of minutes."""
    recipe = Recipe(method="gptq", calibration=FEW)
    idle = estimate(stories, recipe).seconds
    clock = time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: 1000 * clock())
    assert estimate(stories, recipe).seconds < 3 * idle
