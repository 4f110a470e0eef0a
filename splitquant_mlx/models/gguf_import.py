"""Convert a GGUF file to a Hugging Face directory that mlx-lm loads.

Parameter names and shapes come from mlx-lm's model of the architecture, and the gguf package's
table maps the names to llama.cpp's. Names, shapes and settings are checked before anything is
written, and one tensor at a time is in memory.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf import Gguf, TensorInfo, open_gguf, read_tensor
from splitquant_mlx.formats.gguf_architectures import architecture_of
from splitquant_mlx.formats.gguf_config import model_config
from splitquant_mlx.formats.gguf_rope import ROPE_TENSORS
from splitquant_mlx.formats.gguf_settings import block_count
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE, write_tokenizer
from splitquant_mlx.formats.model_card import write_source_card
from splitquant_mlx.formats.packed import dtype_name
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.config import check_config
from splitquant_mlx.progress import SILENT, UNPACKING, Progress

# patterns of mlx-lm's names, and the corresponding names in the gguf package's table
RENAMED = (
    (re.compile(r"\.\w+\.switch_mlp\."), ".mlp.experts."),
    (re.compile(r"\.e_score_correction_bias$"), ".e_score_correction.bias"),
    (re.compile(r"\.expert_bias$"), ".expert_bias.bias"),
    (re.compile(r"\.dt_bias$"), ".dt_proj.bias"),
    (re.compile(r"\.embed_q\."), ".k_b_proj."),
    (re.compile(r"\.unembed_out\."), ".v_b_proj."),
)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
QUERY_OR_KEY = re.compile(r"\.self_attn\.([qk])_proj\.")
# key in the README of a hub repo -> GGUF name
CARD = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
    "tags": "tags",
}


class _Target(NamedTuple):
    """A parameter and its source tensors, joined by `join`; None if it is a stored tensor."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    join: Callable[..., mx.array] | None = None


def import_gguf(path: Path, directory: Path, progress: Progress = SILENT) -> None:
    """Write config.json, the tokenizer and safetensors shards of the model in `path`.

    If all tensors are F32, the parameters are float32; if they are F32 and BF16, bfloat16; else
    float16, or bfloat16 if the architecture's activations overflow float16. `directory` must
    exist; the caller removes it after an error.

    Raises:
        SourceError: the file cannot be opened.
        CheckpointError: the file is corrupt, incomplete or not supported.
    """
    gguf = open_gguf(path)
    try:
        dtype, config, targets = _describe(gguf)
        write_tokenizer(gguf.metadata, directory)
        _write_tensors(gguf, targets, config, dtype, directory, progress)
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc}") from exc
    text = json.dumps(_full_config(gguf, config), indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    card = {key: gguf.metadata.get(f"general.{name}") for key, name in CARD.items()}
    write_source_card(card, directory)


def gguf_parameters(gguf: Gguf) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return config.json's content and the tensors by mlx-lm's names, without reading values.

    Raises:
        CheckpointError: as `import_gguf`.
    """
    try:
        _, config, targets = _describe(gguf)
    except CheckpointError as exc:
        raise CheckpointError(f"{gguf.path}: {exc}") from exc
    return _full_config(gguf, config), {target.name: _info(gguf, target) for target in targets}


def _full_config(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content; in a multimodal model `config` is its text_config."""
    if not architecture_of(gguf.metadata).multimodal:
        return config
    keys = ("model_type", "tie_word_embeddings", "torch_dtype", "bos_token_id", "eos_token_id")
    text = {**config, "model_type": f"{config['model_type']}_text"}
    return {**{key: config[key] for key in keys if key in config}, "text_config": text}


def _info(gguf: Gguf, target: _Target) -> TensorInfo:
    """Return a parameter's tensor; if it is computed, with its shape and its share of the bytes."""
    infos = [gguf.tensors[name] for name in target.sources]
    if target.join is None:
        return infos[0]
    share = math.prod(target.shape) / sum(math.prod(info.shape) for info in infos)
    nbytes = round(share * sum(info.nbytes for info in infos))
    return infos[0]._replace(shape=target.shape, nbytes=nbytes)


def _describe(gguf: Gguf) -> tuple[mx.Dtype, dict[str, Any], list[_Target]]:
    """Return the dtype to store, config.json's content, and the sources of each parameter."""
    types = {info.type for info in gguf.tensors.values()}
    wide_range = architecture_of(gguf.metadata).wide_range or types <= {"F32", "BF16"}
    dtype = mx.float32 if types == {"F32"} else mx.bfloat16 if wide_range else mx.float16
    config = model_config(gguf, dtype_name(dtype))
    return dtype, config, _targets(gguf, config)


def _targets(gguf: Gguf, config: dict[str, Any]) -> list[_Target]:
    """Return the sources of each parameter.

    Raises:
        CheckpointError: when tensors are missing or unknown, or their shapes are not the model's.
    """
    full_config = _full_config(gguf, config)
    check_config(Path("metadata"), full_config, len(gguf.tensors))
    model = build_model(Path("metadata"), full_config)
    name_of = _gguf_names(gguf.metadata["general.architecture"], config["num_hidden_layers"])
    joined = architecture_of(gguf.metadata).joined
    targets = []
    for name, array in parameters(model).items():
        text_name = name.removeprefix("language_model.")
        if config["tie_word_embeddings"] and text_name == "lm_head.weight":
            continue
        layer = LAYER.match(text_name)
        sources, join = joined.get(layer[2] if layer else "", ((), None))
        sources = tuple(f"blk.{layer[1]}.{source}" for source in sources) if layer else ()
        if not sources or not gguf.tensors.keys() >= {*sources}:
            sources, join = (name_of(text_name),), None
        targets.append(_Target(name, tuple(array.shape), sources, join))
    used = {source for target in targets for source in target.sources}
    missing = sorted(used - gguf.tensors.keys())
    layers = range(config["num_hidden_layers"], block_count(gguf.metadata))
    mtp = tuple(f"blk.{number}." for number in layers)  # for multi-token prediction
    unused = gguf.tensors.keys() - used - {*ROPE_TENSORS}
    extra = sorted(name for name in unused if not name.startswith(mtp))
    if missing or extra:
        raise CheckpointError(
            f"tensors missing from a {config['model_type']} model: {missing!r:.200}, unknown: "
            f"{extra!r:.200}; the file is incomplete or from another architecture"
        )
    for target in targets:
        shapes = [gguf.tensors[source].shape for source in target.sources]
        if _without_ones(_shape(target, config, shapes)) != _without_ones(target.shape):
            raise CheckpointError(
                f"tensor {target.sources[0]!r}: expected shape {target.shape} of {target.name} "
                f"from the metadata, got {', '.join(map(str, shapes))}; the file is corrupt"
            )
    return targets


def _shape(
    target: _Target, config: dict[str, Any], shapes: list[tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the shape of the parameter that tensors of `shapes` give, without evaluation."""
    if target.join is None:
        return shapes[0]
    try:
        return target.join(config, *map(mx.zeros, shapes)).shape
    except (ArithmeticError, ValueError, IndexError):
        return (0,)


def _gguf_names(architecture: str, layers: int) -> Any:
    """Return a function from mlx-lm's parameter names to GGUF names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, layers)

    def name_of(parameter: str) -> str:
        name = parameter
        for pattern, replacement in RENAMED:
            name = pattern.sub(replacement, name)
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise CheckpointError(
                f"the gguf package has no name for the parameter {parameter!r}; {ELSEWHERE}"
            )
        return gguf_name if gguf_name.endswith((".weight", ".bias")) else f"{gguf_name}.weight"

    return name_of


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove axes of size 1, which converters add and drop."""
    return tuple(size for size in shape if size != 1)


def _write_tensors(
    gguf: Gguf,
    targets: list[_Target],
    config: dict[str, Any],
    dtype: mx.Dtype,
    directory: Path,
    progress: Progress,
) -> None:
    architecture = architecture_of(gguf.metadata)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    total = sum(_info(gguf, target).nbytes for target in targets)
    stored_as = np.float16 if dtype == mx.float16 else np.float32
    with (
        ShardWriter(
            directory, {target.name: (dtype, target.shape) for target in targets}
        ) as writer,
        progress.task(UNPACKING, total) as advance,
    ):
        for target in targets:
            if target.join is None:
                values = read_tensor(gguf, target.sources[0], stored_as)
            else:
                parts = [mx.array(read_tensor(gguf, source)) for source in target.sources]
                values = np.array(target.join(config, *parts)).astype(stored_as)
            projection = QUERY_OR_KEY.search(target.name)
            if architecture.interleaved and projection:
                values = _half_split(values, heads[projection[1]])
            if architecture.norm_offset and target.name.endswith("norm.weight"):
                values = values - np.array(architecture.norm_offset, stored_as)
            if not np.isfinite(values).all():
                name = target.sources[0]
                raise CheckpointError(f"tensor {name!r}: values not finite as {dtype}; {ELSEWHERE}")
            writer.add(target.name, mx.array(values.reshape(target.shape), dtype))
            advance(_info(gguf, target).nbytes)
        writer.close()


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from interleaved (0, d/2, 1, ...) to half-split (0, 1, ...)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
