"""Random checkpoints, and the benchmark that converts them."""

import json
import math

import mlx.core as mx
import pytest

from splitquant_mlx import SplitQuantError, cli
from splitquant_mlx.bench import YARDSTICK, bench_convert, bench_kmeans
from splitquant_mlx.checkpoint import open_checkpoint
from splitquant_mlx.random_checkpoint import SHAPES, write_random_checkpoint

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
    for name, billions in {"3.2-1b": 1.24, "3.2-3b": 3.21, "3.1-8b": 8.03, "3.1-70b": 70.6}.items():
        sizes = SHAPES[f"llama-{name}"].tensors().values()
        assert sum(map(math.prod, sizes)) / 1e9 == pytest.approx(billions, rel=0.005)


def test_convert_is_timed_side_by_side(tmp_path, capsys, monkeypatch):
    write_random_checkpoint(tmp_path / "m", TINY)
    monkeypatch.chdir(tmp_path)
    command = ["bench", "convert", "--model", "m", "--trials", "1", "--json", "b.json"]
    assert cli.run(command) == 0
    assert "peak memory" in capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    programs = found["programs"]
    assert programs.keys() == {"splitquant", "rtn", YARDSTICK}
    for program in programs.values():
        assert program["median_s"] == program["seconds"][0] > 0
        assert program["peak_bytes"] > 10_000_000
        assert program["ratio"] == program["median_s"] / programs[YARDSTICK]["median_s"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "m"]


def test_program_that_fails_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SplitQuantError, match=r"no config\.json"):
        bench_convert(tmp_path / "empty", tmp_path, trials=1)


def test_exact_kmeans_is_no_worse_and_much_faster():
    found = bench_kmeans(side=512, trials=3)
    assert found["exact_inertia"] <= found["sklearn_inertia"]
    assert found["ratio"] > 10  # a hundred and more on a quiet machine


def test_make_checkpoint_command(tmp_path, capsys):
    assert cli.run(["bench", "make-checkpoint", "gpt-2", str(tmp_path / "m")]) == 2
    assert "wanted one of tiny, llama-3.2-1b" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
