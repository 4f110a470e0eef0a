"""A card states what manifest and measurements contain, and escapes untrusted text."""

import json
import math
import re
import shutil

import pytest
import tiny
import yaml
from cards import card
from fake_hub import COMMIT

from splitquant_mlx import Recipe, SplitQuantError, convert
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.source import Source
from splitquant_mlx.publish.card import METHODS, is_own
from splitquant_mlx.publish.upload import prepare_upload
from splitquant_mlx.recipe import METHODS as NAMES
from splitquant_mlx.recipe import Calibration

README = """---
license: llama3.2
license_name: Llama 3.2
language: [en, no]
base_model: org/parent
tags: [chat, mlx]
pipeline_tag: text-generation
model-index: [{name: x}]
---
# Original
"""
EVIL = "x`|\n---\nlicense: mit\n---\n<script>alert(1)</script>[a](http://evil)\x1b]0;owned\x07"
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cards")
    source = tiny.write_checkpoint(home / "source")
    (source / "README.md").write_text(README)
    (source / "LICENSE").write_text("text")
    named = Source(name="org/original", path=source, revision=COMMIT)
    convert(named, home / "split")
    convert(named, home / "plain", recipe=Recipe(method="rtn", bits=8))
    return home


def metadata(text):
    return yaml.safe_load(FRONT.match(text)[1])


def edited(home, tmp_path, **changes):
    """Return a copy of the plain model with a changed manifest."""
    model = shutil.copytree(home / "plain", tmp_path / "edited")
    manifest = json.loads((model / "splitquant.json").read_text())
    (model / "splitquant.json").write_text(json.dumps({**manifest, **changes}))
    return model


def test_metadata_of_the_original_is_copied(home):
    text = card(home / "split")
    assert metadata(text) == {
        "base_model": "org/original",
        "base_model_relation": "quantized",
        "language": ["en", "no"],
        "library_name": "mlx",
        "license": "llama3.2",
        "license_name": "Llama 3.2",
        "pipeline_tag": "text-generation",
        "tags": ["chat", "mlx", "splitquant-mlx", "splitquant"],
    }
    assert f"[org/original](https://huggingface.co/org/original) at revision `{COMMIT}`" in text
    assert "Same as the original: `Llama 3.2`. See `LICENSE`." in text
    assert is_own(text) and not is_own(text.replace("Measured", "measured"))


def test_bits_per_weight_are_stored_bits_over_original_weights(home):
    original = sum(math.prod(shape) for shape in tiny.make_shapes(tiny.make_config()).values())
    # one scale and bias per 64 codes: float16 if split, else the model's float32
    for name, linear in (("split", 3 * (4 + 32 / 64)), ("plain", 8 + 64 / 64)):
        headers = read_headers(home / name).values()
        whole = 8 * sum(header.nbytes for header in headers) / original
        text = card(home / name)
        assert f"| bits/weight, converted linear layers | {linear:.2f} |" in text
        assert f"| bits/weight, whole model | {whole:.2f} |" in text
        assert "Not measured." in text


def test_commands_depend_on_the_layers(home):
    plain, split = card(home / "plain"), card(home / "split")
    assert "mlx_lm.generate --model user/name --prompt" in plain
    assert "trust-remote-code" not in plain and "LM Studio" in plain
    assert "splitquant-mlx chat --model user/name" in split
    assert "mlx_lm.generate --model user/name --trust-remote-code" in split
    assert "runs [`splitquant_model.py`](splitquant_model.py) from this repo" in split
    assert "It is the file that splitquant-mlx" in split and "stores 3 codes" in split
    assert "LM Studio" not in split


def test_changed_code_is_not_attributed_to_this_package(home, tmp_path):
    model = shutil.copytree(home / "split", tmp_path / "model")
    (model / "splitquant_model.py").write_text("print('hello')")
    assert "It is the file that splitquant-mlx" not in card(model)


def test_the_options_exist_in_mlx_lm(home):
    from mlx_lm.generate import setup_arg_parser

    (line,) = re.findall(r"mlx_lm\.generate (.*)", card(home / "split"))
    known = setup_arg_parser()._option_string_actions
    assert {word for word in line.split() if word.startswith("--")} <= set(known)


@pytest.mark.parametrize(
    ("changes", "base", "relation"),
    [
        ({"revision": None, "source": "/home/me/model"}, "org/parent", None),
        ({"revision": None, "source": "/c/models--o--m/snapshots/" + "a" * 40}, "o/m", "quantized"),
        ({"revision": None, "source": "x", "source_card": {}}, None, None),
        ({"source": "evil](http://x)"}, "org/parent", None),
    ],
)
def test_the_base_model_comes_from_the_manifest(home, tmp_path, changes, base, relation):
    text = card(edited(home, tmp_path, **changes))
    data = metadata(text)
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, relation)
    assert "/home/me" not in text and "](http://x)" not in text
    named = metadata(card(tmp_path / "edited", base_model="a/b"))
    assert (named["base_model"], named["base_model_relation"]) == ("a/b", "quantized")


def test_an_invalid_base_model_is_refused(home):
    for name in ("a/b/c", "a b", "x](y)", "", "-/../"):
        with pytest.raises(SplitQuantError, match="base model"):
            prepare_upload(home / "plain", "user/name", base_model=name)


HOSTILE = {
    "source": {"source": EVIL, "revision": EVIL},
    "card": {"source_card": {"license": EVIL, "tags": [EVIL, "---", "ok"], "evil": EVIL}},
    "card of tables": {"source_card": {"license": {"a": 1}, "tags": {"b": 2}, "language": 1}},
    "versions": {"versions": {EVIL: EVIL}, "device": EVIL},
    "recipe": {"recipe": {"method": "rtn", "bits": 8, "include": [EVIL, "```"]}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_untrusted_text_is_escaped(home, tmp_path, changes):
    text = card(edited(home, tmp_path, **changes))
    known = {
        "base_model", "base_model_relation", "language", "library_name", "license",
        "license_name", "pipeline_tag", "tags",
    }  # fmt: skip
    assert set(metadata(text)) <= known
    assert metadata(text).get("license") in ("llama3.2", None)
    assert all(c.isprintable() or c == "\n" for c in text)
    body = FRONT.sub("", text)
    fenced = re.sub(r"^```\w*\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert fenced.count("```") == 0
    outside = re.sub(r"`[^`\n]*`", "", fenced)
    for dangerous in ("script", "evil", "---\nlicense"):
        assert dangerous not in outside
    assert len(re.findall(r"^---$", text, re.MULTILINE)) == 2


def test_untrusted_notes_are_escaped(home, tmp_path):
    manifest = json.loads((home / "plain" / "splitquant.json").read_text())
    manifest["layers"][0]["note"] = EVIL
    text = card(edited(home, tmp_path, layers=manifest["layers"]))
    assert "script" in text and "script" not in re.sub(r"`[^`\n]*`", "", text)


def test_notes_name_what_the_user_should_check(home, tmp_path):
    assert prepare_upload(home / "plain", "user/name").notes == ()
    model = edited(home, tmp_path, source="/home/me/x", revision=None, source_card={})
    (model / "diary.txt").write_text("mine")
    notes = " ".join(prepare_upload(model, "user/name").notes)
    for part in ("diary.txt", "--base-model", "contains its path: /home/me/x", "no licence"):
        assert part in notes


def test_every_method_is_explained():
    assert METHODS.keys() == {*NAMES}


def test_card_of_lookup_tables(home, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    calibration = Calibration(num_samples=2, sequence_length=16)
    settings = Recipe(method="lut", outliers="1%", sweeps=0, calibration=calibration)
    convert(home / "source", tmp_path / "lut", recipe=settings)
    text = card(tmp_path / "lut")
    assert "one codebook per | row (outliers: 1%)" in text
    assert "--trust-remote-code" in text and "is the file that splitquant-mlx" in text
    assert "codes for every weight" not in text


@pytest.mark.parametrize("method", ["imatrix", "gptq", "auto"])
def test_the_card_states_the_calibration_text(home, tmp_path, monkeypatch, method):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    calibration = Calibration(num_samples=2, sequence_length=16)
    recipe = Recipe(method=method, calibration=calibration)
    convert(home / "source", tmp_path / "sampled", recipe=recipe)
    text = card(tmp_path / "sampled")
    assert "calibrated on text sampled from the original model" in text
    assert "trust-remote-code" not in text
    assert ("per layer, `affine`" in text) == (method == "auto")
    file = tmp_path / "text.txt"
    file.write_text("w3 w5 w8 " * 40)
    calibration = Calibration(text=str(file), num_samples=2, sequence_length=16)
    recipe = Recipe(method=method, calibration=calibration)
    convert(home / "source", tmp_path / "file", recipe=recipe)
    text = card(tmp_path / "file")
    assert "calibrated on a text file" in text and str(tmp_path) not in text
