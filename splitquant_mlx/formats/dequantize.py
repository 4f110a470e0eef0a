"""Turn the packed weights of quantized checkpoints back into floating point, lazily.

Nothing is computed here: each weight becomes an expression that mlx evaluates when the weight is
read, so that one layer is unpacked at a time. W is the weight (out, in), q a code, s a scale:

    fp8            W = q s          s for all, for a row, or for a block ([128, 128])
    mxfp4          W = q 2^(e-127)  e for 32 inputs (OCP Microscaling 1.0); gpt-oss
    mlx            W = q s + b      or one of mlx's floating-point modes
    awq, gptq      W = (q - z) s    codes packed along the outputs (awq) or the inputs (gptq)
    compressed-tensors              fp8, fp4 W = q s / s_tensor, or integers W = (q - z) s
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError

Tensors = dict[str, mx.array]
# of activations and the cache, which are not quantized here
ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")
SCALE_SUFFIXES = ("_scale_inv", "_scale")
# where AutoAWQ puts the code of output 8n + i in a word
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


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
    if unpack is None or rotated or (layout and unpack is _fp8 and not fp8):
        layout = f" ({layout}{', rotated' if rotated else ''})" if layout else ""
        raise CheckpointError(
            f"it is quantized with {method}{layout}, which cannot be undone here: fetch the model "
            "it was made from (base_model in its README), which is in 16 bits"
        )
    found = unpack(tensors, table, fp8, dtype)
    if found.keys() == tensors.keys() and not fp8:
        raise CheckpointError(
            f"config.json says that it is quantized with {method}, and no tensor is: one of the "
            "two is from another model"
        )
    return {name: w for name, w in found.items() if not name.endswith(ACTIVATION_SCALES)}


def _fp8(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    found, used = {}, set()
    groups = _weight_settings(table)
    block = next((group["block_structure"] for group in groups if "block_structure" in group), None)
    for name in sorted(fp8 & tensors.keys()):
        key = next((name + s for s in SCALE_SUFFIXES if name + s in tensors), None)
        if key is None:
            raise CheckpointError(f"tensor {name!r} of fp8 has no {name}_scale_inv or _scale")
        w, used = mx.from_fp8(tensors[name], mx.float32), used | {key}
        scale = _spread(name, tensors[key], w.shape, table.get("weight_block_size") or block)
        found[name] = (w * scale).astype(dtype)
    return {**{name: w for name, w in tensors.items() if name not in used}, **found}


def _spread(name: str, scale: mx.array, shape: tuple[int, ...], block: Any) -> mx.array:
    """Return scales, of which each stands for a block of entries, as an array to multiply with."""
    exponents = scale.dtype == mx.uint8
    scale = scale.astype(mx.float32)
    scale = 2 ** (scale - 127) if exponents else scale
    if scale.size == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    for axis in (-2, -1):
        count, entries = scale.shape[axis], shape[axis]
        if count in (1, entries):
            continue
        size = block[axis] if block else entries // count
        if scale.ndim != len(shape) or count != -(-entries // size):
            raise CheckpointError(
                f"tensor {name!r}: expected a scale for each block of {block or size} of "
                f"{list(shape)}, got {list(scale.shape)}"
            )
        scale = mx.repeat(scale, size, axis=axis)
        scale = scale[..., :entries] if axis == -1 else scale[..., :entries, :]
    return scale


def _mxfp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    found = {}
    for name, w in tensors.items():
        if name.endswith("_blocks"):  # (experts, out, in / 32, 16), the scales without the last
            stem = name.removesuffix("_blocks")
            packed = w.view(mx.uint32).flatten(-2)
            scales = _part(tensors, f"{stem}_scales")
            w = mx.dequantize(packed, scales, group_size=32, bits=4, mode="mxfp4")
            found[stem] = w.astype(dtype).swapaxes(-1, -2)  # as the BF16 model is laid out
        elif not name.endswith("_scales"):
            found[name] = w
    return found


def _mlx(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    found = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        packed = f"{path}.scales" in tensors
        if packed and leaf == "weight":
            own = table.get(path)
            settings = {**table, **(own if isinstance(own, dict) else {})}
            w = mx.dequantize(
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


def _awq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    bits = table.get("bits", table.get("w_bit", 4))
    if bits != 4 or table.get("version", "gemm").lower() != "gemm":
        raise CheckpointError(
            f"expected AWQ weights of 4 bits in the layout 'gemm', got {bits} bits and "
            f"{table.get('version')!r}: fetch the model it was made from"
        )

    def codes(packed: mx.array) -> mx.array:  # (rows, out / 8) to (rows, out)
        return _codes(packed, 4)[..., mx.array(AWQ_ORDER)].flatten(-2)

    def weight(path: str) -> mx.array:
        scales, q = _part(tensors, f"{path}.scales"), codes(tensors[f"{path}.qweight"])
        group = q.shape[0] // scales.shape[0]
        zeros = codes(_part(tensors, f"{path}.qzeros"))
        scales = scales.astype(mx.float32)
        return ((q - mx.repeat(zeros, group, 0)) * mx.repeat(scales, group, 0)).T

    return _packed_layers(tensors, weight, dtype)


def _gptq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    bits = table.get("bits", 4)
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"expected GPTQ weights of 2, 4 or 8 bits, got {bits}: fetch the model it was made from"
        )
    layout = table.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"expected GPTQ weights in the layout 'gptq' or 'gptq_v2', got {layout!r:.80}: fetch "
            "the model it was made from"
        )
    offset = 0 if layout == "gptq_v2" else 1  # the first format stores zero points less 1

    def weight(path: str) -> mx.array:
        packed, scales = tensors[f"{path}.qweight"], _part(tensors, f"{path}.scales")
        q = _codes(packed, bits).swapaxes(-1, -2).flatten(0, 1)  # (in / 8, out, 8) to (in, out)
        zeros = _codes(_part(tensors, f"{path}.qzeros"), bits).flatten(-2) + offset
        group = tensors.get(f"{path}.g_idx")
        if group is None:
            group = mx.arange(q.shape[0]) // (q.shape[0] // scales.shape[0])
        return ((q - zeros[group]) * scales[group].astype(mx.float32)).T

    return _packed_layers(tensors, weight, dtype)


def _packed_layers(
    tensors: Tensors, weight: Callable[[str], mx.array], dtype: mx.Dtype, packed: str = "qweight"
) -> Tensors:
    """Replace each layer's packed tensors by its weight (out, in)."""
    found = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        if f"{path}.{packed}" not in tensors or leaf == "bias":
            found[name] = w
        elif leaf == packed:
            found[f"{path}.weight"] = weight(path).astype(dtype)
    return found


def _codes(packed: mx.array, bits: int) -> mx.array:
    """Return the codes of 32-bit words along a new last axis, lowest bits first, as float32."""
    words = packed.view(mx.uint32)[..., None]
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return ((words >> shifts) & (2**bits - 1)).astype(mx.float32)


def _integers(
    tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype
) -> Tensors:
    found_bits = {group.get("num_bits") for group in _weight_settings(table)}
    if found_bits not in ({4}, {8}):
        raise CheckpointError(
            f"expected integers of 4 or of 8 bits, got {found_bits}: fetch the model it was made "
            "from"
        )
    bits: int = found_bits.pop()  # type: ignore[assignment]  # one of the two above

    def weight(path: str) -> mx.array:
        scales = _part(tensors, f"{path}.weight_scale").astype(mx.float32)
        scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
        q = _codes(tensors[f"{path}.weight_packed"], bits).flatten(-2)  # (out, in / 8) to (out, in)
        zeros = mx.full(scales.shape, 2.0 ** (bits - 1))
        if (packed := tensors.get(f"{path}.weight_zero_point")) is not None:  # (out / 8, groups)
            zeros = _codes(packed, bits).swapaxes(-1, -2).flatten(0, 1)
        group = tensors.get(f"{path}.weight_g_idx")
        if group is None:
            group = mx.arange(q.shape[-1]) // (q.shape[-1] // scales.shape[-1])
        return (q - zeros[:, group]) * scales[:, group]

    return _packed_layers(tensors, weight, dtype, "weight_packed")


def _fp4(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    nvfp4 = str(table["format"]).startswith("nvfp4")
    settings = {"mode": "nvfp4" if nvfp4 else "mxfp4", "group_size": 16 if nvfp4 else 32}

    def weight(path: str) -> mx.array:
        packed = tensors[f"{path}.weight_packed"].view(mx.uint32)
        scales = _part(tensors, f"{path}.weight_scale")
        w = mx.dequantize(packed, scales, bits=4, **settings).astype(mx.float32)
        return w / _part(tensors, f"{path}.weight_global_scale") if nvfp4 else w

    return _packed_layers(tensors, weight, dtype, "weight_packed")


def _weight_settings(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what compressed-tensors says of weights, for each group of layers."""
    groups = (table.get("config_groups") or {}).values()
    settings = [group.get("weights") or {} for group in groups]
    return [{key: v for key, v in found.items() if v is not None} for found in settings]


def _part(tensors: Tensors, name: str) -> mx.array:
    if name not in tensors:
        raise CheckpointError(f"tensor {name!r} of a packed weight is missing: download it again")
    return tensors[name]


Unpack = Callable[[Tensors, Mapping[str, Any], set[str], mx.Dtype], Tensors]
METHODS: dict[str, Unpack] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
    "mlx": _mlx,
    "awq": _awq,
    "gptq": _gptq,
}
LAYOUTS: dict[Any, Unpack] = {  # of compressed-tensors
    None: _fp8,
    "float-quantized": _fp8,
    "naive-quantized": _fp8,
    "mxfp8-quantized": _fp8,
    "pack-quantized": _integers,
    "nvfp4-pack-quantized": _fp4,
    "mxfp4-pack-quantized": _fp4,
}
