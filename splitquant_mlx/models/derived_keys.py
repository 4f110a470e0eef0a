"""Keys that mlx-lm's classes read and transformers' configuration classes do not have.

Original checkpoints have them, checkpoints saved by transformers 5 do not. The values follow the
code of the models in transformers; tests/support/architectures.py compares the results.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

Reference = Any  # transformers' configuration of the language model


def _is_sparse(reference: Reference) -> list[bool]:
    return [kind == "sparse" for kind in reference.mlp_layer_types]


def _old_layer_types(reference: Reference) -> list[Any]:
    """Return the layer types by their names in transformers 4."""
    names = {"full_attention": "attention", "linear_attention": "mamba"}
    return [names.get(kind, kind) for kind in reference.layer_types]


def _full_attention_setting(key: str) -> Callable[[Reference], Any]:
    """Return a function that returns a setting of the full-attention layers."""

    def value(reference: Reference) -> Any:
        layers = getattr(reference, "per_layer_config", None)
        full = reference.layer_types.index("full_attention")
        return getattr(layers[full], key) if layers else getattr(reference, key)

    return value


_GEMMA4 = {
    "global_head_dim": _full_attention_setting("head_dim"),
    "num_global_key_value_heads": _full_attention_setting("num_key_value_heads"),
}
# model_type -> key -> value, or a function of the configuration
DERIVED: dict[str, dict[str, Any]] = {
    "apertus": {
        "mlp_bias": False,
        "post_norm": False,
        "qk_norm": True,
    },
    "exaone_moe": {"is_moe_layer": _is_sparse},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {**_GEMMA4, "hidden_size_per_layer_input": 0},
    "glm_moe_dsa": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "first_k_dense_replace": lambda c: [*_is_sparse(c), True].index(True),
    },
    "gpt2": {"n_ctx": lambda c: c.n_positions},
    "gpt_bigcode": {"n_inner": lambda c: 4 * c.n_embd},
    "granitemoehybrid": {
        "layer_types": _old_layer_types,
        "position_embedding_type": lambda c: (
            "rope" if c.position_embedding_type == "rope" else "nope"
        ),
    },
    "lfm2": {"block_dim": lambda c: c.hidden_size},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba2": {"intermediate_size": lambda c: c.expand * c.hidden_size},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": lambda c: [
            int(kind == "sliding_attention") for kind in c.layer_types
        ],
        "moe_layer_freq": lambda c: [int(sparse) for sparse in _is_sparse(c)],
        "sliding_window_size": lambda c: c.sliding_window - 1,  # excludes the token itself
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": lambda c: c.rms_norm_eps,
        "swa_num_attention_heads": lambda c: c.num_attention_heads,
        "swa_num_key_value_heads": lambda c: 2 * c.num_key_value_heads,
        "swa_head_dim": lambda c: c.head_dim,
        "swa_v_head_dim": lambda c: c.v_head_dim,
    },
    "minimax_m2": {
        "shared_intermediate_size": 0,
        "rotary_dim": lambda c: int(c.head_dim * c.rope_parameters.get("partial_rotary_factor", 1)),
    },
    "nemotron_h": {"layers_block_type": _old_layer_types},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "solar_open": {
        "intermediate_size": lambda c: c.moe_intermediate_size,
        "first_k_dense_replace": 0,
        "partial_rotary_factor": 1.0,
    },
}


def derived_keys(reference: Reference) -> dict[str, Any]:
    """Return the keys of an architecture that transformers does not have; {} without reference."""
    if reference is None:
        return {}
    derived = {}
    for key, value in DERIVED.get(reference.model_type, {}).items():
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            derived[key] = value(reference) if callable(value) else value
    heads, width = (getattr(reference, key, None) for key in ("num_attention_heads", "hidden_size"))
    if isinstance(heads, int) and isinstance(width, int) and heads:
        derived["head_dim"] = width // heads  # a default, if the configuration has none
    return derived
