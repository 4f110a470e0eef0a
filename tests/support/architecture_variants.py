"""The tiny models of architectures.py: their settings, architecture by architecture."""

from dataclasses import dataclass, field
from typing import Any

VOCAB = 96
# of these, a configuration class gets those that it knows
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # mixtures of experts
    "moe_hidden_size": 64,
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # multi-head latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
BASE = 5_000.0
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + n / 16 for n in range(8)],
        "long_factor": [1.5 + n / 8 for n in range(8)],
        "original_max_position_embeddings": 64,
    },
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of one tiny model.

    Attributes:
        architecture: its model_type.
        name: what is special about it.
        settings: of transformers' configuration class, beside SMALL and a base of its own.
        tokens: length of the text.
    """

    architecture: str
    name: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 48


# parts that see or hear, which the language model inside is compared without
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "embed_dim": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 64,
    "projection_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "num_position_embeddings": 16,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "deepstack_visual_indexes": [0],
    "layer_types": ["full_attention"],
}
WRAPPER = {
    "mm_tokens_per_image": 4,
    "projection_hidden_size": 32,
    "projector_hidden_size": 32,
    "merged_hidden_size": 32,
    "out_hidden_size": 64,
}
# language models of wrappers that take several
TEXTS = {"mistral3": "ministral3"}
# wrappers whose language model is written alone, and renamed: what transformers saves of Kimi is
# misnamed, and Gemma 3n's eyes need another package
ALONE = {"gemma3n": ("model.", "model.language_model."), "kimi_k25": ("", "language_model.")}
# transformers has no language model of that name; or mlx-lm's runs with Metal alone
LEFT_OUT = {"mistral4", "pixtral", "step3p5", "muse_spark"}
_MLA = {"num_key_value_heads": 4}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        **_MLA,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "layer_group_size": 2,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": BASE},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    },
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "mimo_v2_flash": {"head_dim": 24},
    # of keys and values of other widths, transformers saves convolutions that are cut in thirds
    "olmo_hybrid": {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "minicpm3": {
        **_MLA,
        "v_head_dim": 16,
        "rope_parameters": {**ROPES["longrope"], "rope_theta": 5000.0},
    },
    "longcat_flash": {
        **_MLA,
        "num_layers": 2,
        "head_dim": 16,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 64,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neox": {"intermediate_size": 256},
    "granite": _MULTIPLIERS,
    "granitemoe": _MULTIPLIERS,
    "granitemoehybrid": {
        **_MULTIPLIERS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "position_embedding_type": "rope",
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "helium": {"num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    "gemma2": {"query_pre_attn_scalar": 16},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": {**_MLA, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "olmo3": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 5000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "qwen3_next": _GATED_DELTA,
    "qwen2_vl_text": {"rope_parameters": {**_MROPE, "rope_theta": BASE}},
    "qwen2_5_vl_text": {"rope_parameters": {**_MROPE, "rope_theta": BASE}},
    "qwen3_vl_moe_text": {"sliding_window": None},
    "mistral4": {
        **_MLA,
        "qk_nope_head_dim": 16,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
    },
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _GATED_DELTA),
    "kimi_linear": {
        **_MLA,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_shared_experts": 1,
        "num_experts_per_token": 2,
    },
    "exaone4": {"sliding_window_pattern": 4},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    "minimax_m3_vl_text": {
        "rotary_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": BASE,
            "partial_rotary_factor": 0.5,
        },
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "recurrent_gemma": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 128,
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 16,
        "intermediate_size": 128,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 3,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
    },
}
_PARTIAL = {"rope_parameters": {"partial_rotary_factor": 0.5}}
VARIANTS: list[dict[str, Any]] = [
    *(
        {"architecture": a, "name": kind, "settings": {"rope_parameters": ROPES[kind]}}
        for a, kinds in {
            "llama": tuple(ROPES),
            "phi3": ("longrope",),
            "qwen2": ("yarn", "dynamic"),
            "qwen3": ("yarn", "llama3"),
            "mistral": ("linear",),
            "granite": ("linear", "longrope"),
            "olmo2": ("llama3",),
            "smollm3": ("yarn",),
            "gemma2": ("linear",),
            "starcoder2": ("yarn",),
        }.items()
        for kind in kinds
    ),
    *(
        {"architecture": a, "name": "longer than the window", "settings": {"sliding_window": 16}}
        for a in ("mistral", "mixtral", "gemma2", "gemma3_text", "cohere2", "olmo3", "phi3")
    ),
    *(
        {"architecture": a, "name": "longer than the window", "settings": {"sliding_window": 16}}
        for a in ("exaone4", "gemma4_text", "starcoder2", "afmoe", "laguna", "mellum", "gpt_oss")
    ),
    *(
        {
            "architecture": a,
            "name": "longer than the window",
            "settings": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        }
        for a in ("qwen2", "qwen3", "qwen3_moe")
    ),
    *(
        {"architecture": a, "name": "tied", "settings": {"tie_word_embeddings": True}}
        for a in ("llama", "qwen3", "mixtral", "olmo2", "phi3", "gpt_neox", "starcoder2", "granite")
    ),
    *(
        {"architecture": a, "name": "untied", "settings": {"tie_word_embeddings": False}}
        for a in ("gemma", "gemma2", "gemma3_text", "cohere", "lfm2", "falcon_h1", "exaone4")
    ),
    *(
        {"architecture": a, "name": "own head_dim", "settings": {"head_dim": 32}}
        for a in ("llama", "mistral", "mixtral", "qwen3", "gemma", "granite", "qwen3_moe", "glm4")
    ),
    *(
        {"architecture": a, "name": "biases", "settings": {"attention_bias": True, **more}}
        for a, more in (("llama", {"mlp_bias": True}), ("qwen3", {}), ("olmo2", {}), ("gemma", {}))
    ),
    *(
        {"architecture": a, "name": "half rotated", "settings": _PARTIAL}
        for a in ("llama", "phi", "glm4", "stablelm", "gpt_neox", "nemotron", "phi3")
    ),
    *(
        {"architecture": a, "name": "longer than the window", "settings": {"sliding_window": 16}}
        for a in ("gemma3", "gemma3n", "gemma4", "mistral3")
    ),
    {"architecture": "llama4", "name": "chunks", "settings": {"attention_chunk_size": 16}},
    {
        "architecture": "llama4",
        "name": "all rotated",
        "settings": {"no_rope_layers": [1, 1, 1, 1], "attn_temperature_tuning": False},
    },
    {"architecture": "mistral3", "name": "Mistral inside", "settings": {"model_type": "mistral"}},
    {
        "architecture": "mistral3",
        "name": "Mistral 4 inside",
        "settings": {"model_type": "mistral4"},
    },
    {"architecture": "qwen3_vl", "name": "tied", "settings": {"tie_word_embeddings": True}},
    *(
        {
            "architecture": a,
            "name": "longrope, long text",
            "settings": {"rope_parameters": ROPES["longrope"], **more},
            "tokens": 80,
        }
        for a, more in (("llama", {}), ("phi3", {"original_max_position_embeddings": 64}))
    ),
    *(
        {
            "architecture": a,
            "name": "yarn, not rounded",
            "settings": {"rope_parameters": {**ROPES["yarn"], "truncate": False}},
        }
        for a in ("llama", "gpt_oss")
    ),
    {
        "architecture": "gemma2",
        "name": "softcapping",
        "settings": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
    },
    {
        "architecture": "deepseek_v3",
        "name": "yarn",
        "settings": {"rope_parameters": {**ROPES["yarn"], "mscale": 1.0, "mscale_all_dim": 1.0}},
    },
    {
        "architecture": "deepseek_v3",
        "name": "groups",
        "settings": {"n_group": 2, "num_experts_per_tok": 2},
    },
    {"architecture": "llama", "name": "gelu", "settings": {"hidden_act": "gelu"}},
    {"architecture": "qwen3_moe", "name": "not normalized", "settings": {"norm_topk_prob": False}},
    {"architecture": "qwen2_moe", "name": "normalized", "settings": {"norm_topk_prob": True}},
    {"architecture": "jamba", "name": "without experts", "settings": {"num_experts": 1}},
    {
        "architecture": "gemma3_text",
        "name": "linear",
        "settings": {"rope_parameters": {"full_attention": {**ROPES["linear"], "rope_theta": 9e3}}},
    },
    {
        "architecture": "olmo3",
        "name": "yarn",
        "settings": {"rope_parameters": {"full_attention": {**ROPES["yarn"], "rope_theta": 5e3}}},
    },
]
