"""A study's TOML file: valid settings, and the errors of invalid ones."""

from pathlib import Path

import pytest

from splitquant_mlx import RecipeError
from splitquant_mlx.study.spec import load_study, slug

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STUDY = """
model = "some/model"
[measure]
arc = ["arc_easy"]
questions = 5
[recipe]
group_size = 32
[[variants]]
name = "plain"
method = "rtn"
[[variants]]
name = "fine"
group_size = 128
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        file = tmp_path / "mine.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_variants_share_the_recipe_and_may_differ_from_it(written):
    study = load_study(written(STUDY))
    assert (study.name, study.title, study.model) == ("mine", "mine", "some/model")
    plain, fine = study.variants["plain"], study.variants["fine"]
    assert (plain.method, plain.group_size) == ("rtn", 32)
    assert (fine.method, fine.group_size) == ("splitquant", 128)
    assert (study.measure.arc, study.measure.questions) == (("arc_easy",), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model =", "modl ="), "modl: unknown key"),
        (('model = "some/model"', "model = 3"), "model: expected a string, got 3"),
        (('model = "some/model"', ""), "model: expected a value, got none"),
        (('name = "plain"', ""), "variants: expected a table with a name"),
        (('name = "plain"', 'name = "a\\nb"'), "a name, one printable line"),
        (('name = "fine"', 'name = "Plain!"'), "the name is already in use"),
        (('name = "fine"', 'name = "original"'), "the name is already in use"),
        (('method = "rtn"', 'method = "best"'), "variant 'plain': method: expected 'splitquant'"),
        (('["arc_easy"]', '["arc_hard"]'), "arc.0: expected 'arc_challenge' or 'arc_easy'"),
        (("questions = 5", "questions = -1"), "questions: expected at least 0, got -1"),
        (("questions = 5", "questions = true"), "questions: expected an integer, got True"),
        (("questions = 5", "context_length = 1"), "context_length: expected at least 2, got 1"),
        (("questions = 5", "answers = 5"), "answers: unknown key, expected one of arc, "),
        (("questions = 5", "trials = 0"), "trials: expected at least 1, got 0"),
    ],
)
def test_a_wrong_study_is_refused_by_name(written, change, message):
    old, new = change
    assert old in STUDY
    with pytest.raises(RecipeError) as refused:
        load_study(written(STUDY.replace(old, new, 1)))
    assert "mine.toml" in str(refused.value) and message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_papers_study_has_the_recipes_of_the_papers_table():
    study = load_study(RECIPES / "paper.toml")
    assert study.model == "meta-llama/Llama-3.2-1B-Instruct"
    rows = {(r.method, r.bits, r.granularity) for r in study.variants.values()}
    assert rows == {
        (method, bits, granularity)
        for method in ("rtn", "splitquant")
        for bits in (2, 4, 8)
        for granularity in ("tensor", "channel", "group")
    }
    assert {claim.value for claim in study.paper.claims} == {11.76, 126}


def test_a_variant_may_be_a_checkpoint_of_another_program(written):
    extra = '\n[[variants]]\nname = "theirs"\npath = "some/model-4bit"\n'
    assert load_study(written(STUDY + extra)).variants["theirs"] == "some/model-4bit"
    with pytest.raises(RecipeError, match="'theirs': path: expected a path and no recipe"):
        load_study(written(STUDY + extra + "bits = 4\n"))


def test_slugs_are_file_names():
    assert slug("INT4 / g64, split") == "int4-g64-split"
    assert slug("../..") == "variant"
