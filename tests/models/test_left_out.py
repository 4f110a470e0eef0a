"""A stored tensor is used, or a warning names it, or the conversion is refused."""

import json

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.left_out import check_left_out, left_out
from splitquant_mlx.models.loader import load_model

TOKENS = mx.array([[n * 7 % tiny.VOCAB for n in range(40)]])
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(directory, *, tie=None, tensors=None):
    """Change tie_word_embeddings in config.json, and tensors of the file."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    if tie is not None:
        config["tie_word_embeddings"] = tie
    (directory / "config.json").write_text(json.dumps(config))
    file = str(directory / "model.safetensors")
    stored = {**mx.load(file), **(tensors or {})}
    mx.eval(stored)
    stored = {name: array for name, array in stored.items() if array is not None}
    mx.save_safetensors(file, stored, metadata={"format": "pt"})
    return directory


def converted(source, target):
    manifest = convert(source, target, recipe=Recipe(method="rtn", bits=8, group_size=32))
    return manifest, load_model(target)(TOKENS)


def test_thousands_of_tensors():
    stored = {str(n): mx.array([float(n)]) for n in range(2500)}
    used = {n: mx.stack([w, w]) for n, w in stored.items() if n not in ("7", "1023", "2499")}
    assert left_out(stored, used) == ["7", "1023", "2499"]


@pytest.mark.parametrize("tie", [True, None], ids=["tied", "silent"])
def test_a_stored_untied_head_is_used(tmp_path, tie):
    from mlx_lm.utils import load_model as stock_load_model

    source = tiny.write_checkpoint(tmp_path / "source", tie_word_embeddings=False)
    expected = load_model(source)(TOKENS)
    rewrite(source, tie=tie)
    assert mx.array_equal(load_model(source)(TOKENS), expected).item()
    _, actual = converted(source, tmp_path / "out")
    assert mx.allclose(actual, expected, atol=0.3).item()
    assert mx.array_equal(stock_load_model(tmp_path / "out")[0](TOKENS), actual).item()
    assert HEAD in mx.load(str(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("tie", [True, None], ids=["tied", "silent"])
def test_a_stored_copy_of_the_embedding_is_a_tied_head(tmp_path, tie):
    source = tiny.write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    expected = load_model(source)(TOKENS)
    copy = mx.load(str(source / "model.safetensors"))[EMBEDDING]
    manifest, actual = converted(rewrite(source, tie=tie, tensors={HEAD: copy}), tmp_path / "out")
    assert mx.allclose(actual, expected, atol=0.3).item()
    assert manifest.warnings == ()


def test_without_a_head_and_a_setting_the_embedding_is_the_head(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    expected = load_model(source)(TOKENS)
    _, actual = converted(rewrite(source), tmp_path / "out")
    assert mx.allclose(actual, expected, atol=0.3).item()


def test_a_head_that_the_class_cannot_use_is_refused(tmp_path):
    """mlx-lm's Gemma 2 is always tied."""
    source = tiny.write_checkpoint(tmp_path / "source", "gemma2")
    rewrite(source, tensors={HEAD: mx.random.normal((tiny.VOCAB, tiny.HIDDEN))})
    with pytest.raises(CheckpointError, match=r"lm_head.weight"):
        open_checkpoint(source)


def test_buffers_and_towers_are_named(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": mx.ones(8) for n in range(2)}
    checkpoint = open_checkpoint(rewrite(source, tie=True, tensors=buffers))
    (warning,) = checkpoint.warnings
    assert "model.layers.*.self_attn.rotary_emb.inv_freq (tensors: 2)" in warning


def test_warnings_say_what_to_use_for_unused_tensors(tmp_path):
    towers = [f"vision_tower.layers.{n}.fc.weight" for n in range(2)] + ["audio_tower.conv.weight"]
    further = ["mtp.fc.weight", "model.layers.2.mlp.up_proj.weight"]
    rest, heads = check_left_out(tmp_path, towers + further, {}, 2, "qwen3_next")
    assert "only the text model" in rest and "mlx_vlm.convert" in rest
    assert "audio_tower.conv.weight, vision_tower.layers.*.fc.weight (tensors: 3)" in rest
    assert "qwen3_next does not use them: model.layers.*.mlp.up_proj.weight, mtp.fc.weight" in heads
    assert "--draft-model" in heads


def test_a_routing_bias_that_the_class_drops_is_refused(tmp_path):
    """mlx-lm's ERNIE chooses experts without it."""
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    file = tmp_path / "bias"
    for content, refused in ((bytes(16), False), (bytes(15) + b"\1", True)):
        file.write_bytes(content)
        header = TensorHeader(file=file, dtype="F32", shape=(4,), nbytes=16, offset=0)
        if refused:
            with pytest.raises(CheckpointError, match="e_score_correction_bias"):
                check_left_out(tmp_path, [name], {name: header}, 2, "ernie4_5_moe")
        else:
            assert check_left_out(tmp_path, [name], {name: header}, 2, "ernie4_5_moe")
