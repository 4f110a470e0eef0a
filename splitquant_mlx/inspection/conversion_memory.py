"""Estimate the peak memory of a conversion from the number of entries of each tensor.

The stages run one after another, and none has the whole original in memory in float: text is
sampled from an 8-bit copy, blocks are calibrated one by one, and refinement trains the quantized
model.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping

import mlx.core as mx

from splitquant_mlx.calibration.blocks import LOGITS
from splitquant_mlx.calibration.self_text import texts_per_batch
from splitquant_mlx.conversion.refine import BATCH_TEXTS as TRAINED_TEXTS
from splitquant_mlx.models.compact import SLICE
from splitquant_mlx.models.footprint import PROGRAM_BYTES
from splitquant_mlx.models.trainable import WIDE
from splitquant_mlx.quantization.gptq import block_entries
from splitquant_mlx.recipe import OWN_LAYERS, SELF, Calibration, Recipe
from splitquant_mlx.runtime.cores import cores

BLOCK_NAME = re.compile(r"(?:layers|blk|blocks|h)\.(\d+)\.")
KEYS_AND_VALUES = re.compile(r"(?:\b[kv]_proj|attn_[kv])\.weight$")
LOGITS_BYTES = 4 * LOGITS  # float32
# bytes per entry of the largest weight, usually an embedding or a head, while it is quantized
LARGEST_WEIGHT, WITH_HESSIAN = {"rtn": 3, "splitquant": 3, "imatrix": 5}, 22
PARALLEL_WEIGHT = 6  # bytes per entry of a layer that is quantized at the same time


def converting_bytes(sizes: Mapping[str, int], recipe: Recipe) -> float:
    """Estimate the peak memory of a conversion, bytes.

    Args:
        sizes: entries of each tensor by its name, of the hub or of GGUF.
        recipe: recipe of the conversion.
    """
    on_cpu = mx.default_device() == mx.cpu
    workers = (os.cpu_count() or 1) if on_cpu else 1
    layers = sorted((n for name, n in sizes.items() if BLOCK_NAME.search(name)), reverse=True)
    workspace = _quantizing_bytes(recipe.method, max(sizes.values()), workers)
    stages: list[float] = [workspace + PARALLEL_WEIGHT * sum(layers[:workers])]
    if recipe.runs_the_model:
        text = recipe.texts
        stages[0] += _block_bytes(sizes, text)
        if text.text == SELF:
            stages.append(_sampling_bytes(sizes, text))
        if recipe.method == "auto" or recipe.refine:  # logits of the original
            stages.append(_block_bytes(sizes, text) + 3 * LOGITS_BYTES * max(cores(), 2))
        if recipe.refine:
            stages.append(_refining_bytes(sizes, recipe, text))
    return PROGRAM_BYTES + max(stages)


def _quantizing_bytes(method: str, entries: int, workers: int) -> float:
    """Return the memory for quantizing the largest weight; `gptq` does so in blocks of rows."""
    if method in LARGEST_WEIGHT:
        return LARGEST_WEIGHT[method] * entries
    blocks = entries if method in OWN_LAYERS else min(entries, workers * block_entries())
    return WITH_HESSIAN * blocks + LARGEST_WEIGHT["rtn"] * (entries - blocks)


def _block_bytes(sizes: Mapping[str, int], text: Calibration) -> float:
    """Return the size of two blocks and of the hidden states before and after, in float32."""
    blocks = Counter[str]()
    for name, entries in sizes.items():
        if match := BLOCK_NAME.search(name):
            blocks[match[1]] += entries
    states = text.texts_for() * text.sequence_length * _hidden(sizes)
    return 4 * (2 * max(blocks.values(), default=0) + 2 * states)


def _sampling_bytes(sizes: Mapping[str, int], text: Calibration) -> float:
    """Return the size of the 8-bit copy, and of KV cache and logits of a batch of texts."""
    hidden = _hidden(sizes)
    cached = sum(n for name, n in sizes.items() if KEYS_AND_VALUES.search(name)) // hidden
    kv_cache = 2 * cached * text.sequence_length  # of a text, 16-bit
    texts = min(texts_per_batch(kv_cache), text.texts_for())
    logits = 8 * texts * max(sizes.values()) / hidden
    dequantized = 4 * SLICE * cores()  # weights that are float32 at a time
    return 1.05 * sum(sizes.values()) + texts * kv_cache + logits + dequantized


def _refining_bytes(sizes: Mapping[str, int], recipe: Recipe, text: Calibration) -> float:
    """Return the size of codes, trained parameters, embedding and logits of a step."""
    bits, group_size = recipe.bits or 4, recipe.group_size or 64
    codes = 1 if mx.default_device() == mx.cpu else bits / 8
    # scales and biases with their updates, gradients and moments
    trained = 4 * 8 / group_size
    largest, tokens = max(sizes.values()), TRAINED_TEXTS * text.sequence_length
    logits = 16 * tokens * largest / _hidden(sizes)
    weights = 16 * min(WIDE, largest) * cores()
    return (codes + trained) * sum(sizes.values()) + 4 * largest + logits + weights


def _hidden(sizes: Mapping[str, int]) -> int:
    """Return the hidden size, which is that of the norms."""
    return next((n for name, n in sizes.items() if name.endswith("norm.weight")), 4096)
