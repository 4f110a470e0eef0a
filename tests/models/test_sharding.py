"""The results of the ranks of a sharded layer or model add up to the whole."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import QuantizedSplitLinear, Recipe, RecipeError, SplitLinear, convert
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.sharding import divide
from splitquant_mlx.nn.split_model_file import Sharded


class Rank:
    """A fake group with a size and a rank."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


class Pair(nn.Module):
    """Two layers, the first sharded by its outputs and the second by its inputs."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def __call__(self, x):
        return self.second(nn.silu(self.first(x)))

    def shard(self, group):
        linear = nn.layers.distributed.shard_linear
        self.first = linear(self.first, "all-to-sharded", group=group)
        self.second = linear(self.second, "sharded-to-all", group=group)


class SplitPair(Sharded, Pair):
    pass


def quantized(inputs, outputs, bias, **settings):
    clusters = settings.pop("clusters")
    return SplitLinear.from_linear(nn.Linear(inputs, outputs, bias), clusters).to_quantized(
        **settings
    )


def copy_of(layer):
    outputs, inputs = layer.weight.shape[0], layer.scales.shape[1] * layer.group_size
    new = QuantizedSplitLinear(
        inputs // layer.clusters,
        outputs,
        "bias" in layer,
        clusters=layer.clusters,
        group_size=layer.group_size,
        bits=layer.bits,
    )
    new.update(layer.parameters())
    return new


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([2, 4]),
    clusters=st.integers(2, 5),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ranks_together_compute_a_split_layer(size, clusters, bits, group_size, groups, bias, seed):
    mx.random.seed(seed)
    width, inner, options = 64, size * groups * group_size, {"bits": bits, "clusters": clusters}
    first = quantized(width, inner, bias, **options, group_size=32)
    second = quantized(inner, 24, bias, **options, group_size=group_size)
    x = mx.random.normal((3, width))
    hidden = first(x)
    expected = second(hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.distributed, "all_sum", lambda x, group=None: x)
        pieces, sums = [], []
        for rank in range(size):
            pair = SplitPair(copy_of(first), copy_of(second))
            pair.shard(Rank(rank, size))
            pieces.append(pair.first(x))
            share = mx.split(hidden, size, axis=-1)[rank]
            sums.append(pair.second(share) - (second.bias if bias else 0))
            assert pair.first.group is None and pair.second.group is not None
            assert pair.second.weight.shape == (24, second.weight.shape[1] // size)
    assert mx.allclose(mx.concatenate(pieces, axis=-1), hidden, rtol=1e-5, atol=1e-5)
    assert mx.allclose(sum(sums) + (second.bias if bias else 0), expected, rtol=1e-4, atol=1e-4)


def test_a_bias_is_added_once_after_the_sum(monkeypatch):
    layer = quantized(128, 16, True, clusters=3, group_size=64)
    expected = layer(mx.ones((1, 128)))
    pair = SplitPair(quantized(32, 128, False, clusters=3, group_size=32), layer)
    pair.shard(Rank(0, 2))
    missing = expected - layer.bias - (pair.second.bias * 0)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: missing)
    assert mx.allclose(pair.second(mx.ones((1, 64))), expected, atol=1e-6)


def test_a_layer_sharded_in_place_leaves_the_sum_to_others():
    class InPlace(Pair):
        def shard(self, group):
            nn.layers.distributed.shard_inplace(self.second, "sharded-to-all", group=group)

    model = type("Model", (Sharded, InPlace), {})(
        nn.Identity(), quantized(128, 16, True, clusters=3, group_size=32)
    )
    whole, x = copy_of(model.second), mx.random.normal((2, 128))
    pieces = []
    for rank in range(2):
        model.second = copy_of(whole)
        model.shard(Rank(rank, 2))
        assert model.second.group is None
        pieces.append(model.second(mx.split(x, 2, axis=-1)[rank]) - whole.bias)
    assert mx.allclose(sum(pieces) + whole.bias, whole(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def divided(tmp_path, monkeypatch):
    """Return a function that converts and shards a tiny model, and returns that of rank 0."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group=None: x)

    def run(size, *, pipeline=False, architecture="llama", group_size=32, **changes):
        source = tiny.write_checkpoint(tmp_path / "source", architecture)
        recipe = Recipe(method="splitquant", group_size=group_size)
        convert(source, tmp_path / "model", recipe=recipe)
        model = load_model(tmp_path / "model", lazy=True)
        config = {**tiny.make_config(architecture), **changes}
        divide(model, config, Rank(0, size), pipeline=pipeline, path=tmp_path / "model")
        return model

    return run


def test_a_rank_has_only_its_share(divided):
    layer = divided(2).model.layers[1]
    assert layer.self_attn.n_heads == tiny.HEADS // 2 and layer.self_attn.n_kv_heads == 1
    assert layer.self_attn.o_proj.weight.shape == (tiny.HIDDEN, 3 * tiny.HIDDEN // 2 * 4 // 32)
    assert layer.mlp.up_proj.weight.shape == (tiny.INNER // 2, 3 * tiny.HIDDEN * 4 // 32)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (3, {}, "3 does not divide its 4 num_attention_heads"),
        (4, {"num_key_value_heads": 3}, "4 does not divide its 3 num_key_value_heads"),
        (
            2,
            {"group_size": 64},
            r"layers.0.self_attn.o_proj \(64 inputs in groups of 64, 64 outputs\) does not divide: "
            "use another number of ranks, or convert it with a smaller group size",
        ),
        (4, {}, r"o_proj \(64 inputs in groups of 32, 64 outputs\) does not divide"),
        (2, {"pipeline": True}, "mlx-lm has no way to divide a llama in a pipeline"),
        (2, {"architecture": "gemma"}, "mlx-lm has no way to divide a gemma by shard"),
        (3, {"architecture": "qwen2", "pipeline": True}, "must be positive and sum to 2 layers"),
    ],
)
def test_a_layer_that_does_not_divide_is_refused(divided, size, options, message):
    with pytest.raises(RecipeError, match=rf"cannot be divided among {size} ranks: .*{message}"):
        divided(size, **options)
