"""Models that mlx-lm runs with Metal kernels only are refused on other devices, and converted."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten

from splitquant_mlx.cli import run
from splitquant_mlx.errors import DeviceError
from splitquant_mlx.models.architecture import build_model, require_kernels

pytestmark = pytest.mark.skipif(
    mx.default_device() == mx.gpu and mx.metal.is_available(), reason="has Metal"
)
REFUSED = "mlx-lm's bitnet needs Metal: run it on the GPU of a Mac"
MUSE_SPARK = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "post_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
    "layer_rope_theta": [10000.0, 0],
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "final_logit_softcapping": 30.0,
    "output_multiplier": 1.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_hidden_size": 64,
    "moe_intermediate_size": 64,
}


@pytest.fixture
def bitnet(tmp_path):
    config = {**tiny.make_config(), "model_type": "bitnet"}
    weights = dict(tree_flatten(build_model(tmp_path, config).parameters()))
    path = tmp_path / "bitnet"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tiny.write_weights(path, {name: w for name, w in weights.items() if w is not None})
    tiny.write_tokenizer(path)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "--method", "gptq", "--mlx-path", "out"),
        ("convert", "--method", "rtn", "--refine", "--mlx-path", "out"),
        ("chat",),
        ("generate", "--prompt", "w3"),
        ("eval", "--task", "perplexity", "--data", "text.txt"),
    ],
)
def test_commands_that_run_it_are_refused(bitnet, capsys, monkeypatch, command):
    monkeypatch.chdir(bitnet.parent)
    Path("text.txt").write_text("w3 " * 600)
    assert run([command[0], "bitnet", *command[1:]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"splitquant-mlx: error: bitnet: {REFUSED}")
    assert sorted(path.name for path in Path().iterdir()) == ["bitnet", "text.txt"]


def test_a_conversion_that_does_not_run_it(bitnet, tmp_path, capsys):
    target = tmp_path / "out"
    assert run(["convert", str(bitnet), "--method", "rtn", "--mlx-path", str(target)]) == 0
    assert run(["inspect", str(target), "--layer", "model.embed_tokens"]) == 0
    capsys.readouterr()
    assert run(["verify", str(target)]) == 0
    out = capsys.readouterr().out
    assert "forward pass  incomplete" in out and REFUSED in out


def test_other_architectures(tmp_path):
    pytest.importorskip("mlx_lm.models.muse_spark")
    config = {"model_type": "muse_spark", "text_config": MUSE_SPARK}
    with pytest.raises(DeviceError, match="mlx-lm's muse_spark needs Metal"):
        require_kernels(tmp_path, build_model(tmp_path, config))


def test_a_model_without_kernels_is_not_called(tmp_path, monkeypatch):
    """DBRX evaluates its routers when it is called, and so reads its weights."""
    model = build_model(tmp_path, tiny.make_config())
    monkeypatch.setattr(type(model), "__call__", lambda *call: pytest.fail("called"))
    require_kernels(tmp_path, model)
