"""Plans: layers selected by a recipe's patterns, notes and sizes, without reading weights."""

import math

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models import deepseek_v3

from splitquant_mlx import convert, load_manifest
from splitquant_mlx.conversion.plan import make_plan
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.recipe import Recipe

EMBEDDING, HEAD, MLP = "model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan") / "model"
    return open_checkpoint(tiny.write_checkpoint(directory, tie_word_embeddings=False)).model


def converted(model, **settings):
    plan = make_plan(
        Recipe(method="rtn", group_size=32, **settings), model, {"vocab_size": tiny.VOCAB}
    )
    return {path for path, layer in plan.layers.items() if layer.action != "keep"}


def test_every_layer_is_converted_without_patterns(model):
    assert {EMBEDDING, HEAD, MLP} < converted(model)


@pytest.mark.parametrize("pattern", ["*embed*", "lm_head", "*.1.mlp.up_proj"])
def test_exclude_reaches_every_kind_of_layer(model, pattern):
    excluded = converted(model) - converted(model, exclude=(pattern,))
    assert excluded == {{"*embed*": EMBEDDING, "lm_head": HEAD}.get(pattern, MLP)}


@pytest.mark.parametrize("path", [EMBEDDING, HEAD, MLP])
def test_include_selects_one_layer_alone(model, path):
    assert converted(model, include=(path,)) == {path}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_without_a_match_is_named(model, option):
    with pytest.raises(RecipeError, match=rf"{option} pattern '\*\.nosuch' matches no layer"):
        converted(model, **{option: ("*.mlp.*", "*.nosuch")})


def test_patterns_that_select_no_layer_are_rejected(model):
    with pytest.raises(RecipeError, match="leave no layer to convert"):
        converted(model, exclude=("*",))


@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("rtn", ""),
        ("splitquant", "a MultiLinear is not split"),
        ("gptq", "a MultiLinear is quantized by rtn"),
        ("lut", "a MultiLinear is quantized by rtn"),
    ],
)
def test_notes_on_matrices_of_latent_attention(method, note):
    sizes = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
    args = deepseek_v3.ModelArgs(num_hidden_layers=1, q_lora_rank=None, hidden_size=64, **sizes)
    plan = make_plan(Recipe(method=method), deepseek_v3.Model(args), {})
    layer = plan.layers["model.layers.0.self_attn.embed_q"]
    assert (layer.action, layer.quantizer, layer.note) == ("quantize", "rtn", note)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {"lm_head": "split", "clusters": 2},
        {"method": "rtn", "bits": 3},
        {"method": "rtn", "mode": "mxfp4"},
    ],
)
def test_planned_bytes_are_those_of_the_conversion(tmp_path, dtype, settings):
    source = tiny.write_checkpoint(tmp_path / "source", dtype=dtype, tie_word_embeddings=False)
    sizes = {} if "mode" in settings else {"group_size": 32}
    recipe, checkpoint = Recipe(**settings, **sizes), open_checkpoint(source)
    plan = make_plan(recipe, checkpoint.model, checkpoint.config)
    planned = plan.tensors(checkpoint.weights)
    convert(source, tmp_path / "target", recipe=recipe)
    stored = mx.load(str(tmp_path / "target" / "model.safetensors"))
    assert {name: shape for name, (_, shape) in planned.items()} == {
        name: array.shape for name, array in stored.items()
    }
    nbytes = sum(kind.size * math.prod(shape) for kind, shape in planned.values())
    assert nbytes == load_manifest(tmp_path / "target").stored_bytes
