"""Convert the metadata of a GGUF file to the config.json of the same model."""

import warnings
from typing import Any

from splitquant_mlx.errors import CheckpointError, SplitQuantWarning
from splitquant_mlx.formats.gguf import Gguf
from splitquant_mlx.formats.gguf_architectures import LOCAL_EXPERTS, Architecture, architecture_of
from splitquant_mlx.formats.gguf_rope import LOG_MULTIPLIER, rope_scaling
from splitquant_mlx.formats.gguf_settings import block_count, count, key_of, number, setting
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE, end_token_ids

ATTENTION_FACTOR = "rope.scaling.attn_factor"
LATENT_KEYS = {
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.kv_lora_rank",
    "attention.q_lora_rank",
    LOG_MULTIPLIER,
}
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of the gating functions
INNER_AND_HEADS = ("inner_size", "time_step_rank")
# groups of DeepSeek 2 and 3 by number of experts; files from before autumn 2025 omit them
DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
# keys that are read, or that repeat what tensors and architecture imply
KNOWN_KEYS = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon attention.sliding_window "
    "attention.sliding_window_pattern rope.dimension_count "
    "rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
    "expert_count expert_used_count expert_feed_forward_length expert_gating_func "
    "expert_shared_feed_forward_length nextn_predict_layers ssm.inner_size "
    "rope.dimension_sections".split()
)


def model_config(gguf: Gguf, dtype: str) -> dict[str, Any]:
    """Return the config.json of the model that the metadata describes.

    Args:
        gguf: the opened file.
        dtype: dtype of the weights to write.

    Raises:
        CheckpointError: when a setting is missing, not a number, or not supported.
    """
    metadata, architecture = gguf.metadata, architecture_of(gguf.metadata)
    tokens, layers = metadata.get("tokenizer.ggml.tokens"), block_count(metadata)
    layers -= count(metadata, "nextn_predict_layers", layers - 1)
    embedding = gguf.tensors.get("token_embd.weight")
    if layers > len(gguf.tensors) or embedding is None or not isinstance(tokens, list):
        raise CheckpointError(
            f"expected an embedding, tokens and tensors for {layers} layers, got "
            f"{len(gguf.tensors)} tensors and tokens {tokens!r:.80}; the file is incomplete"
        )
    if len(tokens) > embedding.shape[0]:
        raise CheckpointError(
            f"tensor 'token_embd.weight': expected at least {len(tokens)} rows, one per token, got "
            f"shape {embedding.shape}; the file is corrupt"
        )
    config = {
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": number(metadata, "embedding_length", int),
        "intermediate_size": number(metadata, "feed_forward_length", int),
        "num_hidden_layers": layers,
        **_attention(metadata, architecture),
        "max_position_embeddings": number(metadata, "context_length", int),
        "rms_norm_eps": _epsilon(metadata),
        "rope_theta": number(metadata, "rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        **{key: value for key, value in _biases(gguf).items() if key in architecture.biases},
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": dtype,
        **architecture.fixed,
    }
    config |= {key: setting(metadata, name) for key, name in architecture.settings.items()}
    for key, (name, default) in architecture.optional.items():
        config[key] = setting(metadata, name, default)
    config |= _variant(gguf, config)
    config |= _windows(metadata, config)
    config |= rope_scaling(gguf, config)
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    if eos := end_token_ids(metadata):
        config["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    _warn_unknown(metadata, architecture)
    return config


def _warn_unknown(metadata: dict[str, Any], architecture: Architecture) -> None:
    prefix = key_of(metadata, "")
    names = {key.removeprefix(prefix) for key in metadata if key.startswith(prefix)}
    known = KNOWN_KEYS.union(architecture.settings.values())
    known |= {name for name, _ in architecture.optional.values()}
    known |= LATENT_KEYS if architecture.latent else set()
    if architecture.model_type == "ministral3":
        known |= {"attention.temperature_scale", LOG_MULTIPLIER}
    # Phi-3's follows from the context lengths; elsewhere 1 is the default
    if architecture.model_type == "phi3" or metadata.get(f"{prefix}{ATTENTION_FACTOR}") == 1:
        known |= {ATTENTION_FACTOR}
    if unknown := sorted(names - known):
        warnings.warn(
            f"unknown settings of the file are left out: {', '.join(unknown)}",
            SplitQuantWarning,
            stacklevel=3,
        )


def _epsilon(metadata: dict[str, Any]) -> float:
    name = "attention.layer_norm_rms_epsilon"
    if key_of(metadata, name) not in metadata:
        name = "attention.layer_norm_epsilon"
    return number(metadata, name, float)


def _attention(metadata: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    heads = number(metadata, "attention.head_count", int)
    if architecture.latent:
        return _latent_attention(metadata, heads)
    if architecture.layer_types:
        return _attention_by_layer(metadata, heads, architecture.layer_types)
    kv_heads = number(metadata, "attention.head_count_kv", int, heads)
    hidden = number(metadata, "embedding_length", int)
    head_dim = number(metadata, "attention.key_length", int, max(1, hidden // heads))
    value_dim = number(metadata, "attention.value_length", int, head_dim)
    rotated = number(metadata, "rope.dimension_count", int, head_dim)
    rotation_valid = rotated == head_dim or (architecture.partial_rotary and rotated < head_dim)
    if head_dim != value_dim or head_dim % 2 or heads % kv_heads or not rotation_valid:
        raise CheckpointError(
            f"attention: expected heads of one even size, got {heads} heads of {head_dim} channels "
            f"({rotated} rotated) and {kv_heads} value heads of {value_dim}; {ELSEWHERE}"
        )
    result: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    if architecture.partial_rotary:
        result["partial_rotary_factor"] = rotated / head_dim
    return result


def _latent_attention(metadata: dict[str, Any], heads: int) -> dict[str, Any]:
    rotated = number(metadata, "rope.dimension_count", int)
    # older files have only the keys without the suffix
    mla = "_mla" if key_of(metadata, "attention.key_length_mla") in metadata else ""
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": number(metadata, "attention.kv_lora_rank", int),
        "q_lora_rank": setting(metadata, "attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": max(0, number(metadata, f"attention.key_length{mla}", int) - rotated),
        "v_head_dim": number(metadata, f"attention.value_length{mla}", int),
    }


def _attention_by_layer(
    metadata: dict[str, Any], heads: int, names: tuple[str, str]
) -> dict[str, Any]:
    kv_heads = metadata.get(key_of(metadata, "attention.head_count_kv"))
    if (
        not isinstance(kv_heads, list)
        or len(kv_heads) != block_count(metadata)
        or any(type(n) is not int or not 0 <= n <= heads for n in kv_heads)
        or len({*kv_heads} - {0}) != 1
    ):
        raise CheckpointError(
            f"attention: expected a number of KV heads per layer, got {kv_heads!r:.80}; {ELSEWHERE}"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads),
        "layer_types": [names[n == 0] for n in kv_heads],
    }


def _biases(gguf: Gguf) -> dict[str, bool]:
    """Return which projections have biases or norms, under all config.json names for it."""
    biased = {name.split(".")[-2] for name in gguf.tensors if name.endswith(".bias")}
    attention = not biased.isdisjoint({"attn_q", "attn_k", "attn_v", "attn_output"})
    mlp = not biased.isdisjoint({"ffn_gate", "ffn_up", "ffn_down"})
    return {
        "attention_bias": attention,
        "attention_out_bias": "attn_output" in biased,
        "mlp_bias": mlp,
        "use_bias": attention or mlp,
        "use_qkv_bias": attention,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in gguf.tensors,
    }


def _variant(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that distinguish models of one GGUF architecture."""
    metadata, name = gguf.metadata, gguf.metadata["general.architecture"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if name == "llama" and metadata.get("llama.expert_count"):
        return {"model_type": "mixtral", **_local_experts(metadata)}
    gating = metadata.get(key_of(metadata, "expert_gating_func"), 1)
    if name == "deepseek2" and gating in (SOFTMAX, SIGMOID):
        return _deepseek(metadata, config, softmax=gating == SOFTMAX)
    if "linear_num_value_heads" in config:
        return _delta_net(metadata, config)
    if name == "granitehybrid":
        return _granite_hybrid(metadata, config)
    if architecture_of(metadata).sigmoid and gating != SIGMOID:
        raise CheckpointError(
            f"{name}.expert_gating_func: expected {SIGMOID} (sigmoid), got {gating!r:.80}; "
            f"{ELSEWHERE}"
        )
    if name == "olmo2" and metadata.get("olmo2.attention.sliding_window"):
        return {"model_type": "olmo3"}
    if name in ("gemma2", "gemma3"):
        # only the 27B models scale queries by a width other than head_dim (llama.cpp)
        is_27b = layers == {"gemma2": 46, "gemma3": 62}[name]
        scalar = config["hidden_size"] // heads if is_27b else config["head_dim"]
        local = number(metadata, "rope.freq_base_swa", float, 10000.0)
        rope = {"rope_local_base_freq": local} if name == "gemma3" else {}
        if name == "gemma3" and "gemma3.rope.freq_base" not in metadata:
            rope["rope_theta"] = 1e6
        return {"query_pre_attn_scalar": scalar, **rope}
    return {}


def _local_experts(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: number(metadata, name, int) for key, name in LOCAL_EXPERTS.items()}


def _deepseek(metadata: dict[str, Any], config: dict[str, Any], softmax: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if key_of(metadata, "expert_group_count") not in metadata:
        groups = DEEPSEEK_GROUPS.get(config["n_routed_experts"], (1, 1))
        result = dict(zip(("n_group", "topk_group"), groups, strict=True))
    if softmax:
        grouped = (config | result)["n_group"] > 1
        method = "group_limited_greedy" if grouped else "greedy"
        result |= {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": method}
    return result


def _delta_net(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    values, heads = (number(metadata, f"ssm.{key}", int) for key in INNER_AND_HEADS)
    result: dict[str, Any] = {"linear_value_head_dim": values // heads}
    sections = metadata.get(key := key_of(metadata, "rope.dimension_sections"))
    if sections is not None:
        if not isinstance(sections, list) or len(sections) < 3:
            raise CheckpointError(f"{key}: expected 3 numbers, got {sections!r:.80}; {ELSEWHERE}")
        result["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config["rope_theta"],
            "partial_rotary_factor": config["partial_rotary_factor"],
            "mrope_section": sections[:3],
            "mrope_interleaved": True,
        }
    return result


def _granite_hybrid(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if metadata.get("granitehybrid.rope.scaling.finetuned"):
        raise CheckpointError(f"expected Granite without rotary embeddings, got Bamba; {ELSEWHERE}")
    inner, heads = (number(metadata, f"ssm.{key}", int) for key in INNER_AND_HEADS)
    sizes = {"mamba_d_head": inner // heads, "mamba_expand": inner // config["hidden_size"]}
    if metadata.get("granitehybrid.expert_count"):
        return sizes | _local_experts(metadata)
    return sizes | {"num_local_experts": 0, "intermediate_size": config["shared_intermediate_size"]}


def _windows(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the attention window and, if the file says so, the layers that have it."""
    if not metadata.get(key_of(metadata, "attention.sliding_window")):  # 0 means none, in Phi-4
        return {}
    result: dict[str, Any] = {"sliding_window": number(metadata, "attention.sliding_window", int)}
    layers = config["num_hidden_layers"]
    pattern = metadata.get(key_of(metadata, "attention.sliding_window_pattern"))
    if type(pattern) is int and pattern > 0:
        pattern = [(n + 1) % pattern != 0 for n in range(layers)]
    if isinstance(pattern, list) and len(pattern) == layers:
        types = ("full_attention", "sliding_attention")
        result["layer_types"] = [types[bool(windowed)] for windowed in pattern]
        if config["model_type"] == "exaone4":
            result["sliding_window_pattern"] = "".join("GL"[bool(windowed)] for windowed in pattern)
    return result
