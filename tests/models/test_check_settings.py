"""mlx-lm's model follows config.json, or the checkpoint is refused."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models.deepseek_v3 import group_expert_select

from splitquant_mlx import Recipe, convert
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.check_settings import check_settings
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.models.folded import fold_multipliers, shift_corrections
from splitquant_mlx.models.loader import load_model

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCAB}
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "intermediate_size": 64, "moe_intermediate_size": 64,
}  # fmt: skip
MAMBA2 = {
    "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2,
}  # fmt: skip
RECURRENT = {
    "model_type": "recurrent_gemma", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64, "lru_width": 64,
    "attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0,
}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2,
    "max_seq_len": 256, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2, "moe_num_experts": 4},
}  # fmt: skip
PHIMOE = {
    "model_type": "phimoe", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
    "num_local_experts": 4, "sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"is_causal": False}, "is_causal False"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "2 layer_types.*, got 1"),
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 does not run with the settings"),
        ("llama", {"rope_parameters": [1, 2]}, r"rope_parameters \[1, 2\]"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "expected a rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, r"\['default'\]"),
        ("llama", {"rope_scaling": {"type": ["default"]}}, r"\['default'\]"),
        (
            "llama",
            {"text_config": {"model_type": ["llama"]}},
            "text_config.model_type is not a name",
        ),
        ("llama", {"text_config": []}, "text_config is not an object"),
        ("llama", {"hidden_act": "gelu", "bos_token_id": "first"}, "hidden_act 'gelu'"),
        (
            "llama",
            {"rms_norm_eps": float("inf")},
            "rms_norm_eps: expected a finite number, got inf",
        ),
        ("llama", {"head_dim": 0}, "head_dim: expected an integer, 1 or more, got 0"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id '2'"),
        ("llama", {"rms_norm_eps": 1}, "rms_norm_eps 1, which transformers refuses"),
        ("llama", {"rms_norm_eps": 1e-40}, "rms_norm_eps: expected a number from"),
        ("llama", {"max_position_embeddings": 10**30}, "expected a number from .*, got 1000"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings: expected true or false"),
        ("llama", {"tie_word_embeddings": "true"}, "tie_word_embeddings: expected true or false"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
        ("llama", {"mlp_bias": "false"}, "mlp_bias: expected true or false, got 'false'"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps: expected a number, got True"),
        ("llama", {"mlp_multipliers": [1.0, 1e30]}, r"mlp_multipliers: expected .*, got 1e\+30"),
        ("qwen3_moe", {"num_experts_per_tok": -2}, "num_experts_per_tok: expected a number of 0"),
        ("llama", {"rope_parameters": {"rope_type": None, "rope_theta": 1e4}}, "and a rope_type"),
    ],
)
def test_an_ignored_setting_is_refused(tmp_path, architecture, settings, message):
    source = tiny.write_checkpoint(tmp_path / "source", architecture, rope_theta=..., **settings)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", recipe=Recipe(method="rtn", bits=8))
    with pytest.raises(CheckpointError, match=message):
        load_model(source)


def test_missing_required_keys_are_named(tmp_path):
    config = normalize(tmp_path, {**MAMBA2, "model_type": "minimax", "num_attention_heads": 4})
    with pytest.raises(CheckpointError, match=r"config.json lacks .* 'rotary_dim', which mlx-lm's"):
        build_model(tmp_path, config)


@pytest.mark.parametrize("value", [0, -4.0, 1e30, 1e-30, True, "4", [0.0] * 8])
@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("rope_theta", {"rope_type": "default"}),
        ("factor", {"rope_type": "linear"}),
        ("factor", {"rope_type": "yarn", "original_max_position_embeddings": 64}),
        ("beta_slow", {"rope_type": "yarn", "factor": 4.0}),
        ("original_max_position_embeddings", {"rope_type": "yarn", "factor": 4.0}),
        ("short_factor", {"rope_type": "longrope", "long_factor": [1.0] * 8}),
        ("partial_rotary_factor", {"rope_type": "default"}),
    ],
)
def test_rotary_settings_of_unusual_magnitude_are_refused(tmp_path, key, table, value):
    """They give infinite or zero frequencies."""
    new = {"rope_theta": 1e4, **table, key: value}
    old = {"rope_theta": new.pop("rope_theta"), "rope_scaling": new}
    for form in (
        {"rope_theta": ..., "rope_parameters": {**new, "rope_theta": 1e4, key: value}},
        old,
    ):
        config = tiny.make_config(**form)
        with pytest.raises(CheckpointError, match=key):
            normalize(tmp_path, config)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (DEEPSEEK, {"rope_interleave": False}, "rope_interleave False"),
        (PHIMOE, {"num_experts_per_tok": 1}, "uses two experts"),
        (DEEPSEEK, {"num_experts_per_tok": 0}, "expected 1 or more"),
        (DEEPSEEK, {"num_experts_per_tok": 1}, "weights of two or more experts only"),
        (MAMBA2, {"layer_norm_epsilon": 1e-2}, "ignore the epsilon"),
        (MAMBA2, {"n_groups": 2}, "as a whole, not in groups"),
        (DBRX, {"ffn_config": {**DBRX["ffn_config"], "moe_top_k": None}}, "dbrx does not run with"),
    ],
    ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else "",
)
def test_other_architectures_than_the_tiny_ones(tmp_path, config, settings, message):
    def check(config):
        both = normalize(tmp_path, config)
        return check_settings(tmp_path, build_model(tmp_path, both), both)

    assert check(config) == []
    with pytest.raises(CheckpointError, match=message):
        check({**config, **settings})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({**MAMBA2, "model_type": "mamba", "intermediate_size": 128}, "use_bcdt_rms", True),
        (RECURRENT, "embeddings_scale_by_sqrt_dim", False),
        ({**tiny.make_config("gemma2"), "model_type": "gemma2"}, "rope_traditional", True),
    ],
)
def test_a_setting_that_only_mlx_lm_reads_is_refused(tmp_path, config, key, value):
    """transformers ignores it."""

    def check(config):
        both = normalize(tmp_path, config)
        return check_settings(tmp_path, build_model(tmp_path, both), both)

    notes = check(config)
    message = f"{key} {value!r}, which mlx-lm reads and transformers does not"
    with pytest.raises(CheckpointError, match=message):
        check({**config, key: value})
    own_code = {**config, key: value, "auto_map": {"AutoConfig": "configuration.Config"}}
    (note,) = set(check(own_code)) - set(notes)
    assert key in note and "was not compared" in note


def test_synonyms_of_settings_of_transformers_are_allowed(tmp_path):
    """Published checkpoints have them, and conversions have both."""
    sizes = tiny.make_config(tie_word_embeddings=False, rope_theta=...)
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes |= {"n_shared_experts": 1}
    text = {**tiny.make_config("qwen2", tie_word_embeddings=False), "model_type": "qwen2_vl_text"}
    for words in (
        {"model_type": "qwen2_vl", "text_config": text, "tie_word_embeddings": False},
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-M", "num_hidden_layers": 4},
        {"model_type": "gemma3_text", "sliding_window_pattern": 2},
        {"model_type": "dots1", "scoring_func": "noaux_tc", "moe_layer_freq": 1},
        {**DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ):
        both = normalize(tmp_path, {**sizes, **words})
        for config in (both, normalize(tmp_path, both)):
            assert check_settings(tmp_path, build_model(tmp_path, config), config) is not None


def test_settings_that_were_not_compared_give_a_warning(tmp_path):
    """A checkpoint's code may read settings differently from transformers."""
    code: Any = {"auto_map": {"AutoConfig": "configuration.Config"}}
    source = tiny.write_checkpoint(tmp_path / "source", rms_norm_eps=1, **code)
    (warning,) = open_checkpoint(source).warnings
    assert "transformers does not read this config.json" in warning and "rms_norm_eps" in warning


@pytest.mark.parametrize("word", [None, "nope", "rope"])
def test_granite_rotates_only_if_its_config_says_so(tmp_path, word):
    """transformers 5 writes null where the original checkpoints have "nope"."""
    config = {"model_type": "granitemoehybrid", "position_embedding_type": word}
    actual = normalize(tmp_path, config)["position_embedding_type"]
    assert actual == (word or "nope")


def test_mimo_from_the_form_of_transformers(tmp_path):
    """Its window counts the token itself, the published one does not; later layers have one."""
    config = {"model_type": "mimo_v2_flash", "num_hidden_layers": 3, "sliding_window": 9}
    normalized = normalize(tmp_path, config)
    assert (normalized["sliding_window"], normalized["sliding_window_size"]) == (9, 8)
    assert normalized["hybrid_layer_pattern"] == [0, 1, 1] == normalized["moe_layer_freq"]
    assert normalized["swa_num_key_value_heads"] == 2 * normalized["num_key_value_heads"]
    published = {"model_type": "mimo_v2_flash", "num_hidden_layers": 3, "sliding_window_size": 8}
    assert normalize(tmp_path, published)["sliding_window_size"] == 8


def test_scaling_that_a_class_does_not_support_is_refused(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    both = normalize(tmp_path, {"model_type": "nanochat", "rope_parameters": rope, **heads})
    with pytest.raises(
        CheckpointError, match=r"rotary embeddings linear.* nanochat has plain ones"
    ):
        check_settings(tmp_path, build_model(tmp_path, both), both)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("lost", ["its table", "its base"])
def test_rotary_embeddings_without_settings_of_a_layer_type_are_refused(tmp_path, kind, lost):
    """The settings of the other layer type would be used instead."""
    rope = {name: {"rope_theta": 5e3} for name in ("full_attention", "sliding_attention")}
    rope |= {kind: {"rope_type": "default"}} if lost == "its base" else {}
    rope = {name: table for name, table in rope.items() if lost == "its base" or name != kind}
    config = {"model_type": "mimo_v2_flash", "num_hidden_layers": 3, "rope_parameters": rope}
    message = "expected settings of full_attention, s" if lost == "its table" else "a rope_theta"
    with pytest.raises(CheckpointError, match=message):
        normalize(tmp_path, config)


def test_a_missing_factor_is_reported(tmp_path):
    for config in ({}, {"dim_model_base": 256}, {"dim_model_base": 256, "hidden_size": 0}):
        config |= {"model_type": "minicpm3", "tie_word_embeddings": True}
        with pytest.raises(CheckpointError, match=r"lacks the factors of a minicpm3: \w+Error"):
            fold_multipliers(tmp_path, {}, config)


def test_factors_that_mlx_lm_ignores_are_folded_into_the_weights(tmp_path):
    ones = mx.ones((2, 2))
    layer = "model.layers.0.self_attn"
    tensors = {f"{layer}.{leaf}_proj.weight": ones for leaf in "qkvo"}
    tensors["model.layers.0.mamba.conv1d.weight"] = mx.ones((4, 1, 3))
    config = {"model_type": "falcon_h1", "key_multiplier": 0.5, "attention_in_multiplier": 3.0}
    folded = fold_multipliers(tmp_path, tensors, config)
    means = {name: array.mean().item() for name, array in folded.items()}
    assert [means[f"{layer}.{leaf}_proj.weight"] for leaf in "qkvo"] == [1, 0.5, 3, 1]
    folded = {**tensors, "model.layers.0.mamba.conv1d.weight": mx.ones((4, 3, 1))}
    assert all(
        mx.array_equal(w, folded[n]) for n, w in fold_multipliers(tmp_path, folded, config).items()
    )

    tensors = {"model.norm.weight": ones, "model.layers.0.norm.weight": ones}
    config = {"model_type": "minicpm3", "dim_model_base": 256, "hidden_size": 512}
    for tied, mean in ((True, 0.5), (False, 1)):
        folded = fold_multipliers(tmp_path, tensors, {**config, "tie_word_embeddings": tied})
        assert folded["model.norm.weight"].mean().item() == mean
        assert folded["model.layers.0.norm.weight"].mean().item() == 1


GROUPS = {"n_group": 4, "topk_group": 2}
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("key", ["n_group", "num_expert_group"])
def test_no_expert_of_an_unselected_group_is_chosen(key):
    random = np.random.default_rng(0)
    gates, correction = random.normal(size=(50, 16)), random.uniform(-2, -0.5, 16)
    scores = 1 / (1 + np.exp(-gates)) + correction
    groups = scores.reshape(50, 4, 4)
    sums = np.sort(groups, axis=-1)[..., -2:].sum(-1)
    is_kept = sums >= np.sort(sums)[:, 2:3]
    expected = np.where(is_kept[..., None], groups, -np.inf).reshape(50, 16).argsort()[:, -4:]

    def chosen(config):
        tensors = {CORRECTION: mx.array(correction).astype(mx.float32), "norm.weight": mx.array([])}
        bias = shift_corrections(tensors, config)[CORRECTION]
        actual = group_expert_select(mx.array(gates), bias, 4, 4, 2, 1.0, True)[0]
        return np.sort(np.array(actual), axis=-1)

    assert not np.array_equal(chosen({key: 1}), np.sort(expected))  # mlx-lm's choice
    np.testing.assert_array_equal(chosen({key: 4}), np.sort(expected))


def test_negative_corrections_are_shifted_when_loaded_and_converted(tmp_path):
    config = {**DEEPSEEK, **GROUPS, "n_routed_experts": 8, "first_k_dense_replace": 1}
    source = tiny.write_checkpoint(tmp_path / "source", vocab_size=config["vocab_size"])
    (source / "config.json").write_text(json.dumps(config))
    model = build_model(source, normalize(source, config))
    stored = mx.arange(-5, 3).astype(mx.bfloat16) / 8
    tiny.write_weights(source, {**parameters(model), CORRECTION: stored})
    raised = mx.arange(8) / 8
    assert mx.array_equal(parameters(load_model(source))[CORRECTION], raised)
    convert(source, tmp_path / "out", recipe=Recipe(method="rtn", group_size=32))
    file = tmp_path / "out" / "model.safetensors"
    loaded: Any = mx.load(str(file), return_metadata=True)
    tensors, metadata = loaded
    assert mx.array_equal(tensors[CORRECTION], raised)
    mx.eval(tensors)
    mx.save_safetensors(str(file), {**tensors, CORRECTION: stored}, metadata)  # by another program
    assert mx.array_equal(parameters(load_model(tmp_path / "out"))[CORRECTION], raised)
