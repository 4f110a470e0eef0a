"""Fold factors that mlx-lm's classes do not apply into the weights.

Falcon H1   mlx-lm folds the multipliers of config.json into the weights of a transformers
            checkpoint, except those of keys (`key_multiplier`) and of the inputs of values.
MiniCPM3    the final states are divided by hidden_size / dim_model_base before the head; mlx-lm
            does so for untied heads only. For tied ones the weight of the last norm is scaled.
Experts     are chosen by score plus correction. With groups, mlx-lm sets the sums of unselected
in groups   groups to 0, transformers (5.24) to -inf. This is equivalent if no correction is below
            0, and adding a constant to all corrections of a layer does not change the choice.
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
        tensors: the stored tensors, before `sanitize`.
        config: config.json, normalized.

    Raises:
        CheckpointError: when config.json lacks a factor.
    """
    try:
        factors = _factors(tensors, config)
    except (KeyError, TypeError, ZeroDivisionError) as exc:
        raise CheckpointError(
            f"{path}: config.json lacks the factors of a {config['model_type']}: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    return {
        name: next((w * factor for suffix, factor in factors if re.search(suffix, name)), w)
        for name, w in tensors.items()
    }


def shift_corrections(
    tensors: Mapping[str, mx.array], config: dict[str, Any]
) -> dict[str, mx.array]:
    """Return the tensors with corrections of expert scores shifted to 0 or more, lazily.

    Args:
        tensors: stored tensors or parameters; corrections have shape (experts,).
        config: config.json, normalized. With one group of experts nothing is changed.
    """
    text = text_settings(config)
    if (text.get("n_group") or text.get("num_expert_group") or 1) == 1:
        return dict(tensors)
    return {
        name: _shift_to_zero(w) if CORRECTION.search(name) and w.size else w
        for name, w in tensors.items()
    }


def _shift_to_zero(w: mx.array) -> mx.array:
    w = w.astype(mx.float32)  # 16-bit dtypes would round the sums
    return w - mx.minimum(mx.where(mx.isinf(w), 0, w).min(), 0)


def _factors(tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return patterns of tensor names with their factors, except factors of 1."""
    factors: dict[str, float] = {}
    convolutions = [w for name, w in tensors.items() if name.endswith("mamba.conv1d.weight")]
    if config["model_type"] == "falcon_h1" and any(w.shape[1] == 1 for w in convolutions):
        factors[r"\.k_proj\.(weight|bias)$"] = config["key_multiplier"]
        factors[r"\.v_proj\.weight$"] = config["attention_in_multiplier"]
    if config["model_type"] == "minicpm3" and config.get("tie_word_embeddings"):
        factors[LAST_NORM.pattern] = config["dim_model_base"] / config["hidden_size"]
    return [(pattern, factor) for pattern, factor in factors.items() if factor != 1]
