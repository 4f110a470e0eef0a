"""Self-check of mlx on every device of this machine.

A tiny random model is split, quantized and run on each device, and compared with the same
computation in numpy: splitting must not change the function, and the quantized kernels must compute
the product with the dequantized weights. A lookup-table layer, which uses a kernel of this package
on a GPU, is compared with its weights as dequantized by operations of mlx.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.models.dense import dense_weight
from splitquant_mlx.nn.lut_model_file import LUTLinear
from splitquant_mlx.nn.split_layers import SplitLinear, quantize_split_layers, split_model
from splitquant_mlx.quantization.rounding import kernel_difference
from splitquant_mlx.quantization.split import split

# largest difference relative to the largest value; GPUs may use TF32 with a 10-bit mantissa
CPU_LIMIT, GPU_LIMIT, CODE_LIMIT = 1e-5, 2e-3, 0.05
DIMS = 512
TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class DeviceCheck:
    """Result of a comparison: its name, the largest relative difference and the limit."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the limit."""
        return self.difference <= self.limit


def devices() -> list[mx.Device]:
    """Return the devices available to mlx, the CPU first."""
    kinds = (mx.cpu, mx.gpu)
    return [mx.Device(kind) for kind in kinds if mx.is_available(mx.Device(kind))]


def self_check() -> list[DeviceCheck]:
    """Split, quantize and run a tiny model on every device; the default device stays the same."""
    weights, biases, x = _tiny_model()
    expected = _forward(weights, biases, x)
    default = mx.default_device()
    checks, quantized = [], []
    try:
        for device in devices():
            mx.set_default_device(device)
            name = device.type.name
            model = split_model(_build(weights, biases))
            limit = CPU_LIMIT if device == mx.cpu else GPU_LIMIT
            checks.append(
                _compare(f"{name}: split model against numpy", model(mx.array(x)), expected, limit)
            )
            checks.append(_check_lookup_tables(name, limit))
            quantize_split_layers(model)
            linears = (model.layers[0], model.layers[2])  # type: ignore[index]
            dense = [np.array(dense_weight(layer), np.float64) for layer in linears]
            quantized.append(np.concatenate(dense))
            y, dense_y = model(mx.array(x)), _forward(dense, biases, x)
            checks.append(_compare(f"{name}: quantized model against numpy", y, dense_y, limit))
        if len(quantized) > 1:
            # devices may round a weight halfway between two codes differently
            cpu, gpu = quantized
            checks.append(_compare("gpu: quantized weights against the CPU", gpu, cpu, CODE_LIMIT))
            difference = kernel_difference()
            name = "gpu: kernel of gptq"
            checks.append(DeviceCheck(name=name, difference=difference, limit=1e-3))
    finally:
        mx.set_default_device(default)
    return checks


def dispatch_ratio() -> float:
    """Return (time of k separate products and their sum) / (time of one split layer).

    Measured on the default device with one token and a 2048 x 2048 layer, as the ratio of the
    medians of alternating runs.
    """
    rng = np.random.default_rng(0)
    w = mx.array(rng.standard_normal((2048, 2048)).astype(np.float32))
    layer = SplitLinear(split(w)).to_quantized()
    width = layer.weight.shape[1] // layer.clusters
    groups = layer.scales.shape[1] // layer.clusters
    parts = [
        (
            mx.contiguous(layer.weight[:, c * width : (c + 1) * width]),
            mx.contiguous(layer.scales[:, c * groups : (c + 1) * groups]),
            mx.contiguous(layer.biases[:, c * groups : (c + 1) * groups]),
        )
        for c in range(layer.clusters)
    ]
    x = mx.array(rng.standard_normal((1, 2048)).astype(np.float32))
    mx.eval(parts, layer.parameters(), x)

    def separate() -> mx.array:
        y = mx.quantized_matmul(x, *parts[0], transpose=True)
        for part in parts[1:]:
            y = y + mx.quantized_matmul(x, *part, transpose=True)
        return y

    times: dict[str, list[float]] = {"one": [], "separate": []}
    for _ in range(TRIALS):
        times["one"].append(_seconds(lambda: layer(x)))
        times["separate"].append(_seconds(separate))
    return statistics.median(times["separate"]) / statistics.median(times["one"])


def _check_lookup_tables(name: str, limit: float) -> DeviceCheck:
    rng = np.random.default_rng(1)
    layer = LUTLinear(DIMS, DIMS, bits=3, outliers=2)
    layer.weight = mx.array(rng.integers(0, 2**32, layer.weight.shape, np.uint32))
    layer.indices = mx.array(rng.integers(0, DIMS, layer.indices.shape, np.uint16))
    for leaf in ("codebook", "outliers", "bias"):
        layer[leaf] = mx.array(rng.standard_normal(layer[leaf].shape).astype(np.float32))
    x = rng.standard_normal((3, DIMS)).astype(np.float32)
    expected = x.astype(np.float64) @ np.array(layer.dense()).T + np.array(layer.bias)
    return _compare(f"{name}: lookup tables against numpy", layer(mx.array(x)), expected, limit)


def _tiny_model() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return weights and biases of two layers, and an input."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((DIMS, DIMS)).astype(np.float32) / DIMS**0.5 for _ in range(2)]
    biases = [rng.standard_normal(DIMS).astype(np.float32) for _ in range(2)]
    return weights, biases, rng.standard_normal((3, DIMS)).astype(np.float32)


def _build(weights: list[np.ndarray], biases: list[np.ndarray]) -> nn.Sequential:
    first, second = nn.Linear(DIMS, DIMS), nn.Linear(DIMS, DIMS)
    for linear, w, bias in zip((first, second), weights, biases, strict=True):
        linear.weight, linear.bias = mx.array(w), mx.array(bias)
    return nn.Sequential(first, nn.ReLU(), second)


def _forward(weights: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the output of the tiny model, computed by numpy in float64."""
    hidden = np.maximum(x.astype(np.float64) @ weights[0].T + biases[0], 0)
    return hidden @ weights[1].T + biases[1]


def _compare(
    name: str, actual: mx.array | np.ndarray, expected: np.ndarray, limit: float
) -> DeviceCheck:
    difference = float(np.abs(np.array(actual) - expected).max() / np.abs(expected).max())
    return DeviceCheck(name=name, difference=difference, limit=limit)


def _seconds(compute: Callable[[], mx.array]) -> float:
    started = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - started
