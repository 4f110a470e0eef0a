"""Experts that are converted to float32 one at a time give the results of mlx-lm's stacks."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
from splitquant_mlx.models.compact import compact
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.narrow_experts import PerExpertSwitchLinear, keep_expert_dtype


@pytest.mark.parametrize("tokens", [3, 40])  # mlx-lm sorts 40 by expert, not 3
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_stack(tokens, bias):
    mx.random.seed(tokens)
    experts = SwitchGLU(64, 32, 4, bias=bias)
    x = mx.random.normal((2, tokens, 64))
    indices = mx.random.randint(0, 3, (2, tokens, 2))

    def squares(x):
        return mx.square(experts(x, indices)).sum()

    expected = experts(x, indices), mx.grad(squares)(x)
    mx.eval(expected)
    assert "down_proj.weight" in keep_expert_dtype(experts)
    for actual, value in zip((experts(x, indices), mx.grad(squares)(x)), expected, strict=True):
        np.testing.assert_allclose(actual, value, atol=1e-5)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in 16 bits")
def test_experts_stay_in_16_bits_for_calibration(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", "qwen3_moe", dtype=mx.bfloat16)
    tokens = mx.array([[n * 7 % tiny.VOCAB for n in range(40)]])
    expected = load_model(source)(tokens)
    model = load_model(source, lazy=True, dequantize=True)
    stacks = [m for m in model.modules() if isinstance(m, PerExpertSwitchLinear)]
    assert len(stacks) == 3 * tiny.LAYERS
    assert {stack.weight.dtype for stack in stacks} == {mx.bfloat16}
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4)
    off = np.abs(np.array(compact(model)(tokens) - expected)).max(-1)[0] / np.abs(expected).max()
    assert 0 < np.median(off) < 0.05  # more for single tokens, whose experts may change


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU's copy is mlx's own")
def test_compact_needs_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("splitquant_mlx.models.compact.SLICE", 1 << 10)
    source = tmp_path / "source"
    write_random_checkpoint(source, replace(SHAPES["tiny"], vocab_size=20000))
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    copy = compact(load_model(source, lazy=True, dequantize=True, keep_dtype=True))
    assert mx.get_peak_memory() - before < 2 * stored
    mx.eval(copy(mx.array([[3]])))  # the head is converted in slices
    assert mx.get_peak_memory() - before < 2 * stored
    assert {array.dtype for _, array in tree_flatten(copy.parameters())} <= {mx.float32, mx.int8}
