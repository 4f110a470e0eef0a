"""Dequantize the packed weights of quantized checkpoints, lazily.

Each weight becomes a lazy mlx expression, so one layer at a time is unpacked in memory. W is the
weight (out, in), q a code, z a zero point, s a scale:

    fp8, int8      W = (q - z) s    s per tensor, row or block ([128, 128]); z is often 0
    mxfp4          W = q 2^(e-127)  e per 32 inputs (OCP Microscaling 1.0); gpt-oss
    mlx            W = q s + b      or one of mlx's floating-point modes
    awq, gptq      W = (q - z) s    codes packed along the outputs (awq) or the inputs (gptq)
    compressed-tensors              fp8, fp4 W = q s / s_tensor, or integers W = (q - z) s
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.packed import (
    Tensors,
    broadcast_scales,
    dtype_name,
    replace_packed,
    required,
    weight_settings,
)
from splitquant_mlx.formats.packed_integers import awq, gptq, packed_integers

# scales of activations and the KV cache, which are not quantized here
ACTIVATION_SCALES = (
    ".activation_scale", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale",
)  # fmt: skip
SCALE_SUFFIXES, ZERO_POINT = ("_scale_inv", "_scale"), "_zero_point"
INTEGER_LAYOUTS = ("int-quantized", "naive-quantized")


def dequantize_tensors(
    tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype
) -> Tensors:
    """Return the tensors of a checkpoint with every packed weight dequantized.

    Args:
        tensors: the stored tensors, lazy.
        table: quantization settings of config.json; `quant_method` names the method.
        fp8: names of the tensors stored as F8_E4M3, which mlx loads as uint8.
        dtype: dtype of the dequantized weights.

    Raises:
        CheckpointError: when the method or layout is unknown, or the tensors do not match it.
    """
    method, layout = str(table.get("quant_method")), table.get("format")
    rotated = bool(table.get("transform_config"))  # mlx-lm does not apply the rotation matrices
    unpack = LAYOUTS.get(layout) if method == "compressed-tensors" else METHODS.get(method)
    if unpack is None or rotated:
        layout = f" ({layout}{', rotated' if rotated else ''})" if layout else ""
        raise CheckpointError(
            f"it is quantized with {method}{layout}, which is not supported: convert the 16-bit "
            "model it was made from (base_model in its README)"
        )
    result = unpack(tensors, table, fp8, dtype)
    if result.keys() == tensors.keys() and not fp8:
        raise CheckpointError(
            f"config.json says that it is quantized with {method}, but no tensor is: one of the "
            "two is from another model"
        )
    return {name: w for name, w in result.items() if not name.endswith(ACTIVATION_SCALES)}


def _scaled(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Dequantize fp8 and int8 codes that are stored under the names of the weights."""
    codes = {name for name in fp8 & tensors.keys() if not name.endswith(ZERO_POINT)}
    if table.get("format") in INTEGER_LAYOUTS:
        codes |= {n for n, w in tensors.items() if w.dtype == mx.int8 and n.endswith(".weight")}
    settings, blocks, weights, used = weight_settings(table), _block_shapes(table), {}, set()
    shifted = settings and all(group.get("symmetric") is False for group in settings)
    for name in sorted(codes):
        key = next((name + s for s in SCALE_SUFFIXES if name + s in tensors), None)
        if key is None:
            kind = "fp8" if name in fp8 else "int8"
            raise CheckpointError(f"tensor {name!r} of {kind} has no {name}_scale_inv or _scale")
        w, scale = _as_float32(tensors, name, fp8), _as_float32(tensors, key, fp8)
        if (zero := name + ZERO_POINT) in tensors or shifted:
            w = w - broadcast_scales(zero, _as_float32(tensors, zero, fp8), w.shape, blocks)
        weights[name] = (w * broadcast_scales(key, scale, w.shape, blocks)).astype(dtype)
        used |= {key, zero}
    return {**{name: w for name, w in tensors.items() if name not in used}, **weights}


def _as_float32(tensors: Tensors, name: str, fp8: set[str]) -> mx.array:
    """Return codes, scales or zero points as float32; uint8 scales are exponents (E8M0)."""
    array = required(tensors, name)
    if name in fp8:
        return mx.from_fp8(array, mx.float32)
    scale = name.endswith(SCALE_SUFFIXES)
    if array.dtype == (mx.uint8 if scale else mx.int8) or mx.issubdtype(array.dtype, mx.floating):
        values = array.astype(mx.float32)
        return 2 ** (values - 127) if array.dtype == mx.uint8 else values
    raise CheckpointError(f"tensor {name!r}: expected a float dtype, got {dtype_name(array.dtype)}")


def _block_shapes(table: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the shapes (rows, columns) of the blocks that may share a scale, by config.json."""
    default = [128, 128] if table["quant_method"] == "fp8" else None
    shapes = [table.get("weight_block_size", default)]
    for group in weight_settings(table):
        size, block = group.get("group_size"), group.get("block_structure")
        shapes += [block.split("x") if isinstance(block, str) else block, size and [1, size]]
    blocks = [(int(rows), int(columns)) for rows, columns in filter(None, shapes)]
    return [block for block in blocks if min(block) > 0]


def _mxfp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    result = {}
    for name, w in tensors.items():
        if name.endswith("_blocks"):  # (experts, out, in / 32, 16); scales without the last axis
            stem = name.removesuffix("_blocks")
            if w.dtype != mx.uint8 or w.shape[-1] != 16:
                raise CheckpointError(
                    f"tensor {name!r}: expected blocks of 16 bytes, got {list(w.shape)} of "
                    f"{dtype_name(w.dtype)}: download it again"
                )
            packed, scales = w.view(mx.uint32).flatten(-2), required(tensors, f"{stem}_scales")
            w = _mx_dequantize(name, packed, scales, group_size=32, bits=4, mode="mxfp4")
            result[stem] = w.astype(dtype).swapaxes(-1, -2)  # the layout of the BF16 model
        elif not name.endswith("_scales"):
            result[name] = w
    return result


def _mx_dequantize(
    name: str, w: mx.array, scales: mx.array, biases: mx.array | None = None, **settings: Any
) -> mx.array:
    """Call `mx.dequantize`; an error includes the shapes."""
    try:
        return mx.dequantize(w, scales, biases, **settings)
    except (ValueError, TypeError) as exc:
        raise CheckpointError(
            f"tensor {name!r}: its codes {list(w.shape)} and scales {list(scales.shape)} do not "
            f"match each other or config.json ({one_line(exc)}): download it again"
        ) from exc


def _mlx(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    result = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        packed = f"{path}.scales" in tensors
        if packed and leaf == "weight":
            layer_settings = table.get(path)
            settings = {**table, **(layer_settings if isinstance(layer_settings, dict) else {})}
            w = _mx_dequantize(
                name,
                w,
                tensors[f"{path}.scales"],
                tensors.get(f"{path}.biases"),
                group_size=settings.get("group_size"),
                bits=settings.get("bits"),
                mode=settings.get("mode", "affine"),
            ).astype(dtype)
        if not packed or leaf not in ("scales", "biases"):
            result[name] = w
    return result


def _fp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    nvfp4 = str(table["format"]).startswith("nvfp4")
    settings = {"mode": "nvfp4" if nvfp4 else "mxfp4", "group_size": 16 if nvfp4 else 32}

    def unpack(path: str) -> mx.array:
        packed, key = tensors[f"{path}.weight_packed"].view(mx.uint32), f"{path}.weight_scale"
        scales = required(tensors, key)
        if (key in fp8) != nvfp4:
            raise ValueError(f"expected {'fp8' if nvfp4 else 'uint8'} scales")
        w = mx.dequantize(packed, scales, bits=4, **settings).astype(mx.float32)
        if not nvfp4:
            return w
        global_scale = required(tensors, f"{path}.weight_global_scale")
        if global_scale.size != 1 or not mx.issubdtype(global_scale.dtype, mx.floating):
            raise ValueError("expected a scalar weight_global_scale of a float dtype")
        return w / global_scale.reshape(())

    return replace_packed(tensors, unpack, dtype, "weight_packed")


Unpack = Callable[[Tensors, Mapping[str, Any], set[str], mx.Dtype], Tensors]
METHODS: dict[str, Unpack] = {
    "fp8": _scaled,
    "fbgemm_fp8": _scaled,
    "mxfp4": _mxfp4,
    "mlx": _mlx,
    "awq": awq,
    "gptq": gptq,
}
LAYOUTS: dict[Any, Unpack] = {  # of compressed-tensors
    None: _scaled,
    "int-quantized": _scaled,
    "float-quantized": _scaled,
    "naive-quantized": _scaled,
    "mxfp8-quantized": _scaled,
    "pack-quantized": packed_integers,
    "nvfp4-pack-quantized": _fp4,
    "mxfp4-pack-quantized": _fp4,
}
