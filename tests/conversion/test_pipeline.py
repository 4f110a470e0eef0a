"""Conversions end to end on tiny trained checkpoints."""

import dataclasses
import hashlib
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from stories import held_out_text
from tiny import write_checkpoint

from splitquant_mlx import (
    QuantizedSplitLinear,
    Recipe,
    RecipeError,
    TargetError,
    convert,
    load,
    load_manifest,
    split_model,
)
from splitquant_mlx.conversion import converter, quantizers, resume
from splitquant_mlx.evaluation.divergence import divergence, log_probabilities
from splitquant_mlx.models.dense import dense_weight, dequantize_model
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.recipe import Calibration

TEXT = held_out_text(1500)


def reference_of(original):
    model, tokenizer = load(original)
    tokens = tokenizer.encode(TEXT)
    return log_probabilities(model, tokens), tokens


def kl_to(reference, path):
    expected, tokens = reference
    actual = log_probabilities(dequantize_model(load_model(path)), tokens)
    return divergence([expected], [actual]).kl_mean


def test_manifest_matches_the_files(stories, split_stories):
    manifest = load_manifest(split_stories)
    weights = mx.load(str(split_stories / "model.safetensors"))
    assert manifest.stored_bytes == sum(w.nbytes for w in weights.values())
    original = mx.load(str(stories / "model.safetensors"))
    parameters = sum(w.size for w in original.values())
    assert manifest.bits_per_weight == pytest.approx(8 * manifest.stored_bytes / parameters)
    bits = entries = 0
    for layer in manifest.layers:
        tensors = [w for name, w in weights.items() if name.rpartition(".")[0] == layer.path]
        assert layer.nbytes == sum(w.nbytes for w in tensors)
        if layer.action == "split":
            w = original[f"{layer.path}.weight"]
            bits, entries = bits + 8 * layer.nbytes, entries + w.size
            assert layer.shape == w.shape and layer.clusters == 3 and len(layer.cut_points) == 2
            assert {str(t.dtype).rpartition(".")[2] for t in tensors} == {"uint32", "float16"}
    assert manifest.linear_bits_per_weight == pytest.approx(bits / entries) == pytest.approx(13.5)
    assert [layer.path for layer in manifest.layers if layer.note] == [
        f"model.layers.{i}.mlp.down_proj" for i in range(5)
    ]
    assert manifest.source.endswith("stories") and manifest.revision is None
    assert {"read", "cluster", "quantize", "write", "total"} == manifest.seconds.keys()
    assert manifest.recipe == Recipe().to_dict()
    assert "mlx" in manifest.versions and manifest.device in ("cpu", "gpu")


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_large_weight_quantized_in_blocks_gives_the_same_bytes(
    stories, tmp_path, monkeypatch, mode
):
    recipe = Recipe(method="rtn", mode=mode)
    hashes = []
    for target, large in (("whole", 1 << 24), ("blocks", 1 << 12)):
        monkeypatch.setattr(quantizers, "LARGE", large)
        hashes.append(convert(stories, tmp_path / target, recipe=recipe).files)
    assert hashes[0] == hashes[1]


def test_signal_to_noise_ratio_is_that_of_the_stored_weights(stories, split_stories):
    original = mx.load(str(stories / "model.safetensors"))
    modules = dict(load_model(split_stories).named_modules())
    for layer in load_manifest(split_stories).layers:
        if layer.snr_db is None:
            continue
        w = np.array(original[f"{layer.path}.weight"], np.float64)
        noise = w - np.array(dense_weight(modules[layer.path]), np.float64)
        expected = 10 * np.log10((w**2).sum() / (noise**2).sum())
        assert layer.snr_db == pytest.approx(expected, abs=0.01)


def test_split_model_has_the_logits_of_the_original(stories):
    tokens = mx.array([list(range(1, 200))])
    expected = load_model(stories)(tokens)
    actual = split_model(load_model(stories))(tokens)
    assert (mx.abs(actual - expected).max() / mx.abs(expected).max()).item() < 1e-5


def test_loaded_model_has_split_layers_and_generates_the_same(stories, split_stories):
    from mlx_lm import generate

    model, tokenizer = load(split_stories)
    assert isinstance(model.layers[0].self_attn.q_proj, QuantizedSplitLinear)
    original, _ = load(stories)
    prompt = "Question: What does a cow say?\nAnswer:"
    answer = generate(model, tokenizer, prompt, max_tokens=20)
    assert answer == generate(original, tokenizer, prompt, max_tokens=20)
    assert answer.split()[0] == "moo"


def test_dense_scoring_agrees_with_the_quantized_kernels(split_stories, tmp_path, stories):
    convert(stories, tmp_path / "rtn", recipe=Recipe(method="rtn"))
    tokens = mx.array([list(range(1, 100))])
    for path in (split_stories, tmp_path / "rtn"):
        quantized = load_model(path)(tokens)
        dense = dequantize_model(load_model(path))(tokens)
        assert (mx.abs(quantized - dense).max() / mx.abs(dense).max()).item() < 1e-4


def test_split_has_a_lower_divergence_than_rtn(stories, tmp_path):
    reference, kl = reference_of(stories), {}
    for method in ("rtn", "splitquant"):
        recipe = Recipe(method=method, embeddings="keep")
        convert(stories, tmp_path / method, recipe=recipe)
        kl[method] = kl_to(reference, tmp_path / method)
    assert 0 < kl["splitquant"] < 0.3 * kl["rtn"]


def test_more_bits_and_finer_granularity_lower_the_divergence(stories, tmp_path):
    reference = reference_of(stories)

    def kl(**settings):
        target = tmp_path / "-".join(map(str, settings.values()))
        convert(stories, target, recipe=Recipe(**settings))
        return kl_to(reference, target)

    by_bits = [kl(bits=bits) for bits in (2, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_granularity = [kl(bits=3, granularity=g) for g in ("tensor", "channel", "group")]
    assert by_granularity == sorted(by_granularity, reverse=True)


def test_recipe_selects_layers(stories, tmp_path):
    patterns = ("*.mlp.*", "*.embed_tokens")
    recipe = Recipe(include=patterns, exclude=("*.4.*",), embeddings="quantize", clusters=2)
    manifest = convert(stories, tmp_path / "out", recipe=recipe)
    actions = {layer.path: layer.action for layer in manifest.layers}
    assert actions["model.layers.0.mlp.up_proj"] == "split"
    assert actions["model.layers.4.mlp.up_proj"] == "keep"
    assert actions["model.layers.0.self_attn.q_proj"] == "keep"
    assert actions["model.embed_tokens"] == "quantize"
    model = load_model(tmp_path / "out")
    assert type(model.model.embed_tokens) is nn.QuantizedEmbedding
    assert model.layers[0].mlp.up_proj.clusters == 2


def test_shards_are_limited_and_load(stories, split_stories, tmp_path):
    convert(stories, tmp_path / "out", max_shard_bytes=100_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    one, many = load_model(split_stories), load_model(tmp_path / "out")
    for (name, a), (_, b) in zip(
        tree_flatten(one.parameters()), tree_flatten(many.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name


def test_conversion_is_deterministic(stories, split_stories, tmp_path):
    convert(stories, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "splitquant_model.py"):
        assert (split_stories / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_sklearn_finds_similar_cut_points(stories, split_stories, tmp_path):
    manifest = convert(stories, tmp_path / "out", recipe=Recipe(kmeans="sklearn"))
    exact = load_manifest(split_stories)
    for ours, theirs in zip(exact.layers, manifest.layers, strict=True):
        assert ours.cut_points == pytest.approx(theirs.cut_points, rel=0.2, abs=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_unquantized_tensors(stories, tmp_path, dtype):
    convert(stories, tmp_path / "out", recipe=Recipe(dtype=dtype))
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert weights["model.norm.weight"].dtype == getattr(mx, dtype)
    scales = weights["model.layers.0.mlp.up_proj.scales"].dtype
    assert scales == (mx.bfloat16 if dtype == "bfloat16" else mx.float16)
    model = load_model(tmp_path / "out")
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]]))))


def test_existing_target_is_kept_or_replaced(stories, tmp_path):
    target = tmp_path / "deep" / "er" / "out"
    with pytest.raises(RecipeError):
        convert(stories, target, recipe=Recipe(group_size=128))
    assert not list(tmp_path.iterdir())
    convert(stories, target, recipe=Recipe(method="rtn"))
    before = (target / "splitquant.json").read_bytes()
    with pytest.raises(TargetError, match="exists already"):
        convert(stories, target)
    assert (target / "splitquant.json").read_bytes() == before
    convert(stories, target, overwrite=True)
    assert json.loads((target / "splitquant.json").read_text())["recipe"]["method"] == "splitquant"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_converted_model_is_rejected(split_stories, tmp_path):
    from splitquant_mlx import CheckpointError

    with pytest.raises(CheckpointError, match="quantized already"):
        convert(split_stories, tmp_path / "out")


def test_other_parameters_are_unchanged(stories, split_stories):
    """Every tensor that is not converted equals the original."""
    original = mx.load(str(stories / "model.safetensors"))
    converted = mx.load(str(split_stories / "model.safetensors"))
    unquantized = [x for x in original if f"{x.removesuffix('weight')}scales" not in converted]
    assert len(unquantized) == 5 + 1 + 11  # unsplittable layers, embedding, norms
    for name in unquantized:
        assert mx.array_equal(converted[name], original[name]), name


def test_one_weight_at_a_time_gives_the_same(tmp_path, monkeypatch):
    """As on a GPU, without a thread pool; random float32 weights have no ties to round."""
    source = write_checkpoint(tmp_path / "source")
    convert(source, tmp_path / "pool")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    convert(source, tmp_path / "out")
    monkeypatch.undo()
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "pool" / "model.safetensors").read_bytes()


def test_unfinished_shard_is_resumed(stories, split_stories, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_S", 0.0)
    convert_weight, seen = converter.convert_weight, []

    def convert_or_stop(w, layer, inputs):
        seen.append(layer.path)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return convert_weight(w, layer, inputs)

    monkeypatch.setattr(converter, "convert_weight", convert_or_stop)
    with pytest.raises(KeyboardInterrupt):
        convert(stories, tmp_path / "out")
    first = len(seen)
    convert(stories, tmp_path / "out")
    assert len(seen) - first < 36 - 10, "half of the layers were finished"
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (split_stories / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["rtn", "splitquant", "imatrix", "gptq"])
def test_files_are_hashed_while_they_are_written(stories, tmp_path, monkeypatch, method):
    def read_again(file):
        pytest.fail(f"{file} is read again")

    monkeypatch.setattr("splitquant_mlx.formats.shard_writer.sha256", read_again)
    calibration = {"num_samples": 2, "sequence_length": 16} if method in ("imatrix", "gptq") else {}
    recipe = Recipe(method=method, dtype="float16", group_size=32)
    if calibration:
        recipe = dataclasses.replace(recipe, calibration=Calibration(**calibration))
    convert(stories, tmp_path / "target", recipe=recipe, max_shard_bytes=200_000)
    hashes = load_manifest(tmp_path / "target").files
    shards = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(shards) > 1
    for file in shards:
        assert hashes[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
