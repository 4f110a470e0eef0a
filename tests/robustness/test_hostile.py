"""Checkpoints made to harm: each was a defect once that tests/fuzz.py or a reader found."""

import json
import os
import pickle
import time

import mlx.core as mx
import pytest
import tiny
from damage import UP, edit_config, tensor, write
from fake_hub import COMMIT, FakeHub

from splitquant_mlx import CheckpointError, convert, load
from splitquant_mlx.cli import run
from splitquant_mlx.formats.gguf_tokenizer import build_tokenizer
from splitquant_mlx.inference.chat import encode
from splitquant_mlx.inspection.layers import find_cut_points, layer_histogram
from splitquant_mlx.models.source import cached

ESCAPE = "\x1b]0;owned\x07"
MESSAGES = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture
def model(tmp_path):
    return tiny.write_checkpoint(tmp_path / "model")


def edit_json(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def refused(action, *arguments):
    """Return the message of a refusal, which must come in time."""
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        action(*arguments)
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)
    return str(caught.value)


def complaint(capfd, *arguments):
    """Return the one line with which a command fails."""
    assert run([str(argument) for argument in arguments]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and "unexpected" not in err
    return err


@pytest.mark.parametrize("name", ["tokenizer_extra.json", "LICENSE", "generation_config.json"])
def test_a_link_to_a_file_elsewhere_is_not_copied(model, tmp_path, name):
    (tmp_path / "credentials").write_text("secret")
    (model / name).symlink_to("../credentials")
    assert "links to a file outside" in refused(convert, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_copied_but_not_what_lies_beside_it(model, tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "again.json").symlink_to("tokenizer.json")
    convert(snapshot, tmp_path / "out")
    assert load(tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    (repo / "refs").write_text("secret")
    (snapshot / "LICENSE").symlink_to("../../refs")
    assert "links to a file outside" in refused(convert, snapshot, tmp_path / "other")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model-2.safetensors", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_without_an_end_is_not_opened(model, tmp_path, name, kind):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if kind == "pipe" else (model / name).symlink_to("/dev/zero")
    for action, *arguments in ((load, model), (convert, model, tmp_path / "out")):
        assert f"{name} is not a file" in refused(action, *arguments)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "notes.txt"])
def test_a_text_file_of_a_terabyte_is_not_read(model, tmp_path, name):
    with (model / name).open("ab") as file:
        file.truncate(1 << 40)  # which takes no room on the disk
    for action, *arguments in ((load, model), (convert, model, tmp_path / "out")):
        assert "bytes, got 1099511627776" in refused(action, *arguments)


CONFIGS = {
    "text_config a number": ({"text_config": 1}, "text_config is not an object"),
    "10**9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
    "rope_theta a table": ({"rope_theta": {"a": 1}}, "rope_theta: expected a number, got {'a': 1}"),
    "an architecture whose module ends Python": ({"model_type": "olmo"}, "olmo"),
    "an architecture outside mlx-lm": ({"model_type": "../../evil"}, "unknown architecture"),
}


@pytest.mark.parametrize(("changes", "wanted"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_by_load_and_convert(model, tmp_path, changes, wanted):
    edit_config(**changes)(model)
    for action, *arguments in ((load, model), (convert, model, tmp_path / "out")):
        assert wanted in refused(action, *arguments)


def test_the_index_of_a_snapshot_may_nest_too_deep(model, tmp_path, monkeypatch):
    write("model.safetensors.index.json", "[" * 200_000)(model)
    repo = tmp_path / "hub" / "models--org--name"
    for folder in ("snapshots", "refs"):
        (repo / folder).mkdir(parents=True)
    model.rename(repo / "snapshots" / COMMIT)
    (repo / "refs" / "main").write_text(COMMIT)
    with FakeHub() as hub, hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"):
        assert cached("org/name") is None


def test_weights_that_are_not_finite_are_named_by_inspect(model):
    tensor(UP, mx.full((tiny.INNER, tiny.HIDDEN), float("nan")))(model)
    layer = UP.removesuffix(".weight")
    for action, *arguments in ((find_cut_points, model), (layer_histogram, model, layer)):
        message = refused(action, *arguments)
        assert layer in message and "NaN" in message


def test_no_code_of_the_checkpoint_runs(model, tmp_path):
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n"
    (model / "evil.py").write_text(evil)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": [1]}))
    edit_config(auto_map={"AutoConfig": "evil.Config"})(model)
    settings = model / "tokenizer_config.json"
    edit_json(settings, auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    assert load(model)  # with the class that transformers has
    convert(model, tmp_path / "out")
    assert not (tmp_path / "out" / "evil.py").exists()
    edit_config(model_file="evil.py")(model)
    for action, *arguments in ((load, model), (convert, model, tmp_path / "other")):
        assert "evil.py" in refused(action, *arguments)
    assert not (tmp_path / "ran").exists()


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('two\nlines') }}",
    "{% for",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 2 ** 60 }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_cannot_leave_its_sandbox(model, template):
    edit_json(model / "tokenizer_config.json", chat_template=template)
    tokenizer = load(model)[1]
    assert "chat template fails" in refused(encode, tokenizer, MESSAGES)


def test_a_vocabulary_of_long_pieces_is_not_cut_for_ever():
    pieces = ["a" * length for length in range(1, 2000)]
    kinds = {"tokenizer.ggml.scores": [0.0] * 1999, "tokenizer.ggml.token_type": [1] * 1999}
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, **kinds}
    assert "squared lengths" in refused(build_tokenizer, metadata)


def test_a_panic_of_the_tokenizers_library_is_a_refusal(model):
    pieces = {"a": 0, "b": 1, "ab": 2}
    bpe = {"type": "BPE", "vocab": pieces, "merges": [["a", "b"]]}
    edit_json(model / "tokenizer.json", model={**bpe, "continuing_subword_prefix": "longer"})
    assert "tokenizer cannot be loaded" in refused(load, model)


def test_settings_of_a_tokenizer_cannot_drive_the_terminal(model, capfd):
    unknown = {"content": "<unk>", ESCAPE: True}
    edit_json(model / "tokenizer_config.json", added_tokens_decoder={"0": unknown})
    assert "has a setting" in refused(load, model)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("verbose", ["True", "False"])
def test_what_a_model_says_cannot_drive_the_terminal(model, capfd, verbose):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    changed = {f"{ESCAPE}{word}" if word[0] == "w" else word: n for word, n in vocabulary.items()}
    edit_json(model / "tokenizer.json", model={**tokenizer["model"], "vocab": changed})
    edit_json(model / "tokenizer_config.json", chat_template=f"{ESCAPE}w3")
    options = ["--max-tokens", "5", "--verbose", verbose, "--temp", "0"]
    assert run(["generate", "--model", str(model), *options]) == 0
    out = capfd.readouterr().out
    assert "owned" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_name_of_a_million_characters_is_cut(model, capfd):
    tensor("A" * 1_000_000, mx.zeros(3))(model)
    assert len(complaint(capfd, "inspect", "--cut-points", "--model", model)) < 2000
