"""Turn the packed weights of quantized checkpoints back into floating point, lazily.

Nothing is computed here: each weight becomes an expression that mlx evaluates when the weight is
read, so that one layer is unpacked at a time. W is the weight (out, in), q a code, s a scale:

    fp8, int8      W = (q - z) s    s for all, for a row, or for a block ([128, 128]); z often 0
    mxfp4          W = q 2^(e-127)  e for 32 inputs (OCP Microscaling 1.0); gpt-oss
    mlx            W = q s + b      or one of mlx's floating-point modes
    awq, gptq      W = (q - z) s    codes packed along the outputs (awq) or the inputs (gptq)
    compressed-tensors              fp8, fp4 W = q s / s_tensor, or integers W = (q - z) s
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.packed import Tensors, packed_layers, part, spread, weight_settings
from splitquant_mlx.formats.packed_integers import awq, gptq, packed_integers

# of activations and the cache, which are not quantized here
ACTIVATION_SCALES = (
    ".activation_scale", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale",
)  # fmt: skip
SCALE_SUFFIXES, ZERO_POINT = ("_scale_inv", "_scale"), "_zero_point"
INTEGER_LAYOUTS = ("int-quantized", "naive-quantized")


def dequantized(
    tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype
) -> Tensors:
    """Return the tensors of a checkpoint with every packed weight as one of `dtype`.

    Args:
        tensors: the files' tensors, unread.
        table: what config.json says of the quantization; `quant_method` names it.
        fp8: the names of the tensors stored as F8_E4M3, which mlx loads as bytes.
        dtype: of the dequantized weights.

    Raises:
        CheckpointError: when the method or its packing is not known, or tensors do not fit it.
    """
    method, layout = str(table.get("quant_method")), table.get("format")
    rotated = bool(table.get("transform_config"))  # by matrices that mlx-lm does not multiply by
    unpack = LAYOUTS.get(layout) if method == "compressed-tensors" else METHODS.get(method)
    if unpack is None or rotated:
        layout = f" ({layout}{', rotated' if rotated else ''})" if layout else ""
        raise CheckpointError(
            f"it is quantized with {method}{layout}: fetch the model it was made from (base_model "
            "in its README), which is in 16 bits"
        )
    found = unpack(tensors, table, fp8, dtype)
    if found.keys() == tensors.keys() and not fp8:
        raise CheckpointError(
            f"config.json says that it is quantized with {method}, and no tensor is: one of the "
            "two is from another model"
        )
    return {name: w for name, w in found.items() if not name.endswith(ACTIVATION_SCALES)}


def _scaled(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Undo codes of 8 bits that are stored as the weights: fp8, or the integers of some layouts."""
    codes = {name for name in fp8 & tensors.keys() if not name.endswith(ZERO_POINT)}
    if table.get("format") in INTEGER_LAYOUTS:
        codes |= {n for n, w in tensors.items() if w.dtype == mx.int8 and n.endswith(".weight")}
    settings, blocks, found, used = weight_settings(table), _blocks(table), {}, set()
    shifted = settings and all(group.get("symmetric") is False for group in settings)
    for name in sorted(codes):
        key = next((name + s for s in SCALE_SUFFIXES if name + s in tensors), None)
        if key is None:
            kind = "fp8" if name in fp8 else "int8"
            raise CheckpointError(f"tensor {name!r} of {kind} has no {name}_scale_inv or _scale")
        w, scale = _values(tensors, name, fp8), _values(tensors, key, fp8)
        if (zero := name + ZERO_POINT) in tensors or shifted:
            w = w - spread(zero, _values(tensors, zero, fp8), w.shape, blocks)
        found[name] = (w * spread(key, scale, w.shape, blocks)).astype(dtype)
        used |= {key, zero}
    return {**{name: w for name, w in tensors.items() if name not in used}, **found}


def _values(tensors: Tensors, name: str, fp8: set[str]) -> mx.array:
    """Return codes, scales or zero points as float32; a scale in bytes is an exponent."""
    array = part(tensors, name)
    if name in fp8:
        return mx.from_fp8(array, mx.float32)
    scale = name.endswith(SCALE_SUFFIXES)
    if array.dtype == (mx.uint8 if scale else mx.int8) or mx.issubdtype(array.dtype, mx.floating):
        values = array.astype(mx.float32)
        return 2 ** (values - 127) if array.dtype == mx.uint8 else values
    dtype = str(array.dtype).rpartition(".")[2]
    raise CheckpointError(f"tensor {name!r}: expected numbers of floating point, got {dtype}")


def _blocks(table: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the blocks (rows, columns) of weights that scales may be of, by config.json."""
    found = [table.get("weight_block_size", [128, 128] if table["quant_method"] == "fp8" else None)]
    for group in weight_settings(table):
        size, block = group.get("group_size"), group.get("block_structure")
        found += [block.split("x") if isinstance(block, str) else block, size and [1, size]]
    blocks = [(int(rows), int(columns)) for rows, columns in filter(None, found)]
    return [block for block in blocks if min(block) > 0]


def _mxfp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    found = {}
    for name, w in tensors.items():
        if name.endswith("_blocks"):  # (experts, out, in / 32, 16), the scales without the last
            stem = name.removesuffix("_blocks")
            if w.dtype != mx.uint8 or w.shape[-1] != 16:
                raise CheckpointError(
                    f"tensor {name!r}: expected blocks of 16 bytes, got {list(w.shape)} of "
                    f"{str(w.dtype).rpartition('.')[2]}: download it again"
                )
            packed, scales = w.view(mx.uint32).flatten(-2), part(tensors, f"{stem}_scales")
            w = _dequantized(name, packed, scales, group_size=32, bits=4, mode="mxfp4")
            found[stem] = w.astype(dtype).swapaxes(-1, -2)  # as the BF16 model is laid out
        elif not name.endswith("_scales"):
            found[name] = w
    return found


def _dequantized(
    name: str, w: mx.array, scales: mx.array, biases: mx.array | None = None, **settings: Any
) -> mx.array:
    """Return what mlx makes of packed codes; an error tells their shapes."""
    try:
        return mx.dequantize(w, scales, biases, **settings)
    except (ValueError, TypeError) as exc:
        raise CheckpointError(
            f"tensor {name!r}: its codes {list(w.shape)} and scales {list(scales.shape)} do not "
            f"fit each other, or config.json ({one_line(exc)}): download it again"
        ) from exc


def _mlx(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    found = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        packed = f"{path}.scales" in tensors
        if packed and leaf == "weight":
            own = table.get(path)
            settings = {**table, **(own if isinstance(own, dict) else {})}
            w = _dequantized(
                name,
                w,
                tensors[f"{path}.scales"],
                tensors.get(f"{path}.biases"),
                group_size=settings.get("group_size"),
                bits=settings.get("bits"),
                mode=settings.get("mode", "affine"),
            ).astype(dtype)
        if not packed or leaf not in ("scales", "biases"):
            found[name] = w
    return found


def _fp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    nvfp4 = str(table["format"]).startswith("nvfp4")
    settings = {"mode": "nvfp4" if nvfp4 else "mxfp4", "group_size": 16 if nvfp4 else 32}

    def weight(path: str) -> mx.array:
        packed, key = tensors[f"{path}.weight_packed"].view(mx.uint32), f"{path}.weight_scale"
        scales = part(tensors, key)
        if (key in fp8) != nvfp4:
            raise ValueError("expected scales of fp8" if nvfp4 else "expected scales of bytes")
        w = mx.dequantize(packed, scales, bits=4, **settings).astype(mx.float32)
        if not nvfp4:
            return w
        whole = part(tensors, f"{path}.weight_global_scale")
        if whole.size != 1 or not mx.issubdtype(whole.dtype, mx.floating):
            raise ValueError("expected one weight_global_scale of floating point")
        return w / whole.reshape(())

    return packed_layers(tensors, weight, dtype, "weight_packed")


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
