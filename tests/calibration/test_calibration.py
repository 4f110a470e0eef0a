"""Calibration: text a model writes, statistics of its layers' inputs, sensitivities."""

import shutil
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_unflatten
from scipy.stats import chisquare
from tokenizers import processors

from splitquant_mlx import RecipeError, dequantize, load
from splitquant_mlx.calibration import blocks, self_text
from splitquant_mlx.calibration.layer_divergence import clip_outliers
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.calibration.self_text import beginnings, sample_tokens
from splitquant_mlx.calibration.sensitivity import predict_divergence
from splitquant_mlx.calibration.statistics import FEW_TOKENS, ExpertMeans, iterate_blocks
from splitquant_mlx.calibration.sums import hessian, sum_of, sum_of_squares
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.cli import run
from splitquant_mlx.evaluation.divergence import divergence, log_probabilities
from splitquant_mlx.models.architecture import parameters
from splitquant_mlx.models.compact import compact
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.prompt_cache import make_cache
from splitquant_mlx.progress import Silent
from splitquant_mlx.quantization.gptq import gptq_quantize
from splitquant_mlx.recipe import Calibration

TOKENS = np.random.default_rng(0).integers(2, tiny.VOCAB, (3, 24)).astype(np.int32)


class Recorder(nn.Module):
    """Keep what a linear layer is fed, by the plain way of wrapping it in the whole model."""

    def __init__(self, layer, seen):
        super().__init__()
        self.layer = layer
        self._seen = seen

    def __call__(self, x):
        self._seen.append(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        return self.layer(x)


def input_means(model, tokens, paths, statistic: Any):
    wanted: dict[str, Any] = dict.fromkeys(paths, statistic)
    blocks = iterate_blocks(lambda: model, tokens, wanted)
    return {path: mean for block in blocks for path, mean in block.means.items()}


def shrunk(h, tokens):
    """Off-diagonal entries of a Hessian (n, n) over 1 + (2 n / tokens)^2."""
    factor = 1 / (1 + (2 * len(h) / tokens) ** 2)
    return factor * h + (1 - factor) * np.diag(np.diagonal(h))


def linear_paths(model):
    linear = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    weights = [name.removesuffix(".weight") for name in parameters(model)]
    return [path for path in weights if path in linear]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_statistics_are_those_of_a_plain_run(tmp_path, architecture):
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    model = load(source)[0]
    paths = linear_paths(model)
    found = input_means(load(source)[0], TOKENS, paths, hessian)
    diagonals = input_means(load(source)[0], TOKENS, paths, sum_of_squares)
    assert found.keys() == diagonals.keys() == set(paths)
    seen = {path: [] for path in paths}
    modules = dict(model.named_modules())
    recorders = [(path, Recorder(modules[path], seen[path])) for path in paths]
    model.update_modules(tree_unflatten(recorders))
    mx.eval(model(mx.array(TOKENS)))
    for path in paths:
        (x,) = seen[path]
        wanted = shrunk(np.array(x.T @ x) / TOKENS.size, TOKENS.size)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.array(found[path]), wanted, atol=1e-4 * scale)
        np.testing.assert_allclose(
            np.array(diagonals[path]), np.diagonal(wanted), atol=1e-4 * scale
        )


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("texts", [1, 3])  # of 4 tokens, which mlx-lm does not sort, and of 24
def test_experts_have_statistics_of_the_tokens_routed_to_them(tmp_path, architecture, texts):
    tokens = TOKENS if texts == 3 else TOKENS[:1, :4]
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    model: Any = load(source)[0]
    block = model.layers[0]
    mlp = block.block_sparse_moe if architecture == "mixtral" else block.mlp
    paths = [path for path, module in model.named_modules() if module is mlp.switch_mlp.up_proj]
    (found,) = (
        b for b in iterate_blocks(lambda: load(source)[0], tokens, {paths[0]: hessian}) if b.means
    )
    x = model.model.embed_tokens(mx.array(tokens))
    x = x + block.self_attn(block.input_layernorm(x), "causal")
    x = np.array(block.post_attention_layernorm(x)).reshape(-1, tiny.HIDDEN).astype(np.float64)
    scores = x @ np.array(mlp.gate.weight).T
    top = model.args.num_experts_per_tok
    routed = [np.flatnonzero(np.argsort(-scores)[:, :top] == e) // top for e in range(tiny.EXPERTS)]
    overall = sum(x[own].T @ x[own] for own in routed) / (len(x) * top)
    for expert, own in enumerate(routed):
        number = len(own) + FEW_TOKENS
        wanted = shrunk((x[own].T @ x[own] + FEW_TOKENS * overall) / number, number)
        np.testing.assert_allclose(found.means[paths[0]][expert], wanted, atol=1e-4)
    assert found.rare == {paths[0]: [e for e, own in enumerate(routed) if len(own) < FEW_TOKENS]}


@pytest.mark.parametrize("statistic", [hessian, sum_of_squares])
@pytest.mark.parametrize("batches", [1, 5])  # few are kept as they are, many as sums
def test_means_of_experts_do_not_depend_on_how_they_are_held(statistic, batches):
    rng = np.random.default_rng(0)
    means, fed = ExpertMeans(3, statistic), [[], [], []]
    for _ in range(batches):
        tokens = rng.standard_normal((40, 32)).astype(np.float32)
        numbers = rng.integers(0, 40, 60)  # many of them more than once
        experts = np.where(numbers % 2, 0, rng.integers(0, 2, 60))  # of which one gets none
        means.add(mx.array(tokens[numbers]), experts)
        for expert, rows in enumerate(fed):
            rows.append(tokens[numbers[experts == expert]])
    assert means.nbytes <= 3 * np.array(statistic(mx.zeros((1, 32)))).nbytes
    rows = [np.concatenate(parts).astype(np.float64) for parts in fed]
    squares = [x.T @ x if statistic is hessian else (x * x).sum(axis=0) for x in rows]
    overall = sum(squares) / (60 * batches)
    for expert, square in enumerate(squares):
        number = len(rows[expert]) + FEW_TOKENS
        expected = (square + FEW_TOKENS * overall) / number
        if statistic is hessian:
            expected = shrunk(expected, number)
        np.testing.assert_allclose(means[expert], expected, atol=1e-5)
    assert means.rare == [e for e, x in enumerate(rows) if len(x) < FEW_TOKENS]


def test_a_tied_head_comes_after_the_blocks(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    up, head = "model.layers.1.mlp.up_proj", "model.embed_tokens"
    blocks = list(
        iterate_blocks(lambda: load(source)[0], TOKENS, {head: hessian, up: sum_of_squares})
    )
    assert [block.prefix for block in blocks] == ["model.layers.0.", "model.layers.1.", ""]
    assert [list(block.means) for block in blocks] == [[], [up], [head]]
    model: Any = load(source)[0]
    hidden = model.model(mx.array(TOKENS)).reshape(-1, tiny.HIDDEN)
    wanted = shrunk(np.array(hidden.T @ hidden) / TOKENS.size, TOKENS.size)
    np.testing.assert_allclose(np.array(blocks[-1].means[head]), wanted, atol=1e-4 * wanted.max())


def test_a_head_is_not_loaded_for_the_statistics_of_its_inputs(stories):
    path = "model.embed_tokens"
    model: Any = load_model(stories, lazy=True)
    table = 4 * model.model.embed_tokens.weight.size
    blocks = iterate_blocks(lambda: load_model(stories, lazy=True), TOKENS, {path: sum_of_squares})
    for _ in model.layers:
        next(blocks)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    last = next(blocks)
    mx.eval(last.means[path])
    assert mx.get_peak_memory() - before < table


def test_a_model_without_blocks_is_refused():
    class Odd(nn.Module):
        model_type = "odd"

        def __call__(self, tokens):
            return tokens

    with pytest.raises(RecipeError, match="a odd model cannot be calibrated"):
        next(iterate_blocks(Odd, TOKENS, {}))


def test_text_is_seeded_and_begins_in_three_ways(stories):
    model, tokenizer = load(stories)
    prompts = beginnings(tokenizer, 6, np.random.default_rng(1))
    settings = {"length": 40, "progress": Silent()}
    first = sample_tokens(model, prompts, seed=1, **settings)
    assert first.shape == (6, 40) and first.dtype == np.int32
    np.testing.assert_array_equal(first, sample_tokens(model, prompts, seed=1, **settings))
    other = sample_tokens(model, prompts, seed=2, **settings)
    assert (first != other).mean() > 0.5
    for tokens, prompt in zip(first.tolist(), prompts, strict=True):
        assert tokens[: len(prompt)] == prompt
    # what the model writes is far likelier under it than chance
    log_p = log_probabilities(model, first[0].tolist())
    chosen = mx.take_along_axis(log_p[:-1], mx.array(first[0, 1:, None]), axis=-1)
    assert float(chosen.mean()) > -4


def test_texts_begin_as_the_tokenizer_has_them_begin(stories):
    _, tokenizer = load(stories)
    rng = np.random.default_rng(0)
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("")[0] == bos
    assert all(prompt[0] == bos for prompt in beginnings(tokenizer, 6, rng))
    tokenizer._tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert bos not in tokenizer.encode("")
    assert not any(bos in prompt for prompt in beginnings(tokenizer, 6, rng))


def test_a_chat_template_gives_beginnings_of_its_own(stories):
    _, tokenizer = load(stories)
    rng = np.random.default_rng(0)
    assert len(beginnings(tokenizer, 5, rng)) == 5
    tokenizer._tokenizer.chat_template = "{% for m in messages %}USER: {{ m.content }}{% endfor %}"
    tokenizer.has_chat_template = True
    found = [tokenizer.decode(prompt) for prompt in beginnings(tokenizer, 6, rng)]
    assert sum("USER:" in text for text in found) == 2
    tokenizer._tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert not any("USER" in tokenizer.decode(p) for p in beginnings(tokenizer, 6, rng))


def test_text_is_written_once(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path))
    settings = Calibration(num_samples=3, sequence_length=16)
    first = calibration_tokens(LazyModel(stories), settings, Silent())
    monkeypatch.setattr("splitquant_mlx.calibration.tokens.sample_tokens", None)
    np.testing.assert_array_equal(calibration_tokens(LazyModel(stories), settings, Silent()), first)
    (kept,) = (tmp_path / "calibration").iterdir()
    kept.write_bytes(b"damaged")
    with pytest.raises(TypeError):
        calibration_tokens(LazyModel(stories), settings, Silent())


def test_texts_longer_than_the_model_was_made_for_are_refused(stories):
    settings = Calibration(num_samples=2, sequence_length=513)
    with pytest.raises(RecipeError, match="sequence_length: expected at most 512"):
        calibration_tokens(LazyModel(stories), settings, Silent())


def test_an_interrupted_text_is_gone_on_with(stories, tmp_path, monkeypatch):
    model, tokenizer = load(stories)
    prompts = beginnings(tokenizer, 5, np.random.default_rng(1))
    settings: Any = {"length": 30, "seed": 1, "progress": Silent()}
    settings["saved_state"] = SavedState(tmp_path / "text")
    monkeypatch.setattr(self_text, "BATCH_TEXTS", 2)
    monkeypatch.setattr(self_text, "SAVE_S", 0.0)
    whole = sample_tokens(model, prompts, **settings)
    assert not list(tmp_path.iterdir())
    draw, drawn = self_text._sample, []

    def draw_or_stop(logits, seed, part):
        drawn.append(seed)
        if len(drawn) == 40:
            raise KeyboardInterrupt
        return draw(logits, seed, part)

    monkeypatch.setattr(self_text, "_sample", draw_or_stop)
    with pytest.raises(KeyboardInterrupt):
        sample_tokens(model, prompts, **settings)
    np.testing.assert_array_equal(sample_tokens(model, prompts, **settings), whole)
    assert len(drawn) <= 3 * 29 + 2
    assert not list(tmp_path.iterdir())


def test_the_batch_follows_from_the_memory_of_the_cache(stories, monkeypatch):
    """Keys and values in 16 bits: layers x 2 x kv width x length x 2 bytes for each text."""
    model, length = load(stories)[0], 512  # twice what mlx-lm makes room for at a time
    args = model.args
    width = args.num_key_value_heads * args.hidden_size // args.num_attention_heads
    text = args.num_hidden_layers * 2 * width * length * 2
    for cached, expected in ((40 * text, 40), (41 * text - 1, 40), (text, 16), (999 * text, 256)):
        monkeypatch.setattr(self_text, "CACHE_BYTES", cached)
        assert self_text._batch_limit(model, length) == expected
    float32, half = ([make_cache(model, length, half=half)] for half in (False, True))
    tokens = mx.array(np.random.default_rng(0).integers(1, 500, (2, 20)))
    wanted, found = (model(tokens, cache=cache) for (cache,) in (float32, half))
    assert found.dtype == mx.float32
    assert 0 < mx.abs(wanted - found).max() < 0.02 * mx.abs(wanted).max()


def test_to_go_on_takes_no_more_memory_than_to_write_it_all(stories, tmp_path, monkeypatch):
    model, tokenizer = load(stories)
    prompts = beginnings(tokenizer, 16, np.random.default_rng(1))
    settings: Any = {"length": 100, "seed": 1, "progress": Silent()}

    def peak(**more: Any) -> int:
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        sample_tokens(model, prompts, **settings, **more)
        return mx.get_peak_memory() - before

    mx.eval(model.parameters())
    whole, draw = peak(), self_text._sample

    def draw_or_stop(logits: Any, seed: Any, part: Any) -> np.ndarray:
        if seed[-1] == 90:
            raise KeyboardInterrupt
        return draw(logits, seed, part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(self_text, "SAVE_S", 0.0)
        patch.setattr(self_text, "_sample", draw_or_stop)
        peak(saved_state=SavedState(tmp_path / "text"))
    assert peak(saved_state=SavedState(tmp_path / "text")) < 1.5 * whole


def test_tokens_are_drawn_as_likely_as_they_are():
    logits = mx.random.normal((1, 150), key=mx.random.key(0)) * 2
    p = np.array(mx.softmax(logits, axis=-1))[0].astype(np.float64)
    drawn = self_text._sample(mx.repeat(logits, 20_000, axis=0), [0], slice(0, 20_000))
    often = p * 20_000 > 5
    counts = np.bincount(drawn, minlength=150)[often]
    assert chisquare(counts, p[often] / p[often].sum() * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("width", [5, 768, 769, 2000])
def test_a_hessian_in_panels_is_the_product(width):
    rng = np.random.default_rng(width)
    batches = [rng.standard_normal((n, width)).astype(np.float32) for n in (30, 1, 50)]
    total = sum_of(hessian)
    for part in (batches[:2], batches[2:]):
        for add in total.tasks([mx.array(x) for x in part]):
            add()
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(np.array(total.pop()), rows.T @ rows, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_copy_that_samples_predicts_nearly_the_same(tmp_path, architecture):
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    original, copy = load(source)[0], compact(load(source, lazy=True)[0])
    wanted, found = (m(mx.array(TOKENS)) for m in (original, copy))
    assert 0 < mx.abs(wanted - found).max() < 0.05 * mx.abs(wanted).max()
    stored, whole = (
        sum(array.nbytes for array in parameters(m).values()) for m in (copy, original)
    )
    assert stored < 0.4 * whole


def test_text_from_a_file_is_taken_evenly(stories, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a cat. " * 200 + "The end came soon. " * 200)
    settings = Calibration(text=str(file), num_samples=4, sequence_length=32)
    tokens = calibration_tokens(LazyModel(stories), settings, Silent())
    assert tokens.shape == (4, 32)
    tokenizer = load(stories)[1]
    assert "cat" in tokenizer.decode(tokens[0].tolist())
    assert "end" in tokenizer.decode(tokens[-1].tolist())


def test_predicted_divergence_is_the_measured_one(stories, tmp_path):
    """Each layer alone, quantized by gptq, on other text than the prediction was made on."""
    model, tokenizer = load(stories)
    tokens, other = (
        sample_tokens(
            model,
            beginnings(tokenizer, 24, np.random.default_rng(seed)),
            length=64,
            seed=seed,
            progress=Silent(),
        )
        for seed in (0, 1)
    )
    paths = [path for path in linear_paths(model) if model_weight(model, path).shape[1] == 64]
    options = {path: [(3, 32), (4, 32)] for path in [*paths, "model.embed_tokens"]}
    found = predict_divergence(
        lambda: load(stories, lazy=True)[0],
        tokens,
        options,
        seed=0,
        progress=Silent(),
        saved_state=SavedState(tmp_path),
    )
    wanted = [log_probabilities(model, text) for text in other.tolist()]
    means = input_means(load(stories)[0], tokens, list(options), hessian)
    ratios = {}
    for path in [paths[0], paths[3], paths[4], paths[-1], "model.embed_tokens"]:
        assert found[path][3, 32] > 2 * found[path][4, 32] > 0
        weight = model_weight(model, path)
        quantized = gptq_quantize(weight, np.array(means[path]), bits=3, group_size=32)
        measured = with_quantized(model, path, quantized, wanted, other)
        ratios[path] = found[path][3, 32] / measured
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def loss_of_an_embedding(directory, tokens, change):
    """Return the sensitivities of an untied embedding after `change` of the model's module."""

    def changed():
        model: Any = load_model(directory)
        change(model.model)
        return model

    path = "model.embed_tokens"
    return predict_divergence(
        changed,
        tokens,
        {path: [(3, 32), (4, 32)], "lm_head": [(3, 32)]},
        seed=0,
        progress=Silent(),
        saved_state=SavedState(directory / "state"),
    )[path]


def test_an_embedding_counts_by_the_rows_that_are_looked_up(tmp_path):
    directory = tiny.write_checkpoint(tmp_path / "model", "mistral")
    tokens = np.arange(128, dtype=np.int32).reshape(4, 32) % 32

    def with_unused(scale):
        def change(module):
            weight = module.embed_tokens.weight
            module.embed_tokens.weight = mx.concatenate([weight[:32], scale * weight[32:]])

        return loss_of_an_embedding(directory, tokens, change)

    assert with_unused(1) == with_unused(100)


def test_rows_that_a_model_scales_count_by_what_it_makes_of_them(tmp_path):
    """As Gemma does: half of a table, whose rows are doubled, is the same model."""
    directory = tiny.write_checkpoint(tmp_path / "model", "mistral")
    tokens = np.arange(128, dtype=np.int32).reshape(4, 32) % 32

    class Doubled(nn.Embedding):
        def __call__(self, x):
            return 2 * super().__call__(x)

    def halve(module):
        weight = module.embed_tokens.weight
        module.embed_tokens = Doubled(*weight.shape)
        module.embed_tokens.weight = weight / 2

    plain = loss_of_an_embedding(directory, tokens, lambda module: None)
    doubled = loss_of_an_embedding(directory, tokens, halve)
    assert doubled == {option: pytest.approx(kl, rel=1e-3) for option, kl in plain.items()}


def test_one_token_does_not_decide_what_an_embedding_costs(stories, tmp_path):
    """Its row is so short that the norm after it enlarges gradients a thousandfold."""
    path, short = "model.embed_tokens", 5
    tokens = 6 + np.arange(2048, dtype=np.int32).reshape(32, 64) % 500

    def changed():
        model: Any = load(stories, lazy=True)[0]
        scale = mx.where(mx.arange(512) == short, 1e-5, 1.0)[:, None]
        model.model.embed_tokens.weight = scale * model.model.embed_tokens.weight
        return model

    def predict(name):
        settings = {"seed": 0, "progress": Silent(), "saved_state": SavedState(tmp_path / name)}
        options = {path: [(3, 32), (4, 32)]}
        return predict_divergence(changed, tokens, options, **settings)[path]

    without = predict("without")
    tokens[3, 7] = short
    assert predict("with") == {o: pytest.approx(kl, rel=0.05) for o, kl in without.items()}


def test_a_few_extreme_gradients_are_clipped():
    g = mx.random.normal((2000, 8), key=mx.random.key(0))
    g[7] *= 1e4
    clipped, norms = (np.array(x) for x in (clip_outliers(g), mx.linalg.norm(g, axis=-1)))
    largest = np.sort(np.delete(norms, 7))[-2:]
    assert np.linalg.norm(clipped[7]) == pytest.approx(largest[-2], rel=0.01)
    kept = norms < largest[-2]
    np.testing.assert_array_equal(clipped[kept], np.array(g)[kept])
    assert not clip_outliers(mx.zeros((3, 4))).any()


def test_sensitivities_do_not_depend_on_how_much_is_computed_at_once(
    stories, tmp_path, monkeypatch
):
    options = {"model.layers.0.mlp.up_proj": [(3, 32)], "model.embed_tokens": [(3, 32), (4, 32)]}
    tokens = np.arange(2048, dtype=np.int32).reshape(32, 64) % 500

    def predict(name):
        settings = {"seed": 0, "progress": Silent(), "saved_state": SavedState(tmp_path / name)}
        return predict_divergence(lambda: load(stories, lazy=True)[0], tokens, options, **settings)

    def flat(found):
        return [kl for of in found.values() for kl in of.values()]

    whole = flat(predict("whole"))
    monkeypatch.setattr(blocks, "CPU_BATCH_TOKENS", 64)
    monkeypatch.setattr(blocks, "LOGITS", 64 * 512)
    pieces = flat(predict("pieces"))  # other tokens are drawn, which is all that differs
    np.testing.assert_allclose(pieces, whole, rtol=0.3)


def test_a_layer_that_no_text_reaches_is_named(stories, tmp_path):
    def changed():
        model = load(stories, lazy=True)[0]
        model.model.layers[0].mlp.spare = nn.Linear(64, 64)
        return model

    tokens, path = np.arange(64, dtype=np.int32).reshape(2, 32), "model.layers.0.mlp.spare"
    with pytest.raises(RecipeError, match=r"no calibration text reaches .*spare"):
        list(iterate_blocks(changed, tokens, {path: hessian}))
    settings = {"seed": 0, "progress": Silent(), "saved_state": SavedState(tmp_path)}
    with pytest.raises(RecipeError, match=r"no calibration text reaches .*spare"):
        predict_divergence(changed, tokens, {path: [(4, 32)]}, **settings)


@pytest.mark.parametrize("method", ["gptq", "lut", "auto"])
def test_a_block_that_overflows_is_named(stories, tmp_path, method, capsys):
    source = shutil.copytree(stories, tmp_path / "source")
    weights = mx.load(str(source / "model.safetensors"))
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = mx.full(weights[name].shape, 3e38)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    sizes = ["--num-samples", "2", "--sequence-length", "16", "--dtype", "float32"]
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 50)
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out")]
    assert run([*command, "--method", method, "--calibration", str(text), *sizes]) == 2
    assert "model.layers.1 computes NaN or infinite values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sensitivities_go_on_where_they_were_interrupted(stories, tmp_path):
    """In the blocks on the way there, and on the way back; the result is that of one go."""
    paths = [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 4)]
    options = {path: [(3, 32), (4, 32)] for path in [*paths, "model.embed_tokens"]}
    tokens = np.arange(256, dtype=np.int32).reshape(4, 64)
    steps: list[int] = []
    notes: list[str] = []

    class Interrupted(Silent):
        def __init__(self, after: int):
            self.after = after

        @contextmanager
        def task(self, label, total=None):
            def advance(amount, note=""):
                steps.append(amount)
                if sum(steps) >= self.after:
                    raise KeyboardInterrupt

            yield advance

        def note(self, text):
            notes.append(text)

    def predict(directory, after=1000):
        steps.clear()
        return predict_divergence(
            lambda: load(stories, lazy=True)[0],
            tokens,
            options,
            seed=0,
            progress=Interrupted(after),
            saved_state=SavedState(tmp_path / directory),
        )

    whole = predict("one go")
    assert sum(steps) == 2 * 5 + 1
    for after in (2, 7, 9):
        with pytest.raises(KeyboardInterrupt):
            predict("interrupted", after)
    assert predict("interrupted") == whole
    assert steps[0] == 8
    assert notes == ["Resuming: 6 of 11 steps done", "Resuming: 8 of 11 steps done"]
    assert not (tmp_path / "interrupted").exists()


def model_weight(model, path):
    return dict(model.named_modules())[path].weight


def with_quantized(model, path, quantized, wanted, tokens):
    """Measure the divergence with one layer quantized, to 3 bits in groups of 32."""
    module = dict(model.named_modules())[path]
    original = module.weight
    module.weight = dequantize(quantized, bits=3, group_size=32)
    try:
        return divergence(
            wanted, (log_probabilities(model, text) for text in tokens.tolist())
        ).kl_mean
    finally:
        module.weight = original
