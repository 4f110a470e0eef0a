"""Checkpoints of mixed-bit layers: converted, verified, run, described or rejected."""

import json

import mlx.core as mx
import pytest

from splitquant_mlx import (
    Recipe,
    RecipeError,
    SplitQuantError,
    convert,
    load,
    load_manifest,
    verify,
)
from splitquant_mlx.inspection.layers import layer_histogram
from splitquant_mlx.inspection.overview import describe
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.source import resolve
from splitquant_mlx.nn.lut_model_file import MixedLinear
from splitquant_mlx.recipe import Calibration

CALIBRATION = Calibration(num_samples=8, sequence_length=64)
SETTINGS = {"bits": 3, "group_size": 32, "dtype": "float16", "calibration": CALIBRATION}
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def mixed(stories, tmp_path_factory):
    """Return `stories` converted by salience."""
    directory = tmp_path_factory.mktemp("mixed")
    include = ("model.layers.0.*", "model.embed_tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(directory / "cache"))
        recipe = Recipe(method="salience", include=include, **SETTINGS)
        convert(stories, directory / "mixed", recipe=recipe)
    return directory / "mixed"


def test_manifest_matches_the_files(mixed, stories):
    for check in verify(mixed, source=resolve(str(stories))):
        assert not check.problems
    layers = {layer.path: layer for layer in load_manifest(mixed).layers}
    out, width = layers[PATH].shape
    assert layers[PATH].nbytes == out * width * 3 // 8 + 2 * 2 * out * width // 32 + width
    assert layers[PATH].mode == "mixed" and layers["model.embed_tokens"].mode == "affine"


def test_model_runs_and_is_described(mixed):
    model, tokenizer = load(mixed)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, MixedLinear)
    tokens = mx.array([tokenizer.encode("Once upon a time")])
    logits = model(tokens)
    layer.biases = layer.biases + 1  # cached parts must be recomputed
    assert not mx.allclose(model(tokens), logits).item()
    overview = describe(mixed)
    assert overview.method == "salience" and "trust-remote-code" in overview.runs_in
    assert layer_histogram(mixed, PATH).counts.sum() == layer.dense().size


@pytest.mark.parametrize("widths", [[3] * 63 + [4], [2] * 64, [0] * 64, [9] * 64])
def test_damaged_widths_are_detected(mixed, tmp_path, stories, widths):
    for file in mixed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = mx.load(str(file))
    tensors[f"{PATH}.widths"] = mx.array(widths, mx.uint8)
    mx.save_safetensors(str(file), tensors)
    problems = [
        p for check in verify(tmp_path, source=resolve(str(stories))) for p in check.problems
    ]
    assert any("up_proj" in problem for problem in problems)


def test_experts_and_layers_with_fixed_bits_use_gptq(mixture, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    for method in ("salience", "lut"):
        recipe = Recipe(method=method, **SETTINGS)
        layers = convert(mixture, tmp_path / method, recipe=recipe).layers
        forms = {layer.path.split(".", 3)[-1]: (layer.mode, layer.bits) for layer in layers}
        assert forms["mlp.switch_mlp.up_proj"] == ("affine", 3) and forms["mlp.gate"][1] == 8
        assert forms["self_attn.q_proj"] == ("mixed" if method == "salience" else "lut", 3)
        logits = load_model(tmp_path / method)(mx.array([[1, 2, 3]]))
        assert mx.all(mx.isfinite(logits)).item()
        for check in verify(tmp_path / method, source=resolve(str(mixture))):
            assert not check.problems


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 6}, "bits: expected 2, 3, 4, 5 with method 'salience', got 6"),
        ({"refine": True}, "refine: not for method 'salience'"),
        ({"outliers": "1%"}, "outliers: not for method 'salience'"),
        ({"mode": "mxfp4"}, "mode"),
    ],
)
def test_bad_settings_are_rejected(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"method": "salience", **settings})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("salience", {"bits": 8}, "up_proj.bits: expected 2, 3, 4, 5 with method 'salience'"),
        ("lut", {"group_size": 32}, "up_proj.group_size: not for method 'lut': leave it out"),
    ],
)
def test_bad_settings_of_a_layer_are_rejected(stories, tmp_path, method, settings, message):
    with pytest.raises(RecipeError, match=message):
        convert(stories, tmp_path / "out", recipe=Recipe(method=method, layers={PATH: settings}))


def test_config_names_the_layers(mixed):
    config = json.loads((mixed / "config.json").read_text())
    assert config["splitquant"]["mixed"][PATH] == {"bits": 3, "group_size": 32}
    assert (mixed / config["model_file"]).exists()


@pytest.mark.parametrize("method", ["lut", "salience"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_rejected(stories, tmp_path, method, value):
    source = tmp_path / "source"
    source.mkdir()
    for file in stories.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = mx.load(str(source / "model.safetensors"))
    weight = tensors[f"{PATH}.weight"]
    weight[0, 0] = value
    mx.save_safetensors(str(source / "model.safetensors"), {**tensors, f"{PATH}.weight": weight})
    calibration = Calibration(text=str(tmp_path / "text.txt"), num_samples=2, sequence_length=8)
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 20)
    recipe = Recipe(method=method, calibration=calibration)
    with pytest.raises(SplitQuantError) as caught:
        convert(source, tmp_path / "out", recipe=recipe)
    assert "NaN or infinite" in str(caught.value) and "\n" not in str(caught.value)
