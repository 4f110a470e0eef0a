"""The table that method auto prints before a conversion."""

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
    assert ("The KL of a mixture of experts is predicted" in out) == mixture


def test_expert_stacks_and_shared_experts_have_separate_rows(capsys):
    block = "model.layers.{}.mlp"
    stacks, shared = f"{block}.switch_mlp.up_proj", f"{block}.shared_expert.up_proj"
    bits = {
        name.format(n): 3 + n + 2 * (name == shared) for name in (stacks, shared) for n in (0, 1)
    }
    bits["lm_head"] = 8
    forecast = Forecast(
        recipe=Recipe(layers={path: {"bits": n, "group_size": 64} for path, n in bits.items()}),
        bits_per_weight=4.5,
        total_bytes=8e5,
        divergence=dict.fromkeys(bits, 0.25),
        nbytes=dict.fromkeys(bits, 1e3),
    )
    print_forecast(forecast)
    rows = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == ["switch_mlp.up_proj", "shared_expert.up_proj", "lm_head"]
