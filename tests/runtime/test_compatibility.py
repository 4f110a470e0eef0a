"""Incompatible versions are refused; all undocumented names of mlx-lm in use are listed."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from splitquant_mlx import VersionError, convert, load
from splitquant_mlx.cli import run
from splitquant_mlx.runtime import compatibility
from splitquant_mlx.runtime.compatibility import NAMES, OLDEST, check_names, check_versions

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
NAMED = [(module, name) for module, names in NAMES.items() for name in names]


def refused(capsys, *arguments):
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines(keepends=True)[-1]  # after the line about loading


def test_the_installed_versions_are_accepted():
    check_versions()
    for module in NAMES:
        check_names(module)


def test_the_oldest_versions_match_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {re.split(r"[\[>]", line)[0]: line for line in project["dependencies"]}
    for package, oldest in OLDEST.items():
        assert re.search(r">=([\d.]+)", bounds[package])[1] == oldest


@pytest.mark.parametrize(
    ("package", "installed"),
    [("mlx", "0.30.6"), ("mlx-lm", "0.31.2"), ("transformers", "5.5.4"), ("mlx", "0.9")],
)
@pytest.mark.parametrize("command", ["convert", "generate", "serve", "eval", "doctor"])
def test_an_old_version_is_refused_first(
    package, installed, command, stories, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compatibility, "_installed", {**OLDEST, package: installed}.get)
    model = [] if command == "doctor" else ["--model", stories]
    task = ["--task", "perplexity"] if command == "eval" else []
    err = refused(capsys, command, *model, *task)
    assert f"{package}: expected version {OLDEST[package]} or later for splitquant-mlx" in err
    assert f"got {installed}: pip install -U {package}\n" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("installed", ["0.31.2", "0.31.2.dev20260101", "0.31.10", "1.0", None])
def test_other_versions_are_accepted(installed, monkeypatch):
    monkeypatch.setattr(compatibility, "_installed", {**OLDEST, "mlx": installed}.get)
    check_versions()


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_a_name_that_is_gone_is_named(module, name, monkeypatch, stories, capsys):
    owner, _, last = name.rpartition(".")
    home = import_module(module)
    monkeypatch.delattr(getattr(home, owner) if owner else home, last)
    command = "generate" if module == "mlx_lm.utils" else "serve"
    err = refused(capsys, command, "--model", stories)
    assert f"has no {module}.{name}, which splitquant-mlx" in err
    assert '(in its clone: git pull && pip install .), or pip install "mlx-lm==0.31.3"' in err


def test_the_library_raises_the_same(stories, tmp_path, monkeypatch):
    from mlx_lm import utils

    monkeypatch.delattr(utils, "_get_classes")
    with pytest.raises(VersionError, match=r"has no mlx_lm\.utils\._get_classes"):
        load(stories)
    with pytest.raises(VersionError):
        convert(stories, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_undocumented_names_of_mlx_lm_are_listed():
    """Private names of mlx-lm's modules, and every name that the server imports."""
    imported = set()
    for file in (ROOT / "splitquant_mlx").rglob("*.py"):
        serving = file.parent.name == "inference" and file.stem not in (
            "chat",
            "decoding",
            "server",
        )
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm"):
                names = [name.name for name in node.names if serving or name.name[0] == "_"]
                imported |= {(node.module, name) for name in names}
    assert {("mlx_lm.utils", "_get_classes"), ("mlx_lm.generate", "BatchGenerator")} <= imported
    assert imported <= {(module, name.partition(".")[0]) for module, name in NAMED}
