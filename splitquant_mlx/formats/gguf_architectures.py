"""Supported GGUF architectures, and how llama.cpp's converters change their weights.

`ARCHITECTURES` has what GGUF files omit because all models of the architecture share it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf_joined import (
    DELTA_NET,
    FUSED_QKV,
    GROUPED_DELTA_NET,
    LATENT,
    MAMBA,
    Joined,
)
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE

EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
SHARED_EXPERTS = {
    **EXPERTS,
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
GROUPED_EXPERTS = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
}
GROUPS = {
    "n_group": ("expert_group_count", 1),
    "topk_group": ("expert_group_used_count", 1),
    "routed_scaling_factor": ("expert_weights_scale", 1.0),
    "norm_topk_prob": ("expert_weights_norm", False),
}
WINDOW = {"sliding_window": "attention.sliding_window"}
MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
SOFTCAPS = {
    f"{place}_logit_softcapping": f"{place}_logit_softcapping" for place in ("attn", "final")
}
LAYER_NORM = "attention.layer_norm_epsilon"
GELU = {"hidden_act": "gelu_pytorch_tanh"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Mapping of one GGUF architecture to config.json.

    Args:
        model_type: mlx-lm's name of the architecture.
        settings: config.json key -> metadata key of its value.
        optional: config.json key -> metadata key and default.
        fixed: config.json entries that all models of the architecture share.
        sigmoid: the router's scores are sigmoids, not a softmax.
        latent: multi-head latent attention (MLA).
        layer_types: names of the layers with and without key and value heads.
        interleaved: the converter permuted the rows of the query and key projections: llama.cpp
            rotates adjacent channels, transformers channels i and i + head_dim / 2.
        biases: the settings that say which projections have biases.
        norm_offset: number that the converter added to the weights of norms.
        partial_rotary: only some of a head's channels may be rotated.
        joined: parameters that the converter changed, by their names after "model.layers.N.".
        multimodal: the model is the language model of a multimodal one.
        wide_range: activations overflow float16.
    """

    model_type: str
    settings: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sigmoid: bool = False
    latent: bool = False
    layer_types: tuple[str, str] | None = None
    interleaved: bool = False
    biases: tuple[str, ...] = ("attention_bias", "mlp_bias")
    norm_offset: float = 0.0
    partial_rotary: bool = False
    joined: Mapping[str, Joined] = field(default_factory=dict)
    multimodal: bool = False
    wide_range: bool = False


def _gemma(model_type: str, **settings: Any) -> Architecture:
    return Architecture(model_type=model_type, norm_offset=1.0, wide_range=True, **settings)


def _delta_net(model_type: str, settings: Mapping[str, str], **others: Any) -> Architecture:
    return Architecture(
        model_type=model_type,
        settings={
            **settings,
            "linear_num_value_heads": "ssm.time_step_rank",
            "linear_num_key_heads": "ssm.group_count",
            "linear_key_head_dim": "ssm.state_size",
            "linear_conv_kernel_dim": "ssm.conv_kernel",
        },
        optional={"full_attention_interval": ("full_attention_interval", 4)},
        partial_rotary=True,
        biases=("attention_bias",),
        **others,
    )


def _lfm2(model_type: str, settings: Mapping[str, str], **fixed: Any) -> Architecture:
    return Architecture(
        model_type=model_type,
        settings={
            **settings,
            "norm_eps": "attention.layer_norm_rms_epsilon",
            "conv_L_cache": "shortconv.l_cache",
        },
        fixed={"conv_bias": False, **fixed},
        layer_types=("full_attention", "conv"),
        biases=(),
    )


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", interleaved=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen2moe": Architecture(model_type="qwen2_moe", settings=SHARED_EXPERTS),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        settings=EXPERTS,
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "gemma": _gemma("gemma", fixed=GELU),
    "gemma2": _gemma("gemma2", settings={**WINDOW, **SOFTCAPS}),
    "gemma3": _gemma("gemma3_text", settings=WINDOW, fixed={"sliding_window_pattern": 6}),
    "phi3": Architecture(model_type="phi3", partial_rotary=True),
    "olmo2": Architecture(model_type="olmo2"),
    "olmoe": Architecture(
        model_type="olmoe",
        settings={key: EXPERTS[key] for key in ("num_experts", "num_experts_per_tok")},
        fixed={"norm_topk_prob": False},
    ),
    "smollm3": Architecture(
        model_type="smollm3", interleaved=True, fixed={"no_rope_layer_interval": 4}
    ),
    "granite": Architecture(model_type="granite", settings=MULTIPLIERS, interleaved=True),
    "granitemoe": Architecture(
        model_type="granitemoe", settings={**MULTIPLIERS, **LOCAL_EXPERTS}, interleaved=True
    ),
    "granitehybrid": Architecture(
        model_type="granitemoehybrid",
        settings={
            **MULTIPLIERS,
            "shared_intermediate_size": "expert_shared_feed_forward_length",
            "mamba_n_heads": "ssm.time_step_rank",
            "mamba_d_state": "ssm.state_size",
            "mamba_d_conv": "ssm.conv_kernel",
            "mamba_n_groups": "ssm.group_count",
        },
        fixed={
            "position_embedding_type": "nope",
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
        },
        interleaved=True,
        layer_types=("attention", "mamba"),
        joined=MAMBA,
    ),
    "starcoder2": Architecture(
        model_type="starcoder2",
        settings={"norm_epsilon": LAYER_NORM},
        fixed=GELU,
        biases=("use_bias",),
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        settings={**LOCAL_EXPERTS, **WINDOW, "intermediate_size": "expert_feed_forward_length"},
    ),
    "glm4": Architecture(model_type="glm4", partial_rotary=True),
    "command-r": Architecture(
        model_type="cohere",
        settings={"layer_norm_eps": LAYER_NORM, "logit_scale": "logit_scale"},
    ),
    "cohere2": Architecture(
        model_type="cohere2",
        settings={**WINDOW, "layer_norm_eps": LAYER_NORM, "logit_scale": "logit_scale"},
    ),
    "seed_oss": Architecture(
        model_type="seed_oss", biases=("attention_bias", "attention_out_bias", "mlp_bias")
    ),
    "mistral3": Architecture(model_type="ministral3", interleaved=True),
    "ernie4_5": Architecture(model_type="ernie4_5", biases=("use_bias",)),
    "glm4moe": Architecture(
        model_type="glm4_moe",
        settings=GROUPED_EXPERTS,
        optional=GROUPS,
        fixed={"rope_scaling": None},
        partial_rotary=True,
        sigmoid=True,
        biases=("attention_bias", "use_qk_norm"),
    ),
    "minimax-m2": Architecture(
        model_type="minimax_m2",
        settings={
            **LOCAL_EXPERTS,
            "intermediate_size": "expert_feed_forward_length",
            "rotary_dim": "rope.dimension_count",
        },
        fixed={"scoring_func": "sigmoid", "use_qk_norm": True, "shared_intermediate_size": 0},
        sigmoid=True,
        partial_rotary=True,
        biases=(),
    ),
    "deepseek2": Architecture(
        model_type="deepseek_v3",
        settings=GROUPED_EXPERTS,
        optional=GROUPS,
        fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        sigmoid=True,
        latent=True,
        joined=LATENT,
        biases=("attention_bias",),
    ),
    "exaone4": Architecture(
        model_type="exaone4",
        fixed={"rope_scaling": None, "sliding_window": None, "sliding_window_pattern": None},
        biases=(),
    ),
    "lfm2": _lfm2(
        "lfm2",
        {"block_dim": "embedding_length", "block_ff_dim": "feed_forward_length"},
        block_auto_adjust_ff_dim=False,
        block_multiple_of=256,
        block_ffn_dim_multiplier=1.0,
    ),
    "lfm2moe": _lfm2(
        "lfm2_moe",
        {**EXPERTS, "num_dense_layers": "leading_dense_block_count"},
        norm_topk_prob=True,
        use_expert_bias=True,
    ),
    "stablelm": Architecture(
        model_type="stablelm",
        settings={"layer_norm_eps": LAYER_NORM},
        optional={"use_parallel_residual": ("use_parallel_residual", True)},
        partial_rotary=True,
        biases=("use_qkv_bias",),
    ),
    "phi2": Architecture(
        model_type="phi",
        settings={"layer_norm_eps": LAYER_NORM},
        fixed={"hidden_act": "gelu_new"},
        partial_rotary=True,
        joined=FUSED_QKV,
        biases=(),
    ),
    "qwen3next": _delta_net(
        "qwen3_next",
        SHARED_EXPERTS,
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        joined=DELTA_NET,
    ),
    "qwen35": _delta_net("qwen3_5", {}, multimodal=True, joined=GROUPED_DELTA_NET),
    "qwen35moe": _delta_net(
        "qwen3_5_moe", SHARED_EXPERTS, multimodal=True, joined=GROUPED_DELTA_NET
    ),
    "nemotron": Architecture(
        model_type="nemotron",
        settings={"norm_eps": LAYER_NORM},
        fixed={"hidden_act": "relu2"},
        norm_offset=1.0,
        partial_rotary=True,
    ),
}


def architecture_of(metadata: dict[str, Any]) -> Architecture:
    """Return the entry of `ARCHITECTURES` for a file's metadata.

    Raises:
        CheckpointError: when the architecture is unknown.
    """
    name = metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"architecture: expected one of {known}, got {name!r:.80}; {ELSEWHERE}"
        )
    return architecture
