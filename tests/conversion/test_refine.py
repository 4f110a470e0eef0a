"""Scales and biases trained against the original: the gradients, what is written, what is kept."""

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors import safe_open
from scipy.special import rel_entr, softmax

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.calibration import predictions
from splitquant_mlx.calibration.predictions import kl_divergence, most_likely
from splitquant_mlx.conversion import pipeline, refine
from splitquant_mlx.conversion.refine_step import Step
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.patch import replace_tensors
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.models.trainable import TrainableLinear, TrainableSwitchLinear
from splitquant_mlx.progress import Silent
from splitquant_mlx.recipe import Calibration
from splitquant_mlx.runtime import workspace

CALIBRATION = Calibration(num_samples=8, sequence_length=32)
SIZES = {"group_size": 32, "dtype": "float16"}
PLAIN = {"method": "rtn", "calibration": CALIBRATION, **SIZES}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))


def tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def test_a_wide_layer_is_dense_in_pieces_alone(monkeypatch):
    quantized = nn.QuantizedLinear.from_linear(nn.Linear(64, 100), 32, 4)
    x = mx.random.normal((3, 64))

    def gradients(layer):
        return nn.value_and_grad(layer, lambda layer: mx.square(layer(x)).sum())(layer)[1]

    whole = gradients(TrainableLinear(quantized))
    monkeypatch.setattr("splitquant_mlx.models.trainable.WIDE", 64 * 24)
    layer, pieces = TrainableLinear(quantized), []
    product = layer._product

    def noted(x, *arrays):
        pieces.append(len(arrays[0]))
        return product(x, *arrays)

    layer._product = noted
    found = gradients(layer)
    assert pieces == [24, 24, 24, 24, 4]
    for name in "uv":
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_plain_formula(bits, bias):
    mx.random.seed(bits)
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 24, bias=bias), 32, bits)
    x = mx.random.normal((2, 5, 64))
    trainable = TrainableLinear(layer)
    np.testing.assert_allclose(trainable(x), layer(x), atol=1e-5)

    def plain(x, u, v):
        ones, zeros = mx.ones_like(layer.scales), mx.zeros_like(layer.scales)
        codes = mx.dequantize(layer.weight, ones, zeros, 32, bits).reshape(24, 2, 32)
        middle = (2**bits - 1) / 2
        moved = codes + v[..., None] + u[..., None] * (codes - middle) / middle
        w = (layer.scales[..., None] * moved + layer.biases[..., None]).reshape(24, 64)
        return mx.sin(x @ w.T + (layer.bias if bias else 0)).sum()

    def ours(x, u, v):
        trainable.u, trainable.v = u, v
        return mx.sin(trainable(x)).sum()

    arguments = (x, *(0.1 * mx.random.normal(layer.scales.shape) for _ in range(2)))
    for found, wanted in zip(
        mx.grad(ours, (0, 1, 2))(*arguments), mx.grad(plain, (0, 1, 2))(*arguments), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 40])  # which mlx-lm does not sort by expert, and does
def test_gradients_of_experts_are_those_of_the_plain_formula(tokens):
    mx.random.seed(tokens)
    stack = SwitchLinear(64, 24, 4, bias=True).to_quantized(32, 4)
    stack.bias = mx.random.normal(stack.bias.shape)
    trainable = TrainableSwitchLinear(stack)
    x = mx.random.normal((2, tokens, 1, 1, 64))
    experts = mx.random.randint(0, 3, (2, tokens, 2))  # the fourth has no token
    np.testing.assert_allclose(trainable(x, experts), stack(x, experts), atol=1e-5)

    def plain(x, u, v):
        ones, zeros = mx.ones_like(stack.scales), mx.zeros_like(stack.scales)
        codes = mx.dequantize(stack.weight, ones, zeros, 32, 4).reshape(4, 24, 2, 32)
        moved = codes + v[..., None] + u[..., None] * (codes - 7.5) / 7.5
        w = (stack.scales[..., None] * moved + stack.biases[..., None]).reshape(4, 24, 64)
        y = (w[experts] * mx.broadcast_to(x, (2, tokens, 2, 1, 64))).sum(-1)
        return mx.sin(y + stack.bias[experts]).sum()

    def ours(x, u, v):
        trainable.u, trainable.v = u, v
        return mx.sin(trainable(x, experts)).sum()

    arguments = (x, *(0.1 * mx.random.normal(stack.scales.shape) for _ in range(2)))
    for found, wanted in zip(
        mx.grad(ours, (0, 1, 2))(*arguments), mx.grad(plain, (0, 1, 2))(*arguments), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_one_expert_at_a_time_is_dense():
    stacks = [SwitchLinear(256, 256, 64, bias=False).to_quantized(64, 4) for _ in range(2)]
    layers = [TrainableSwitchLinear(stack) for stack in stacks]
    x, experts = mx.random.normal((8, 1, 1, 256)), mx.random.randint(0, 64, (8, 8))

    def ours(v):
        y = x
        for layer, own in zip(layers, v, strict=True):
            layer.v = own
            y = layer(y, experts).mean(1, keepdims=True)
        return mx.square(y).sum()

    mx.eval([layer.state for layer in layers], x, experts)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(ours)([layer.v for layer in layers]))
    assert mx.get_peak_memory() - before < 48 * 256 * 256 * 4  # of the 128


@pytest.mark.parametrize("name", ["stories", "mixture"])
@pytest.mark.parametrize("cores", [1, 2])
def test_gradients_block_by_block_are_those_of_the_whole_model(
    request, tmp_path, monkeypatch, cores, name
):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    recipe = Recipe(method="rtn", **SIZES)
    convert(request.getfixturevalue(name), tmp_path / "target", recipe=recipe)
    model, _ = load(tmp_path / "target")
    refine._make_trainable(model)
    tokens = np.random.default_rng(0).integers(3, 90, (2, 12)).astype(np.int32)
    wanted = most_likely(1.1 * model(mx.array(tokens)))

    def divergence(model):
        return kl_divergence(model(mx.array(tokens)), *wanted)

    whole = dict(tree_flatten(nn.value_and_grad(model, divergence)(model)[1]))
    mx.eval(model.parameters(), wanted)
    found = dict(tree_flatten(Step(model, tokens, wanted).gradients()))
    assert found.keys() == whole.keys()
    for path, gradient in whole.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-3, atol=1e-6 * len(found))
    assert max(float(mx.abs(gradient).max()) for gradient in whole.values()) > 1e-3


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("number", [11, 4])
def test_divergence_and_its_gradient(dtype, number, monkeypatch):
    """All tokens but the most likely are one event."""
    monkeypatch.setattr(predictions, "MOST_LIKELY", number)
    logits, wanted = (3 * mx.random.normal((2, 5, 11), key=mx.random.key(k)) for k in (0, 1))
    logits, wanted = logits.astype(dtype), wanted.astype(dtype)
    q, p = (softmax(np.array(x, np.float64), axis=-1) for x in (logits, wanted))
    order = np.argsort(-p, axis=-1)
    top, rest = order[..., :number], order[..., number:]

    def events(x):
        chosen = np.take_along_axis(x, top, axis=-1)
        others = np.take_along_axis(x, rest, axis=-1).sum(-1, keepdims=True)
        return np.concatenate([chosen, others], axis=-1)

    kept = most_likely(wanted)
    value, gradient = mx.value_and_grad(lambda x: 2 * kl_divergence(x, *kept))(logits)
    expected = rel_entr(events(p), events(q)).sum(-1).mean()
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-4)
    assert gradient.dtype == dtype
    share = events(p)[..., -1:] / np.maximum(events(q)[..., -1:], 1e-30)
    slopes = q * (1 - share)
    np.put_along_axis(slopes, top, np.take_along_axis(q - p, top, axis=-1), axis=-1)
    atol = 1e-6 if dtype == mx.float32 else 1e-4
    np.testing.assert_allclose(gradient, 2 * slopes / 10, rtol=1e-3, atol=atol)


def test_a_refinement_goes_on_where_it_was_interrupted(stories, tmp_path, monkeypatch):
    recipe = Recipe(**PLAIN, refine=True)
    whole = convert(stories, tmp_path / "whole", recipe=recipe)
    monkeypatch.setattr(refine, "SAVE_S", 0.0)
    steps: list[float] = []

    class Interrupted(Silent):
        @contextmanager
        def task(self, label, total=None):
            def advance(amount=1):
                if label == "Refining":
                    steps.append(amount)
                    if len(steps) == 6:
                        raise KeyboardInterrupt

            yield advance

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_clear", lambda directory: None)
        with pytest.raises(KeyboardInterrupt):
            convert(stories, tmp_path / "target", recipe=recipe, progress=Interrupted())
    steps[:] = [0.0] * 10
    again = convert(stories, tmp_path / "target", recipe=recipe, progress=Interrupted())
    assert max(steps) > 2
    assert again.files == whole.files


@pytest.mark.parametrize("name", ["stories", pytest.param("mixture", marks=pytest.mark.slow)])
def test_only_scales_and_biases_change(request, tmp_path, name):
    source, bits = request.getfixturevalue(name), 4 if name == "stories" else 3
    before = convert(source, tmp_path / "plain", recipe=Recipe(method="rtn", bits=bits, **SIZES))
    manifest = convert(source, tmp_path / "refined", recipe=Recipe(bits=bits, **PLAIN, refine=True))
    assert 0 < manifest.refinement["after"] < manifest.refinement["before"]
    assert manifest.seconds["refine"] > 0 and not before.refinement
    assert manifest.stored_bytes == before.stored_bytes
    plain, refined = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    assert plain.keys() == refined.keys()
    trained = {f"{layer.path}." for layer in manifest.layers if layer.action == "quantize"}
    trained.discard("model.embed_tokens.")
    for name, tensor in plain.items():
        assert tensor.dtype == refined[name].dtype
        if ".mlp.gate." in name:  # a router at 8 bits, whose steps float16 hardly tells apart
            continue
        same = np.array_equal(tensor, refined[name])
        assert same != (name.endswith((".scales", ".biases")) and name.startswith(tuple(trained)))
    model, _ = load(tmp_path / "refined")
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_what_is_said_of_it_holds_of_what_is_written(stories, tmp_path, monkeypatch):
    seen = []

    def noted(model, predictions, tokens, **settings):
        seen.append((predictions, tokens))
        return refine.refine(model, predictions, tokens, **settings)

    monkeypatch.setattr(pipeline, "refine", noted)
    manifest = convert(stories, tmp_path / "target", recipe=Recipe(**PLAIN, refine=True))
    model, _ = load(tmp_path / "target")  # whose embedding is quantized, and the head, too
    ((predictions, tokens),) = seen
    own = [array[:: refine.HELD_OUT] for array in predictions]
    logits = model(mx.array(tokens[:: refine.HELD_OUT]))
    found = kl_divergence(logits, *own).item()
    assert found == pytest.approx(manifest.refinement["after"], rel=0.02)
    assert found < 0.95 * manifest.refinement["before"]


def test_what_does_not_help_is_not_kept(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(refine, "LEARNING_RATE", 10.0)
    manifest = convert(stories, tmp_path / "refined", recipe=Recipe(**PLAIN, refine=True))
    assert manifest.refinement["after"] == manifest.refinement["before"]
    convert(stories, tmp_path / "plain", recipe=Recipe(method="rtn", **SIZES))
    plain, refined = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    assert all(np.array_equal(plain[name], refined[name]) for name in plain)


def test_eight_times_as_many_other_texts_are_trained_on(stories, tmp_path, monkeypatch):
    asked, trained = [], []
    find, train = pipeline.calibration_tokens, pipeline.refine
    monkeypatch.setattr(
        pipeline, "calibration_tokens", lambda *args: asked.append(find(*args)) or asked[-1]
    )
    monkeypatch.setattr(
        pipeline, "refine", lambda *args, **kw: trained.append(args[2]) or train(*args, **kw)
    )
    recipe = Recipe(**{**PLAIN, "method": "imatrix"}, refine=True)
    convert(stories, tmp_path / "refined", recipe=recipe)
    calibrated, others = (set(map(bytes, tokens)) for tokens in (asked[0], trained[0]))
    assert (len(asked[0]), len(trained[0])) == (8, 64)
    assert len(others) > 60 and not calibrated & others


def test_a_kill_while_refining_costs_the_refinement_only(stories, tmp_path, monkeypatch):
    recipe = Recipe(**PLAIN, refine=True)
    settings = {"recipe": recipe, "max_shard_bytes": 60_000}
    whole = convert(stories, tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    def kill(*args, **settings):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "refine", kill)
        patch.setattr(workspace, "_clear", lambda directory: None)
        with pytest.raises(Killed):
            convert(stories, tmp_path / "target", **settings)
    taken, resume = [], ShardWriter.resume
    monkeypatch.setattr(
        ShardWriter, "resume", lambda *args: taken.append(resume(*args)) or taken[-1]
    )
    again = convert(stories, tmp_path / "target", **settings)
    shards = len(list((tmp_path / "whole").glob("*.safetensors")))
    assert taken == [shards] and shards > 3
    assert again.files == whole.files


def test_tensors_are_replaced_in_their_own_type(tmp_path):
    tensors = {"a": mx.zeros((2, 3), mx.bfloat16), "b": mx.arange(5), "c": mx.zeros((4,))}
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with ShardWriter(tmp_path, expected, max_shard_bytes=1) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
    wanted = mx.random.normal((2, 3))
    hashes = replace_tensors(tmp_path, {"a": wanted})
    assert list(hashes) == ["model-00001-of-00003.safetensors"]
    found = mx.load(str(tmp_path / next(iter(hashes))))["a"]
    assert found.dtype == mx.bfloat16 and mx.array_equal(found, wanted.astype(mx.bfloat16))
    assert mx.array_equal(
        mx.load(str(tmp_path / "model-00002-of-00003.safetensors"))["b"], tensors["b"]
    )
    with pytest.raises(ValueError, match=r"c: expected \[4\], got \[5\]"):
        replace_tensors(tmp_path, {"c": mx.zeros((5,))})
    with pytest.raises(ValueError, match="no d"):
        replace_tensors(tmp_path, {"d": wanted})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "refine: not for method 'splitquant'"),
        ({"method": "rtn", "mode": "mxfp4"}, "mode: expected 'affine' with refine, got 'mxfp4'"),
        ({"method": "rtn", "granularity": "channel"}, "granularity: expected 'group' with refine"),
    ],
)
def test_recipes_that_cannot_be_refined(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(refine=True, **settings)


def test_few_texts_are_refused(stories, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog. " * 8)
    few = Calibration(text=str(tmp_path / "text.txt"), num_samples=1, sequence_length=32)
    with pytest.raises(RecipeError, match="8 texts or more"):
        convert(
            stories, tmp_path / "x", recipe=Recipe(**{**PLAIN, "calibration": few}, refine=True)
        )
    assert not (tmp_path / "x").exists()
