"""Find what a checkpoint holds and mlx-lm's model of it does not use.

mlx-lm's `sanitize` renames, stacks and drops tensors. Which are dropped is read off the graph of
the arrays, which are not evaluated: a tensor that no parameter comes from is left out. Most such
tensors change nothing (buffers, towers for images, heads that predict further tokens), and the
user is told what to use for them; any other one would make the converted model another model.
"""

import io
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.expert_stacks import INPUT, OUTPUT

# constants that the model computes by itself
CONSTANT = re.compile(
    r"rotary|rope\.|inv_freq|freqs_c|position_ids|masked_bias|attn(ention)?\.bias$"
)
# layers that predict more than the next token
FURTHER = re.compile(r"(^|\.)(mtp|eh_proj|enorm|hnorm|nextn|shared_head)[._]|(^|\.)mtp_")
# parts that read images and sounds
OTHER_INPUT = re.compile(
    r"vision|visual|image|video|audio|multi_modal|multimodal|mm_projector|(^|\.)(embed_vision|patch_merge)"
)
LAYER = re.compile(r"layers\.(\d+)\.")
HEAD = re.compile(r"(^|.*\.)lm_head\.weight$")
EMBEDDING = re.compile(r"(^|.*\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
CHUNK_BYTES = 1 << 24
LABELS = 1000  # that a drawing takes: Python hands no more than 1,024 named arguments to mlx
INPUT_NOTE = (
    "the text model alone is converted; left out is what reads images and sounds: {names}; for "
    "them convert the original with mlx_vlm.convert"
)
FURTHER_NOTE = (
    "left out is what predicts further tokens, which mlx-lm's {model_type} does without: {names}; "
    "to generate faster give mlx_lm a small model as --draft-model"
)


def settle_head(config: dict[str, Any], headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """Return config.json with what the tensors say of a head tied to the embedding.

    mlx-lm's classes drop a stored head where config.json says that it is tied, or says nothing; a
    head that differs from the embedding is used instead. Where nothing is said and no head is
    stored, it is tied.
    """
    heads = [header for name, header in headers.items() if HEAD.match(name)]
    embeddings = [header for name, header in headers.items() if EMBEDDING.match(name)]
    text = config.get("text_config")
    tables = [config, *([text] if isinstance(text, dict) else [])]
    said = next(
        (t for table in tables if (t := table.get("tie_word_embeddings")) is not None), None
    )
    if len(heads) > 1 or len(embeddings) != 1:
        return config
    tie = said is not False
    if heads and tie:
        tie = same_bytes(heads[0], embeddings[0])
        if tie and said is None:
            return config
    settled = {"tie_word_embeddings": tie}
    inner = {"text_config": {**text, **settled}} if isinstance(text, dict) else {}
    return {**config, **settled, **inner}


def same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    """Compare two stored tensors, without reading either whole into memory."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    a, b = _bytes(one), _bytes(other)
    starts = range(0, one.nbytes, CHUNK_BYTES)
    return all(np.array_equal(a[n : n + CHUNK_BYTES], b[n : n + CHUNK_BYTES]) for n in starts)


def left_out(stored: dict[str, mx.array], used: dict[str, mx.array]) -> list[str]:
    """Return the names of stored tensors that no parameter comes from.

    Args:
        stored: lazy arrays as they are in the files.
        used: the model's parameters, made from them.
    """
    same = {id(array) for array in used.values()}
    names = [name for name, array in stored.items() if id(array) not in same]
    if not names:
        return []
    read: set[str] = set()
    for start in range(0, len(names), LABELS):
        graph = io.StringIO()
        some = range(start, min(start + LABELS, len(names)))
        labels = {f"stored_{n}": stored[names[n]] for n in some}
        mx.export_to_dot(graph, *used.values(), **labels)  # type: ignore[arg-type]
        read |= set(re.findall(r'^"stored_(\d+)" ->', graph.getvalue(), re.MULTILINE))
    return [name for n, name in enumerate(names) if str(n) not in read]


def check_left_out(
    path: Path, names: list[str], headers: dict[str, TensorHeader], layers: int, model_type: str
) -> list[str]:
    """Refuse to leave out what makes the model another one.

    Args:
        path: the checkpoint, for messages.
        names: what is left out.
        headers: of all stored tensors.
        layers: how many the model has; what belongs to further ones predicts further tokens.
        model_type: mlx-lm's name of the architecture, for messages.

    Returns:
        A sentence for each kind of what is left out, with what to use for it.

    Raises:
        CheckpointError: when a tensor is left out that is none of the harmless ones.
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
        elif FURTHER.search(name) or (layer and int(layer[1]) >= layers):
            kinds.setdefault(FURTHER_NOTE, []).append(name)
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
                "would differ from the original's: it cannot be converted rightly with this mlx-lm"
            )
    return [
        note.format(model_type=model_type, names=_listed(found)) for note, found in kinds.items()
    ]


def _listed(names: list[str]) -> str:
    """Return a short list of tensors, those of all layers as one."""
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    more = f" and {len(kinds) - 3} more" if kinds[3:] else ""
    return f"{', '.join(kinds[:3])}{more} (tensors: {len(names)})"


def _bytes(tensor: TensorHeader) -> np.ndarray:
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
