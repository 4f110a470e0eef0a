"""Read a config.json with transformers, the reference for what a model computes."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from splitquant_mlx.errors import one_line
from splitquant_mlx.models.config import settings_tables

# dtypes are those of the files; transformers accepts only torch's
DTYPES = ("torch_dtype", "dtype")
NOT_SETTINGS = ("quantization", "quantization_config", "splitquant", "model_file", "auto_map")
FIELD = re.compile(r"alidation error for field '(\w+)'")
# settings of training, of generation, or of the caller of transformers
UNUSED = (
    r".*dropout.*|.*pdrop|.*drop_rate|initializer.*|init_\w+|.*_init|.*init_std|rescale_prenorm.*"
    r"|(?!eos).*token_id|.*token_ids|.*_token_index|.*loss.*|.*jitter.*|output_.*|return_.*|use_cache"
    r"|cache_implementation|pretraining_tp|gradient.*|torch_dtype|dtype|architectures|model_type"
    r"|problem_type|id2label|label2id|.*_version|_name_or_path|tokenizer_class|prefix|auto_map"
    r"|is_decoder|is_encoder_decoder|add_cross_attention|cross_attention.*|chunk_size.*"
    r"|.*chunk_size|use_mamba.*|use_associative_scan|.*cache_dtype|num_logits_to_keep"
    r"|reorder_and_upcast.*|summary_.*|.*kernels|attention_softmax_in_fp32"
    r"|scale_attention_softmax_in_fp32|residual_in_fp32|mtp_.*|.*nextn.*|\w*_implementation"
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """transformers' reading of a config.json.

    Attributes:
        reference: its configuration; None if it has no class of this model_type, or the class
            differs from mlx-lm's of the same name, such as for checkpoints with their own code.
        refused: entries that the class refuses; `reference` has its defaults instead.
        reason: why the class refuses the configuration, else empty.
    """

    reference: Any
    refused: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def read_as_transformers(config: dict[str, Any]) -> Reading:
    """Return transformers' reading of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, refused = config.get("model_type"), {}
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        return Reading(reference=None)
    tables = settings_tables(config)
    while True:
        given = {k: v for k, v in config.items() if k not in (*NOT_SETTINGS, *DTYPES, *refused)}
        if len(tables) > 1:
            given["text_config"] = {k: v for k, v in tables[1].items() if k not in refused}
        try:
            with _silenced():
                reference = CONFIG_MAPPING[name].from_dict(copy.deepcopy(given))
            return Reading(reference=reference, refused=refused)
        except Exception as exc:  # the class validates values
            match = FIELD.search(str(exc))
            key = match[1] if match else ""
            values = [table[key] for table in tables if key in table]
            if not values or key in refused or "auto_map" in config:
                return Reading(reference=None, reason=one_line(exc))
            refused[key] = values[0]


def reference_config(config: dict[str, Any]) -> Any:
    """Return transformers' configuration or None, see `Reading`."""
    return read_as_transformers(config).reference


def text_reference(reference: Any) -> Any:
    """Return the part of transformers' configuration that describes the language model."""
    if reference is None:
        return None
    text = reference.get_text_config(decoder=True)
    return reference if isinstance(text, dict) else text  # a dict is a key unknown to the class


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence transformers' messages about unknown settings."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
