"""Find the tensors of a checkpoint that mlx-lm's model does not use.

mlx-lm's `sanitize` renames, stacks and drops tensors. A tensor was dropped if no parameter depends
on it in the graph of the (unevaluated) arrays. Most such tensors do not affect the text model
(buffers, vision towers, heads for multi-token prediction), and a warning says what to use for
them; any other is an error, since the converted model would compute something else.
"""

import io
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import CheckpointError, abbreviate
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.config import settings_tables, text_settings
from splitquant_mlx.models.expert_stacks import INPUT, OUTPUT

# constants that the model computes itself
CONSTANT = re.compile(
    r"rotary|rope\.|inv_freq|freqs_c|position_ids|masked_bias|attn(ention)?\.bias$"
)
# multi-token prediction: layers that predict more than the next token
MTP = re.compile(r"(^|\.)(mtp|eh_proj|enorm|hnorm|nextn|shared_head)[._]|(^|\.)mtp_")
# modules of images and audio
OTHER_INPUT = re.compile(
    r"vision|visual|image|video|audio|multi_modal|multimodal|mm_projector|(^|\.)(embed_vision|patch_merge)"
)
LAYER = re.compile(r"layers\.(\d+)\.")
HEAD = re.compile(r"(^|.*\.)lm_head\.weight$")
EMBEDDING = re.compile(r"(^|.*\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
CHUNK_BYTES = 1 << 24
LABELS = 1000  # labels per graph: mlx accepts at most 1,024 keyword arguments
INPUT_NOTE = (
    "only the text model is converted; tensors for images and audio are left out: {names}; to keep "
    "them, convert the original with mlx_vlm.convert"
)
MTP_NOTE = (
    "tensors for multi-token prediction (MTP) are left out, since mlx-lm's {model_type} does not "
    "use them: {names}; for faster generation pass a small model to mlx_lm as --draft-model"
)


def resolve_tied_head(config: dict[str, Any], headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """Return config.json with `tie_word_embeddings` as the tensors show.

    mlx-lm's classes drop a stored head if config.json says that it is tied, or does not say. Here
    a stored head that differs from the embedding is untied, and a missing one is tied unless
    config.json says otherwise.
    """
    heads = [header for name, header in headers.items() if HEAD.match(name)]
    embeddings = [header for name, header in headers.items() if EMBEDDING.match(name)]
    ties = [table.get("tie_word_embeddings") for table in settings_tables(config)]
    declared = next((tie for tie in ties if tie is not None), None)
    if len(heads) > 1 or len(embeddings) != 1:
        return config
    tie = declared is not False
    if heads and tie:
        tie = same_bytes(heads[0], embeddings[0])
        if tie and declared is None:
            return config
    settings: dict[str, Any] = {"tie_word_embeddings": tie}
    if (text := text_settings(config)) is not config:
        settings["text_config"] = {**text, **settings}
    return {**config, **settings}


def same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    """Return whether two stored tensors are equal, reading a chunk at a time."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    a, b = _bytes(one), _bytes(other)
    starts = range(0, one.nbytes, CHUNK_BYTES)
    return all(np.array_equal(a[n : n + CHUNK_BYTES], b[n : n + CHUNK_BYTES]) for n in starts)


def left_out(stored: dict[str, mx.array], used: dict[str, mx.array]) -> list[str]:
    """Return the names of stored tensors that no parameter depends on.

    Args:
        stored: the stored tensors, lazy.
        used: the model's parameters, computed from them.
    """
    same = {id(array) for array in used.values()}
    names = [name for name, array in stored.items() if id(array) not in same]
    if not names:
        return []
    read: set[str] = set()
    for start in range(0, len(names), LABELS):
        graph = io.StringIO()
        numbers = range(start, min(start + LABELS, len(names)))
        labels = {f"stored_{n}": stored[names[n]] for n in numbers}
        mx.export_to_dot(graph, *used.values(), **labels)  # type: ignore[arg-type]
        read |= set(re.findall(r'^"stored_(\d+)" ->', graph.getvalue(), re.MULTILINE))
    return [name for n, name in enumerate(names) if str(n) not in read]


def check_left_out(
    path: Path, names: list[str], headers: dict[str, TensorHeader], layers: int, model_type: str
) -> list[str]:
    """Refuse unused tensors that affect the model's output.

    Args:
        path: the checkpoint, for messages.
        names: the unused tensors.
        headers: headers of all stored tensors.
        layers: number of layers of the model; later ones are for multi-token prediction.
        model_type: mlx-lm's name of the architecture, for messages.

    Returns:
        One sentence per kind of harmless unused tensors, with what to use for them.

    Raises:
        CheckpointError: when an unused tensor is not known to be harmless.
    """
    embeddings = [header for name, header in headers.items() if EMBEDDING.match(name)]
    unused = [
        name
        for name in names
        if not (HEAD.match(name) and any(same_bytes(headers[name], e) for e in embeddings))
    ]
    kinds: dict[str, list[str]] = {}
    for name in unused:
        layer, header = LAYER.search(name), headers.get(name)
        if OTHER_INPUT.search(name):
            kinds.setdefault(INPUT_NOTE, []).append(name)
        elif MTP.search(name) or (layer and int(layer[1]) >= layers):
            kinds.setdefault(MTP_NOTE, []).append(name)
        elif (
            CONSTANT.search(name)
            or header is None
            or INPUT.sub(OUTPUT, name) not in headers
            or (header.nbytes <= CHUNK_BYTES and not np.any(_bytes(header)))
        ):
            kinds.setdefault("not used by mlx-lm's {model_type}: {names}", []).append(name)
        else:
            raise CheckpointError(
                f"{path}: mlx-lm's {model_type} does not use the tensor {name!r}, so its output "
                "would differ from the original's: this mlx-lm does not support the model"
            )
    return [
        note.format(model_type=model_type, names=_summarize(names)) for note, names in kinds.items()
    ]


def _summarize(names: list[str]) -> str:
    """Return a short list of tensors, with a wildcard for the layer number."""
    kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    return f"{abbreviate(kinds)} (tensors: {len(names)})"


def _bytes(tensor: TensorHeader) -> np.ndarray:
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
