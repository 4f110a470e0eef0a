"""The demo on a tiny checkpoint: its table, JSON and next command."""

import json
import shutil

import pytest

from splitquant_mlx.cli import run
from splitquant_mlx.demo import run as demo
from splitquant_mlx.demo.run import RECIPES, run_demo, save_results
from splitquant_mlx.models.source import Source

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def chat_model(stories, tmp_path, monkeypatch):
    """Return a copy of a tiny model with a chat template; text and answers are shortened.

    It has one token per letter and was trained on 256 tokens of context.
    """
    monkeypatch.setattr(demo, "TEXT", demo.TEXT[:256])
    monkeypatch.setattr(demo, "MAX_TOKENS", 12)
    copy = shutil.copytree(stories, tmp_path / "chatty")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


def test_demo_compares_the_original_with_every_recipe(chat_model, tmp_path):
    source = Source(name="tiny", path=chat_model, revision=None)
    results = run_demo(source, tmp_path / "out")
    assert [result.method for result in results] == ["original", *RECIPES]
    original, plain, calibrated, split = results
    assert original.divergence is None and original.bits_per_weight == 32
    for better in (calibrated, split):
        assert 0 < better.divergence.kl_mean < plain.divergence.kl_mean
    assert plain.nbytes == calibrated.nbytes < split.nbytes < original.nbytes
    assert all(result.answer for result in results)
    save_results(results, source.name, tmp_path)
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["results"][3]["divergence"]["kl_mean"] == split.divergence.kl_mean
    assert saved["device"] in ("cpu", "gpu")
    assert saved["versions"]["mlx"] and saved["machine"]["memory_bytes"] > 0


def test_demo_replaces_an_earlier_one_and_names_the_next_command(
    chat_model, split_stories, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(split_stories, tmp_path / "cache" / "demo" / "gptq-4-bit")
    file = tmp_path / "results.json"
    assert run(["demo", "--model", str(chat_model), "--json", str(file)]) == 0
    saved = tmp_path / "cache" / "demo" / "demo.json"
    assert json.loads(file.read_text()) == json.loads(saved.read_text())
    shown, notes = capsys.readouterr()
    assert "split 4-bit" in shown and "2 of 3, converting: gptq 4-bit" in notes
    path = tmp_path / "cache" / "demo" / "gptq-4-bit"
    assert shown.splitlines()[-1].endswith(f"Next: splitquant-mlx chat {path}")
    assert (path / "splitquant.json").is_file()
    assert not any(line.endswith(" ") for line in shown.splitlines())
