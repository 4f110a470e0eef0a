"""Convert the rotary embedding settings of a GGUF file to config.json's rope_scaling."""

import math
from typing import Any

import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf import Gguf, read_tensor
from splitquant_mlx.formats.gguf_settings import key_of, number
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# the values of all published Llama 3.1, 3.2 and 3.3; GGUF stores only the resulting factors
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def rope_scaling(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of config.json that scale rotary embeddings; empty for plain ones."""
    metadata = gguf.metadata
    if ROPE_TENSORS[1] in gguf.tensors:
        return _longrope(gguf)
    legacy = metadata.get(key_of(metadata, "rope.scale_linear"))
    kind = metadata.get(key_of(metadata, "rope.scaling.type"), "linear" if legacy else "none")
    if ROPE_TENSORS[0] in gguf.tensors and kind == "none":
        return _llama3_scaling(gguf, config)
    kinds = ("yarn",) if config["model_type"] == "ministral3" else ("none", "linear", "yarn")
    if kind not in kinds or ROPE_TENSORS[0] in gguf.tensors:
        key, expected = key_of(metadata, "rope.scaling.type"), " or ".join(kinds)
        raise CheckpointError(f"{key}: expected {expected}, got {kind!r:.80}; {ELSEWHERE}")
    if kind == "none" and config["model_type"] == "gpt_oss":  # transformers defaults to YaRN
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    if kind == "none":
        return {}
    factor = number(metadata, "rope.scaling.factor", float, legacy)
    if kind == "linear":
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}
    return _yarn(metadata, config, factor)


def _yarn(metadata: dict[str, Any], config: dict[str, Any], factor: float) -> dict[str, Any]:
    context = number(metadata, "rope.scaling.original_context_length", int)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context,
    }
    for name in ("beta_fast", "beta_slow"):
        if key_of(metadata, f"rope.scaling.yarn_{name}") in metadata:
            scaling[name] = number(metadata, f"rope.scaling.yarn_{name}", float)
    if config["model_type"] == "gpt_oss":
        scaling["truncate"] = False
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        mscale = 10 * number(metadata, LOG_MULTIPLIER, float, 0.1)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    if config["model_type"] != "ministral3":
        return {"rope_scaling": scaling}
    scaling |= {
        "rope_theta": config["rope_theta"],
        "mscale": 1.0,
        "mscale_all_dim": number(metadata, LOG_MULTIPLIER, float),
        "llama_4_scaling_beta": number(metadata, "attention.temperature_scale", float),
    }
    return {"rope_parameters": scaling}


def _longrope(gguf: Gguf) -> dict[str, Any]:
    """Return Phi-3's longrope scaling, whose factors per frequency are stored as tensors."""
    factors = {
        f"{length}_factor": read_tensor(gguf, f"rope_factors_{length}.weight").tolist()
        for length in ("long", "short")
    }
    context = number(gguf.metadata, "rope.scaling.original_context_length", int)
    return {
        "rope_scaling": {"type": "longrope", **factors},
        "original_max_position_embeddings": context,
    }


def _llama3_scaling(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return the Llama 3 scaling that gives the head_dim / 2 factors in the file.

    Frequencies of wavelengths over context/low are divided by `factor`, those under context/high
    are unchanged, and in between 1/divisor is linear in 1/wavelength (transformers,
    _compute_llama3_parameters).
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
        raise CheckpointError(
            f"tensor {ROPE_TENSORS[0]!r}: expected the {half} factors of Llama 3.1 to 3.3, got "
            f"shape {factors.shape}, up to {factor}; {ELSEWHERE}"
        )
    return {"rope_scaling": {"factor": factor, **LLAMA3_ROPE}} if factor != 1 else {}
