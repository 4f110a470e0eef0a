"""Convert every architecture of tests/support/tiny.py; rtn is mlx-lm's quantization."""

import json

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.recipe import Calibration

PROMPT = mx.array([[3, 5, 8, 13, 21, 34, 55, 89]])


def logits(model) -> mx.array:
    return model(PROMPT).astype(mx.float32)


def converted(tmp_path, architecture, recipe, **options):
    source = tiny.write_checkpoint(tmp_path / "source", architecture, **options)
    manifest = convert(source, tmp_path / "target", recipe=recipe)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "target" / file).read_bytes() == (source / file).read_bytes()
    return manifest, load(source)[0], load(tmp_path / "target")[0]


def similarity(a: mx.array, b: mx.array) -> float:
    """Return the correlation of two sets of logits."""
    a, b = a - a.mean(), b - b.mean()
    return (mx.sum(a * b) / mx.sqrt(mx.sum(a * a) * mx.sum(b * b))).item()


@pytest.mark.parametrize("method", ["splitquant", "rtn"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_architecture_converts_and_runs(tmp_path, architecture, method):
    manifest, original, model = converted(tmp_path, architecture, Recipe(method=method, bits=8))
    actual, expected = logits(model), logits(original)
    assert actual.shape == (1, PROMPT.size, tiny.VOCAB)
    assert mx.all(mx.isfinite(actual)).item()
    assert similarity(actual, expected) > 0.99
    actions = {layer.action for layer in manifest.layers if layer.kind == "linear"}
    assert actions == {"split" if method == "splitquant" else "quantize"}


CALIBRATED = [
    # auto is slow: by default one dense architecture, and one with experts
    pytest.param(architecture, method, marks=[pytest.mark.slow] if rare else [])
    for architecture in tiny.ARCHITECTURES
    for method in ("imatrix", "gptq", "auto")
    for rare in [method == "auto" and architecture not in ("llama", "qwen3_moe")]
]


@pytest.mark.parametrize(("architecture", "method"), CALIBRATED)
def test_an_architecture_is_calibrated(tmp_path, monkeypatch, architecture, method):
    """On self-generated text, to a plain mlx checkpoint, which can be refined."""
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    fixed = {"bits": 4, "embedding_bits": 8, "group_size": 32}
    bits = {"target_bpw": 5.0} if method == "auto" else fixed
    refine = method == "imatrix" and architecture in ("llama", "qwen3_moe")
    calibration = Calibration(num_samples=24 if refine else 8, sequence_length=32)
    recipe = Recipe(method=method, **bits, calibration=calibration, refine=refine)
    manifest, original, model = converted(tmp_path, architecture, recipe)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "model_file" not in config and config["quantization"]["group_size"] in (32, 64)
    least = 0.8 if "experts" in str(manifest.layers) else 0.9  # another expert may be chosen
    assert similarity(logits(model), logits(original)) > least
    linear = [layer for layer in manifest.layers if layer.kind == "linear"]
    assert {layer.action for layer in linear} == {"quantize"}
    assert manifest.recipe["method"] == method
    assert not refine or 0 < manifest.refinement["after"] <= manifest.refinement["before"]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_are_converted_by_both_methods(tmp_path, architecture):
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    for method, action in (("splitquant", "split"), ("rtn", "quantize")):
        manifest = convert(source, tmp_path / method, recipe=Recipe(method=method))
        experts = [layer for layer in manifest.layers if layer.kind == "experts"]
        assert len(experts) == 3 * tiny.LAYERS
        assert {layer.action for layer in experts} == {action}
        assert {layer.shape[0] for layer in experts} == {tiny.EXPERTS}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_dtypes_and_shards(tmp_path, dtype, shards):
    options = {"dtype": dtype, "shards": shards, "index": False, "tie_word_embeddings": False}
    manifest, original, model = converted(tmp_path, "llama", Recipe(bits=8), **options)
    assert similarity(logits(model), logits(original)) > 0.99
    stored = mx.load(str(tmp_path / "target" / "model.safetensors"))
    assert stored["model.norm.weight"].dtype == dtype
    (head,) = (layer for layer in manifest.layers if layer.kind == "lm_head")
    assert head.action == "keep"


def test_linear_biases_are_unchanged(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", "qwen2", dtype=mx.float16)
    convert(source, tmp_path / "target")
    stored = mx.load(str(tmp_path / "target" / "model.safetensors"))
    original = mx.load(str(source / "model.safetensors"))
    names = [name for name in original if name.endswith(".bias")]
    assert len(names) == 3 * tiny.LAYERS
    for name in names:
        assert mx.array_equal(stored[name], original[name]).item(), name


MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rtn_equals_mlx_lm_bit_for_bit(tmp_path, capsys, mode, dtype, tied):
    from mlx_lm import convert as mlx_lm_convert

    name = str(dtype).rpartition(".")[2]
    source = tiny.write_checkpoint(
        tmp_path / "source", dtype=dtype, tie_word_embeddings=tied, torch_dtype=name
    )
    convert(source, tmp_path / "ours", recipe=Recipe(method="rtn", mode=mode))
    group_size, bits = MODES[mode]
    mlx_lm_convert(
        str(source),
        str(tmp_path / "theirs"),
        quantize=True,
        q_group_size=group_size,
        q_bits=bits,
        q_mode=mode,
    )
    ours = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    theirs = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        assert ours[tensor].dtype == theirs[tensor].dtype, tensor
        assert mx.array_equal(ours[tensor], theirs[tensor]).item(), tensor
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0]["quantization"] == configs[1]["quantization"]
