"""Load a model, converted or not, as mlx-lm's model.

Code of the checkpoint is not run: split layers and lookup tables use this package's classes. On the
CPU, where mlx's 16-bit matmuls are slow, 16-bit parameters are converted to float32. With a group
of ranks the model is sharded before any weight is read.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.manifest import MODEL_FILE
from splitquant_mlx.models.architecture import (
    evaluate_random_state,
    parameters,
    require_kernels,
)
from splitquant_mlx.models.check_settings import check_settings
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.companions import COMPANIONS
from splitquant_mlx.models.config import check_config, read_config
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.folded import shift_corrections
from splitquant_mlx.models.left_out import resolve_tied_head
from splitquant_mlx.models.quantized import quantization_table, runs_packed
from splitquant_mlx.models.sharding import divide
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.runtime.disk import sha256
from splitquant_mlx.runtime.ranks import Group, check_alike, is_single_rank

# files that transformers builds tokenizers from
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_USABLE: set[tuple[Any, str]] = set()  # names and hashes of files that were loaded


def load(
    model: str | Path | Source,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    lazy: bool = False,
    group: Group | None = None,
    pipeline: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Args:
        model: hub repo id, directory, .gguf file, or resolved source.
        revision: branch, tag or commit of a hub repo.
        trust_remote_code: run Python files of the checkpoint.
        tokenizer_config: arguments of the tokenizer.
        lazy: do not read parameters until they are used; ignored for .gguf files.
        group: ranks to shard the model among; all must load it at the same time.
        pipeline: assign whole layers to each rank, instead of a part of every layer.

    Returns:
        mlx-lm's model and tokenizer, for mlx_lm.generate and similar functions.

    Raises:
        SplitQuantError: when the model is missing or not usable.
    """
    source = model if isinstance(model, Source) else resolve(str(model), revision=revision)
    with as_directory(source) as directory:
        loaded = load_model(
            directory,
            trust_remote_code=trust_remote_code,
            lazy=lazy and source.path.is_dir(),
            group=group,
            pipeline=pipeline,
        )
        settings = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
        return loaded, load_tokenizer(directory, settings)


def load_model(
    directory: Path,
    *,
    trust_remote_code: bool = False,
    lazy: bool = False,
    group: Group | None = None,
    pipeline: bool = False,
    dequantize: bool = False,
    keep_dtype: bool = False,
    to_run: bool = True,
) -> nn.Module:
    """Load the model of a checkpoint directory; see `load`.

    With `dequantize` all layers are dequantized, and on the CPU experts are converted to float32
    one at a time. With `keep_dtype` 16-bit parameters are not converted to float32. Without
    `to_run` a model that needs another device is not refused.
    """
    config = read_config(directory)
    headers = read_headers(directory)
    check_config(directory, config, len(headers))
    packed = runs_packed(quantization_table(directory, config)) and not dequantize
    if packed or config.get("model_file"):
        config = resolve_tied_head(config, headers)
        model = _load_with_mlx_lm(directory, config, trust_remote_code)
    else:
        checkpoint = open_checkpoint(directory)
        model, config = checkpoint.model.eval(), checkpoint.config
        model.load_weights(list(checkpoint.weights.items()))
        del checkpoint
    if to_run:
        require_kernels(directory, model)
    if group is not None and not is_single_rank(group):
        layout = [config, [[name, h.dtype, h.shape] for name, h in sorted(headers.items())]]
        digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()
        check_alike(group, f"model at {directory}", digest)
        divide(model, config, group, pipeline=pipeline, path=directory)
    with _readable(directory):
        if mx.default_device() == mx.cpu and not keep_dtype:
            from splitquant_mlx.models.narrow_experts import to_float32

            to_float32(model, experts=not dequantize)
        if not lazy:
            mx.eval(model.parameters())
        evaluate_random_state()
    return model


def _load_with_mlx_lm(
    directory: Path, config: dict[str, Any], trust_remote_code: bool
) -> nn.Module:
    """Load a model that has quantized layers, or a model file."""
    from mlx_lm.utils import load_model as mlx_lm_load_model

    from splitquant_mlx.nn import lut_model_file, split_model_file
    from splitquant_mlx.nn.build_model import ModelArgs

    options: dict[str, Any] = {"model_config": {}}
    model_code = config.get("model_file")
    if isinstance(config.get("splitquant"), dict) and model_code in (None, MODEL_FILE):
        options["model_config"]["model_file"] = None
        code = split_model_file if "layers" in config["splitquant"] else lut_model_file
        options["get_model_classes"] = lambda config: (code.Model, ModelArgs)
    elif model_code and not trust_remote_code:
        raise CheckpointError(
            f"{directory} requires running its code, {model_code!r}: read it, and pass "
            "--trust-remote-code if you trust it"
        )
    elif model_code:
        options["trust_remote_code"] = True
    if not options.get("trust_remote_code"):
        config = normalize(directory, config)  # and refuse unsupported settings
        options["model_config"] |= {k: v for k, v in config.items() if k != "model_file"}
    with _readable(directory):
        model, _ = mlx_lm_load_model(directory, lazy=True, **options)
    if not options.get("trust_remote_code"):
        check_settings(directory, model, config)
        model.load_weights(list(shift_corrections(parameters(model), config).items()))
    return model


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Raise errors inside mlx-lm as CheckpointError."""
    try:
        yield
    except Exception as exc:  # ValueError, KeyError, TypeError, RuntimeError, ...
        raise CheckpointError(
            f"{directory} cannot be loaded: {type(exc).__name__}: {one_line(exc)}"
        ) from exc


def load_tokenizer(directory: Path, settings: dict[str, Any]) -> Any:
    """Load the tokenizer of a checkpoint directory as mlx-lm's TokenizerWrapper."""
    # without trust_remote_code, transformers would prompt on the terminal
    settings = {"trust_remote_code": False, **settings}
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as mlx_lm_load_tokenizer

    _check_keys(directory)
    try:
        eos_token_ids = load_config(directory).get("eos_token_id")
        return mlx_lm_load_tokenizer(directory, settings, eos_token_ids=eos_token_ids)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # OSError, ValueError, ..., or a Rust panic
        reason = f"{type(exc).__name__}: {one_line(exc)}"
        if not any(file for pattern in TOKENIZERS for file in directory.glob(pattern)):
            reason = f"it has none of {', '.join(TOKENIZERS)}"
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {reason}") from exc


def tokenizer_problem(directory: Path) -> str:
    """Return why a checkpoint has no usable tokenizer; empty if it has one.

    A converted model has copies of the original's files, which are not loaded a second time.
    """
    try:
        files = {file for pattern in COMPANIONS for file in directory.glob(pattern)}
        digests = frozenset((file.name, sha256(file)) for file in files if file.is_file())
        config = read_config(directory)  # of which loading uses two settings
        key = (digests, repr([config.get(key) for key in ("model_type", "eos_token_id")]))
        if key not in _USABLE:
            load_tokenizer(directory, {})
            _USABLE.add(key)
    except (CheckpointError, OSError) as exc:
        return str(exc)
    return ""


def _check_keys(directory: Path) -> None:
    """Refuse keys with control characters, since tokenizers prints unknown keys."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, _ in pairs:
            if not key.isprintable():
                raise CheckpointError(f"{directory}: the tokenizer has a setting {key!r:.80}")
        return dict(pairs)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            text = (directory / name).read_text(encoding="utf-8")
            json.loads(text, object_pairs_hook=check)
        except (OSError, ValueError, RecursionError):
            continue  # transformers reports it, or does not need the file
