"""The cost model: bytes exactly, coefficients found again, predictions that scale."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import Recipe, RecipeError, cli, convert
from splitquant_mlx.bench import scaling
from splitquant_mlx.bench.cost import (
    M4_CLASS,
    Cost,
    Machine,
    count_work,
    fit_cost,
    predict,
    summarize_fit,
)
from splitquant_mlx.bench.programs import Run
from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
from splitquant_mlx.formats.manifest import load_manifest

TINY = SHAPES["tiny"]
ODD = dataclasses.replace(TINY, hidden_size=192, intermediate_size=224, tie_word_embeddings=True)
RECIPES = [
    Recipe(),
    Recipe(clusters=5, bits=3, group_size=32),
    Recipe(bits=8, embeddings="quantize", lm_head="split"),
    Recipe(exclude=("*.mlp.*",), granularity="channel"),
    Recipe(method="rtn"),
    Recipe(method="rtn", bits=6, embeddings="keep", dtype="float32"),
    Recipe(method="rtn", mode="mxfp4"),
]
REAL = [
    count_work(case.shape, case.recipe) for case in scaling.CASES if case.shape.vocab_size < 10**5
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("shape", "dtype"), [(TINY, "bfloat16"), (ODD, "float32")])
def test_bytes_are_those_of_a_conversion(tmp_path, shape, dtype, recipe):
    write_random_checkpoint(tmp_path / "m", shape, dtype=dtype)
    manifest = convert(tmp_path / "m", tmp_path / "out", recipe=recipe)
    work = count_work(shape, recipe, dtype)
    assert work.bytes_in == manifest.source_bytes
    assert work.bytes_out == manifest.stored_bytes
    split = [math.prod(layer.shape) for layer in manifest.layers if layer.action == "split"]
    plain = [math.prod(layer.shape) for layer in manifest.layers if layer.action == "quantize"]
    assert (work.clustered, work.split_codes) == (sum(split), sum(split) * recipe.clusters)
    assert work.plain_codes == sum(plain)


def test_weights_are_those_of_the_names():
    assert count_work(SHAPES["llama-3.1-70b"], Recipe()).weights / 1e9 == pytest.approx(70.6, 0.01)


def test_recipe_that_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="group size 128 divides the width of no layer"):
        count_work(dataclasses.replace(ODD, intermediate_size=96), Recipe(group_size=128))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0.01, 100), min_size=5, max_size=5),
    st.lists(st.integers(0, 4), max_size=2, unique=True),
)
def test_fit_finds_the_coefficients_that_made_the_times(sizes, absent):
    typical = np.array([1.0, 1e-9, 3e-9, 3e-9, 3e-9]) * sizes
    typical[absent] = 0.0
    cost = Cost(**dict(zip(Cost.__dataclass_fields__, typical.tolist(), strict=True)))
    times = [cost.seconds(work) for work in REAL]
    if min(times) <= 0:
        return
    found = fit_cost(REAL, times)
    assert [found.seconds(work) for work in REAL] == pytest.approx(times, rel=1e-6)
    assert list(dataclasses.asdict(found).values()) == pytest.approx(
        typical.tolist(), rel=1e-3, abs=1e-6 * max(typical[1:]) + (1e-6 if 0 in absent else 0)
    )


def test_fit_of_impossible_times_has_no_negative_coefficient():
    times = [1 / work.weights for work in REAL]
    assert all(value >= 0 for value in dataclasses.asdict(fit_cost(REAL, times)).values())


def test_summary_gives_the_errors_of_the_medians():
    cost = Cost(
        startup_s=1.0,
        s_per_byte=0.0,
        s_per_clustered=0.0,
        s_per_split_code=0.0,
        s_per_plain_code=0.0,
    )
    found = summarize_fit(cost, REAL[:2], [[0.5, 0.8, 2.0], [2.0, 2.0, 2.0]])
    assert [case["relative_error"] for case in found["cases"]] == pytest.approx([0.25, -0.5])
    assert found["largest_relative_error"] == pytest.approx(0.5)


COST = Cost(
    startup_s=2.0,
    s_per_byte=1e-10,
    s_per_clustered=1e-8,
    s_per_split_code=1e-9,
    s_per_plain_code=1e-9,
)
SAME = Machine(
    name="the same", cores=2, core_speed=1.0, memory_bytes_per_s=1e30, disc_bytes_per_s=1e30
)


@pytest.mark.parametrize("work", REAL)
def test_prediction_scales_with_what_it_says(work):
    def on(**changes):
        return predict(COST, work, dataclasses.replace(SAME, **changes), fit_cores=2)

    nbytes = work.bytes_in + work.bytes_out
    assert on() == pytest.approx(COST.seconds(work))
    computing = COST.seconds(work) - 2.0 - 1e-10 * nbytes
    assert on() - on(cores=4) == pytest.approx(computing / 2)
    assert on() - on(core_speed=2.0) == pytest.approx(computing / 2 + 1.0)
    assert on(disc_bytes_per_s=1e9) - on() == pytest.approx(nbytes * (1e-9 - 1e-10))
    assert on(cores=10**9, memory_bytes_per_s=1e6) == pytest.approx(2 + nbytes * (1e-10 + 1e-6))


def test_larger_models_are_predicted_to_take_longer():
    rows = scaling.predictions(COST, fit_cores=2)
    for method in scaling.METHODS:
        for key in ("bytes_out", "here_s", "other_machine_s"):
            values = [row[key] for row in rows if row["method"] == method]
            assert len(values) == 4 and all(a < b for a, b in pairwise(values))


def test_cost_command_fits_what_it_measured(tmp_path, capsys, monkeypatch):
    """The conversions are real, in this process; their times are made up, and found again."""
    monkeypatch.chdir(tmp_path)
    recipes = [Recipe(clusters=2), Recipe(bits=8), Recipe(method="rtn")]
    cases = tuple(scaling.Case(shape=TINY, recipe=recipe) for recipe in recipes)
    monkeypatch.setattr(scaling, "CASES", cases)

    def run_here(command, target):
        assert cli.run(command[3:]) == 0
        recipe = Recipe.from_dict(load_manifest(target).recipe)
        shutil.rmtree(target)
        seconds = COST.seconds(count_work(TINY, recipe))
        return Run(started=0, seconds=seconds, peak_bytes=1, output=""), {}

    monkeypatch.setattr(scaling, "run_conversion", run_here)
    assert cli.run(["bench", "cost", "--trials", "1", "--json", "cost.json"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTED" in out and "no conversion was timed on this machine" in out
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [case["recipe"] for case in found["fit"]["cases"]] == [r.to_dict() for r in recipes]
    cost = Cost(**found["fit"]["coefficients"])
    for case, recipe in zip(found["fit"]["cases"], recipes, strict=True):
        work = count_work(TINY, recipe)
        assert case["work"] == dataclasses.asdict(work)
        assert case["seconds"] == [COST.seconds(work)]
        assert case["modelled_s"] == cost.seconds(work) == pytest.approx(case["median_s"])
    assert found["fit"]["largest_relative_error"] < 1e-6
    assert found["other_machine"]["name"] == M4_CLASS.name
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
