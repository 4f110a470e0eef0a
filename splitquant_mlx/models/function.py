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

import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.config_forms import reference_config, rope_parameters, text_reference
from splitquant_mlx.models.rotary import check_rotary

Reference = Any  # transformers' configuration of the language model
# sizes and parameters that are there or not show in the tensors' shapes and names; what is said of
# rotary embeddings and windows is checked by measuring; the rest is for training, for generation,
# or for the caller of transformers
HARMLESS = re.compile(
    r"(?!.*window)(?!num_\w*_per_).*(_size|_dim|_rank|_width|_inner|_embd|_heads|_groups)|n_head"
    r"|num_\w*(layers|experts|blocks)|n_(layers?|positions|ctx)|expand|ssm_\w+_size"
    r"|.*bias|.*qk_(layer)?norm|use_qk_norm|qk_layernorm"
    r"|.*rope.*|.*rotary.*|.*sliding_window.*|max_window_layers|layer_types|max_(position|seq).*"
    r"|.*dropout.*|.*pdrop|.*drop_rate|initializer.*|init_\w+|.*_init|.*init_std|rescale_prenorm.*"
    r"|.*token_id|.*token_ids|.*_token_index|.*loss.*|.*jitter.*|output_.*|return_.*|use_cache"
    r"|cache_implementation|pretraining_tp|gradient.*|torch_dtype|dtype|architectures|model_type"
    r"|problem_type|id2label|label2id|.*_version|_name_or_path|tokenizer_class|prefix|auto_map"
    r"|tie_\w+|is_decoder|is_encoder_decoder|add_cross_attention|cross_attention.*|chunk_size.*"
    r"|.*chunk_size|use_mamba.*|use_associative_scan|time_step_(min|max|floor)|.*cache_dtype"
    r"|num_logits_to_keep|scale_attn_by_inverse.*|reorder_and_upcast.*|summary_.*|.*kernels"
    r"|attention_softmax_in_fp32|scale_attention_softmax_in_fp32|residual_in_fp32|mtp_.*|.*nextn.*"
    r"|.*variance_scale|mlp_layer_types|moe_layers|layers_block_type|per_layer_config|\w*_implementation|use_bidirectional.*"
)
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


# found by tests/support/architectures.py, explained by the source of both
DIFFERENCES = {
    "gpt_bigcode": Difference(reason="it computes GELU exactly, not by the tanh formula"),
    "gpt_neox": Difference(reason="it computes GELU by the tanh formula, not exactly"),
    "starcoder2": Difference(reason="it computes GELU exactly, not by the tanh formula"),
    "nemotron_h": Difference(
        reason="transformers raises time steps to time_step_min, mlx-lm follows time_step_limit",
        applies=lambda reference: reference.time_step_min > reference.time_step_limit[0],
    ),
    "jamba": Difference(
        reason="it normalizes the weights of the chosen experts",
        wrong=True,
        applies=lambda reference: reference.num_experts > 1,
    ),
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
    reference = text_reference(reference_config(config))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    settings = {**text, **({} if reference is None else reference.to_dict())}
    notes = check_rotary(path, model, rope_parameters(text, reference), settings)
    if reference is None:
        return notes
    kind = reference.model_type
    known = DIFFERENCES.get(kind)
    if known and known.applies(reference):
        if known.wrong:
            raise CheckpointError(
                f"{path}: mlx-lm's {kind} differs from the original: {known.reason}: its output "
                "would be wrong"
            )
        notes.append(f"mlx-lm's {kind} differs slightly from the original: {known.reason}")
    return notes + _unread_keys(path, model, settings, reference) + _windows(model, reference)


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
        if re.search(rf"""[."']{re.escape(key)}\b""", source):
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
