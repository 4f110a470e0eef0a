"""Describe a model from its headers, config and manifest, without reading weights."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.formats.gguf import TensorInfo, open_gguf
from splitquant_mlx.formats.manifest import LayerRecord, load_manifest
from splitquant_mlx.models.config import read_config, text_settings
from splitquant_mlx.models.footprint import context_limit, running_bytes
from splitquant_mlx.models.gguf_import import gguf_parameters
from splitquant_mlx.models.library import runs_in
from splitquant_mlx.models.shards import read_headers


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Properties of a model.

    Attributes:
        architecture: `model_type` of config.json.
        parameters: number of parameters of the original model.
        context: maximum context length in tokens; None if unknown.
        vocabulary: size of the vocabulary; None if unknown.
        has_chat_template: whether it has a chat template.
        method: quantization method; "" for an original.
        source: model that it was converted from; "" if unknown.
        bits_per_weight: stored bits / parameters, of the whole model.
        stored_bytes: size of its tensors.
        memory_bytes: estimated memory to run it.
        runs_in: programs that run it.
        layers: layers with a weight matrix.
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
    """Describe a model directory. Raises CheckpointError when it is not one."""
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
    return Overview(
        architecture=str(config.get("model_type", "unknown")),
        parameters=parameters,
        context=context_limit(config),
        vocabulary=vocabulary if type(vocabulary) is int else None,
        has_chat_template=_has_chat_template(directory),
        method=_method(config, manifest),
        source=manifest.source if manifest else "",
        bits_per_weight=8 * stored / max(parameters, 1),
        stored_bytes=stored,
        memory_bytes=running_bytes(directory),
        runs_in=runs_in(layers),
        layers=layers,
    )


def describe_gguf(path: Path) -> Overview:
    """Describe the model of a .gguf file from its header.

    Raises:
        SourceError: when the file cannot be opened.
        CheckpointError: when the file is corrupt or its architecture is not supported.
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
    type_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        type_bytes[tensor.type] += tensor.nbytes
    return Overview(
        architecture=config["model_type"],
        parameters=entries,
        context=context_limit(config),
        vocabulary=text_settings(config)["vocab_size"],
        has_chat_template="tokenizer.chat_template" in gguf.metadata,
        method=f"GGUF, mostly {type_bytes.most_common(1)[0][0]}",
        source="",
        bits_per_weight=8 * stored / entries,
        stored_bytes=stored,
        memory_bytes=running_bytes(path),
        runs_in="splitquant-mlx (unpacked to 16 bits first), llama.cpp, LM Studio",
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


def group_layers(layers: tuple[LayerRecord, ...]) -> list[tuple[str, list[LayerRecord]]]:
    """Group layers that differ only in their block number, which is "*" in the group's name."""
    groups: dict[str, dict[tuple[object, ...], list[LayerRecord]]] = {}
    for layer in layers:
        name = re.sub(r"\.\d+\.", ".*.", layer.path)
        form = (layer.action, layer.bits, layer.group_size, layer.clusters, layer.mode)
        groups.setdefault(name, {}).setdefault((layer.shape, form), []).append(layer)
    return [(name, group) for name, forms in groups.items() for group in forms.values()]


def _method(config: Mapping[str, Any], manifest: Any) -> str:
    if manifest is not None:
        return str(manifest.recipe.get("method", "splitquant"))
    settings = config.get("quantization") or config.get("quantization_config")
    return str(settings.get("quant_method", "mlx")) if isinstance(settings, Mapping) else ""


def _has_chat_template(directory: Path) -> bool:
    if any((directory / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")):
        return True
    with suppress(OSError, ValueError):
        text = (directory / "tokenizer_config.json").read_text(encoding="utf-8")
        return "chat_template" in text
    return False


def _layers(config: Mapping[str, Any], headers: Mapping[str, Any]) -> list[LayerRecord]:
    """Return the layers of a model without a manifest, which mlx may have quantized."""
    quantization = config.get("quantization")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    layers = []
    for name, header in sorted(headers.items(), key=lambda item: _natural(item[0])):
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(header.shape) < 2:
            continue
        parts = [headers.get(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases")]
        nbytes = sum(part.nbytes for part in parts if part)
        override = quantization.get(path)
        override = override if isinstance(override, Mapping) else {}
        settings = {**quantization, **override} if parts[1] else {}
        bits, size = settings.get("bits"), settings.get("group_size")
        *rows, width = header.shape
        if type(bits) is int and bits > 0:
            width = width * 32 // bits
        else:
            bits = size = None
        shape = (*rows, width)
        layers.append(
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
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key for natural sorting: layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
