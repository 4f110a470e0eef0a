"""Stacks of experts of many architectures through every method."""

import json
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from architecture_variants import Variant
from architectures import settings_of
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
from splitquant_mlx.calibration.statistics import ExpertMeans, iterate_blocks
from splitquant_mlx.conversion import converter, pipeline, quantizers
from splitquant_mlx.models.architecture import build_model
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.nn.split_model_file import QuantizedSplitSwitchLinear
from splitquant_mlx.quantization.affine import Quantized, dequantize
from splitquant_mlx.recipe import Calibration

ARCHITECTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v3", "gpt_oss"),
    *("glm4_moe", "granitemoe", "llama4"),
)
CALIBRATION = Calibration(num_samples=8, sequence_length=32)
SIZES = {"bits": 4, "group_size": 32}
CALIBRATED = {**SIZES, "embedding_bits": 8, "calibration": CALIBRATION}
RECIPES = {
    "rtn": Recipe(method="rtn", **SIZES),
    "imatrix": Recipe(method="imatrix", **CALIBRATED),
    "gptq": Recipe(method="gptq", **CALIBRATED),
    "auto": Recipe(method="auto", target_bpw=5.0, calibration=CALIBRATION),
    "splitquant": Recipe(group_size=32),
    "refine": Recipe(method="rtn", refine=True, calibration=CALIBRATION, **SIZES),
}


def write_random(directory, architecture):
    """Write a random checkpoint, its tensors named as mlx-lm names them."""
    text = "llama4_text" if architecture == "llama4" else architecture
    settings = settings_of(Variant(architecture=text))
    config = CONFIG_MAPPING[text](**settings).to_dict()
    if architecture == "llama4":
        config = {"model_type": "llama4", "text_config": config}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = build_model(directory, normalize(directory, config))

    def draw(path, old):
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        if old.ndim == 1 or path.endswith(("A_log", "dt_bias")):
            return old + 0.1 * mx.random.normal(old.shape)
        return mx.random.normal(old.shape) * (0.5 if "embed" in path else old.shape[-1] ** -0.5)

    tensors = tree_map_with_path(draw, model.parameters())
    tiny.write_weights(directory, dict(tree_flatten(tensors)))
    tiny.write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("experts")
        patch.setenv("SPLITQUANT_CACHE", str(home / "cache"))
        yield write_random(home / request.param, request.param)


def logits(path):
    tokens = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 48))
    return np.array(load(path)[0](mx.array(tokens)).astype(mx.float32))


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_experts_go_through_every_method(source, tmp_path, method):
    manifest = convert(source, tmp_path / "target", recipe=RECIPES[method])
    correlation = np.corrcoef(logits(tmp_path / "target").ravel(), logits(source).ravel())[0, 1]
    assert correlation > 0.6  # at 4 bits, many tokens of random weights change their expert
    model = load(source)[0]
    stacks = {path for path, m in model.named_modules() if isinstance(m, SwitchLinear)}
    actions = {layer.action for layer in manifest.layers if layer.path in stacks}
    assert actions == {"split" if method == "splitquant" else "quantize"}
    refined = manifest.refinement
    assert (method == "refine") == bool(refined)
    assert not refined or refined["after"] <= refined["before"]


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_routers_are_affine_as_in_mlx_lm(mixture, tmp_path, mode):
    convert(mixture, tmp_path / "ours", recipe=Recipe(method="rtn", mode=mode))
    theirs, config = quantize_model(*mlx_lm_load_model(mixture), None, None, mode=mode)
    ours, _ = load(tmp_path / "ours")
    table = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]
    gate = "model.layers.0.mlp.gate"
    assert table[gate] == {**config["quantization"][gate], "mode": "affine"}
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.allclose(ours(tokens), theirs(tokens), atol=1e-4)


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_large_statistics_are_released_before_the_next_block(tmp_path, monkeypatch, limit):
    alive = []

    def watched(*args):
        seen = []
        for block in iterate_blocks(*args):
            seen += [weakref.ref(x) for x in block.means.values() if isinstance(x, ExpertMeans)]
            yield block
            del block
            alive.append(sum(mean() is not None for mean in seen))

    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "iterate_blocks", watched)
    monkeypatch.setattr(converter, "OVERLAP_BYTES", limit)
    # busy threads still reference their inputs
    monkeypatch.setattr(converter, "executor", lambda name, threads: Slow(threads))
    source = tiny.write_checkpoint(tmp_path / "source", "qwen3_moe")
    convert(source, tmp_path / "target", recipe=RECIPES["gptq"])
    assert (max(alive) == 0) == (limit == 0)


@pytest.mark.parametrize(
    ("method", "quantizer", "calibrated"),
    [("lut", "gptq", True), ("salience", "gptq", True), ("omniquant", "rtn", False)],
)
def test_notes_name_the_quantizer_of_a_stack(tmp_path, monkeypatch, method, quantizer, calibrated):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    source = tiny.write_checkpoint(tmp_path / "source", "qwen3_moe")
    few = Calibration(num_samples=2, sequence_length=8)
    recipe = Recipe(method=method, bits=4, calibration=few, sweeps=1)
    manifest = convert(source, tmp_path / "target", recipe=recipe)
    notes = {layer.note for layer in manifest.layers if layer.kind == "experts"}
    rare = "experts 0, 1, 2, 3 saw few tokens: calibrated mostly on those of all experts"
    note = f"a stack of experts is quantized by {quantizer}"
    assert notes == {f"{note}; {rare}" if calibrated else note}


class Slow(ThreadPoolExecutor):
    def submit(self, work, *args):
        def later():
            time.sleep(0.05)
            return work()

        return super().submit(later)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("texts", [1, 40])  # few tokens are not sorted by expert, many are
def test_split_stack_is_the_sum_of_its_parts(texts, bias):
    mx.random.seed(texts)
    stack = QuantizedSplitSwitchLinear(4, 64, 24, bias, clusters=3, group_size=32, bits=4)
    w = mx.random.normal((4, 24, 3 * 64))
    stack.update(dict(zip(("weight", "scales", "biases"), mx.quantize(w, 32, 4), strict=True)))
    if bias:
        stack.bias = mx.random.normal((4, 24))
    x = mx.random.normal((texts, 1, 1, 64))
    experts = mx.random.randint(0, 4, (texts, 2))
    stored = Quantized(stack["weight"], stack["scales"], stack["biases"])
    whole = dequantize(stored, bits=4, group_size=32).reshape(4, 24, 3, 64).sum(axis=2)
    plain = SwitchLinear(64, 24, 4, bias=bias)
    plain.update({"weight": whole, **({"bias": stack.bias} if bias else {})})
    np.testing.assert_allclose(stack(x, experts), plain(x, experts), atol=1e-4)
    assert "input_dims=64, output_dims=24" in repr(stack)


class CountingPool(ThreadPoolExecutor):
    """Thread pool that counts calls of `map`."""

    calls = 0

    def map(self, *arguments, **options):
        self.calls += 1
        return super().map(*arguments, **options)


@pytest.mark.parametrize("method", ["gptq", "imatrix", "splitquant"])
def test_parallel_quantization_of_a_stack_gives_the_same_bytes(method, tmp_path, monkeypatch):
    shape = replace(SHAPES["tiny"], num_experts=6, num_experts_per_tok=2)
    write_random_checkpoint(tmp_path / "source", shape)
    contents = []
    for name, large in (("serial", quantizers.LARGE), ("parallel", 64)):
        pool = CountingPool(2, thread_name_prefix=quantizers.POOL)
        monkeypatch.setattr(quantizers, "executor", lambda *_, pool=pool: pool)
        monkeypatch.setattr(quantizers, "LARGE", large)
        convert(tmp_path / "source", tmp_path / name, recipe=RECIPES[method])
        pool.shutdown()
        assert (pool.calls > 0) == (name == "parallel")
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]
