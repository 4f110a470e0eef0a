"""KL divergence agrees with float64 numpy, with or without the reference's cache."""

import dataclasses
import os
import shutil
import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_llama import NumpyLlama
from tiny import write_checkpoint

from splitquant_mlx import CheckpointError, Recipe, RecipeError, SourceError, convert, load
from splitquant_mlx.data.text import cut_windows, encode
from splitquant_mlx.evaluation import reference as module
from splitquant_mlx.evaluation import scoring
from splitquant_mlx.evaluation.divergence import (
    divergence,
    log_probabilities,
    measure_both,
    measure_divergence,
)
from splitquant_mlx.evaluation.perplexity import measure_perplexity
from splitquant_mlx.evaluation.reference import open_reference
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.lazy import model_hash
from splitquant_mlx.models.loader import load_model

TOLERANCE = 1e-4
ENTRY_BYTES = 3 * 32 * 512 * 4  # of the `windows` fixture, vocabulary 512


def story_windows(directory, text, context_length=32, limit=3):
    return cut_windows(encode(load(directory)[1], text[:2000]), context_length, limit)


@pytest.fixture(scope="module")
def windows(stories, story_text):
    return story_windows(stories, story_text)


class Loader:
    """Load a model and count the loads."""

    def __init__(self, directory):
        self.directory, self.calls = directory, 0

    def __call__(self):
        self.calls += 1
        return load_model(self.directory)


@pytest.fixture
def loader(stories):
    return Loader(stories)


@pytest.fixture
def opened(stories, windows, loader, tmp_path):
    """Return a function that opens the reference with a separate cache."""

    def open_it(cut=windows, **options):
        settings = {"model_hash": "stories", "load": loader, "directory": tmp_path / "cache"}
        return open_reference(cut, **(settings | options))

    return open_it


def entries(directory):
    return sorted(directory.glob("*")) if directory.exists() else []


def check(result, log_p, log_q):
    """Compare with the definition; log_p, log_q: (positions, vocabulary), float64."""
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    assert result.positions == len(kl)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=TOLERANCE)
    # of a single position, from float32 log-probabilities
    assert result.kl_median == pytest.approx(np.median(kl), rel=TOLERANCE, abs=1e-7)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=TOLERANCE)
    error = kl.std(ddof=1) / len(kl) ** 0.5
    assert result.standard_error == pytest.approx(error, rel=TOLERANCE)
    assert result.top1_agreement == (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).mean()


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(method="rtn", group_size=32, bits=3)])
def test_agrees_with_numpy(recipe, stories, windows, tmp_path):
    convert(stories, tmp_path / "model", recipe=recipe)
    reference = open_reference(
        windows, model_hash="", load=lambda: load_model(stories), directory=tmp_path / "cache"
    )
    result = measure_divergence(for_scoring(load_model(tmp_path / "model")), reference)
    original, converted = NumpyLlama(stories), NumpyLlama(tmp_path / "model")
    log_p, log_q = (
        np.concatenate([model(window) for window in windows]) for model in (original, converted)
    )
    check(result, log_p, log_q)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(2, 300), st.floats(0.01, 8), st.integers(0, 9))
def test_agrees_with_the_definition(positions, vocabulary, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (2, positions, vocabulary))
    logits[1] = logits[0] + rng.normal(0, scale, (positions, vocabulary))
    exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    p, q = mx.array(exact.astype(np.float32))
    result = divergence([p[:1], p[1:]], [q[:1], q[1:]])
    rounded = exact.astype(np.float32).astype(np.float64)
    kl = (np.exp(rounded[0]) * (rounded[0] - rounded[1])).sum(axis=-1)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=TOLERANCE, abs=1e-6)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=TOLERANCE, abs=1e-6)
    best = rounded.argmax(axis=-1)
    assert result.top1_agreement == (best[0] == best[1]).mean()


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_divergence_of_a_model_from_itself_is_zero(rows, opened, loader, windows, monkeypatch):
    """From the cache, live, as the model's whole output, and in other block sizes."""
    cached, live = opened(), opened(model_hash="live", limit_bytes=0)
    assert cached.file and live.file is None
    for reference in (cached, live):
        result = measure_divergence(loader(), reference)
        assert result.kl_p99 < 1e-6 and result.top1_agreement == 1
    whole = [mx.concatenate(list(cached))]
    monkeypatch.setattr(scoring, "MAX_BLOCK_ROWS", rows)
    other = [mx.concatenate(list(scoring.log_probability_blocks(loader(), windows)))]
    result = divergence(whole, other)
    assert 0 <= result.kl_mean < 1e-6 and result.kl_p99 < 1e-6
    direct = [log_probabilities(loader(), window.tolist()) for window in windows]
    assert divergence(whole, [mx.concatenate(direct)]).kl_p99 < 1e-6


def test_one_run_measures_divergence_and_perplexity(opened, windows, split_stories):
    model = for_scoring(load_model(split_stories))
    divergence_, perplexity = measure_both(model, opened())
    assert divergence_ == measure_divergence(model, opened())
    alone = measure_perplexity(model, windows.reshape(-1), context_length=windows.shape[1])
    assert dataclasses.asdict(perplexity) == pytest.approx(dataclasses.asdict(alone), rel=1e-5)


def test_cached_predictions_replace_the_model(opened, loader, split_stories):
    model = for_scoring(load_model(split_stories))
    first = measure_divergence(model, opened())
    assert loader.calls == 1
    again = opened()
    assert measure_divergence(model, again) == measure_divergence(model, again) == first
    assert loader.calls == 1
    live = opened(limit_bytes=0, model_hash="again")
    assert measure_divergence(model, live) == first
    assert loader.calls > 1
    assert [file.stat().st_size for file in entries(again.file.parent)] == [ENTRY_BYTES + 128]


def test_every_setting_has_a_separate_entry(opened, loader, windows):
    shapes = (windows, windows[:2], windows.reshape(-1, 16), windows[::-1])
    files = {opened(cut).file for cut in shapes} | {opened(model_hash="other").file}
    assert len(files) == 5 == loader.calls


DAMAGE = {
    "empty": lambda content: b"",
    "torn": lambda content: content[:-1],
    "header only": lambda content: content[:128],
    "longer": lambda content: content + b"\0" * 4,
    "a row short": lambda content: content[: -32 * 3 * 4],
    "another vocabulary": lambda content: content.replace(b"512)", b"511)"),
    "another shape": lambda content: content.replace(b"(3, 32,", b"(32, 3,"),
    "another dtype": lambda content: content.replace(b"<f4", b"<i4"),
    "foreign": lambda content: os.urandom(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_recomputed(damage, opened, loader):
    reference = opened()
    content = reference.file.read_bytes()
    damaged = DAMAGE[damage](content)
    assert damaged != content
    reference.file.write_bytes(damaged)
    assert measure_divergence(loader(), reference).kl_p99 < 1e-6  # opened before: runs live
    calls = loader.calls
    assert opened().file.read_bytes() == content
    assert loader.calls == calls + 1


def test_a_file_truncated_during_reading_raises(opened, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_BLOCK_ROWS", 32)
    reference = opened()
    blocks = iter(reference)
    next(blocks)
    os.truncate(reference.file, 200)
    with pytest.raises(SourceError, match="truncated while it was read"):
        list(blocks)


def test_an_interrupted_run_leaves_no_files(opened, loader, tmp_path, monkeypatch):
    def interrupted(*arguments):
        yield from list(scoring.log_probability_blocks(*arguments))[:2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "log_probability_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened()
    assert entries(tmp_path / "cache") == []
    killed = tmp_path / "cache" / ".entry-x.partial"
    for age_s, remains in ((10, True), (2 * module.ABANDONED_S, False)):
        killed.write_bytes(b"half of it")
        os.utime(killed, (time.time() - age_s,) * 2)
        opened(model_hash=str(age_s))
        assert killed.exists() == remains


def test_the_least_recently_used_entry_is_evicted(opened, loader, tmp_path):
    limit = 2 * (ENTRY_BYTES + 128)
    files = {}
    for name in ("a", "b", "a", "c"):  # "a" is used again, so "b" makes room for "c"
        files[name] = opened(model_hash=name, limit_bytes=limit).file
        time.sleep(0.01)
    foreign = tmp_path / "cache" / "notes.txt"
    foreign.write_text("not ours")
    assert loader.calls == 3
    assert entries(tmp_path / "cache") == sorted([files["a"], files["c"], foreign])
    opened(model_hash="a", limit_bytes=limit)
    assert loader.calls == 3
    opened(model_hash="d", limit_bytes=ENTRY_BYTES + 128)
    assert len(entries(tmp_path / "cache")) == 2 and foreign.exists()


def test_predictions_over_the_limit_are_not_cached(opened, tmp_path):
    entry = opened().file
    assert opened(model_hash="big", limit_bytes=ENTRY_BYTES - 1).file is None
    assert entries(tmp_path / "cache") == [entry]


def test_an_unwritable_cache_is_not_an_error(opened, loader, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    reference = opened(directory=tmp_path / "file" / "cache")
    assert reference.file is None
    assert measure_divergence(loader(), reference).kl_p99 < 1e-6

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    assert opened().file is None and entries(tmp_path / "cache") == []


def test_the_cache_is_in_the_packages_directory(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "home"))
    assert opened(directory=None).file.parent == tmp_path / "home" / "reference"


def test_different_vocabularies_are_rejected(opened, tmp_path, windows):
    reference = opened(windows % 90)
    with pytest.raises(RecipeError, match=r"shape \(32, 512\) .* got \(32, 96\)"):
        measure_divergence(load_model(write_checkpoint(tmp_path / "tiny")), reference)
    with pytest.raises(RecipeError, match="expected tokens from 0 to 511"):
        opened(windows + 500)
    with pytest.raises(RecipeError, match="at least one prediction"):
        divergence([], [])


def test_model_hash_is_of_the_content(stories, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stories, copy)
    expected = model_hash(stories)
    assert model_hash(copy) == expected
    (copy / "README.md").write_text("beside the point")
    assert model_hash(copy) == expected
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1])
        (copy / name).write_bytes(content[:middle] + changed + content[middle + 1 :])
        assert model_hash(copy) != expected, name
        (copy / name).write_bytes(content)
    assert model_hash(copy) == expected
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert model_hash(copy) != expected
    one, two = (write_checkpoint(tmp_path / str(n), shards=n, tokenizer=False) for n in (1, 2))
    assert model_hash(one) != model_hash(two)
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        model_hash(tmp_path)


def test_progress_adds_up(opened, loader, recorder):
    reference = opened(progress=recorder)
    assert sum(recorder.reported) == 0 and len(recorder.reported) > 1
    measure_divergence(loader(), reference, progress=recorder)
    assert sum(recorder.reported) == 0


@pytest.mark.slow
def test_a_real_vocabulary_takes_bounded_memory(smollm2, story_text, tmp_path, monkeypatch):
    """49,152 entries: the log-probabilities of the text are 24 times the size of a block."""
    model, tokenizer = load(smollm2)
    windows = cut_windows(encode(tokenizer, story_text[:5000]), 512, 1)
    monkeypatch.setattr(scoring, "BLOCK_BYTES", 4 << 20)
    reference = open_reference(
        windows, model_hash="smollm2", load=lambda: model, directory=tmp_path / "cache"
    )
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = measure_divergence(model, reference)
    extra_bytes = mx.get_peak_memory() - before
    print(f"\n{extra_bytes / 2**20:.0f} MiB besides the model: {result}")
    assert result.positions == 512 and result.kl_p99 < 1e-6
    assert extra_bytes < 4 * windows.size * 49_152
