"""Invalid weights, which are detected when they are read, and unusual ones that are valid."""

import math
import os
from itertools import product

import gguf_bytes
import mlx.core as mx
import numpy as np
import pytest
import tiny
from damage import BIAS, EMBED, NORM, UP, tensor

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import QUANTIZERS, Quantizer
from splitquant_mlx.conversion.weight import SAMPLE, UnusableWeightError, convert_weight


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [UP, NORM, EMBED, BIAS])
@pytest.mark.parametrize("method", ["splitquant", "rtn"])
def test_weight_that_is_not_finite_is_refused(refusal, tmp_path, name, value, method):
    source = tiny.write_checkpoint(tmp_path / "source", "qwen2")
    w = mx.load(str(source / "model.safetensors"))[name]
    flat = w.flatten()
    flat[w.size - 1] = value
    tensor(name, flat.reshape(w.shape))(source)
    message = refusal(None, "--method", method, late=True)
    assert f"tensor {name!r} has NaN or infinite values as float32" in message


def test_weight_too_large_for_float16_is_refused(refusal, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", dtype=mx.bfloat16)
    tensor(UP, mx.full((128, 64), 1e5, mx.bfloat16))(source)
    message = refusal(None, "--dtype", "float16", late=True)
    assert f"tensor {UP!r} has NaN or infinite values as float16" in message
    assert "--dtype bfloat16 or float32" in message


def blocks(value):
    """Return a weight of random signs times `value`."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (128, 64))
    return mx.array(signs * value)


VALID = {
    "zero": mx.zeros((128, 64)),
    "minus zero": mx.full((128, 64), -0.0),
    "constant": mx.full((128, 64), 0.25),
    "constant below zero": mx.full((128, 64), -0.25),
    "one entry": mx.zeros((128, 64)).at[5, 7].add(3.0),
    "two values": blocks(0.1),
    "1e-30": blocks(1e-30),
    "subnormal": blocks(1e-41),
    "1e-7 beside 1": mx.concatenate([blocks(1e-7)[:64], mx.ones((64, 64))]),
    "1e18": mx.random.normal((128, 64), key=mx.random.key(0)) * 1e18,
    "1e30": mx.random.normal((128, 64), key=mx.random.key(0)) * 1e30,
    "two values of 1e30": blocks(1e30),
    "1e30 beside 1": mx.concatenate([blocks(1e30)[:64], mx.ones((64, 64))]),
    "3e38": blocks(3e38),
}


def unusual():
    """Return parameters for every valid weight in every dtype that can represent it."""
    params = []
    for case, dtype, settings in product(
        VALID,
        (mx.float16, mx.bfloat16, mx.float32),
        ({}, {"granularity": "tensor"}, {"method": "rtn"}),
    ):
        if settings and dtype != mx.bfloat16:  # each setting with one of the dtypes
            continue
        held = mx.all(mx.isfinite(VALID[case].astype(dtype))).item()
        overflows = case == "3e38" and settings.get("method") == "rtn"  # in mlx's own formula
        if held and not overflows:
            name = "-".join([case, str(dtype).rpartition(".")[2], *settings.values()])
            params.append(pytest.param(case, dtype, settings, id=name))
    return params


@pytest.mark.parametrize(("case", "dtype", "settings"), unusual())
def test_unusual_weights_are_valid(tmp_path, case, dtype, settings):
    w = VALID[case].astype(dtype)
    source = tiny.write_checkpoint(tmp_path / "source", dtype=dtype, replace={UP: w})
    convert(source, tmp_path / "target", recipe=Recipe(**settings))
    for name, array in mx.load(str(tmp_path / "target" / "model.safetensors")).items():
        if mx.issubdtype(array.dtype, mx.floating):
            assert mx.all(mx.isfinite(array)).item(), name
    model, _ = load(tmp_path / "target")
    layer = model.layers[0].mlp.up_proj
    parts = getattr(layer, "clusters", 1)
    w_hat = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4).reshape(
        128, parts, 64
    )
    assert mx.all(mx.isfinite(w_hat)).item()
    error = mx.abs(w_hat.sum(axis=1) - w.astype(mx.float32)).max().item()
    assert error <= 0.15 * mx.abs(w.astype(mx.float32)).max().item() + 1e-6


def test_weight_too_large_for_mlx_to_quantize_is_refused(refusal, tmp_path):
    tiny.write_checkpoint(tmp_path / "source", replace={UP: VALID["3e38"]})
    assert repr(UP) in refusal(None, "--method", "rtn", late=True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_row_that_overflows_in_a_large_weight_is_detected(dtype):
    """In a large weight, only some rows are compared with their quantized values."""
    w = mx.zeros((SAMPLE // 32, 64), dtype)
    w[1, :2] = mx.array([3e38, -3e38])
    layer = LayerPlan(
        path=UP, kind="linear", action="quantize", shape=w.shape, quantizer="rtn", bits=4,
        group_size=64,
    )  # fmt: skip
    with pytest.raises(UnusableWeightError, match="too large to quantize"):
        convert_weight(w, layer)


def test_error_of_a_quantizer_is_not_reported_as_a_damaged_checkpoint(tmp_path, monkeypatch):
    def apply(w, layer, inputs):
        return w @ w

    monkeypatch.setitem(QUANTIZERS, "rtn", Quantizer(apply=apply))
    source = tiny.write_checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match="matmul"):
        convert(source, tmp_path / "target", recipe=Recipe(method="rtn"))


def test_model_of_zeros_runs(tmp_path):
    config = tiny.make_config()
    zeros = {name: mx.zeros(shape) for name, shape in tiny.make_shapes(config).items()}
    source = tiny.write_checkpoint(tmp_path / "source", replace=zeros)
    convert(source, tmp_path / "target")
    model, _ = load(tmp_path / "target")
    assert mx.array_equal(model(mx.array([[1, 2]])), mx.zeros((1, 2, tiny.VOCAB))).item()


def vanish(file):
    file.unlink()


def shrink(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize("change", [vanish, shrink, empty])
def test_source_that_changes_after_the_headers_were_read(refusal, tmp_path, monkeypatch, change):
    from splitquant_mlx.models import checkpoint

    source = tiny.write_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    read = checkpoint.read_headers

    def read_and_change(*args):
        headers = read(*args)
        change(file)
        return headers

    monkeypatch.setattr(checkpoint, "read_headers", read_and_change)
    assert "model.safetensors cannot be read" in refusal(forget=[file])


def test_gguf_file_that_changes_during_the_conversion(refusal, tmp_path, monkeypatch):
    from splitquant_mlx.conversion import pipeline

    source = tmp_path / "source.gguf"
    source.write_bytes(gguf_bytes.write())
    plan = pipeline.make_plan

    def plan_and_change(*args):
        source.write_bytes(gguf_bytes.write() + b" ")
        return plan(*args)

    monkeypatch.setattr(pipeline, "make_plan", plan_and_change)
    message = refusal(source, late=True, forget=[source])
    assert f"{source} changed while it was read" in message


def test_source_that_shrinks_after_it_was_opened(refusal, tmp_path, monkeypatch):
    from splitquant_mlx.conversion import pipeline

    source = tiny.write_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    plan = pipeline.make_plan

    def plan_and_change(*args):
        shrink(file)
        return plan(*args)

    monkeypatch.setattr(pipeline, "make_plan", plan_and_change)
    message = refusal(late=True, forget=[file])
    assert "cannot be read" in message or "changed while it was read" in message
