"""Recipes: checked on construction, and the same after a round trip through TOML."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitquant_mlx import Recipe, RecipeError, load_recipe
from splitquant_mlx.recipe import BITS, GROUP_SIZES, Calibration
from splitquant_mlx.sizes import parse_bytes
from splitquant_mlx.study.spec import load_study

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PATTERNS = st.lists(st.text(max_size=8), max_size=3).map(tuple)


@given(
    recipe=st.builds(
        Recipe,
        method=st.just("splitquant"),
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from(GROUP_SIZES),
        granularity=st.sampled_from(["group", "channel", "tensor"]),
        clusters=st.integers(2, 8),
        kmeans=st.sampled_from(["exact", "sklearn"]),
        dtype=st.sampled_from([None, "float16", "bfloat16", "float32"]),
        embeddings=st.sampled_from([None, "keep", "quantize"]),
        lm_head=st.sampled_from([None, "keep", "quantize"]),
        include=PATTERNS,
        exclude=PATTERNS,
    )
)
def test_round_trip(recipe, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(file) == recipe


CALIBRATIONS = st.builds(
    Calibration,
    text=st.sampled_from(["self", "my text.jsonl"]),
    num_samples=st.none() | st.integers(1, 999),
    sequence_length=st.integers(2, 999),
    seed=st.integers(0, 2**40),
)


@given(
    method=st.sampled_from(["imatrix", "gptq"]),
    calibration=CALIBRATIONS,
    embedding_bits=st.sampled_from([None, 4, 8]),
    layers=st.dictionaries(
        st.text(max_size=8),
        st.fixed_dictionaries(
            {}, optional={"bits": st.sampled_from(BITS), "group_size": st.sampled_from(GROUP_SIZES)}
        ),
        max_size=3,
    ),
)
def test_round_trip_with_tables(method, calibration, embedding_bits, layers, tmp_path_factory):
    recipe = Recipe(
        method=method, calibration=calibration, embedding_bits=embedding_bits, layers=layers
    )
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_defaults_are_the_paper_for_splitquant_and_mlx_lm_for_rtn():
    paper, plain = Recipe(), Recipe(method="rtn")
    assert (paper.clusters, paper.bits, paper.group_size) == (3, 4, 64)
    assert (paper.embeddings, paper.lm_head) == ("keep", "keep")
    assert (plain.embeddings, plain.lm_head) == ("quantize", "quantize")
    assert Recipe(method="rtn", mode="mxfp8").bits == 8
    fitted, chosen = Recipe(method="gptq"), Recipe(method="auto")
    assert (fitted.embeddings, fitted.embedding_bits, fitted.sweeps) == ("quantize", 6, 1)
    assert fitted.calibration == Calibration()
    assert (chosen.target_bpw, chosen.max_kl, chosen.embedding_bits) == (4.5, None, None)
    assert Recipe(calibration=Calibration()).embedding_bits is None


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "awq"},
        {"bits": 7},
        {"method": "gptq", "granularity": "tensor"},
        {"method": "gptq", "target_bpw": 4.5},
        {"method": "imatrix", "sweeps": 2},
        {"method": "rtn", "calibration": {"seed": 1}},
        {"method": "gptq", "calibration": {"seed": -1}},
        {"method": "gptq", "calibration": {"seeds": 1}},
        {"method": "gptq", "calibration": "self"},
        {"method": "gptq", "calibration": {"text": ""}},
        {"method": "gptq", "calibration": {"sequence_length": 1}},
        {"method": "gptq", "sweeps": -1},
        {"method": "gptq", "embedding_bits": 7},
        {"method": "gptq", "layers": {"a": {"bits": 7}}},
        {"method": "gptq", "layers": {"a": 4}},
        {"method": "gptq", "layers": ["a"]},
        {"method": "rtn", "mode": "mxfp4", "layers": {"a": {"bits": 4}}},
        {"method": "auto", "target_bpw": 4.5, "max_kl": 0.1},
        {"method": "auto", "target_size": "4GB", "fits": "16GB"},
        {"method": "auto", "target_size": "4"},
        {"method": "auto", "target_size": 4_000_000_000},
        {"method": "auto", "fits": "16 apples"},
        {"method": "gptq", "fits": "16GB"},
        {"method": "auto", "target_bpw": 3},
        {"method": "auto", "max_kl": 0},
        {"method": "auto", "max_kl": float("nan")},
        {"method": "auto", "target_bpw": "4.5"},
        {"method": "auto", "bits": 2},
        {"method": "auto", "group_size": 32},
        {"method": "rtn", "clusters": 5},
        {"method": "gptq", "kmeans": "sklearn"},
        {"embedding_bits": 6},
        {"bits": True},
        {"bits": "4"},
        {"group_size": 48},
        {"clusters": 1},
        {"clusters": 9},
        {"clusters": 3.0},
        {"granularity": "row"},
        {"mode": "mxfp4"},
        {"mode": "mxfp4", "method": "rtn", "bits": 8},
        {"mode": "nvfp4", "method": "rtn", "granularity": "tensor"},
        {"dtype": "int8"},
        {"embeddings": "split"},
        {"method": "rtn", "lm_head": "split"},
        {"include": (1,)},
        {"include": "*.mlp.*"},
        {"exclude": 1},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(RecipeError) as caught:
        Recipe(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz = 4", "bitz: unknown key, expected one of method, bits"),
        ("bits = ", "not valid TOML"),
        ("include = 'a'", "include: expected a list, got 'a'"),
        ("bits = 7", "bits: expected 2, 3, 4, 5, 6 or 8, got 7"),
        ("[variants.a]", "is a study, not a recipe: splitquant-mlx run "),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(file)
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4.2GB", 4_200_000_000), ("4 GiB", 4 * 2**30), ("900mb", 9 * 10**8), ("64k", 64_000)],
)
def test_sizes_are_read_as_they_are_written(text, nbytes):
    assert parse_bytes(text) == nbytes
    assert Recipe(method="auto", target_size=text).target_bpw is None


@pytest.mark.parametrize(
    ("widest", "texts"), [(64, 128), (1536, 128), (2048, 128), (3072, 192), (8192, 256)]
)
def test_wide_layers_are_calibrated_on_more_texts(widest, texts):
    recipe = Recipe(method="gptq").for_model(widest)
    assert recipe.texts.num_samples == texts
    assert recipe.for_model(1) == recipe
    assert Recipe(method="rtn").for_model(widest) == Recipe(method="rtn")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_and_studies_load_and_open_with_a_comment(file):
    study = "[[variants]]" in file.read_text()
    (load_study if study else load_recipe)(file)
    assert file.read_text().startswith("#")
