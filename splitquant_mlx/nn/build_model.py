"""Build an mlx-lm or mlx-vlm model with replaced layers: the code that all model files share.

A checkpoint ships a single model file. `conversion.save` inlines this module there in place of the
import statement, so it imports only mlx and the program that runs the checkpoint.

mlx-vlm runs a model file without a flag. It expects `ModelConfig` and other classes in it;
`__getattr__` takes those from mlx-vlm's module of the architecture.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.nn as nn
from mlx.utils import tree_unflatten

LayerFactory = Callable[[str, nn.Module | None, dict], nn.Module | None]


class ModelArgs:
    """Arguments of `build_model`: the contents of config.json."""

    def __init__(self, config: dict):
        self.config = config

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Store `config` unchanged."""
        return cls(config)


class ModelConfig:
    """Replacement for the configuration class of mlx-vlm's module of the architecture.

    Attributes:
        module: that module; None until `from_dict` is called.
    """

    module: ClassVar[Any] = None

    @classmethod
    def from_dict(cls, config: dict) -> Any:
        """Return the architecture's configuration, with an additional attribute `splitquant`."""
        from mlx_vlm.utils import get_model_and_args  # pyright: ignore[reportMissingImports]

        plain = {key: value for key, value in config.items() if key != "model_file"}
        cls.module, _ = get_model_and_args(plain)
        args = cls.module.ModelConfig.from_dict(plain)
        args.splitquant = config["splitquant"]
        return args


def __getattr__(name: str) -> Any:
    """Return `TextConfig`, `VisionModel`, ... of mlx-vlm's module of the architecture."""
    if name.startswith("_") or ModelConfig.module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(ModelConfig.module, name)


def replace_layers(model: nn.Module, tables: dict[str, dict], make_layer: LayerFactory) -> None:
    """Replace the listed layers of `model`, in place, by uninitialized layers of `make_layer`.

    Args:
        model: a model of mlx-lm or mlx-vlm.
        tables: table name -> layer path -> settings. Paths may omit the prefix `language_model.`
            that mlx-vlm's models have.
        make_layer: called with the table name, the current layer (None if there is none) and the
            settings; returns None for a layer that it cannot replace.

    Raises:
        ValueError: when a path is not that of a linear layer of the model.
    """
    modules = dict(model.named_modules())
    replaced = []
    for table, layers in tables.items():
        for name, settings in layers.items():
            path = name if name in modules else f"language_model.{name}"
            layer = make_layer(table, modules.get(path), settings)
            if layer is None:
                raise ValueError(
                    f"config.json: splitquant: {table} has {name!r}, which is not a linear layer "
                    "of this model"
                )
            replaced.append((path, layer))
    model.update_modules(tree_unflatten(replaced))


def build_model(args: Any, make_layer: LayerFactory, mixin: type) -> nn.Module:
    """Build the model of mlx-lm or mlx-vlm for this architecture, with replaced layers.

    Args:
        args: `ModelArgs` from mlx-lm, or the configuration that `ModelConfig.from_dict` returned.
        make_layer: see `replace_layers`.
        mixin: class whose `shard` overrides that of mlx-lm's model class, if it has one.
    """
    if not isinstance(args, ModelArgs):
        model = ModelConfig.module.Model(args)
        replace_layers(model, args.splitquant, make_layer)
        return model
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(args.config)
    if hasattr(model_class, "shard"):
        model_class = type(model_class.__name__, (mixin, model_class), {})
    model = model_class(args_class.from_dict(args.config))
    replace_layers(model, args.config["splitquant"], make_layer)
    return model
