"""What is shown before a conversion."""

import pytest

from splitquant_mlx import Recipe
from splitquant_mlx.cli.summary import print_forecast
from splitquant_mlx.conversion.bits import Forecast, Step


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("larger", [None, Step(bits_per_weight=5, total_bytes=9e5, divergence=0.1)])
def test_the_table_of_auto(capsys, mixture, larger):
    path = "model.layers.0.mlp.up_proj"
    forecast = Forecast(
        recipe=Recipe(method="gptq", layers={path: {"bits": 4, "group_size": 64}}),
        bits_per_weight=4.5,
        total_bytes=8e5,
        divergence={path: 0.25},
        nbytes={path: 7e5},
        next_size=larger,
        mixture=mixture,
    )
    print_forecast(forecast)
    out = capsys.readouterr().out
    (whole,) = (line.split() for line in out.splitlines() if "whole checkpoint" in line)
    (step,) = (line.split() for line in out.splitlines() if "next size up" in line)
    assert whole == ["whole", "checkpoint", "800.0", "kB", "0.25"]
    shown = "5.00 bits/weight 900.0 kB 0.1" if larger else "none: this is the best"
    assert " ".join(step) == f"next size up {shown}"
    assert ("The KL of a mixture is predicted" in out) == mixture
