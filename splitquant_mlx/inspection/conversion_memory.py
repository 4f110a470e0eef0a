"""Estimate the peak memory of a conversion from the entries of each tensor.

Stages follow one another, and none holds the whole original in float: text is sampled from a copy
in 8 bits, blocks are calibrated one by one, and refinement holds the quantized model.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping

import mlx.core as mx

from splitquant_mlx.calibration.blocks import LOGITS
from splitquant_mlx.models.footprint import PROGRAM_BYTES
from splitquant_mlx.quantization.gptq import block_entries
from splitquant_mlx.recipe import OWN_LAYERS, SELF, Calibration, Recipe

BLOCK_NAME = re.compile(r"(?:layers|blk|blocks|h)\.(\d+)\.")
KEYS_AND_VALUES = re.compile(r"(?:\b[kv]_proj|attn_[kv])\.weight$")
TEXTS = 128  # sampled side by side
TRAINED_TEXTS = 4  # in a step of refinement
WIDENED_BYTES = 4 * 2**24  # of the 8-bit copy's weights, on the CPU
HEAD_BYTES = 4 * LOGITS  # in float32
# bytes for each entry of the largest weight while it is quantized, mostly of an embedding or a head
LARGEST, WITH_HESSIAN = {"rtn": 3, "splitquant": 3, "imatrix": 5}, 22
BESIDE = 6  # bytes for each entry of a layer that is quantized at the same time


def converting_bytes(sizes: Mapping[str, int], recipe: Recipe) -> float:
    """Estimate the peak memory of a conversion, bytes.

    Args:
        sizes: entries of each tensor, by the names of the hub or of GGUF.
        recipe: of the conversion.
    """
    on_cpu = mx.default_device() == mx.cpu
    workers = (os.cpu_count() or 1) if on_cpu else 1
    layers = sorted((n for name, n in sizes.items() if BLOCK_NAME.search(name)), reverse=True)
    workspace = _quantizing_bytes(recipe.method, max(sizes.values()), workers)
    stages: list[float] = [workspace + BESIDE * sum(layers[:workers])]
    if recipe.runs_the_model:
        text = recipe.texts
        stages[0] += _block_bytes(sizes, text)
        if text.text == SELF:
            stages.append(_sampling_bytes(sizes, text, 4 if on_cpu else 2))
        if recipe.method == "auto" or recipe.refine:  # the original's logits, with copies
            stages.append(_block_bytes(sizes, text) + 4 * HEAD_BYTES)
        if recipe.refine:
            stages.append(_refining_bytes(sizes, recipe, text))
    return PROGRAM_BYTES + max(stages)


def _quantizing_bytes(method: str, entries: int, workers: int) -> float:
    """Return what the largest weight takes while it is quantized, by `gptq` in blocks of rows."""
    if method in LARGEST:
        return LARGEST[method] * entries
    blocks = entries if method in OWN_LAYERS else min(entries, workers * block_entries())
    return WITH_HESSIAN * blocks + LARGEST["rtn"] * (entries - blocks)


def _block_bytes(sizes: Mapping[str, int], text: Calibration) -> float:
    """Return the size of a block and the next, in float32, and of the texts' states beside them."""
    blocks = Counter[str]()
    for name, entries in sizes.items():
        if found := BLOCK_NAME.search(name):
            blocks[found[1]] += entries
    states = text.num_samples * text.sequence_length * _hidden(sizes)
    return 4 * (2 * max(blocks.values(), default=0) + 2 * states)


def _sampling_bytes(sizes: Mapping[str, int], text: Calibration, entry: int) -> float:
    """Return the size of the 8-bit copy with keys and values of the texts, and their logits."""
    hidden, texts = _hidden(sizes), min(TEXTS, text.num_samples)
    cached = sum(n for name, n in sizes.items() if KEYS_AND_VALUES.search(name)) / hidden
    logits = 8 * texts * max(sizes.values()) / hidden
    keys_and_values = entry * cached * texts * text.sequence_length
    return 1.05 * sum(sizes.values()) + keys_and_values + logits + WIDENED_BYTES


def _refining_bytes(sizes: Mapping[str, int], recipe: Recipe, text: Calibration) -> float:
    """Return the size of codes, of what is trained, of the embedding, and of a step's logits."""
    bits, group_size = recipe.bits or 4, recipe.group_size or 64
    trained = 4 * 8 / group_size  # scales, biases, their changes, gradients and averages
    largest, tokens = max(sizes.values()), TRAINED_TEXTS * text.sequence_length
    logits = 16 * tokens * largest / _hidden(sizes)
    return (bits / 8 + trained) * sum(sizes.values()) + 4 * largest + logits


def _hidden(sizes: Mapping[str, int]) -> int:
    """Return the size of a hidden state, that of the norms."""
    return next((n for name, n in sizes.items() if name.endswith("norm.weight")), 4096)
