"""Check that mlx-lm's model computes the function that transformers reads from config.json.

mlx-lm's classes read the keys that they know and ignore the rest. An ignored setting that changes
the function is an error, or a warning if only texts longer than an attention window differ.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.models.config import text_settings
from splitquant_mlx.models.config_forms import SYNONYMS, rope_parameters
from splitquant_mlx.models.foreign_keys import foreign_keys
from splitquant_mlx.models.reference import UNUSED, read_as_transformers, text_reference
from splitquant_mlx.models.rotary import check_rotary

Reference = Any  # transformers' configuration of the language model
Table = dict[str, Any]
# code that evaluates arrays
EVALUATES = re.compile(r"\.item\(|\.tolist\(|mx\.eval\(")
SEVERAL_EXPERTS = re.compile(r"(top_k|experts_per_tok) > 1")
EVALUATED = "eval an array during function transformations"  # mlx's error if it is compiled
# settings that are checked elsewhere: sizes and optional parameters show in the tensors' shapes and
# names, rotary embeddings and windows are measured
CHECKED = (
    r"(?!.*window)(?!num_\w*_per_).*(_size|_dim|_rank|_width|_inner|_embd|_heads|_groups)|n_head"
    r"|num_\w*(layers|experts|blocks)|n_(layers?|positions|ctx)|expand|ssm_\w+_size"
    r"|.*bias|.*qk_(layer)?norm|use_qk_norm|qk_layernorm|tie_\w+|time_step_(min|max|floor)"
    r"|(?!rope_interleave).*rope.*|.*rotary.*|.*sliding_window.*|max_window_layers|layer_types"
    r"|max_(position|seq).*|.*variance_scale|mlp_layer_types|moe_layers|layers_block_type"
    r"|per_layer_config|use_bidirectional.*"
)
HARMLESS = re.compile(f"{UNUSED}|{CHECKED}|eos_token_id")
# the same for bools, which are not sizes; a stored head decides whether it is tied
SWITCHES = re.compile(rf"{UNUSED}|tie_\w+")
# values that follow from settings that mlx-lm reads
IMPLIED: dict[str, Callable[[Reference], Any]] = {
    "moe_layers": lambda c: list(
        range(c.interleave_moe_layer_step - 1, c.num_hidden_layers, c.interleave_moe_layer_step)
    )
}
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"}
GELU = re.compile(r"gelu\w*|geglu")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A known difference between mlx-lm's and transformers' models of an architecture.

    Attributes:
        reason: one clause.
        wrong: whether the output is wrong for all texts; otherwise it differs slightly.
        applies: returns whether a configuration is affected.
    """

    reason: str
    wrong: bool = False
    applies: Callable[[Reference], bool] = lambda reference: True


TIME_STEPS = "transformers raises time steps to time_step_min, mlx-lm follows time_step_limit"
# up to 1e-4 the difference cannot be measured
LARGE_EPSILON = Difference(
    reason="some of its norms ignore the epsilon of config.json",
    wrong=True,
    applies=lambda c: any(
        getattr(c, name, 0) > 1e-4 for name in ("rms_norm_eps", "layer_norm_epsilon")
    ),
)
GROUPED_NORM = Difference(
    reason="it normalizes the output of a mixer as a whole, not in groups",
    wrong=True,
    applies=lambda c: max(getattr(c, name, 1) for name in ("n_groups", "mamba_n_groups")) > 1,
)
# found by tests/support/architectures.py, explained by the source of both
DIFFERENCES = {
    "falcon_h1": (
        Difference(
            reason="its biases are not multiplied",
            wrong=True,
            applies=lambda c: (
                (c.mlp_bias or c.mamba_proj_bias or c.attention_bias)
                and {1.0, c.attention_out_multiplier, c.ssm_out_multiplier}
                | {*c.mlp_multipliers, *c.ssm_multipliers}
                != {1.0}
            ),
        ),
    ),
    "glm4_moe_lite": (LARGE_EPSILON,),
    "gpt_bigcode": (Difference(reason="it computes GELU exactly, not by the tanh formula"),),
    "gpt_neox": (Difference(reason="it computes GELU by the tanh formula, not exactly"),),
    "granitemoehybrid": (GROUPED_NORM,),
    "jamba": (
        Difference(
            reason="it normalizes the weights of the chosen experts",
            wrong=True,
            applies=lambda c: c.num_experts > 1,
        ),
    ),
    "llama4_text": (LARGE_EPSILON,),
    "mamba2": (LARGE_EPSILON, GROUPED_NORM),
    "nemotron_h": (
        LARGE_EPSILON,
        Difference(
            reason=TIME_STEPS,
            applies=lambda c: c.time_step_limit[0] < c.time_step_min <= 0.01,
        ),
        Difference(
            reason=TIME_STEPS,
            wrong=True,
            applies=lambda c: c.time_step_min > max(0.01, c.time_step_limit[0]),
        ),
    ),
    "phimoe": (
        Difference(
            reason="transformers uses two experts per token, whatever num_experts_per_tok",
            wrong=True,
            applies=lambda c: c.num_experts_per_tok != 2,
        ),
    ),
    "recurrent_gemma": (LARGE_EPSILON,),
    "starcoder2": (Difference(reason="it computes GELU exactly, not by the tanh formula"),),
}


def check_settings(path: Path, model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Check that mlx-lm's model follows config.json.

    Args:
        path: the checkpoint, for messages.
        model: built from `config`.
        config: config.json, normalized.

    Returns:
        Differences that are slight or affect some texts only, one sentence each.

    Raises:
        CheckpointError: when its output would be wrong.
    """
    _check_runs(path, model, config["model_type"])
    reading = read_as_transformers(config)
    reference = text_reference(reading.reference)
    text = text_settings(config)
    settings = {**text, **({} if reference is None else reference.to_dict())}
    _check_causal(path, settings)
    notes = check_rotary(path, model, rope_parameters(text, reference), settings)
    if reference is None:
        if reading.reason:
            notes.append(
                f"transformers does not read this config.json ({reading.reason}): its settings "
                "were not compared"
            )
        return notes
    kind = reference.model_type
    for known in DIFFERENCES.get(kind, ()):
        if not known.applies(reference):
            continue
        if known.wrong:
            raise CheckpointError(
                f"{path}: mlx-lm's {kind} differs from the original: {known.reason}: its output "
                "would be wrong"
            )
        notes.append(f"mlx-lm's {kind} differs slightly from the original: {known.reason}")
    _check_chosen_experts(path, model, reference)
    notes += _foreign_keys(path, config, text, _source(model))
    return notes + _unread_keys(path, model, settings, reference) + _windows(model, reference)


def _check_runs(path: Path, model: nn.Module, kind: str) -> None:
    """Refuse settings with which mlx-lm's code fails; nothing is evaluated.

    Code that evaluates arrays, such as DBRX's choice of experts, runs up to there.
    """
    from mlx_lm.models.cache import make_prompt_cache

    def run(tokens: mx.array) -> mx.array:
        return model(tokens, cache=make_prompt_cache(model))

    try:
        (mx.compile(run) if EVALUATES.search(_source(model)) else run)(mx.zeros((1, 2), mx.int32))
    except RuntimeError:
        return  # a kernel that this machine does not have
    except Exception as exc:  # mlx-lm's code raises exceptions of any class
        if EVALUATED in str(exc):
            return
        raise CheckpointError(
            f"{path}: mlx-lm's {kind} does not run with the settings of config.json: "
            f"{type(exc).__name__}: {one_line(exc)}"
        ) from exc


def _check_causal(path: Path, settings: Table) -> None:
    """Refuse bidirectional attention, which mlx-lm's models do not have."""
    causal = {"use_bidirectional_attention": (None, False, "vision"), "is_causal": (None, True)}
    for key, allowed in causal.items():
        if settings.get(key) not in allowed:
            raise CheckpointError(
                f"{path}: config.json has {key} {settings[key]!r:.60}, but mlx-lm's models attend "
                "to earlier tokens only: its output would be wrong"
            )


def _check_chosen_experts(path: Path, model: nn.Module, reference: Reference) -> None:
    """Refuse 0 experts per token, and 1 if its weight is not normalized to 1 by mlx-lm."""
    chosen = getattr(reference, "num_experts_per_tok", None)
    if chosen == 0 and any(getattr(reference, key, 0) for key in SYNONYMS[3]):
        raise CheckpointError(
            f"{path}: config.json: num_experts_per_tok: expected 1 or more, got 0"
        )
    normalizes = all(getattr(reference, key, True) for key in ("norm_topk_prob", "route_norm"))
    if chosen == 1 and normalizes and SEVERAL_EXPERTS.search(_source(model)):
        raise CheckpointError(
            f"{path}: config.json has num_experts_per_tok 1, but mlx-lm's {reference.model_type} "
            "normalizes the weights of two or more experts only: its output would be wrong"
        )


def _foreign_keys(path: Path, config: Table, text: Table, source: str) -> list[str]:
    """Refuse settings that mlx-lm reads and transformers does not."""

    def harmless(key: str, value: Any) -> bool:
        pattern = SWITCHES if isinstance(value, bool) else HARMLESS
        return bool(pattern.fullmatch(key)) or not _is_mentioned(key, source)

    notes = []
    for key, default in foreign_keys(path, config, harmless):
        note = f"config.json has {key} {text[key]!r:.60}, which mlx-lm reads"
        if "auto_map" not in config:
            raise CheckpointError(
                f"{path}: {note} and transformers does not (mlx-lm's default is {default!r:.60}): "
                "its output would differ from the original's"
            )
        notes.append(f"{note} and transformers' class does not: it was not compared")
    return notes


def _unread_keys(
    path: Path, model: nn.Module, settings: dict[str, Any], reference: Reference
) -> list[str]:
    """Refuse settings that differ from transformers' defaults and that mlx-lm does not read."""
    defaults = type(reference)().to_dict()
    source = _source(model)
    notes = []
    for key, value in sorted(settings.items()):
        if key not in defaults or HARMLESS.fullmatch(key) or _same(value, defaults[key]):
            continue
        if key in IMPLIED and _same(value, IMPLIED[key](reference)):
            continue
        if _is_mentioned(key, source):
            continue
        if key in ACTIVATIONS and GELU.fullmatch(str(value)) and GELU.search(str(defaults[key])):
            notes.append(
                f"mlx-lm does not read {key} {value!r}: it may use another formula for GELU"
            )
            continue
        raise CheckpointError(
            f"{path}: config.json has {key} {value!r:.60}, which mlx-lm's {reference.model_type} "
            f"does not read (it uses {defaults[key]!r:.60}): its output would be wrong"
        )
    return notes


def _is_mentioned(key: str, source: str) -> bool:
    return bool(re.search(rf"""[."']{re.escape(key)}\b""", source))


def _same(value: Any, default: Any) -> bool:
    """Return whether two settings are equal; lists, such as one entry per layer, as sets."""
    if isinstance(value, list) and isinstance(default, list):
        return {str(item) for item in value} == {str(item) for item in default}
    return value == default


def _source(model: nn.Module) -> str:
    """Return the source of the mlx-lm modules that define a model's layers."""
    names = {type(module).__module__ for module in model.modules()}
    modules = (sys.modules[name] for name in sorted(names) if name.startswith("mlx_lm.models."))
    return "\n".join(inspect.getsource(module) for module in modules)


def _windows(model: nn.Module, reference: Reference) -> list[str]:
    """Compare the attention windows of the layers with those of mlx-lm's caches."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    window = getattr(reference, "sliding_window", None)
    layers: Any = model.layers
    types = getattr(reference, "layer_types", None) or ["sliding_attention"] * len(layers)
    expected = [window if kind == "sliding_attention" else None for kind in types]
    actual = [
        cache.max_size if isinstance(cache, RotatingKVCache) else None
        for cache in make_prompt_cache(model)
    ]
    if len(actual) != len(expected) or all(a == b for a, b in zip(actual, expected, strict=True)):
        return []
    size = min(size for size in (*actual, *expected) if size)
    return [
        f"mlx-lm's attention windows differ from transformers': texts longer than {size} tokens "
        "give different results"
    ]
