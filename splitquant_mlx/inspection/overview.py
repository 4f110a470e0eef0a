"""Describe a model from its headers, config and manifest; no weight is read."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.formats.gguf import TensorInfo, open_gguf
from splitquant_mlx.formats.manifest import LayerRecord, load_manifest
from splitquant_mlx.models.checkpoint import read_headers
from splitquant_mlx.models.config import read_config, text_settings
from splitquant_mlx.models.footprint import context_limit, running_bytes
from splitquant_mlx.models.gguf_import import gguf_parameters
from splitquant_mlx.models.library import runs_in


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a model directory holds.

    Attributes:
        architecture: `model_type` of its config.json.
        parameters: of the original model.
        context: tokens that it was made for; None where it does not say.
        vocabulary: tokens; None where it does not say.
        has_chat_template: whether it is made to chat.
        method: that it was quantized with; "" for an original.
        source: what it was converted from; "" where it does not say.
        bits_per_weight: stored bits over original entries, of the whole model.
        stored_bytes: of its tensors.
        memory_bytes: that it takes to run, about.
        runs_in: the programs that run it.
        layers: those with a weight matrix.
    """

    architecture: str
    parameters: int
    context: int | None
    vocabulary: int | None
    has_chat_template: bool
    method: str
    source: str
    bits_per_weight: float
    stored_bytes: int
    memory_bytes: int
    runs_in: str
    layers: tuple[LayerRecord, ...]


def describe(directory: Path) -> Overview:
    """Describe a model directory. Raises CheckpointError when it is none."""
    manifest = load_manifest(directory)
    config, headers = read_config(directory), read_headers(directory)
    layers = manifest.layers if manifest else tuple(_layers(config, headers))
    stored = sum(header.nbytes for header in headers.values())
    quantized = {leaf for x in layers for leaf in (f"{x.path}.scales", f"{x.path}.biases")}
    matrices = {f"{layer.path}.weight": math.prod(layer.shape) for layer in layers}
    parameters = sum(
        matrices.get(name, math.prod(header.shape))
        for name, header in headers.items()
        if name not in quantized
    )
    if manifest is not None:
        parameters = round(8 * manifest.stored_bytes / manifest.bits_per_weight)
    vocabulary = text_settings(config).get("vocab_size")
    templates = ("chat_template.jinja", "chat_template.json")
    return Overview(
        architecture=str(config.get("model_type", "unknown")),
        parameters=parameters,
        context=context_limit(config),
        vocabulary=vocabulary if type(vocabulary) is int else None,
        has_chat_template=any((directory / name).is_file() for name in templates)
        or "chat_template" in _tokenizer_config(directory),
        method=_method(config, manifest),
        source=manifest.source if manifest else "",
        bits_per_weight=8 * stored / max(parameters, 1),
        stored_bytes=stored,
        memory_bytes=running_bytes(directory),
        runs_in=runs_in(layers),
        layers=layers,
    )


def describe_gguf(path: Path) -> Overview:
    """Describe the model of a .gguf file from its header, as it is in the file.

    Raises:
        SourceError: the file cannot be opened.
        CheckpointError: the file is corrupt, or of an architecture that is not supported here.
    """
    gguf = open_gguf(path)
    config, tensors = gguf_parameters(gguf)
    layers = tuple(
        _gguf_layer(name.removesuffix(".weight"), tensor)
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) > 1
    )
    entries = sum(math.prod(tensor.shape) for tensor in tensors.values())
    stored = sum(tensor.nbytes for tensor in tensors.values())
    bytes_of: Counter[str] = Counter()
    for tensor in tensors.values():
        bytes_of[tensor.type] += tensor.nbytes
    return Overview(
        architecture=config["model_type"],
        parameters=entries,
        context=context_limit(config),
        vocabulary=text_settings(config)["vocab_size"],
        has_chat_template="tokenizer.chat_template" in gguf.metadata,
        method=f"GGUF, {bytes_of.most_common(1)[0][0]} most of it",
        source="",
        bits_per_weight=8 * stored / entries,
        stored_bytes=stored,
        memory_bytes=running_bytes(path),
        runs_in="here (unpacked to 16 bits first), llama.cpp, LM Studio",
        layers=layers,
    )


def _gguf_layer(path: str, tensor: TensorInfo) -> LayerRecord:
    return LayerRecord(
        path=path,
        kind="embedding" if "embed" in path else "linear",
        action="keep" if tensor.type in ("F32", "F16", "BF16") else "quantize",
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        bits_per_weight=8 * tensor.nbytes / math.prod(tensor.shape),
        mode=tensor.type,
    )


def kinds(layers: tuple[LayerRecord, ...]) -> list[tuple[str, list[LayerRecord]]]:
    """Group layers that differ in the number of their block alone, which is * in the name."""
    found: dict[str, dict[tuple[object, ...], list[LayerRecord]]] = {}
    for layer in layers:
        name = re.sub(r"\.\d+\.", ".*.", layer.path)
        form = (layer.action, layer.bits, layer.group_size, layer.clusters, layer.mode)
        found.setdefault(name, {}).setdefault((layer.shape, form), []).append(layer)
    return [(name, group) for name, forms in found.items() for group in forms.values()]


def _method(config: Mapping[str, Any], manifest: Any) -> str:
    if manifest is not None:
        return str(manifest.recipe.get("method", "splitquant"))
    table = config.get("quantization") or config.get("quantization_config")
    return str(table.get("quant_method", "mlx")) if isinstance(table, Mapping) else ""


def _tokenizer_config(directory: Path) -> str:
    try:
        return (directory / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _layers(config: Mapping[str, Any], headers: Mapping[str, Any]) -> list[LayerRecord]:
    """Return the layers of a model without a manifest, mlx's quantized ones among them."""
    table = config.get("quantization")
    table = table if isinstance(table, Mapping) else {}
    found = []
    for name, header in sorted(headers.items(), key=lambda item: _natural(item[0])):
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(header.shape) < 2:
            continue
        parts = [headers.get(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases")]
        nbytes = sum(part.nbytes for part in parts if part)
        own = table.get(path)
        own = {**table, **own} if isinstance(own, Mapping) else table
        bits = own.get("bits") if parts[1] else None
        size = own.get("group_size") if parts[1] else None
        *rows, width = header.shape
        if type(bits) is int and bits > 0:
            width = width * 32 // bits
        else:
            bits = size = None
        shape = (*rows, width)
        found.append(
            LayerRecord(
                path=path,
                kind="embedding" if "embed" in path else "linear",
                action="quantize" if bits else "keep",
                shape=shape,
                nbytes=nbytes,
                bits_per_weight=8 * nbytes / math.prod(shape),
                bits=bits,
                group_size=size if type(size) is int else None,
            )
        )
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
