"""Fold into weights the factors that an architecture has and mlx-lm's class of it leaves out.

Falcon H1   mlx-lm folds the multipliers of config.json into the weights when it reads a checkpoint
            of transformers, but for those of keys (`key_multiplier`) and of the inputs of values.
MiniCPM3    the final states are divided by hidden_size / dim_model_base in front of the head; in
            mlx-lm of a head of its own only. The weight of the last norm carries it as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

LAST_NORM = re.compile(r"(^|\.)(?<!\d\.)norm\.weight$")


def fold_multipliers(
    tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors with the factors folded in, lazily.

    Args:
        tensors: of a checkpoint, as its maker or transformers wrote it.
        config: config.json, normalized.
    """
    factors = _factors(tensors, config)
    return {
        name: next((w * f for end, f in factors if re.search(end, name)), w)
        for name, w in tensors.items()
    }


def _factors(tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return patterns of names with the factor of those tensors, those of 1 left out."""
    found: dict[str, float] = {}
    convolutions = [w for name, w in tensors.items() if name.endswith("mamba.conv1d.weight")]
    if config["model_type"] == "falcon_h1" and any(w.shape[1] == 1 for w in convolutions):
        found[r"\.k_proj\.(weight|bias)$"] = config["key_multiplier"]
        found[r"\.v_proj\.weight$"] = config["attention_in_multiplier"]
    if config["model_type"] == "minicpm3" and config.get("tie_word_embeddings"):
        found[LAST_NORM.pattern] = config["dim_model_base"] / config["hidden_size"]
    return [(pattern, factor) for pattern, factor in found.items() if factor != 1]
