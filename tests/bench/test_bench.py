"""The benchmarks measure real processes, and their results are consistent."""

import json
import shutil
import sys
import time
from functools import cache

import numpy as np
import pytest

from splitquant_mlx import SplitQuantError, cli
from splitquant_mlx.bench import conversion
from splitquant_mlx.bench.conversion import BASELINE, SKLEARN, bench_convert, run_conversion
from splitquant_mlx.bench.programs import OURS, Run, run_program, spread
from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
from splitquant_mlx.formats.manifest import load_manifest

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_random_checkpoint(path, TINY)
    return path


def test_run_is_timed_from_start_to_end():
    before = time.perf_counter()
    run = run_program([sys.executable, "-c", "import time; time.sleep(0.3); print('done')"])
    assert before <= run.started and run.started + run.seconds <= time.perf_counter()
    assert run.seconds >= 0.3
    assert run.output == "done\n"


def test_peak_memory_is_that_of_the_program():
    """On Linux a child's peak starts at its parent's, which must not be reported."""
    ballast = np.ones(40_000_000)  # 320 MB
    small = run_program([sys.executable, "-c", "pass"]).peak_bytes
    large = run_program([sys.executable, "-c", "x = b'1' * 200_000_000"]).peak_bytes
    assert small < 50_000_000 < ballast.nbytes
    assert large - small == pytest.approx(200_000_000, rel=0.05)


def test_failure_is_named_by_its_last_line():
    code = "import sys; sys.exit('first\\nlast')"
    with pytest.raises(SplitQuantError, match=r"failed: last$"):
        run_program([sys.executable, "-c", code])
    with pytest.raises(SplitQuantError, match="No such file"):
        run_program(["/nowhere/to/be/found"])


@pytest.mark.parametrize("values", [[3.0], [5, 1, 2], [4.0, 8.0]])
def test_spread_is_numpys(values):
    result = spread(values)
    assert result["runs"] == values
    assert (result["median"], result["min"], result["max"]) == (
        np.median(values),
        np.min(values),
        np.max(values),
    )


@pytest.mark.slow
def test_conversions_are_compared(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = cache(lambda command, target: run_conversion(list(command), target))
    monkeypatch.setattr(
        conversion, "run_conversion", lambda command, target: once(tuple(command), target)
    )
    command = ["bench", "convert", "--model", str(tiny), "--trials", "1", "--json", "b.json"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "peak memory" in out and "seconds of rtn: read" in out
    programs = json.loads((tmp_path / "b.json").read_text())["programs"]
    assert programs.keys() == {"splitquant", "rtn", BASELINE}
    for program in programs.values():
        assert program["median_s"] == program["seconds"][0] > 0
        assert program["peak_bytes"] > 10_000_000
        assert program["ratio"] == program["median_s"] / programs[BASELINE]["median_s"]
    for name in ("splitquant", "rtn"):
        stages = programs[name]["stages_s"]
        assert stages.keys() == {"read", "cluster", "quantize", "write", "total"}
        assert 0 < stages["total"] < programs[name]["median_s"]
        assert (stages["cluster"] > 0) == (name != "rtn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json"]


def test_published_approach_is_timed_on_request(tiny, tmp_path, monkeypatch):
    """Each program converts with its method; in this process, for speed."""
    did = {}

    def run_here(command, target):
        if command[:3] != list(OURS):
            return Run(started=0, seconds=2, peak_bytes=1, output=""), {}
        assert cli.run(command[3:]) == 0
        manifest = load_manifest(target)
        assert manifest
        shutil.rmtree(target)
        did[manifest.recipe["method"], manifest.recipe["kmeans"]] = manifest.seconds
        return Run(started=0, seconds=8, peak_bytes=1, output=""), manifest.seconds

    monkeypatch.setattr(conversion, "run_conversion", run_here)
    programs = bench_convert(tiny, tmp_path, trials=1, sklearn=True)["programs"]
    assert did.keys() == {("splitquant", "exact"), ("rtn", "exact"), ("splitquant", "sklearn")}
    assert programs[SKLEARN]["stages_s"] == did["splitquant", "sklearn"]
    assert [program["ratio"] for program in programs.values()] == [4, 4, 1, 4]


def test_program_that_fails_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SplitQuantError, match="is not a model directory"):
        bench_convert(tmp_path / "empty", tmp_path, trials=1)


@pytest.mark.parametrize("command", [["convert"], []])
def test_no_trials_are_refused(tiny, capsys, command):
    assert cli.run(["bench", *command, "--trials", "0", "--model", str(tiny)]) == 2
    assert "--trials: expected at least 1, got '0'" in capsys.readouterr().err


def test_json_file_without_a_directory_is_refused_before_the_work(tiny, capsys, tmp_path):
    file = tmp_path / "none" / "b.json"
    for command in (["--model", str(tiny)], ["convert", "--model", str(tiny)]):
        assert cli.run(["bench", *command, "--json", str(file)]) == 2
        assert f"there is no directory {file.parent}" in capsys.readouterr().err
