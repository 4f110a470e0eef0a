"""The model file of a checkpoint builds mlx-vlm's model with replaced layers."""

import sys
from types import ModuleType, SimpleNamespace

import mlx.nn as nn
import pytest

from splitquant_mlx.conversion.save import model_code

TABLES = {
    "QuantizedSplitLinear": ("layers", {"clusters": 2, "group_size": 32, "bits": 4}),
    "LUTLinear": ("lut", {"bits": 3, "outliers": 1}),
    "MixedLinear": ("mixed", {"bits": 3, "group_size": 32}),
}


class Model(nn.Module):
    """Stub of an mlx-vlm model, which contains the language model as a submodule."""

    def __init__(self, config):
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.up = nn.Linear(64, 32)


class ModelConfig(SimpleNamespace):
    @classmethod
    def from_dict(cls, config):
        return cls(**config)


@pytest.fixture
def mlx_vlm(monkeypatch):
    """Install a stub of mlx-vlm and return its module of the architecture."""
    llama = SimpleNamespace(Model=Model, ModelConfig=ModelConfig, VisionModel=object())
    utils = ModuleType("mlx_vlm.utils")
    vars(utils)["get_model_and_args"] = lambda config: (llama, config["model_type"])
    monkeypatch.setitem(sys.modules, "mlx_vlm", ModuleType("mlx_vlm"))
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", utils)
    return llama


def model_file(mode):
    """Return a checkpoint's model file as a module; it must not import this package."""
    code = model_code([SimpleNamespace(mode=mode)])
    assert b"splitquant_mlx" not in code
    module = ModuleType("custom_model")
    exec(code, module.__dict__)
    return module


@pytest.mark.parametrize("layer", TABLES)
def test_builds_the_model_of_mlx_vlm_with_replaced_layers(mlx_vlm, layer):
    table, settings = TABLES[layer]
    code = model_file(table)
    with pytest.raises(AttributeError, match="VisionModel"):
        _ = code.VisionModel
    config = {"model_type": "llama", "model_file": "x.py", "splitquant": {table: {"up": settings}}}
    model = code.Model(code.ModelConfig.from_dict(config))
    assert code.VisionModel is mlx_vlm.VisionModel
    assert type(model) is Model and type(model.language_model.up).__name__ == layer
    assert "bias" in model.language_model.up


@pytest.mark.parametrize("layer", TABLES)
def test_missing_layer_is_named(mlx_vlm, layer):
    table, settings = TABLES[layer]
    code = model_file(table)
    config = {"model_type": "llama", "splitquant": {table: {"down": settings}}}
    with pytest.raises(ValueError, match=f"{table} has 'down', which is not a linear layer"):
        code.Model(code.ModelConfig.from_dict(config))
