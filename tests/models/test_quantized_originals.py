"""Quantized originals are dequantized to the weights computed here by numpy, or refused."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.dequantize import dequantize_tensors
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.loader import load_model

RANDOM = np.random.default_rng(0)
CONFIG = {**tiny.make_config("llama"), "torch_dtype": "float32"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# values of the 256 codes of float8 e4m3fn, by its definition; two are NaN
_SIGN, _EXPONENT, _MANTISSA = (np.arange(256) >> np.array([[7], [3], [0]])) & [[1], [15], [7]]
E4M3 = np.where(
    _EXPONENT > 0, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0), _MANTISSA / 8 * 2.0**-6
) * (1 - 2.0 * _SIGN)
E4M3[[127, 255]] = np.inf


def weights():
    shapes = tiny.make_shapes(CONFIG)
    return {
        name: RANDOM.normal(len(shape) == 1, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def is_projection(name):
    return name.endswith(tuple(f"{p}.weight" for p in PROJECTIONS))


def write(directory, quantization, pack, config=CONFIG):
    """Write a checkpoint whose projections `pack` stores; return the expected weights.

    `pack` gives the tensors of a weight by suffix, as (safetensors' dtype, shape, bytes), and the
    values that they stand for.
    """
    entries, expected = {}, weights()
    for name, w in list(expected.items()):
        if is_projection(name):
            tensors, expected[name] = pack(w)
            stem = name.removesuffix("weight")
            entries |= {stem + suffix: entry for suffix, entry in tensors.items()}
        else:
            entries[name] = stored(w)
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )
    tiny.write_tokenizer(directory)
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (directory / "model.safetensors").write_bytes(content)
    return expected


def stored(array):
    names = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "U8", "int8": "I8"}
    return names[array.dtype.name], array.shape, np.ascontiguousarray(array).tobytes()


def as_fp8(w, scale):
    """Return the codes nearest to w / scale, and their values."""
    codes = np.abs((w / scale)[..., None] - E4M3).argmin(axis=-1).astype(np.uint8)
    return ("F8_E4M3", w.shape, codes.tobytes()), (E4M3[codes] * scale).astype(np.float32)


def fp8_tensor(w):  # Ministral: one scale
    codes, values = as_fp8(w, scale := np.float32(np.abs(w).max() / 448))
    scales = {
        "weight_scale_inv": stored(np.array(scale)),
        "activation_scale": stored(scale.reshape(1)),
    }
    return {"weight": codes, **scales}, values


def fp8_channel(w):  # compressed-tensors: one scale per row
    scale = np.abs(w).max(1, keepdims=True) / 448
    codes, values = as_fp8(w, scale)
    return {"weight": codes, "weight_scale": stored(scale)}, values


def fp8_block(w):  # DeepSeek, with blocks that do not divide the widths
    rows, columns = (-(-n // 48) for n in w.shape)
    scale = RANDOM.uniform(1e-3, 2e-3, (rows, columns)).astype(np.float32)
    whole = scale.repeat(48, 0).repeat(48, 1)[: w.shape[0], : w.shape[1]]
    codes, values = as_fp8(w, whole)
    return {"weight": codes, "weight_scale_inv": stored(scale)}, values


def fp8_block_by_layout(w):  # compressed-tensors
    tensors, values = fp8_block(w)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"]}, values


def int8(w):  # compressed-tensors, with zero points
    scale = RANDOM.uniform(1e-3, 2e-3, (len(w), 1)).astype(np.float32)
    codes, zero = RANDOM.integers(-128, 128, w.shape), RANDOM.integers(-128, 128, (len(w), 1))
    return {
        "weight": stored(codes.astype(np.int8)),
        "weight_scale": stored(scale),
        "weight_zero_point": stored(zero.astype(np.int8)),
    }, ((codes - zero) * scale).astype(np.float32)


def mxfp8(w):
    exponents = RANDOM.integers(115, 120, (w.shape[0], w.shape[1] // 32)).astype(np.uint8)
    codes, values = as_fp8(w, (2.0 ** (exponents - 127.0)).repeat(32, 1))
    return {"weight": codes, "weight_scale": stored(exponents)}, values


def fp4(*shape):
    """Return random bytes of two 4-bit codes, the first in the lower half, and their values."""
    codes = RANDOM.integers(0, 16, shape)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return packed, magnitudes * np.where(codes & 8, -1, 1)


def mxfp4(w):
    packed, values = fp4(*w.shape)
    exponents = RANDOM.integers(115, 120, (len(w), w.shape[1] // 32)).astype(np.uint8)
    values = values * (2.0 ** (exponents - 127.0)).repeat(32, 1)
    tensors = {"weight_packed": stored(packed), "weight_scale": stored(exponents)}
    return tensors, values.astype(np.float32)


def nvfp4(w):
    packed, values = fp4(*w.shape)
    scales = RANDOM.integers(50, 60, (len(w), w.shape[1] // 16))
    values = values * E4M3[scales].repeat(16, 1) / 3
    return {
        "weight_packed": stored(packed),
        "weight_scale": ("F8_E4M3", scales.shape, scales.astype(np.uint8).tobytes()),
        "weight_global_scale": stored(np.array([3], np.float32)),
    }, values.astype(np.float32)


def pack(codes, bits):
    """Pack codes along the last axis into 32-bit words, lowest bits first, padded with zeros."""
    count = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    words = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, count)
    shifted = words << (np.arange(count, dtype=np.uint32) * bits)
    return shifted.sum(-1).astype(np.uint32).view(np.int32)


def random_codes(w, bits, size, order=None):
    """Return codes and zero points (in, out) and (groups, out), scales, and their values.

    `order` tells the group of each input; without it they follow each other.
    """
    out, inputs = w.shape
    groups = -(-inputs // size)
    order = np.arange(inputs) // size if order is None else order
    codes = RANDOM.integers(0, 2**bits, (inputs, out))
    zeros = RANDOM.integers(0, 2**bits, (groups, out))
    scales = RANDOM.uniform(0.01, 0.02, (groups, out)).astype(np.float16)
    values = (codes - zeros[order]) * scales.astype(np.float32)[order]
    return codes, zeros, scales, values.T.astype(np.float32)


def awq(w):
    codes, zeros, scales, values = random_codes(w, 4, 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output in each place of a word

    def words(array):
        return stored(pack(array.reshape(len(array), -1, 8)[..., order].reshape(array.shape), 4))

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": stored(scales)}, values


def gptq(w, bits=4, size=32, stored_less=1, ordered=False):
    order = np.arange(w.shape[1]) // size
    order = RANDOM.permutation(order) if ordered else order
    codes, zeros, scales, values = random_codes(w, bits, size, order)
    tensors = {
        "qweight": stored(np.ascontiguousarray(pack(codes.T, bits).T)),
        "qzeros": stored(pack((zeros - stored_less) % 2**bits, bits)),
        "scales": stored(scales),
        "g_idx": stored(order.astype(np.int32)),
    }
    return tensors, values


def gptq_2(w):
    return gptq(w, bits=2, stored_less=0, ordered=True)


def gptq_8(w):
    return gptq(w, bits=8, size=w.shape[1])


def integers(w):  # compressed-tensors, pack-quantized
    codes = RANDOM.integers(0, 16, w.shape)
    scales = RANDOM.uniform(0.01, 0.02, (w.shape[0], w.shape[1] // 32)).astype(np.float32)
    values = ((codes - 8) * scales.repeat(32, 1)).astype(np.float32)
    return {
        "weight_packed": stored(pack(codes, 4)),
        "weight_scale": stored(scales),
        "weight_shape": stored(np.array(w.shape, np.int32)),
    }, values


def ordered_integers(w):  # with zero points, and columns grouped in the order of their importance
    order = RANDOM.permutation(np.arange(w.shape[1]) // 32)
    codes, zeros, scales, values = random_codes(w, 4, 32, order)
    return {
        "weight_packed": stored(pack(codes.T, 4)),
        "weight_scale": stored(scales.T),
        "weight_zero_point": stored(np.ascontiguousarray(pack(zeros, 4).T)),
        "weight_g_idx": stored(order.astype(np.int32)),
    }, values


@pytest.mark.parametrize("bias", [0, 1])
def test_extra_biases_of_zeros_are_dropped(bias, tmp_path):
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}

    def biased(w):
        tensors, values = gptq(w)
        return {**tensors, "bias": stored(np.full(len(w), bias, np.float16))}, values

    expected = write(tmp_path / "m", quantization, biased)
    if bias:
        with pytest.raises(CheckpointError, match=r"extra tensors: .*_proj\.bias"):
            open_checkpoint(tmp_path / "m")
        return
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.weights.keys() == expected.keys()
    assert "not used by mlx-lm's llama" in checkpoint.warnings[1]
    assert load_model(tmp_path / "m")(mx.array([[3, 4]])).shape == (1, 2, tiny.VOCAB)


def compressed(layout, **weights):
    groups = {"group_0": {"weights": {"block_structure": None, **weights}}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


CASES = {
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, fp8_tensor),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8_block),
    "fp8 by row": (compressed("float-quantized"), fp8_channel),
    "int8": (compressed("int-quantized", num_bits=8, symmetric=False), int8),
    "fp8 in blocks, compressed": (
        compressed("float-quantized", block_structure=[48, 48]),
        fp8_block_by_layout,
    ),
    "mxfp8": (compressed("mxfp8-quantized", group_size=32), mxfp8),
    "mxfp4": (compressed("mxfp4-pack-quantized", num_bits=4), mxfp4),
    "nvfp4": (compressed("nvfp4-pack-quantized", num_bits=4), nvfp4),
    "integers": (compressed("pack-quantized", num_bits=4, group_size=32), integers),
    "integers in another order": (
        compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False, actorder="group"),
        ordered_integers,
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq),
    "gptq of 2 bits, ordered": (
        {
            "quant_method": "gptq",
            "bits": 2,
            "group_size": 32,
            "desc_act": True,
            "format": "gptq_v2",
        },
        gptq_2,
    ),
    "gptq of 8 bits, by row": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq_8),
}


@pytest.mark.parametrize("name", CASES)
def test_dequantized_weights(name, tmp_path):
    quantization, packing = CASES[name]
    expected = write(tmp_path / "m", quantization, packing)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert "quantization_config" not in checkpoint.config
    assert "quantized again" in checkpoint.warnings[0]
    assert checkpoint.weights.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(np.array(checkpoint.weights[key]), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gptq", "integers in another order"])
def test_widths_that_do_not_fill_words(name):
    quantization, packing = CASES[name]
    tensors, expected = packing(np.zeros((50, 107), np.float32))
    names = {"I32": mx.int32, "F16": mx.float16}
    arrays = {
        f"a.{leaf}": mx.array(np.frombuffer(content, np.uint8)).view(names[dtype]).reshape(shape)
        for leaf, (dtype, shape, content) in tensors.items()
    }
    if "weight_packed" in tensors:
        arrays["a.weight_shape"] = mx.array([50, 107])
    actual = dequantize_tensors(arrays, quantization, set(), mx.float32)
    assert actual.keys() == {"a.weight"}
    np.testing.assert_allclose(np.array(actual["a.weight"]), expected, rtol=1e-6, atol=1e-7)


def test_experts_of_gpt_oss_have_the_layout_of_16_bits():
    packed, values = fp4(4, 6, 64)
    exponents = RANDOM.integers(0, 250, (4, 6, 2)).astype(np.uint8)
    tensors = {
        "experts.down_proj_blocks": mx.array(packed.reshape(4, 6, 2, 16)),
        "experts.down_proj_scales": mx.array(exponents),
        "experts.down_proj_bias": mx.zeros((4, 6)),
    }
    actual = dequantize_tensors(tensors, {"quant_method": "mxfp4"}, set(), mx.bfloat16)
    assert actual.keys() == {"experts.down_proj", "experts.down_proj_bias"}
    expected = values * (2.0 ** (exponents - 127.0)).repeat(32, -1)
    w = np.array(actual["experts.down_proj"].astype(mx.float32))  # (experts, in, out)
    np.testing.assert_array_equal(w, expected.swapaxes(1, 2).astype(np.float32))


BLOCKS, SCALES = "experts.down_proj_blocks", "experts.down_proj_scales"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: {BLOCKS: t[BLOCKS]},
        lambda t: {**t, SCALES: t[SCALES].swapaxes(1, 2)},
        lambda t: {**t, SCALES: t[SCALES].astype(mx.float32)},
        lambda t: {**t, BLOCKS: t[BLOCKS].swapaxes(1, 2)},
        lambda t: {**t, BLOCKS: t[BLOCKS][:, 1:]},
        lambda t: {**t, BLOCKS: t[BLOCKS].reshape(4, 6, 32)},
        lambda t: {**t, BLOCKS: t[BLOCKS].astype(mx.int32)},
    ],
)
def test_damaged_experts_of_gpt_oss_are_refused(damage):
    tensors = {
        BLOCKS: mx.zeros((4, 6, 2, 16), mx.uint8),
        SCALES: mx.full((4, 6, 2), 127, mx.uint8),
    }
    assert dequantize_tensors(tensors, {"quant_method": "mxfp4"}, set(), mx.float32)
    with pytest.raises(CheckpointError, match=r"tensor 'experts\.down_proj_(blocks|scales)'"):
        dequantize_tensors(damage(tensors), {"quant_method": "mxfp4"}, set(), mx.float32)


@pytest.mark.parametrize("settings", [{"group_size": 64}, {"bits": 8}, {"mode": "mxfp4"}])
def test_settings_that_mlx_tensors_do_not_have_are_refused(settings):
    w, scales, biases = mx.quantize(mx.random.normal((8, 128)), group_size=32, bits=4)
    tensors = {"a.weight": w, "a.scales": scales, "a.biases": biases}
    table = {"quant_method": "mlx", "group_size": 32, "bits": 4}
    assert dequantize_tensors(tensors, table, set(), mx.float32).keys() == {"a.weight"}
    with pytest.raises(CheckpointError, match=r"'a\.weight': its codes \[8, 16\] and scales"):
        dequantize_tensors(tensors, table | settings, set(), mx.float32)


def damages(tensors, quantization):
    """Yield kinds of damage to the tensors of a layer, and the tensors."""
    optional = {"weight_shape"} if quantization.get("desc_act") else {"weight_shape", "g_idx"}
    for leaf, (dtype, shape, content) in tensors.items():
        if leaf == "activation_scale":
            continue
        if leaf not in optional:
            yield f"{leaf} is missing", {k: v for k, v in tensors.items() if k != leaf}
        if len(set(shape)) > 1:
            yield f"{leaf} is swapped", {**tensors, leaf: (dtype, shape[::-1], content)}
        if max(shape, default=0) > 1:
            more = content + content[: len(content) // shape[0]]
            yield f"{leaf} is longer", {**tensors, leaf: (dtype, (shape[0] + 1, *shape[1:]), more)}
        if dtype in ("I32", "F32"):
            other = {"I32": "F32", "F32": "I32"}[dtype]
            yield f"{leaf} is {other}", {**tensors, leaf: (other, shape, content)}


@pytest.mark.parametrize("name", CASES)
def test_damaged_tensors_are_refused(name, tmp_path):
    quantization, packing = CASES[name]
    whole, _ = packing(np.ones((64, 128), np.float32))
    for number, (kind, _) in enumerate(damages(whole, quantization)):

        def damaged(w, kind=kind):
            tensors, values = packing(w)
            damaged = (
                dict(damages(tensors, quantization))[kind] if w.shape == (64, 128) else tensors
            )
            return damaged, values

        write(tmp_path / f"{number}", quantization, damaged)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / f"{number}")
            pytest.fail(kind)
        assert "down_proj" in str(caught.value) and "\n" not in str(caught.value), kind


@pytest.mark.parametrize("name", ["fp8 in blocks", "gptq"])
def test_it_converts_and_runs(name, tmp_path):
    write(tmp_path / "m", *CASES[name])
    convert(tmp_path / "m", tmp_path / "out", recipe=Recipe(method="rtn", group_size=32))
    ids = mx.array([[3, 4, 5]])
    original, converted = load_model(tmp_path / "m")(ids), load_model(tmp_path / "out")(ids)
    assert mx.abs(original - converted).max() < 0.5 * mx.abs(original).max()
    layers: Any = load_model(tmp_path / "m").layers
    assert isinstance(layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("mode", [{"bits": 4, "group_size": 32}, {"mode": "mxfp4", "bits": 4}])
def test_an_mlx_checkpoint_is_dequantized_by_its_settings(mode, tmp_path):
    tiny.write_checkpoint(tmp_path / "m", "llama")
    mode = {"group_size": 32, **mode}
    model = load_model(tmp_path / "m")
    nn.quantize(model, **mode)
    layers: Any = model.layers
    own = layers[0].mlp.down_proj
    expected = mx.dequantize(
        own.weight, own.scales, own.get("biases"), **{"mode": "affine", **mode}
    )
    (tmp_path / "q").mkdir()
    model.save_weights(str(tmp_path / "q" / "model.safetensors"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({**config, "quantization": mode}))
    tiny.write_tokenizer(tmp_path / "q")
    actual = open_checkpoint(tmp_path / "q").weights["model.layers.0.mlp.down_proj.weight"]
    assert mx.allclose(actual.astype(mx.float32), expected.astype(mx.float32), atol=1e-2)
    recipe = Recipe(method="imatrix", group_size=32)
    assert convert(tmp_path / "q", tmp_path / "out", recipe=recipe).layers


def test_old_gptq_models_have_their_settings_in_a_separate_file(tmp_path):
    quantization, packing = CASES["gptq of 2 bits, ordered"]
    expected = write(tmp_path / "m", None, packing)
    old = {key: value for key, value in quantization.items() if key != "quant_method"}
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(old))
    actual = open_checkpoint(tmp_path / "m").weights
    for key, value in expected.items():
        np.testing.assert_allclose(np.array(actual[key]), value, rtol=1e-6, atol=1e-7)
    assert load_model(tmp_path / "m")(mx.array([[3, 4]])).shape == (1, 2, tiny.VOCAB)


def test_an_unsupported_method_says_what_to_convert(tmp_path):
    write(tmp_path / "m", {"quant_method": "bitsandbytes", "load_in_4bit": True}, fp8_tensor)
    with pytest.raises(CheckpointError, match=r"quantized with bitsandbytes.*base_model"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "settings",
    [
        compressed("pack-quantized", num_bits=3),
        compressed("float-quantized"),  # in blocks of unknown size
        {**compressed("float-quantized", block_structure=[48, 48]), "transform_config": {"R1": 1}},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "bits": 3, "format": "gptq"},
        {"quant_method": "awq", "bits": 4, "format": "gemv"},
        {"quant_method": "hqq"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values()))[:40],
)
def test_unsupported_layouts_are_refused(settings, tmp_path):
    write(tmp_path / "m", settings, fp8_block_by_layout)
    with pytest.raises(
        CheckpointError, match=r"convert the (16-bit )?model it was|expected a scale"
    ):
        open_checkpoint(tmp_path / "m")


def test_a_missing_scale_is_named(tmp_path):
    def without(w):
        return {"weight": fp8_tensor(w)[0]["weight"]}, w

    write(tmp_path / "m", {"quant_method": "fp8"}, without)
    with pytest.raises(CheckpointError, match=r"_proj.weight' of fp8 has no .*_scale_inv"):
        open_checkpoint(tmp_path / "m")
