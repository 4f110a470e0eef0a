"""Parameters that GGUF files split, fuse or transform are restored from every form."""

import math
from pathlib import Path
from typing import Any

import gguf_models
import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf import open_gguf
from splitquant_mlx.inspection.overview import describe_gguf
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.gguf_import import _gguf_names, gguf_parameters, import_gguf

VOCAB, HIDDEN, HEADS, NOPE, ROPE, VALUE, RANK = 300, 64, 4, 8, 16, 12, 32
SETTINGS = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
LATENT = {
    "kv_lora_rank": RANK,
    "q_lora_rank": None,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64},
}
LATENT_KEYS = {
    "rope.dimension_count": ROPE,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "attention.kv_lora_rank": RANK,
    "attention.key_length": NOPE + ROPE,
    "attention.value_length": VALUE,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
}


def model(kind, settings):
    """Return random parameters of mlx-lm's model, and its settings."""
    config = {"model_type": kind, **SETTINGS, **settings, "tie_word_embeddings": False}
    random = np.random.default_rng(0)
    arrays = parameters(build_model(Path(), config))
    return {n: random.normal(size=a.shape).astype(np.float32) for n, a in arrays.items()}, config


def write(path, architecture, weights, config, keys, replaced):
    """Write a file in which the tensors `replaced` stand for some parameters."""
    name_of = _gguf_names(architecture, config["num_hidden_layers"])
    parts = {part for names, _ in replaced for part in names}
    plain = {n.removeprefix("language_model."): w for n, w in weights.items() if n not in parts}
    stored = {name_of(n): w for n, w in plain.items()}
    for _, tensors in replaced:
        stored |= tensors
    entries = gguf_models.settings(config) | keys
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    gguf_models.write(path, architecture, entries | gguf_models.words(VOCAB), stored)


def check(path, weights):
    """Check that importing a file gives `weights`, and that its header describes all its bytes."""
    directory = path.with_suffix("")
    directory.mkdir()
    import_gguf(path, directory)
    actual: Any = mx.load(str(directory / "model.safetensors"))
    assert actual.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(np.array(actual[name]), value, rtol=1e-5, err_msg=name)
    opened = open_gguf(path)
    infos = gguf_parameters(opened)[1]
    assert infos.keys() == weights.keys()
    for name, value in weights.items():
        assert math.prod(infos[name].shape) == value.size
    assert describe_gguf(path).vocabulary == VOCAB
    held = sum(info.nbytes for info in opened.tensors.values())
    assert sum(info.nbytes for info in infos.values()) == held


def kv_b(weights, kind):
    """Return the names of the parameters of keys and values, and their joint tensor on the hub."""
    stem = "model.layers.0.self_attn"
    if kind == "deepseek_v2":
        return [f"{stem}.kv_b_proj.weight"], weights[f"{stem}.kv_b_proj.weight"]
    names = [f"{stem}.embed_q.weight", f"{stem}.unembed_out.weight"]
    keys, values = (weights[name] for name in names)  # (heads, rank, nope), (heads, value, rank)
    rows = [np.vstack([k.T, v]) for k, v in zip(keys, values, strict=True)]
    return names, np.vstack(rows)


@pytest.mark.parametrize("form", ["whole", "in parts"])
@pytest.mark.parametrize(("kind", "gating"), [("deepseek_v2", 1), ("deepseek_v3", 2)])
def test_keys_and_values_of_deepseek(tmp_path, kind, gating, form):
    weights, config = model(kind, LATENT)
    names, whole = kv_b(weights, kind)
    assert whole.shape == (HEADS * (NOPE + VALUE), RANK)
    heads = whole.reshape(HEADS, NOPE + VALUE, RANK)
    keys, values = heads[:, :NOPE].swapaxes(1, 2), heads[:, NOPE:]
    stored = {"whole": {"attn_kv_b.weight": whole}}
    stored["in parts"] = {"attn_k_b.weight": keys, "attn_v_b.weight": values}
    tensors = {f"blk.0.{name}": w for name, w in stored[form].items()}
    path = tmp_path / "a.gguf"
    settings = {**LATENT_KEYS, "expert_gating_func": gating}
    write(path, "deepseek2", weights, config, settings, [(names, tensors)])
    check(path, weights)


@pytest.mark.parametrize("fused", [False, True])
def test_queries_keys_and_values_of_phi2(tmp_path, fused):
    weights, config = model("phi", {"intermediate_size": 256})
    replaced = []
    for leaf in ("weight", "bias") if fused else ():
        names = [f"model.layers.0.self_attn.{name}_proj.{leaf}" for name in "qkv"]
        rows = np.concatenate([weights[name] for name in names])
        replaced.append((names, {f"blk.0.attn_qkv.{leaf}": rows}))
    keys = {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8}
    path = tmp_path / "a.gguf"
    write(path, "phi2", weights, config, keys, replaced)
    check(path, weights)


def tiled(w, axis=0):
    """Reorder the value heads of 2 key heads as files do: the first of each, then the second."""
    heads = np.moveaxis(w, axis, 0).reshape(2, 3, -1, *np.delete(w.shape, axis))
    flat = np.concatenate([heads[key, value] for value in range(3) for key in range(2)])
    return np.moveaxis(flat, 0, axis)


def test_linear_attention_of_qwen_3_5(tmp_path):
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16}
    sizes |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "head_dim": 16}
    text = {**SETTINGS, **sizes, "tie_word_embeddings": False}
    weights, _ = model("qwen3_5", {"text_config": text})
    stem = "language_model.model.layers.0.linear_attn."
    weights[f"{stem}A_log"] = np.abs(weights[f"{stem}A_log"])

    def values(w):  # after 2 times 32 queries and keys
        return np.concatenate([w[:64], tiled(w[64:])])

    stored = {
        "A_log": ("ssm_a", lambda w: -np.exp(tiled(w))),
        "dt_bias": ("ssm_dt.bias", tiled),
        "in_proj_a.weight": ("ssm_alpha.weight", tiled),
        "in_proj_b.weight": ("ssm_beta.weight", tiled),
        "in_proj_z.weight": ("attn_gate.weight", tiled),
        "in_proj_qkv.weight": ("attn_qkv.weight", values),
        "conv1d.weight": ("ssm_conv1d.weight", lambda w: values(w)[..., 0]),
        "out_proj.weight": ("ssm_out.weight", lambda w: tiled(w, 1)),
    }
    replaced = [
        ([stem + name], {f"blk.0.{old}": change(weights[stem + name])})
        for name, (old, change) in stored.items()
    ]
    keys = {
        "ssm.time_step_rank": 6,
        "ssm.group_count": 2,
        "ssm.state_size": 16,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 48,
        "rope.dimension_sections": [2, 1, 1, 0],
        "rope.dimension_count": 8,
    }
    write(tmp_path / "a.gguf", "qwen35", weights, text, keys, replaced)
    check(tmp_path / "a.gguf", weights)


@pytest.mark.parametrize("rows", [3 * HIDDEN + 3, 3 * HIDDEN + 1])
def test_tensors_of_another_shape_are_refused(tmp_path, rows):
    weights, config = model("phi", {"intermediate_size": 256})
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    replaced = [(names, {"blk.0.attn_qkv.weight": np.ones((rows, HIDDEN))})]
    keys = {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8}
    write(tmp_path / "a.gguf", "phi2", weights, config, keys, replaced)
    message = r"'blk\.0\.attn_qkv\.weight': expected shape \(64, 64\) of model.*, got \(19"
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "a.gguf", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
