"""Turn the metadata of a GGUF file into the config.json of the same model."""

import math
import warnings
from typing import Any

import numpy as np

from splitquant_mlx.errors import CheckpointError, SplitQuantWarning
from splitquant_mlx.formats.gguf import Gguf, read_tensor
from splitquant_mlx.formats.gguf_architectures import (
    LOCAL_EXPERTS,
    Architecture,
    architecture_of,
)
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE, end_token_ids

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
MAX_SETTING = 1 << 40
ATTENTION_FACTOR = "rope.scaling.attn_factor"
# The values of all published Llama 3.1, 3.2 and 3.3; GGUF keeps only the factors they lead to.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
LATENT = {
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.kv_lora_rank",
    "attention.q_lora_rank",
    LOG_MULTIPLIER,
}
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of these gating functions
# of DeepSeek 2 and 3 by their number of experts; files of before autumn 2025 leave it out
DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
# Every key that is read, or that says nothing which the tensors and the architecture do not say.
KNOWN = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon attention.sliding_window "
    "attention.sliding_window_pattern rope.dimension_count "
    "rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow "
    "expert_count expert_used_count expert_feed_forward_length expert_gating_func "
    "expert_shared_feed_forward_length nextn_predict_layers ssm.inner_size".split()
)


def model_config(gguf: Gguf, dtype: str) -> dict[str, Any]:
    """Return the config.json of the model that the metadata describes.

    Args:
        gguf: the opened file.
        dtype: in which its weights will be stored.

    Raises:
        CheckpointError: when a setting is missing, no number, or not supported.
    """
    metadata, architecture = gguf.metadata, architecture_of(gguf.metadata)
    tokens, layers = metadata.get("tokenizer.ggml.tokens"), block_count(metadata)
    layers -= _count(metadata, "nextn_predict_layers", layers - 1)
    embedding = gguf.tensors.get("token_embd.weight")
    if layers > len(gguf.tensors) or embedding is None or not isinstance(tokens, list):
        raise CheckpointError(
            f"expected an embedding, tokens and tensors for {layers} layers, got "
            f"{len(gguf.tensors)} tensors and tokens {tokens!r:.80}; the file is incomplete"
        )
    if len(tokens) > embedding.shape[0]:
        raise CheckpointError(
            f"tensor 'token_embd.weight': expected a row for each of {len(tokens)} tokens, got "
            f"shape {embedding.shape}; the file is corrupt"
        )
    config = {
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": _number(metadata, "embedding_length", int),
        "intermediate_size": _number(metadata, "feed_forward_length", int),
        "num_hidden_layers": layers,
        **_attention(metadata, architecture),
        "max_position_embeddings": _number(metadata, "context_length", int),
        "rms_norm_eps": _epsilon(metadata),
        "rope_theta": _number(metadata, "rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        **{key: value for key, value in _biases(gguf).items() if key in architecture.biases},
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": dtype,
        **architecture.fixed,
    }
    config |= {key: _setting(metadata, name) for key, name in architecture.settings.items()}
    for key, (name, default) in architecture.optional.items():
        config[key] = _setting(metadata, name, default)
    config |= _variant(gguf, config)
    config |= _windows(metadata, config)
    config |= _rope_scaling(gguf, config)
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    _note_unknown(metadata, architecture)
    ends = end_token_ids(metadata)
    return config | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def block_count(metadata: dict[str, Any]) -> int:
    """Return the number of a file's layers, those that predict further tokens among them."""
    return _number(metadata, "block_count", int)


def _count(metadata: dict[str, Any], name: str, most: int) -> int:
    value = metadata.get(_key(metadata, name), 0)
    if type(value) is not int or not 0 <= value <= most:
        key = _key(metadata, name)
        raise CheckpointError(f"{key}: expected 0 to {most}, got {value!r:.80}; {ELSEWHERE}")
    return value


def _note_unknown(metadata: dict[str, Any], architecture: Architecture) -> None:
    prefix = _key(metadata, "")
    names = {key.removeprefix(prefix) for key in metadata if key.startswith(prefix)}
    known = KNOWN.union(architecture.settings.values())
    known |= {name for name, _ in architecture.optional.values()}
    known |= LATENT if architecture.latent else set()
    if architecture.model_type == "ministral3":
        known |= {"attention.temperature_scale", LOG_MULTIPLIER}
    # of Phi-3 it follows from the lengths; elsewhere 1 is what all files without it have
    if architecture.model_type == "phi3" or metadata.get(f"{prefix}{ATTENTION_FACTOR}") == 1:
        known |= {ATTENTION_FACTOR}
    if unknown := sorted(names - known):
        warnings.warn(
            f"settings of the file that are not understood, and left out: {', '.join(unknown)}",
            SplitQuantWarning,
            stacklevel=3,
        )


def _key(metadata: dict[str, Any], name: str) -> str:
    return f"{metadata.get('general.architecture')}.{name}"


def _number(metadata: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a positive number; a float32 as its shortest decimal: 1e-05, not 9.99999974e-06."""
    key = _key(metadata, name)
    value = _collapsed(metadata.get(key, default))
    if type(value) not in (int, kind) or not 0 < value < MAX_SETTING:
        expected = f"a positive {kind.__name__} below {MAX_SETTING}"
        raise CheckpointError(f"{key}: expected {expected}, got {value!r:.80}; {ELSEWHERE}")
    return value if kind is int else float(str(np.float32(value)))


def _setting(metadata: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return a number, none or more, or a switch."""
    value = _collapsed(metadata.get(_key(metadata, name), default))
    if isinstance(value, bool) or value == 0:
        return value
    return _number(metadata, name, int if isinstance(value, int) else float, default)


def _collapsed(value: Any) -> Any:
    """Return the one number that all layers have, where there is one for each of them."""
    same = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if same else value


def _epsilon(metadata: dict[str, Any]) -> float:
    name = "attention.layer_norm_rms_epsilon"
    if _key(metadata, name) not in metadata:
        name = "attention.layer_norm_epsilon"
    return _number(metadata, name, float)


def _attention(metadata: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    heads = _number(metadata, "attention.head_count", int)
    if architecture.latent:
        return _latent_attention(metadata, heads)
    if architecture.layer_types:
        return _attention_in_some_layers(metadata, heads, architecture.layer_types)
    kv_heads = _number(metadata, "attention.head_count_kv", int, heads)
    hidden = _number(metadata, "embedding_length", int)
    head_dim = _number(metadata, "attention.key_length", int, max(1, hidden // heads))
    value_dim = _number(metadata, "attention.value_length", int, head_dim)
    rotated = _number(metadata, "rope.dimension_count", int, head_dim)
    whole = rotated == head_dim or (architecture.partial_rotary and rotated < head_dim)
    if head_dim != value_dim or head_dim % 2 or heads % kv_heads or not whole:
        raise CheckpointError(
            f"attention: expected equal even sizes of heads, got {heads} heads of {head_dim} "
            f"channels, {rotated} of them rotated, and {kv_heads} value heads of {value_dim}; "
            f"{ELSEWHERE}"
        )
    found: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    if architecture.partial_rotary:
        found["partial_rotary_factor"] = rotated / head_dim
    return found


def _latent_attention(metadata: dict[str, Any], heads: int) -> dict[str, Any]:
    rotated = _number(metadata, "rope.dimension_count", int)
    # older files know no other lengths
    mla = "_mla" if _key(metadata, "attention.key_length_mla") in metadata else ""
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": _number(metadata, "attention.kv_lora_rank", int),
        "q_lora_rank": _setting(metadata, "attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": max(0, _number(metadata, f"attention.key_length{mla}", int) - rotated),
        "v_head_dim": _number(metadata, f"attention.value_length{mla}", int),
    }


def _attention_in_some_layers(
    metadata: dict[str, Any], heads: int, names: tuple[str, str]
) -> dict[str, Any]:
    of_layers = metadata.get(_key(metadata, "attention.head_count_kv"))
    if (
        not isinstance(of_layers, list)
        or len(of_layers) != block_count(metadata)
        or any(type(n) is not int or not 0 <= n <= heads for n in of_layers)
        or len({*of_layers} - {0}) != 1
    ):
        raise CheckpointError(
            f"attention: expected key and value heads of each layer, got {of_layers!r:.80}; "
            f"{ELSEWHERE}"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": max(of_layers),
        "layer_types": [names[n == 0] for n in of_layers],
    }


def _biases(gguf: Gguf) -> dict[str, bool]:
    """Tell which projections have biases or norms, under all names that there are for it."""
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
    """Return what tells models apart that share a GGUF architecture."""
    metadata, name = gguf.metadata, gguf.metadata["general.architecture"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if name == "llama" and metadata.get("llama.expert_count"):
        experts = {key: _number(metadata, of, int) for key, of in LOCAL_EXPERTS.items()}
        return {"model_type": "mixtral", **experts}
    gating = metadata.get(_key(metadata, "expert_gating_func"), 1)
    if name == "deepseek2" and gating in (SOFTMAX, SIGMOID):
        return _deepseek(metadata, config, softmax=gating == SOFTMAX)
    if name == "qwen3next":
        values = _number(metadata, "ssm.inner_size", int)
        return {"linear_value_head_dim": values // config["linear_num_value_heads"]}
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
        # only the 27B models scale their queries by another width than a head's (llama.cpp)
        of_27b = layers == {"gemma2": 46, "gemma3": 62}[name]
        scalar = config["hidden_size"] // heads if of_27b else config["head_dim"]
        local = _number(metadata, "rope.freq_base_swa", float, 10000.0)
        of_gemma3 = {"rope_local_base_freq": local} if name == "gemma3" else {}
        if name == "gemma3" and "gemma3.rope.freq_base" not in metadata:
            of_gemma3["rope_theta"] = 1e6
        return {"query_pre_attn_scalar": scalar, **of_gemma3}
    return {}


def _deepseek(metadata: dict[str, Any], config: dict[str, Any], softmax: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if _key(metadata, "expert_group_count") not in metadata:
        groups = DEEPSEEK_GROUPS.get(config["n_routed_experts"], (1, 1))
        found = dict(zip(("n_group", "topk_group"), groups, strict=True))
    if softmax:
        grouped = (config | found)["n_group"] > 1
        method = "group_limited_greedy" if grouped else "greedy"
        found |= {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": method}
    return found


def _granite_hybrid(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if metadata.get("granitehybrid.rope.scaling.finetuned"):
        raise CheckpointError(f"expected Granite without rotary embeddings, got Bamba; {ELSEWHERE}")
    inner = _number(metadata, "ssm.inner_size", int)
    found = {
        "mamba_d_head": inner // config["mamba_n_heads"],
        "mamba_expand": inner // config["hidden_size"],
    }
    if metadata.get("granitehybrid.expert_count"):
        return found | {key: _number(metadata, of, int) for key, of in LOCAL_EXPERTS.items()}
    return found | {"num_local_experts": 0, "intermediate_size": config["shared_intermediate_size"]}


def _windows(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the attention window, and in which layers it is where the file says so."""
    if not metadata.get(_key(metadata, "attention.sliding_window")):  # 0 is none, in Phi-4
        return {}
    found: dict[str, Any] = {"sliding_window": _number(metadata, "attention.sliding_window", int)}
    layers = config["num_hidden_layers"]
    pattern = metadata.get(_key(metadata, "attention.sliding_window_pattern"))
    if type(pattern) is int and pattern > 0:
        pattern = [(n + 1) % pattern != 0 for n in range(layers)]
    if isinstance(pattern, list) and len(pattern) == layers:
        words = ("full_attention", "sliding_attention")
        found["layer_types"] = [words[bool(windowed)] for windowed in pattern]
        if config["model_type"] == "exaone4":
            found["sliding_window_pattern"] = "".join("GL"[bool(of)] for of in pattern)
    return found


def _rope_scaling(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return the rope_scaling of config.json; empty where its absence means plain embeddings."""
    metadata = gguf.metadata
    if ROPE_TENSORS[1] in gguf.tensors:
        return _long_rope(gguf)
    legacy = metadata.get(_key(metadata, "rope.scale_linear"))
    kind = metadata.get(_key(metadata, "rope.scaling.type"), "linear" if legacy else "none")
    if ROPE_TENSORS[0] in gguf.tensors and kind == "none":
        return _llama3_scaling(gguf, config)
    kinds = ("yarn",) if config["model_type"] == "ministral3" else ("none", "linear", "yarn")
    if kind not in kinds or ROPE_TENSORS[0] in gguf.tensors:
        key, expected = _key(metadata, "rope.scaling.type"), " or ".join(kinds)
        raise CheckpointError(f"{key}: expected {expected}, got {kind!r:.80}; {ELSEWHERE}")
    if kind == "none" and config["model_type"] == "gpt_oss":  # whose default is YaRN
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    if kind == "none":
        return {}
    factor = _number(metadata, "rope.scaling.factor", float, legacy)
    if kind == "linear":
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}
    return _yarn(metadata, config, factor)


def _yarn(metadata: dict[str, Any], config: dict[str, Any], factor: float) -> dict[str, Any]:
    context = _number(metadata, "rope.scaling.original_context_length", int)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context,
    }
    for name in ("beta_fast", "beta_slow"):
        if _key(metadata, f"rope.scaling.yarn_{name}") in metadata:
            scaling[name] = _number(metadata, f"rope.scaling.yarn_{name}", float)
    if config["model_type"] == "gpt_oss":
        scaling["truncate"] = False
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        mscale = 10 * _number(metadata, LOG_MULTIPLIER, float, 0.1)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    if config["model_type"] != "ministral3":
        return {"rope_scaling": scaling}
    scaling |= {
        "rope_theta": config["rope_theta"],
        "mscale": 1.0,
        "mscale_all_dim": _number(metadata, LOG_MULTIPLIER, float),
        "llama_4_scaling_beta": _number(metadata, "attention.temperature_scale", float),
    }
    return {"rope_parameters": scaling}


def _long_rope(gguf: Gguf) -> dict[str, Any]:
    """Return the scaling of Phi-3's long models, whose factors for each frequency are tensors."""
    factors = {
        f"{length}_factor": read_tensor(gguf, f"rope_factors_{length}.weight").tolist()
        for length in ("long", "short")
    }
    context = _number(gguf.metadata, "rope.scaling.original_context_length", int)
    return {
        "rope_scaling": {"type": "longrope", **factors},
        "original_max_position_embeddings": context,
    }


def _llama3_scaling(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return the Llama 3 scaling that slows the head_dim / 2 frequencies as the file's factors do.

    Wavelengths over context/low are slowed by `factor`, those under context/high not at all, and
    in between 1/slow-down is linear in 1/wavelength (transformers, _compute_llama3_parameters).
    """
    factors, half = read_tensor(gguf, ROPE_TENSORS[0]), config["head_dim"] // 2
    factor = float(factors.max())
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    with np.errstate(all="ignore"):
        expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != (half,) or not np.allclose(factors, expected, rtol=1e-4):
        got = f"{factors.shape} up to {factor}"
        raise CheckpointError(
            f"tensor {ROPE_TENSORS[0]!r} holds factors {got}, expected {(half,)} of Llama 3.1 to "
            f"3.3; {ELSEWHERE}"
        )
    return {"rope_scaling": {"factor": factor, **LLAMA3_ROPE}} if factor != 1 else {}
