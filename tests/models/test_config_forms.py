"""A config.json of transformers 4 and one of transformers 5 describe the same model."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.conversion.verify import verify
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.rotary import check_rotary
from splitquant_mlx.models.source import resolve

TOKENS = mx.array([[n * 7 % tiny.VOCAB for n in range(150)]])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def write_both_forms(directory, architecture, base, scaling):
    """Write a model twice, with a config.json of transformers 4 and of transformers 5."""
    old = tiny.write_checkpoint(directory / "old", architecture)
    new = tiny.write_checkpoint(directory / "new", architecture)
    config = json.loads((old / "config.json").read_text())
    config.pop("rope_theta", None)
    config.pop("rope_scaling", None)
    is_scaled = scaling["rope_type"] != "default"
    olds = {"rope_theta": base, "torch_dtype": "float32"}
    olds |= {"rope_scaling": {**scaling, "type": scaling["rope_type"]}} if is_scaled else {}
    rope: dict = {"rope_theta": base, **scaling}
    if architecture == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    news = {"rope_parameters": rope, "dtype": "float32"}
    (old / "config.json").write_text(json.dumps({**config, **olds}))
    (new / "config.json").write_text(json.dumps({**config, **news}))
    return old, new


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_scalings_are_read_from_both_forms(tmp_path, architecture, kind):
    old, new = write_both_forms(tmp_path, architecture, 250_000.0, SCALINGS[kind])
    expected = load_model(old)(TOKENS)
    assert mx.array_equal(load_model(new)(TOKENS), expected).item()
    plain, _ = write_both_forms(tmp_path / "plain", architecture, 10_000.0, SCALINGS["default"])
    assert mx.max(mx.abs(load_model(plain)(TOKENS) - expected)).item() > 1e-3


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a != "llama"])
def test_the_base_is_read_from_both_forms(tmp_path, architecture):
    old, new = write_both_forms(tmp_path, architecture, 250_000.0, SCALINGS["default"])
    assert mx.array_equal(load_model(new)(TOKENS), load_model(old)(TOKENS)).item()


def test_the_result_has_both_forms(tmp_path):
    from mlx_lm.utils import load_model as stock_load_model
    from transformers import AutoConfig

    old, new = write_both_forms(tmp_path, "llama", 250_000.0, LLAMA3)
    for source in (old, new):
        convert(source, tmp_path / "out", recipe=Recipe(method="rtn", bits=8), overwrite=True)
        ours = load_model(tmp_path / "out")(TOKENS)
        assert mx.array_equal(stock_load_model(tmp_path / "out")[0](TOKENS), ours).item()
        actual, expected = (AutoConfig.from_pretrained(d) for d in (tmp_path / "out", new))
        kept = {k: v for k, v in actual.rope_parameters.items() if k != "type"}
        assert kept == expected.rope_parameters == {"rope_theta": 250_000.0, **LLAMA3}


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "spiral", "factor": 2.0}, "spiral"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({**SCALINGS["yarn"], "attention_factor": 1.5}, "attention_factor"),
    ],
)
def test_settings_that_mlx_lm_does_not_have_are_refused(tmp_path, scaling, message):
    _, new = write_both_forms(tmp_path, "llama", 10_000.0, scaling)
    with pytest.raises(CheckpointError, match=message):
        convert(new, tmp_path / "out", recipe=Recipe(method="rtn", bits=8))
    with pytest.raises(CheckpointError, match=message):
        load_model(new)


def test_a_scaling_that_the_class_does_not_read_is_refused(tmp_path):
    """mlx-lm's Gemma 2 has plain rotary embeddings only."""
    _, new = write_both_forms(tmp_path, "gemma2", 10_000.0, SCALINGS["linear"])
    with pytest.raises(CheckpointError, match=r"gemma2 rotates differently"):
        load_model(new)


def test_verify_reports_a_lost_setting(tmp_path):
    """As in checkpoints converted before both forms were written."""
    _, new = write_both_forms(tmp_path, "llama", 250_000.0, LLAMA3)
    convert(new, tmp_path / "out", recipe=Recipe(method="rtn", bits=8))
    source = resolve(str(new))
    assert not any(check.problems for check in verify(tmp_path / "out", source=source))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rope_theta": 10_000.0}))
    problems = {check.name: check.problems for check in verify(tmp_path / "out", source=source)}
    assert "rope_theta: expected 250000.0, got 10000.0" in problems["original"][0]


def wrap(directory, architecture, **text):
    """Turn the checkpoint of a language model into one of a multimodal model."""
    file, weights = directory / "config.json", str(directory / "model.safetensors")
    inner = {**json.loads(file.read_text()), **text}
    tie = inner.pop("outer_tie", inner["tie_word_embeddings"])
    outer = {"model_type": architecture, "text_config": inner, "tie_word_embeddings": tie}
    file.write_text(json.dumps(outer))
    tensors = {f"language_model.{name}": w for name, w in mx.load(weights).items()}
    mx.eval(tensors)
    mx.save_safetensors(weights, tensors, metadata={"format": "pt"})
    return directory


def test_a_multimodal_config_without_vocab_size(tmp_path):
    """transformers 5 writes Gemma 3's vocab_size in text_config only."""
    from mlx_lm.utils import load_model as stock_load_model

    alone = tiny.write_checkpoint(tmp_path / "alone", "gemma3_text")
    expected = load_model(alone)(TOKENS)
    wrapped = wrap(tiny.write_checkpoint(tmp_path / "wrapped", "gemma3_text"), "gemma3")
    assert mx.array_equal(load_model(wrapped)(TOKENS), expected).item()
    convert(wrapped, tmp_path / "out", recipe=Recipe(method="rtn", bits=8))
    ours = load_model(tmp_path / "out")(TOKENS)
    assert mx.array_equal(stock_load_model(tmp_path / "out")[0](TOKENS), ours).item()


def test_the_outer_config_decides_whether_the_head_is_tied(tmp_path):
    """As in transformers; mlx-lm's Mistral 3 reads text_config."""
    alone = tiny.write_checkpoint(tmp_path / "alone", tie_word_embeddings=True)
    expected = load_model(alone)(TOKENS)
    wrapped = tiny.write_checkpoint(tmp_path / "wrapped", tie_word_embeddings=True)
    wrap(wrapped, "mistral3", tie_word_embeddings=False, outer_tie=True)
    assert mx.array_equal(load_model(wrapped)(TOKENS), expected).item()


def test_rotation_in_different_layers_is_refused(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", no_rope_layers=[1, 0])
    with pytest.raises(CheckpointError, match=r"no_rope_layers \[1, 0\].*layers \[1\]"):
        load_model(source)


def test_rotation_of_fewer_dimensions_is_refused(tmp_path):
    """Without a partial_rotary_factor the whole head is rotated."""
    model = nn.Module()
    model.layers = [{"rope": nn.RoPE(8)}, {"rope": nn.RoPE(8)}]
    table = {"rope_type": "default", "rope_theta": 10_000.0}
    assert check_rotary(tmp_path, model, {"": table}, {"head_dim": 8}) == []
    with pytest.raises(CheckpointError, match="8 of 16 dimensions"):
        check_rotary(tmp_path, model, {"": table}, {"head_dim": 16})


def test_a_missing_package_is_reported(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    with pytest.raises(CheckpointError, match="olmo needs a package that is not installed"):
        load_model(source)


def test_names_that_mlx_vlm_reads(tmp_path):
    text = tiny.make_config("gemma3_text", rope_theta=250_000.0)
    normalized = normalize(tmp_path, {"model_type": "gemma3", "text_config": text})
    assert normalized["text_config"]["rope_global_base_freq"] == 250_000.0
    text = {**tiny.make_config("qwen2"), "model_type": "qwen2_vl_text"}
    saved = {"model_type": "qwen2_vl", "vision_config": {"model_type": "qwen2_vl_vision"}}
    normalized = normalize(tmp_path, {**saved, "text_config": text})
    assert normalized["vision_config"]["model_type"] == normalized["model_type"] == "qwen2_vl"
    assert normalized["hidden_size"] == normalized["text_config"]["hidden_size"] == tiny.HIDDEN
    vision = {"model_type": "llama4_vision_model", "rope_parameters": {"rope_theta": 5e3}}
    text = {"model_type": "llama4_text", "num_hidden_layers": 4}
    both = normalize(
        tmp_path, {"model_type": "llama4", "text_config": text, "vision_config": vision}
    )
    assert {"rope_theta": 5e3, "vision_feature_layer": -1}.items() <= both["vision_config"].items()
