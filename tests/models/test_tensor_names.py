"""Tensors saved under other names are recognized, or refused with the cause."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from splitquant_mlx import Recipe, convert
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.renamed import rename

TOKENS = mx.array([[3, 1, 4, 1, 5]])


def save(directory, rename, architecture="llama", extra=None, **config):
    """Write a tiny checkpoint whose tensors are named by `rename`; return plain and renamed."""
    plain = tiny.write_checkpoint(directory / "plain", architecture, **config)
    tensors = mx.load(str(plain / "model.safetensors"))
    renamed = directory / "renamed"
    renamed.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (renamed / name).write_bytes((plain / name).read_bytes())
    named = {rename(name): tensor for name, tensor in tensors.items()}
    mx.save_safetensors(str(renamed / "model.safetensors"), {**named, **(extra or {})})
    return plain, renamed


NAMINGS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of each layer": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "data parallel": lambda name: f"module.{name}",
    "no prefix": lambda name: name.removeprefix("model."),
    "a wrapper": lambda name: f"language_model.{name}",
    "a wrapper inside": lambda name: f"model.language_model.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("rename", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_other_prefixes_are_the_same_model(tmp_path, rename, architecture):
    plain, renamed = save(tmp_path, rename, architecture)
    assert mx.array_equal(load_model(renamed)(TOKENS), load_model(plain)(TOKENS))


def test_a_converted_checkpoint_is_the_same(tmp_path):
    plain, renamed = save(tmp_path, NAMINGS["torch.compile"], tie_word_embeddings=False)
    for source in (plain, renamed):
        convert(source, source / "out", recipe=Recipe(method="rtn"))
    a, b = (mx.load(str(source / "out" / "model.safetensors")) for source in (plain, renamed))
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_vision_modules_are_left_out_under_both_names(tmp_path):
    text = tiny.make_config("gemma3_text")
    outputs = []
    for number, (prefix, outer) in enumerate(
        [("language_model.model.", ""), ("model.language_model.", "model.")]
    ):
        vision = {
            f"{outer}vision_tower.encoder.layers.0.fc.weight": mx.ones((4, 4)),
            f"{outer}multi_modal_projector.weight": mx.ones((4,)),
        }
        rename = lambda name, prefix=prefix: prefix + name.removeprefix("model.")  # noqa: E731
        _, renamed = save(tmp_path / str(number), rename, "gemma3_text", vision)
        config = {"model_type": "gemma3", "text_config": text, "vocab_size": tiny.VOCAB}
        (renamed / "config.json").write_text(tiny.json.dumps(config))
        outputs.append(load_model(renamed)(TOKENS))
    assert mx.array_equal(*outputs)


@pytest.mark.parametrize("name", ["model.", "model.layers.1.self_attn."])
def test_stored_rotary_frequencies_are_left_out(tmp_path, name):
    extra = {f"{name}rotary_emb.inv_freq": mx.ones((8,))}
    plain, renamed = save(tmp_path, NAMINGS["torch.compile"], extra=extra)
    assert mx.array_equal(load_model(renamed)(TOKENS), load_model(plain)(TOKENS))


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_a_base_model_without_its_head_is_refused(tmp_path):
    rename = NAMINGS["no prefix"]
    _, renamed = save(tmp_path, rename)
    config = tiny.make_config(tie_word_embeddings=False)
    (renamed / "config.json").write_text(tiny.json.dumps(config))
    assert "saved without its output head" in refusal(renamed)


def test_names_of_another_program_are_shown_with_the_expected_ones(tmp_path):
    _, renamed = save(tmp_path, lambda name: f"blk_{name.replace('.', '_')}", "qwen3_moe")
    message = refusal(renamed)
    assert "expected names such as lm_head" in message or "such as model.embed_tokens" in message
    assert "got blk_model_embed" in message
    assert "config.json" not in message.removeprefix(str(tmp_path))


def test_an_adapter_is_refused(tmp_path):
    _, renamed = save(tmp_path, lambda name: f"base_model.model.{name[:-7]}.lora_A.weight")
    assert "this is an adapter" in refusal(renamed)


def test_vision_tensors_of_a_text_model_are_not_dropped(tmp_path):
    extra = {"vision_tower.layers.0.fc.weight": mx.ones((4, 4))}
    _, renamed = save(tmp_path, NAMINGS["a wrapper"], extra=extra)
    assert "extra tensors: vision_tower" in refusal(renamed)


@pytest.mark.parametrize("mixed", [False, True])
def test_float64_is_read_as_float32(tmp_path, mixed):
    source = tiny.write_checkpoint(tmp_path / "source", torch_dtype="float64")
    expected = load_model(source)(TOKENS)
    tensors = {n: np.array(w) for n, w in mx.load(str(source / "model.safetensors")).items()}
    for name in list(tensors)[: 3 if mixed else None]:
        tensors[name] = tensors[name].astype(np.float64)
    save_file(tensors, source / "model.safetensors")
    assert mx.array_equal(load_model(source)(TOKENS), expected)
    convert(source, tmp_path / "out", recipe=Recipe(method="rtn", exclude=("*.mlp.*",)))
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {w.dtype for w in stored.values()} == {mx.float32, mx.uint32}
    assert tiny.json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == (
        "float32"
    )


@pytest.mark.parametrize(
    ("kind", "saved", "expected"),
    [
        ("nanochat", "model.embed_tokens.weight", "transformer.wte.weight"),
        ("nanochat", "model.layers.10.self_attn.q_proj.weight", "transformer.h.10.attn.c_q.weight"),
        (
            "nanochat",
            "model.layers.1.self_attn.o_proj.weight",
            "transformer.h.1.attn.c_proj.weight",
        ),
        ("nanochat", "model.layers.1.mlp.fc2.weight", "transformer.h.1.mlp.c_proj.weight"),
        ("nanochat", "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"),
        (
            "olmo_hybrid",
            "model.layers.0.attention_layer_norm.weight",
            "model.layers.0.input_layernorm.weight",
        ),
        ("llama", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_of_transformers(kind, saved, expected):
    assert list(rename({saved: mx.zeros(1)}, kind)) == [expected]


def test_layers_saved_without_shared_keys_are_refused(tmp_path):
    plain, _ = save(tmp_path, str)
    tensors = mx.load(str(plain / "model.safetensors"))
    shared = [
        name for name in tensors if "layers.1.self_attn.k_" in name or "1.self_attn.v_" in name
    ]
    for name in shared:
        del tensors[name]
    mx.save_safetensors(str(plain / "model.safetensors"), tensors)
    assert "layers that share keys and values" in refusal(plain)
