"""The benchmark of calibrated conversions: operation counts and output."""

import dataclasses
import json

import pytest
import tiny

from splitquant_mlx import Recipe, cli
from splitquant_mlx.bench.calibrated import count_operations
from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
from splitquant_mlx.recipe import Calibration


def test_operations_are_those_of_the_formula(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    result = count_operations(source, Calibration(num_samples=4, sequence_length=8))
    h, inner, kv = tiny.HIDDEN, tiny.INNER, tiny.KV_HEADS * tiny.HEAD_DIM
    queries = tiny.HEADS * tiny.HEAD_DIM
    layers = [(queries, h), (kv, h), (kv, h), (h, queries), (inner, h), (inner, h), (h, inner)]
    weights = tiny.LAYERS * sum(out * width for out, width in layers)
    assert result == {
        "sampling": 2 * 32 * (weights + tiny.VOCAB * h),
        "forward": 2 * 32 * weights,
        "hessians": 32 * tiny.LAYERS * (2 * h**2 + queries**2 + inner**2),
        "rounding": 5 * tiny.LAYERS * sum(out * width**2 for out, width in layers),
    }


def test_operations_count_the_active_experts(tmp_path):
    shape = dataclasses.replace(SHAPES["tiny"], num_experts=4, num_experts_per_tok=2)
    write_random_checkpoint(tmp_path / "mixture", shape)
    result = count_operations(tmp_path / "mixture", Calibration(num_samples=4, sequence_length=8))
    h, inner, kv, vocab = 128, 256, 64, 256
    attention = [(h, h), (kv, h), (kv, h), (h, h)]
    router = [(4, h)]
    expert = [(inner, h), (inner, h), (h, inner)]

    def operations(layers):
        return sum(out * width**2 for out, width in layers)

    weights = 2 * sum(out * width for out, width in attention + router + 2 * expert)
    assert result == {
        "sampling": 2 * 32 * (weights + vocab * h),
        "forward": 2 * 32 * weights,
        # of q, k, v; of o; of router; of gate and up; of down
        "hessians": 32 * 2 * (h**2 + h**2 + h**2 + 2 * h**2 + 2 * inner**2),
        "rounding": 5 * 2 * operations(attention + router + 4 * expert),
    }


def test_command_prints_bound_ratio_and_stages(tmp_path, monkeypatch, capsys):
    source = tiny.write_checkpoint(tmp_path / "source")
    recipe = Recipe(
        method="gptq", group_size=32, calibration=Calibration(num_samples=4, sequence_length=8)
    )
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    monkeypatch.chdir(tmp_path)
    command = ["bench", "calibrated", "--model", str(source), "--recipe", "recipe.toml"]
    assert cli.run([*command, "--device", "cpu", "--json", "found.json"]) == 0
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["ratio"] == pytest.approx(result["wall_s"] / result["bound_s"])
    stages = [stage["stage"] for stage in result["stages"]]
    assert stages[-2:] == ["Sampling text", "Quantizing"]
    assert all(stage["peak_bytes"] > 1 << 26 for stage in result["stages"])
    assert sum(stage["seconds"] for stage in result["stages"]) <= result["wall_s"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "recipe.toml", "found.json"}
