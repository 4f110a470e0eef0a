"""Settings that change what a model computes, and that mlx-lm's class leaves out or must not.

Each was followed by transformers alone, without a word, before it was mended or refused.
"""

from typing import Any

SETTINGS: list[dict[str, Any]] = [
    *(
        {"architecture": a, "name": "one expert", "settings": {"num_experts_per_tok": 1}}
        for a in ("phimoe", "deepseek_v3", "glm4_moe", "nemotron_h", "qwen3_moe")
    ),
    {
        "architecture": "gpt2",
        "name": "scaled by layer",
        "settings": {"scale_attn_by_inverse_layer_idx": True},
    },
    *(
        {"architecture": a, "name": "not interleaved", "settings": {"rope_interleave": False}}
        for a in ("deepseek_v3", "glm4_moe_lite")
    ),
    {
        "architecture": "falcon_h1",
        "name": "multipliers",
        "settings": {
            "attention_in_multiplier": 1.1,
            "attention_out_multiplier": 0.6,
            "embedding_multiplier": 2.0,
            "key_multiplier": 0.7,
            "lm_head_multiplier": 0.5,
            "mlp_multipliers": [0.7, 1.3],
            "ssm_in_multiplier": 0.8,
            "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
            "ssm_out_multiplier": 1.4,
        },
    },
    {
        "architecture": "granitemoehybrid",
        "name": "not rotated",
        "settings": {"position_embedding_type": None},
    },
    *(
        {
            "architecture": "minicpm3",
            "name": f"long text, {name}",
            "settings": {"tie_word_embeddings": name == "tied"},
            "tokens": 80,
        }
        for name in ("tied", "untied")
    ),
    {
        "architecture": "gemma3_text",
        "name": "not causal",
        "settings": {"use_bidirectional_attention": True},
    },
    {
        "architecture": "gemma2",
        "name": "without softcapping",
        "settings": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    *(
        {"architecture": a, "name": "large epsilon", "settings": {"rms_norm_eps": 0.1}}
        for a in ("llama", "qwen3", "gemma3_text", "deepseek_v3", "glm4_moe_lite", "llama4")
    ),
    {"architecture": "mamba2", "name": "groups", "settings": {"n_groups": 2}},
    {"architecture": "nemotron_h", "name": "groups", "settings": {"n_groups": 2}},
    *(
        {"architecture": a, "name": "groups", "settings": {"mamba_n_groups": 2}}
        for a in ("granitemoehybrid", "falcon_h1")
    ),
    {
        "architecture": "mamba2",
        "name": "large epsilon",
        "settings": {"layer_norm_epsilon": 0.1},
    },
]
