"""Fold into weights the factors that an architecture has and mlx-lm's class of it leaves out.

Falcon H1   mlx-lm folds the multipliers of config.json into the weights when it reads a checkpoint
            of transformers, but for those of keys (`key_multiplier`) and of the inputs of values.
MiniCPM3    the final states are divided by hidden_size / dim_model_base in front of the head; in
            mlx-lm of a head of its own only. The weight of the last norm carries it as well.
Experts     are chosen by score plus a correction; in groups, mlx-lm sets the sums of the groups
in groups   left out to 0, transformers (5.24) to -inf. With no correction below 0 that is the same,
            and the same number added to all of a layer's corrections changes no choice.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.config import text_settings

CORRECTION = re.compile(r"\.(e_score_correction|expert)_bias$")
LAST_NORM = re.compile(r"(^|\.)(?<!\d\.)norm\.weight$")


def fold_multipliers(
    path: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors with the factors folded in, lazily.

    Args:
        path: the checkpoint, for messages.
        tensors: of a checkpoint, as its maker or transformers wrote it.
        config: config.json, normalized.

    Raises:
        CheckpointError: when config.json lacks a number for them.
    """
    try:
        factors = _factors(tensors, config)
    except (KeyError, TypeError, ZeroDivisionError) as exc:
        raise CheckpointError(
            f"{path}: config.json does not say what factors a {config['model_type']} has: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    return {
        name: next((w * f for end, f in factors if re.search(end, name)), w)
        for name, w in tensors.items()
    }


def raise_corrections(
    tensors: Mapping[str, mx.array], config: dict[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors, corrections of experts' scores raised to 0 or more, lazily.

    Args:
        tensors: of a checkpoint, or parameters; corrections have shape (experts,).
        config: config.json, normalized. Nothing is changed where experts are in one group.
    """
    text = text_settings(config)
    if (text.get("n_group") or text.get("num_expert_group") or 1) == 1:
        return dict(tensors)
    return {
        name: _raised(w) if CORRECTION.search(name) and w.size else w for name, w in tensors.items()
    }


def _raised(w: mx.array) -> mx.array:
    w = w.astype(mx.float32)  # a type of 16 bits would round the sums
    return w - mx.minimum(mx.where(mx.isinf(w), 0, w).min(), 0)


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
