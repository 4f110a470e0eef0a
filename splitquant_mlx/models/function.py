"""Check that mlx-lm's model computes what config.json, as transformers reads it, asks for.

mlx-lm's classes take what they know from config.json and ignore the rest. A setting that changes
the function and is ignored is an error, or a warning where only texts longer than an attention
window tell the difference.
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
# code that needs the values of arrays
EVALUATES = re.compile(r"\.item\(|\.tolist\(|mx\.eval\(")
SEVERAL_EXPERTS = re.compile(r"(top_k|experts_per_tok) > 1")
NO_VALUES = "eval an array during function transformations"  # mlx's words where they are asked for
# sizes and parameters that are there or not show in the tensors' shapes and names; what is said of
# rotary embeddings and windows is checked by measuring
SHOWN = (
    r"(?!.*window)(?!num_\w*_per_).*(_size|_dim|_rank|_width|_inner|_embd|_heads|_groups)|n_head"
    r"|num_\w*(layers|experts|blocks)|n_(layers?|positions|ctx)|expand|ssm_\w+_size"
    r"|.*bias|.*qk_(layer)?norm|use_qk_norm|qk_layernorm|tie_\w+|time_step_(min|max|floor)"
    r"|(?!rope_interleave).*rope.*|.*rotary.*|.*sliding_window.*|max_window_layers|layer_types"
    r"|max_(position|seq).*|.*variance_scale|mlp_layer_types|moe_layers|layers_block_type"
    r"|per_layer_config|use_bidirectional.*"
)
HARMLESS = re.compile(f"{UNUSED}|{SHOWN}|eos_token_id")
# what is no size, whatever its name; a stored head decides whether it is tied
SWITCHES = re.compile(rf"{UNUSED}|tie_\w+")
# what follows from settings that mlx-lm does read
IMPLIED: dict[str, Callable[[Reference], Any]] = {
    "moe_layers": lambda c: list(
        range(c.interleave_moe_layer_step - 1, c.num_hidden_layers, c.interleave_moe_layer_step)
    )
}
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"}
GELU = re.compile(r"gelu\w*|geglu")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Record where mlx-lm's model of an architecture is known to differ from transformers'.

    Attributes:
        reason: one clause.
        wrong: whether the output is wrong for any text; otherwise it is off by little.
        applies: tells whether it concerns a configuration.
    """

    reason: str
    wrong: bool = False
    applies: Callable[[Reference], bool] = lambda reference: True


TIME_STEPS = "transformers raises time steps to time_step_min, mlx-lm follows time_step_limit"
# up to 1e-4 it makes no difference that could be told
LARGE_EPSILON = Difference(
    reason="some of its norms have an epsilon of their own",
    wrong=True,
    applies=lambda c: any(
        getattr(c, name, 0) > 1e-4 for name in ("rms_norm_eps", "layer_norm_epsilon")
    ),
)
GROUPED_NORM = Difference(
    reason="it normalizes what leaves a mixer as a whole, not in its groups",
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
            reason="transformers takes two experts for each token, whatever num_experts_per_tok "
            "says",
            wrong=True,
            applies=lambda c: c.num_experts_per_tok != 2,
        ),
    ),
    "recurrent_gemma": (LARGE_EPSILON,),
    "starcoder2": (Difference(reason="it computes GELU exactly, not by the tanh formula"),),
}


def check_function(path: Path, model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Compare what mlx-lm's model computes with what config.json asks for.

    Args:
        path: the checkpoint, for messages.
        model: built from `config`.
        config: config.json, normalized.

    Returns:
        What differs for some texts only, or by little, one sentence each.

    Raises:
        CheckpointError: when it computes something else.
    """
    _check_runs(path, model, config["model_type"])
    reading = read_as_transformers(config)
    reference = text_reference(reading.reference)
    text = text_settings(config)
    settings = {**text, **({} if reference is None else reference.to_dict())}
    _check_causal(path, settings)
    notes = check_rotary(path, model, rope_parameters(text, reference), settings)
    if reference is None:
        note = "transformers does not read this config.json ({}): what it says was not compared"
        return notes + [note.format(reading.reason)] * bool(reading.reason)
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
    """Refuse settings that mlx-lm's code fails on; nothing is evaluated.

    Code that needs values, such as DBRX's choice of experts, is followed up to there.
    """
    from mlx_lm.models.cache import make_prompt_cache

    def run(tokens: mx.array) -> mx.array:
        return model(tokens, cache=make_prompt_cache(model))

    try:
        (mx.compile(run) if EVALUATES.search(_source(model)) else run)(mx.zeros((1, 2), mx.int32))
    except RuntimeError:
        return  # a kernel that another machine may have
    except Exception as exc:  # of mlx-lm's code, which meets what it does not expect
        if NO_VALUES in str(exc):
            return
        raise CheckpointError(
            f"{path}: mlx-lm's {kind} does not run with the settings of config.json: "
            f"{type(exc).__name__}: {one_line(exc)}"
        ) from exc


def _check_causal(path: Path, settings: Table) -> None:
    """Refuse attention to later tokens, which no class of mlx-lm has."""
    causal = {"use_bidirectional_attention": (None, False, "vision"), "is_causal": (None, True)}
    for key, allowed in causal.items():
        if settings.get(key) not in allowed:
            raise CheckpointError(
                f"{path}: config.json has {key} {settings[key]!r:.60}, but mlx-lm's models attend "
                "to earlier tokens alone: its output would be wrong"
            )


def _check_chosen_experts(path: Path, model: nn.Module, reference: Reference) -> None:
    """Refuse no expert for a token, and one that counts 1 where mlx-lm leaves its probability."""
    chosen = getattr(reference, "num_experts_per_tok", None)
    if chosen == 0 and any(getattr(reference, key, 0) for key in SYNONYMS[3]):
        raise CheckpointError(
            f"{path}: config.json has num_experts_per_tok 0, expected one of its experts at least"
        )
    normalizes = all(getattr(reference, key, True) for key in ("norm_topk_prob", "route_norm"))
    if chosen == 1 and normalizes and SEVERAL_EXPERTS.search(_source(model)):
        raise CheckpointError(
            f"{path}: config.json has num_experts_per_tok 1, but mlx-lm's {reference.model_type} "
            "normalizes the weights of several experts alone: its output would be wrong"
        )


def _foreign_keys(path: Path, config: Table, text: Table, source: str) -> list[str]:
    """Refuse settings that mlx-lm follows and transformers does not."""

    def harmless(key: str, value: Any) -> bool:
        pattern = SWITCHES if isinstance(value, bool) else HARMLESS
        return bool(pattern.fullmatch(key)) or not _is_mentioned(key, source)

    notes = []
    for key, default in foreign_keys(path, config, harmless):
        said = f"config.json has {key} {text[key]!r:.60}, which mlx-lm follows"
        if "auto_map" not in config:
            raise CheckpointError(
                f"{path}: {said} and transformers does not (as if it were {default!r:.60}): its "
                "output would differ from the original's"
            )
        notes.append(f"{said} and transformers' own class does not: it was not compared")
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
                f"mlx-lm does not read {key} {value!r}: it may use another formula of GELU"
            )
            continue
        raise CheckpointError(
            f"{path}: config.json has {key} {value!r:.60}, which mlx-lm's {reference.model_type} "
            f"does not read (it takes {defaults[key]!r:.60}): its output would be wrong"
        )
    return notes


def _is_mentioned(key: str, source: str) -> bool:
    return bool(re.search(rf"""[."']{re.escape(key)}\b""", source))


def _same(value: Any, default: Any) -> bool:
    """Compare two settings; of lists, such as one entry for each layer, which entries they have."""
    if isinstance(value, list) and isinstance(default, list):
        return {str(item) for item in value} == {str(item) for item in default}
    return value == default


def _source(model: nn.Module) -> str:
    """Return the code of the modules of mlx-lm that a model is made of."""
    names = {type(module).__module__ for module in model.modules()}
    found = (sys.modules[name] for name in sorted(names) if name.startswith("mlx_lm.models."))
    return "\n".join(inspect.getsource(module) for module in found)


def _windows(model: nn.Module, reference: Reference) -> list[str]:
    """Compare the attention windows of the layers, which mlx-lm's caches show."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    window = getattr(reference, "sliding_window", None)
    layers: Any = model.layers
    types = getattr(reference, "layer_types", None) or ["sliding_attention"] * len(layers)
    wanted = [window if kind == "sliding_attention" else None for kind in types]
    found = [
        cache.max_size if isinstance(cache, RotatingKVCache) else None
        for cache in make_prompt_cache(model)
    ]
    if len(found) != len(wanted) or all(a == b for a, b in zip(found, wanted, strict=True)):
        return []
    size = min(size for size in (*found, *wanted) if size)
    return [
        f"mlx-lm has other attention windows than transformers: texts longer than {size} tokens "
        "give other results"
    ]
