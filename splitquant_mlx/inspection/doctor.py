"""Check on the user's own machine that mlx computes what it should, on every device it has.

A tiny random model is split, quantized and run on each device, and compared with the same
computation in numpy: the split must leave the function as it was, and the quantized kernels must
compute the product with the weights that the codes stand for. A layer of lookup tables, on a GPU a
kernel of this package, is compared with the weight that mlx's operations make of its codes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.models.dense import dense_weight
from splitquant_mlx.nn.neighbour_file import LUTLinear
from splitquant_mlx.nn.split_layers import SplitLinear, quantize_split_layers, split_model
from splitquant_mlx.quantization.rounding import kernel_difference
from splitquant_mlx.quantization.split import split

# largest difference relative to the largest value; GPUs may multiply in TF32, of 10-bit mantissa
CPU_LIMIT, GPU_LIMIT, CODE_LIMIT = 1e-5, 2e-3, 0.05
DIMS = 512
TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """Hold one finding: what was compared, the largest relative difference, the limit."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the limit."""
        return self.difference <= self.limit


def devices() -> list[mx.Device]:
    """Return the devices mlx can compute on here, the CPU first."""
    kinds = (mx.cpu, mx.gpu)
    return [mx.Device(kind) for kind in kinds if mx.is_available(mx.Device(kind))]


def self_check() -> list[Check]:
    """Split, quantize and run a tiny model on every device; leaves the default device alone."""
    weights, biases, x = _tiny_model()
    whole = _forward(weights, biases, x)
    default = mx.default_device()
    checks, codes = [], []
    try:
        for device in devices():
            mx.set_default_device(device)
            name = device.type.name
            model = split_model(_build(weights, biases))
            limit = CPU_LIMIT if device == mx.cpu else GPU_LIMIT
            checks.append(
                _check(f"{name}: split model against numpy", model(mx.array(x)), whole, limit)
            )
            checks.append(_tables_check(name, limit))
            quantize_split_layers(model)
            linears = (model.layers[0], model.layers[2])  # type: ignore[index]
            dense = [np.array(dense_weight(layer), np.float64) for layer in linears]
            codes.append(np.concatenate(dense))
            found, wanted = model(mx.array(x)), _forward(dense, biases, x)
            checks.append(_check(f"{name}: quantized model against numpy", found, wanted, limit))
        if len(codes) > 1:
            # a device may round a weight that lies between two codes the other way
            cpu, gpu = codes
            checks.append(_check("gpu: quantized weights, as on the CPU", gpu, cpu, CODE_LIMIT))
            difference = kernel_difference()
            checks.append(Check(name="gpu: kernel of gptq", difference=difference, limit=1e-3))
    finally:
        mx.set_default_device(default)
    return checks


def dispatch_ratio() -> float:
    """Return the time of k separate products and their sum over that of one split layer.

    On the default device, one token, a 2048 x 2048 layer; medians of alternating runs.
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


def _tables_check(name: str, limit: float) -> Check:
    rng = np.random.default_rng(1)
    layer = LUTLinear(DIMS, DIMS, bits=3, outliers=2)
    layer.weight = mx.array(rng.integers(0, 2**32, layer.weight.shape, np.uint32))
    layer.indices = mx.array(rng.integers(0, DIMS, layer.indices.shape, np.uint16))
    for leaf in ("codebook", "outliers", "bias"):
        layer[leaf] = mx.array(rng.standard_normal(layer[leaf].shape).astype(np.float32))
    x = rng.standard_normal((3, DIMS)).astype(np.float32)
    wanted = x.astype(np.float64) @ np.array(layer.dense()).T + np.array(layer.bias)
    return _check(f"{name}: lookup tables against numpy", layer(mx.array(x)), wanted, limit)


def _tiny_model() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return weights and biases of two layers, and an input."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((DIMS, DIMS)).astype(np.float32) / DIMS**0.5 for _ in range(2)]
    biases = [rng.standard_normal(DIMS).astype(np.float32) for _ in range(2)]
    return weights, biases, rng.standard_normal((3, DIMS)).astype(np.float32)


def _build(weights: list[np.ndarray], biases: list[np.ndarray]) -> nn.Sequential:
    layers = []
    for w, bias in zip(weights, biases, strict=True):
        linear = nn.Linear(DIMS, DIMS)
        linear.weight, linear.bias = mx.array(w), mx.array(bias)
        layers.append(linear)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def _forward(weights: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Run the tiny model in numpy, float64."""
    hidden = np.maximum(x.astype(np.float64) @ weights[0].T + biases[0], 0)
    return hidden @ weights[1].T + biases[1]


def _check(name: str, found: mx.array | np.ndarray, wanted: np.ndarray, limit: float) -> Check:
    difference = float(np.abs(np.array(found) - wanted).max() / np.abs(wanted).max())
    return Check(name=name, difference=difference, limit=limit)


def _seconds(compute: Callable[[], mx.array]) -> float:
    started = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - started
