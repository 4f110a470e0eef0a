"""The table of an untrusted README is read safely and stored in the manifest."""

import json
import os
import time

import pytest
import tiny
from fake_hub import COMMIT, FakeHub

from splitquant_mlx import convert
from splitquant_mlx.formats.model_card import read_source_card, write_source_card

BOMB = "a: &a [x, y]\n" + "\n".join(f"b{n}: &b{n} {{<<: [*c, *c]}}" for n in range(3))
MERGES = "k0: &k0 {license: mit}\n" + "\n".join(
    f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: mit\nlanguage: no", {"license": "mit", "language": "no"}),
        ("language:\n- en\n- no\nx: 1", {"language": ["en", "no"]}),
        ('license: 2024-01-01\nlicense_name: "a\\nb"', {"license": "2024-01-01"}),
        ("license: {a: b}\ntags: [[x], y, '']", {"tags": ["y"]}),
        (f"license: {'x' * 300}", {}),
        ('license: "\\e]0;owned"', {}),
        ("- license", {}),
        ("license: [", {}),
        ("!!python/object/apply:os.system ['true']", {}),
        ("license: !!python/object/apply:os.system ['x']", {"license": ["x"]}),
        ("? [a, b]\n: c", {}),
        ("[" * 500, {}),
        (BOMB, {}),
        ("", {}),
    ],
)
def test_the_table_is_read_and_checked(tmp_path, block, expected):
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n# Title\n---\nlicense: other\n---\n")
    assert read_source_card(tmp_path) == expected


def test_nested_merges_are_not_expanded(tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{MERGES}\n---\n")
    start = time.monotonic()
    assert read_source_card(tmp_path) == {"license": "mit"}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", [b"# no table", b"", b"\xff\xfe\x00", b"---\nlicense: mit\n"])
def test_a_readme_without_a_table(tmp_path, text):
    assert read_source_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(text)
    assert read_source_card(tmp_path) == {}


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert read_source_card(tmp_path) == {}


def test_crlf_and_a_byte_order_mark(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
    assert read_source_card(tmp_path) == {"license": "mit"}


def test_a_card_round_trips(tmp_path):
    card = {"license": "é: 'x' #y", "tags": ["a", "---", "b: c"]}
    write_source_card({**card, "other": "z", "license_name": None}, tmp_path)
    assert read_source_card(tmp_path) == card


def test_the_manifest_has_the_card_of_a_hub_repo(tmp_path, monkeypatch):
    source = tiny.write_checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\ndatasets: [x]\n---\n")
    (source / "LICENSE.txt").write_text("MIT")
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    with (
        FakeHub(repos={"org/model": files}) as hub,
        hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"),
    ):
        manifest = convert("org/model", tmp_path / "out")
    assert (manifest.source, manifest.revision) == ("org/model", COMMIT)
    written = json.loads((tmp_path / "out" / "splitquant.json").read_text())
    assert written["source_card"] == {"license": "mit"}
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "MIT"
    assert not (tmp_path / "out" / "README.md").exists()
