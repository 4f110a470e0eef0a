"""What is published: a wheel with all of the package, an sdist whose tests run."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Return the directory of a wheel that was built from an sdist, and of that."""
    pytest.importorskip("build", reason='building needs pip install ".[dev]"')
    home = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", home, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home


def files(*directories):
    found = (path for name in directories for path in (ROOT / name).rglob("*") if path.is_file())
    kept = (path for path in found if "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in kept}


def test_the_metadata_are_sound(dist):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_is_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "splitquant-mlx = splitquant_mlx.__main__:main" in wheel.read(entry_points).decode()
    assert {name for name in names if ".dist-info/" not in name} == files("splitquant_mlx")
    assert {"splitquant_mlx/py.typed", "splitquant_mlx/report/page.html.j2"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_tests_of_the_sdist_run_in_it(dist, tmp_path):
    subprocess.run(["tar", "xzf", next(dist.glob("*.tar.gz")), "-C", tmp_path], check=True)
    (home,) = tmp_path.iterdir()
    held = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    alone = {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Justfile",
        "mkdocs.yml",
        "pyproject.toml",
    }
    wanted = files("splitquant_mlx", "tests", "recipes", "docs", "examples", ".ci") | alone
    assert {path for path in wanted if not re.match(r"docs/results/\w+/report\.", path)} <= held
    names = ("test_readme", "test_recipe", "runtime/test_compatibility", "test_imports")
    chosen = [f"tests/{name}.py" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
