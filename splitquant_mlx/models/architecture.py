"""Find mlx-lm's model classes of an architecture, and build a model."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from splitquant_mlx.errors import CheckpointError, DeviceError, one_line
from splitquant_mlx.models.config import SIZES
from splitquant_mlx.runtime.compatibility import check_names

# annotation of a setting -> expected value, and the types that would fail later, in mlx-lm
TYPES: dict[Any, tuple[str, tuple[type, ...]]] = {
    "int": ("a number", (bool, str, list, dict)),
    "float": ("a number", (bool, str, list, dict)),
    "bool": ("true or false", (str, float, list, dict)),
}
MISSING_ARGUMENTS = re.compile(r"ModelArgs.__init__\(\) missing \d+ required .*arguments?: (.*)")
MODEL_TYPE = re.compile(r"[\w-]+")


def find_classes(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for `config`: the model and its arguments.

    Raises:
        CheckpointError: when mlx-lm has no such architecture, or an entry of config.json has the
            wrong type.
        VersionError: when the installed mlx-lm is too old or too new.
    """
    check_names("mlx_lm.utils")
    from mlx_lm.utils import _get_classes

    try:
        if not MODEL_TYPE.fullmatch(config["model_type"]):  # it is part of a module's name
            raise ValueError("not a module name")
        model_class, args_class = _get_classes(config)
    except SystemExit as exc:
        raise CheckpointError(
            f"{path}: mlx-lm's {config['model_type']} needs a package that is not installed"
        ) from exc
    except (ValueError, AttributeError) as exc:
        raise CheckpointError(
            f"{path}: unknown architecture {config['model_type']!r:.60}: this mlx-lm has no such "
            "model; a newer one may (pip install -U mlx-lm)"
        ) from exc
    _check_types(path, config, args_class)
    return model_class, args_class


def build_model(path: Path, config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model for `config` with unevaluated parameters."""
    model_class, args_class = find_classes(path, config)
    try:
        model = model_class(args_class.from_dict(config))
        evaluate_random_state()
        return model
    except Exception as exc:  # mlx-lm's models raise exceptions of any class
        if missing := MISSING_ARGUMENTS.search(str(exc)):
            raise CheckpointError(
                f"{path}: config.json lacks {missing[1]}, which mlx-lm's {config['model_type']} "
                "requires: it is incomplete, or from another architecture of that name"
            ) from exc
        sizes = ", ".join(f"{key} {str(config[key])[:20]}" for key in SIZES if key in config)
        raise CheckpointError(
            f"{path}: config.json does not describe a {config['model_type']!r} model: "
            f"{type(exc).__name__}: {one_line(exc)} ({sizes or 'no sizes'})"
        ) from exc


def require_kernels(path: Path, model: nn.Module) -> None:
    """Raise DeviceError if mlx-lm's model needs Metal and the default device is another."""
    if (mx.default_device() == mx.gpu and mx.metal.is_available()) or not _has_kernels(model):
        return
    try:
        model(mx.zeros((1, 1), mx.int32))  # is not evaluated
    except Exception as exc:  # others are raised where the model is used
        if "[metal_kernel]" in str(exc):
            kind = getattr(model, "model_type", type(model).__name__)
            raise DeviceError(
                f"{path}: mlx-lm's {kind} needs Metal: run it on the GPU of a Mac (conversions "
                "with --method rtn or splitquant do not run it)"
            ) from exc


def _has_kernels(model: nn.Module) -> bool:
    """Return whether the code of a model, or of one of its layers, uses kernels for Metal."""
    modules = {type(module).__module__ for module in model.modules()}
    files = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    sources = (Path(file).read_text(encoding="utf-8") for file in files if file)
    return any("metal_kernel" in source or "..kernels" in source for source in sources)


def evaluate_random_state() -> None:
    """Evaluate mlx's random state after initializing parameters that are never read.

    The state is a lazy chain of key splits that grows with every model in a process that draws no
    other random numbers (measured: 33 kB for a model of two layers).
    """
    mx.eval(mx.random.state)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of a model by name, in model order."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def widest_input(model: nn.Module) -> int:
    """Return the number of inputs of the widest layer that can be quantized, but embeddings."""
    return max(
        (
            module["weight"].shape[-1]
            for module in model.modules()
            if hasattr(module, "to_quantized") and not isinstance(module, nn.Embedding)
        ),
        default=0,
    )


def _check_types(path: Path, config: dict[str, Any], args_class: type) -> None:
    """Refuse entries of the wrong type where the class has a number or bool."""
    fields = dataclasses.fields(args_class) if dataclasses.is_dataclass(args_class) else ()
    for field in fields:
        value = config.get(field.name)
        expected, refused = TYPES.get(getattr(field.type, "__name__", field.type), ("", ()))
        if isinstance(value, refused):
            raise CheckpointError(
                f"{path}: config.json: {field.name}: expected {expected}, got {value!r:.80}"
            )
