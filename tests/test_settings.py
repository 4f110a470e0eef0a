"""Settings classes: errors on one line that name the key, and options made from the class."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from splitquant_mlx import Recipe, RecipeError
from splitquant_mlx.cli.settings import Given, settings_options
from splitquant_mlx.recipe import Calibration
from splitquant_mlx.settings import descriptions, settings
from splitquant_mlx.study.spec import Measure


@settings
class Oven:
    """Settings of an oven.

    Attributes:
        top_heat: temperature of the upper element,
            degrees Celsius.
        rack: number of the rack.
    """

    top_heat: Annotated[int, Field(ge=30)] | None = None
    rack: int = 2

    def __post_init__(self):
        if self.top_heat and self.rack > 3:
            raise RecipeError("expected at most 3 with top_heat", field="rack")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_heat": 3}, "top_heat: expected at least 30, got 3"),
        ({"rack": "2"}, "rack: expected an integer, got '2'"),
        ({"rack": True}, "rack: expected an integer, got True"),
        ({"shelf": 1}, "shelf: unknown key, expected one of top_heat, rack"),
        ({"top_heat": 90, "rack": 4}, "rack: expected at most 3 with top_heat"),
    ],
)
def test_a_bad_value_is_refused_whenever_the_class_is_built(values, message):
    for _ in range(2):  # the first use must not differ from the later ones
        with pytest.raises(RecipeError) as caught:
            Oven(**values)
        assert str(caught.value) == message
        assert caught.value.field == next(name for name in values if message.startswith(name))
    with pytest.raises(RecipeError):
        dataclasses.replace(Oven(), **values)


@pytest.mark.parametrize("kind", [Recipe, Calibration, Measure])
def test_every_field_is_described(kind):
    assert all(descriptions(kind).values())


def test_the_recipe_reference_is_that_of_the_classes():
    script = Path(__file__).resolve().parents[1] / "docs" / "recipes.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


def test_options_come_from_the_class():
    app, seen = typer.Typer(), []

    @app.command()
    @settings_options(Oven, "given", flags={"rack": ("--rack", "-r")}, panel="Baking")
    def bake(dish: str, *, given: Given) -> None:
        if dish == "bread":
            raise RecipeError("rack: the word begins this message, which is not about the option")
        seen.append((dish, Oven(**given)))

    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120", "NO_COLOR": "1"}).output
    assert "--top-heat" in shown and "Temperature of the upper element" in shown
    assert "Baking" in shown and "-r" in shown
    assert CliRunner().invoke(app, ["pie", "-r", "1"]).exit_code == 0
    assert seen == [("pie", Oven(rack=1))]
    refused = CliRunner().invoke(app, ["pie", "--top-heat", "90", "--rack", "4"]).exception
    assert str(refused) == "--rack: expected at most 3 with --top-heat"
    refused = CliRunner().invoke(app, ["pie", "--top-heat", "9"]).exception
    assert str(refused) == "--top-heat: expected at least 30, got 9"
    refused = CliRunner().invoke(app, ["bread"]).exception
    assert str(refused).startswith("rack: the word")
