"""GGUF files of many architectures give the logits of transformers' own model."""

import gguf_models
import mlx.core as mx
import numpy as np
import pytest
import transformers

from splitquant_mlx.models.gguf_import import import_gguf

TOLERANCE = 1e-4  # of logits with a standard deviation of about 1.5
VOCAB = 300
BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
COUNTS = {"expert_count": 4, "expert_used_count": 2}
HEAD_32 = {"attention.key_length": 32, "attention.value_length": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# name: architecture, transformers' class, its settings, the metadata for them
CASES = {
    "llama": ("llama", "Llama", {"head_dim": 32}, HEAD_32),
    "llama with biases, tied": (
        "llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {},
    ),
    "yarn": (
        "llama",
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, COUNTS),
    "qwen2": ("qwen2", "Qwen2", {}, {}),
    "qwen2moe": (
        "qwen2moe",
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 48},
        {**COUNTS, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, HEAD_32),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
        {**COUNTS, **HEAD_32, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        {
            **HEAD_32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 4096,
        },
    ),
    "gemma3": (
        "gemma3",
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,
            "sliding_window": 8,
        },
        {**HEAD_32, "attention.sliding_window": 8, "rope.freq_base": 1e6},
    ),
    "phi3, partly rotated": (
        "phi3",
        "Phi3",
        {"partial_rotary_factor": 0.75},
        {"rope.dimension_count": 12, "rope.scaling.original_context_length": 4096},
    ),
    "olmo2": ("olmo2", "Olmo2", {}, {}),
    "olmo3": (
        "olmo2",
        "Olmo3",
        {"sliding_window": 8},
        {
            "attention.sliding_window": 8,
            "rope.freq_base_swa": 10000.0,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
    ),
    "olmo3, windows elsewhere": (
        "olmo2",
        "Olmo3",
        {
            "sliding_window": 8,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [False, True, True, False],
        },
    ),
    "smollm3": ("smollm3", "SmolLM3", {}, {"rope.dimension_count": 16}),
    "granite": (
        "granite",
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "logits_scaling": 8.0,
        },
        {
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "attention.scale": 0.0625,
            "logit_scale": 8.0,
        },
    ),
}

pytestmark = pytest.mark.slow  # the oracle is transformers with torch


def reference(name):
    """Return transformers' model of a case, with weights that show what happens to them."""
    _, family, settings, _ = CASES[name]
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    torch = pytest.importorskip("torch", reason='pip install ".[parity]"')
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{**BASE, **settings})).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn_like(value) * 1.5 / value.shape[-1] ** 0.5)
            elif "norm" in key:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                value.copy_(torch.randn_like(value) * 0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    from mlx_lm.utils import load_model

    architecture, _, settings, metadata = CASES[name]
    model, config = reference(name), {**BASE, **settings}
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    config["rope_theta"] = _rope_theta(model.config)
    found = {**gguf_models.settings(config), **metadata}
    gguf_models.write(
        tmp_path / "a.gguf",
        architecture,
        {**{f"{architecture}.{key}": v for key, v in found.items()}, **gguf_models.words(VOCAB)},
        gguf_models.tensors(architecture, weights, config),
    )
    (tmp_path / "hf").mkdir()
    import_gguf(tmp_path / "a.gguf", tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, 40))
    torch = pytest.importorskip("torch", reason='pip install ".[parity]"')
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    imported, _ = load_model(tmp_path / "hf")
    imported.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(imported(mx.array(ids))), expected, atol=TOLERANCE)


def _rope_theta(config):
    rope = config.rope_parameters
    return float(rope.get("full_attention", rope)["rope_theta"])
