"""Build the model of the program that runs a checkpoint: the part that all model files have.

A checkpoint carries one file: `conversion.save` writes this text there in the place of the line
that imports it, so nothing but mlx and the program that runs the checkpoint is imported here.
mlx-vlm runs such a file without a flag, with classes of its own: it asks for `ModelConfig`, and
whatever else it asks for is answered by its own module of the architecture.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.nn as nn
from mlx.utils import tree_unflatten

Make = Callable[[str, nn.Module | None, dict], nn.Module | None]


class ModelArgs:
    """Carry config.json to `build_model`."""

    def __init__(self, config: dict):
        self.config = config

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Wrap `config` whole."""
        return cls(config)


class ModelConfig:
    """Stand in for the configuration class of mlx-vlm's module of the architecture.

    Attributes:
        module: that module, once a config was read.
    """

    module: ClassVar[Any] = None

    @classmethod
    def from_dict(cls, config: dict) -> Any:
        """Return that module's own configuration, with the `splitquant` table noted on it."""
        from mlx_vlm.utils import get_model_and_args  # pyright: ignore[reportMissingImports]

        plain = {key: value for key, value in config.items() if key != "model_file"}
        cls.module, _ = get_model_and_args(plain)
        found = cls.module.ModelConfig.from_dict(plain)
        found.splitquant = config["splitquant"]
        return found


def __getattr__(name: str) -> Any:
    """Answer mlx-vlm for the module of the architecture: `TextConfig`, `VisionModel`, ..."""
    if name.startswith("_") or ModelConfig.module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(ModelConfig.module, name)


def replace_layers(model: nn.Module, tables: dict[str, dict], make: Make) -> None:
    """Put empty layers where `tables` (table -> path -> settings) says.

    The layers may be those of a part `language_model`, as in mlx-vlm's models. `make` is given
    the table's name, the layer that is there and the settings; it returns None for a layer that
    it does not replace.

    Raises:
        ValueError: when a path is not that of a linear layer of the model.
    """
    modules = dict(model.named_modules())
    replaced = []
    for table, layers in tables.items():
        for name, settings in layers.items():
            path = name if name in modules else f"language_model.{name}"
            layer = make(table, modules.get(path), settings)
            if layer is None:
                raise ValueError(
                    f"config.json: splitquant: {table} has {name!r}, which is no linear layer of "
                    "this model"
                )
            replaced.append((path, layer))
    model.update_modules(tree_unflatten(replaced))


def build_model(args: Any, make: Make, sharded: type) -> nn.Module:
    """Build mlx-lm's own model of this architecture, or mlx-vlm's, with layers of `make`.

    `sharded` is a class whose `shard` stands before that of mlx-lm's model, where it has one.
    """
    if not isinstance(args, ModelArgs):
        model = ModelConfig.module.Model(args)
        replace_layers(model, args.splitquant, make)
        return model
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(args.config)
    if hasattr(model_class, "shard"):
        model_class = type(model_class.__name__, (sharded, model_class), {})
    model = model_class(args_class.from_dict(args.config))
    replace_layers(model, args.config["splitquant"], make)
    return model
