"""The scripts in `benchmarks`, whose results are in the documentation."""

import json
import shutil
from pathlib import Path

import memory_by_depth
import numpy as np
import pytest
from kmeans_speed import bench_all_kmeans, bench_kmeans
from memory_by_depth import bench_memory

from splitquant_mlx import cli
from splitquant_mlx.bench.programs import Run
from splitquant_mlx.bench.random_checkpoint import SHAPES


def test_kmeans_is_timed_for_every_pair():
    runs = bench_all_kmeans(["float16", "float32"], [2, 5], side=64, trials=1)["runs"]
    assert [(run["dtype"], run["clusters"]) for run in runs] == [
        ("float16", 2), ("float16", 5), ("float32", 2), ("float32", 5),
    ]  # fmt: skip
    for run in runs:
        assert run["exact_inertia"] <= run["sklearn_inertia"] * (1 + 1e-12)
        assert run["ratio"] == run["sklearn_ns_per_weight"] / run["exact_ns_per_weight"]
        assert len(run["sklearn_runs_ns"]) == 3
        assert run["sklearn_ns_per_weight"] == np.median(run["sklearn_runs_ns"])


def test_exact_kmeans_is_much_faster():
    assert bench_kmeans(side=1024, trials=3)["ratio"] > 10  # hundreds on a quiet machine


def test_memory_is_compared_between_depths(tmp_path, monkeypatch):
    # the model for floor_bytes has 2 layers
    peaks = {2: iter([100, 90, 110]), 1: iter([200, 500, 100]), 3: iter([230, 230, 231])}

    def run_here(command, target):
        assert cli.run(command[3:]) == 0
        shutil.rmtree(target)
        model = command[command.index("--model") + 1]
        layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
        peak_bytes = next(peaks[layers])
        return Run(started=0, seconds=layers, peak_bytes=peak_bytes, output=""), {}

    monkeypatch.setattr(memory_by_depth, "run_conversion", run_here)
    result = bench_memory(SHAPES["tiny"], [1, 3], tmp_path)
    assert [run["layers"] for run in result["runs"]] == [1, 3]
    assert [run["peak_bytes"] for run in result["runs"]] == [200, 230]
    assert result["runs"][0]["peak_runs_bytes"] == [200, 500, 100]
    assert result["floor_bytes"] == 100
    assert (result["growth"], result["growth_above_floor"]) == (1.15, 1.3)
    assert result["runs"][1]["source_bytes"] > 2 * result["runs"][0]["source_bytes"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Four times the layers, at most 1.6 GB, with tensors larger than the libraries."""
    result = bench_memory(SHAPES["deep"], [8, 16, 32], tmp_path)
    assert min(run["peak_bytes"] for run in result["runs"]) > 2 * result["floor_bytes"]
    assert result["growth"] < 1.1
