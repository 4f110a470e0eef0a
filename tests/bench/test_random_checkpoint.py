"""Random checkpoints can be loaded by mlx-lm and have the requested sizes."""

import dataclasses
import json
import math

import mlx.core as mx
import pytest

from splitquant_mlx import Calibration, Recipe, RecipeError, cli, convert, load
from splitquant_mlx.bench.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from splitquant_mlx.models.checkpoint import open_checkpoint

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_random_checkpoint_is_a_model(tmp_path, dtype, max_shard_bytes):
    write_random_checkpoint(tmp_path / "m", TINY, dtype=dtype, max_shard_bytes=max_shard_bytes)
    checkpoint = open_checkpoint(tmp_path / "m")
    w = checkpoint.weights["model.layers.1.mlp.down_proj.weight"]
    assert w.dtype == getattr(mx, dtype) and w.shape == (128, 256)
    assert mx.std(w.astype(mx.float32)).item() == pytest.approx(0.02, rel=0.05)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == len(checkpoint.stamps)


def test_shapes_have_the_parameters_of_their_names():
    llama = {"3.2-1b": 1.24, "3.2-3b": 3.21, "3.1-8b": 8.03, "3.1-70b": 70.6}
    named = {f"llama-{name}": billions for name, billions in llama.items()}
    for name, billions in (named | {"qwen3-30b-a3b": 30.1}).items():
        sizes = SHAPES[name].tensors().values()
        assert sum(map(math.prod, sizes)) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden_size": 132}, "hidden_size: expected a multiple of 8"),
        ({"intermediate_size": 0}, "intermediate_size: expected at least 1, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of the 4"),
    ],
)
def test_invalid_sizes_are_rejected(sizes, named):
    with pytest.raises(RecipeError, match=named):
        Shape(**{**vars(TINY), **sizes})


def test_command_writes_the_requested_sizes(tmp_path):
    options = ["--layers", "1", "--hidden-size", "64", "--intermediate-size", "96"]
    options += ["--dtype", "float32", "--shard-size", "0.05"]
    assert cli.run(["bench", "make-checkpoint", "tiny", str(tmp_path / "m"), *options]) == 0
    model, _ = load(tmp_path / "m")
    (layer,) = model.model.layers  # type: ignore[union-attr]
    assert layer.mlp.up_proj.weight.shape == (96, 64)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert all((tmp_path / "m" / name).is_file() for name in shards)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt-2"], "expected one of tiny, deep, llama-3.2-1b"),
        (["tiny", "--layers", "0"], "num_hidden_layers: expected at least 1, got 0"),
        (["tiny", "--shard-size", "0"], "--shard-size: expected at least 0.001, got"),
        (["tiny", "--dtype", "int8"], "--dtype: expected one of 'float16'"),
    ],
)
def test_command_rejects_invalid_options_before_writing(tmp_path, capsys, arguments, named):
    shape, *options = arguments
    command = ["bench", "make-checkpoint", shape, str(tmp_path / "m"), *options]
    assert cli.run(command) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


TINY_MIXTURE = dataclasses.replace(TINY, num_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("shape", [TINY, TINY_MIXTURE], ids=["dense", "mixture"])
def test_a_random_checkpoint_can_be_calibrated(tmp_path, monkeypatch, shape):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    write_random_checkpoint(tmp_path / "random", shape)
    recipe = Recipe(method="imatrix", calibration=Calibration(num_samples=2, sequence_length=8))
    manifest = convert(tmp_path / "random", tmp_path / "out", recipe=recipe)
    assert any(layer.action == "quantize" for layer in manifest.layers)
