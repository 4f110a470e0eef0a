"""The same model and recipe give the same bytes on the same device, in every process.

With a different number of BLAS threads, matrix products may differ in their last bits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.recipe import Calibration

TEXTS = Calibration(num_samples=4, sequence_length=16)
RECIPES = {
    "splitquant": Recipe(),
    "splitquant, fitted": Recipe(calibration=TEXTS),
    "rtn": Recipe(method="rtn"),
    "imatrix": Recipe(method="imatrix", calibration=TEXTS),
    "gptq": Recipe(method="gptq", calibration=TEXTS),
    "lut": Recipe(method="lut", calibration=TEXTS, outliers="1%"),
    "salience": Recipe(method="salience", calibration=TEXTS),
    "omniquant": Recipe(method="omniquant", calibration=TEXTS),
    "efficientqat": Recipe(method="efficientqat", calibration=TEXTS),
    "auto": Recipe(method="auto", calibration=TEXTS),
    "refine": Recipe(method="imatrix", calibration=TEXTS, refine=True),
}
PROGRAM = """
import sys
from splitquant_mlx.runtime import blas
blas.preload()
import mlx.core as mx
mx.set_default_device(mx.Device(mx.cpu))
from splitquant_mlx import convert
from test_determinism import RECIPES
for name, recipe in RECIPES.items():
    convert(sys.argv[1], f"{sys.argv[2]}/{name}", recipe=recipe)
"""


def contents(directory):
    """Return the bytes of every file, and the manifest without its times."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    manifest = json.loads(files.pop("splitquant.json"))
    assert manifest.pop("seconds")
    return files, manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("determinism") / "source")


@pytest.mark.parametrize("name", RECIPES)
def test_two_conversions_are_the_same_bytes(source, tmp_path, monkeypatch, name):
    results = []
    for number in ("1", "2"):
        monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / f"cache-{number}"))
        convert(source, tmp_path / number, recipe=RECIPES[name])
        results.append(contents(tmp_path / number))
    assert results[0] == results[1]


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(source, tmp_path):
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for number in ("1", "2"):
        cache = {"SPLITQUANT_CACHE": str(tmp_path / f"cache-{number}")}
        command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / number)]
        subprocess.run(command, env=os.environ | paths | cache, check=True, timeout=300)
    for name in RECIPES:
        assert contents(tmp_path / "1" / name) == contents(tmp_path / "2" / name)
