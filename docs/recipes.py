"""Write docs/recipes.md, the reference of recipes and studies, from their settings classes.

With --check nothing is written; the exit code says whether the page is up to date.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from splitquant_mlx.recipe import Calibration, LayerSettings, Recipe
from splitquant_mlx.settings import descriptions
from splitquant_mlx.study.spec import Measure, Study

PAGE = Path(__file__).with_name("recipes.md")
INTRODUCTION = """\
<!-- written by docs/recipes.py from the settings classes -->
# Recipes and studies

A recipe is a TOML file with the settings of one conversion: `splitquant-mlx convert --recipe
recipe.toml`. Its keys are also options, which win over the file: `--group-size` for `group_size`,
`--q-mode` for `mode`, `--calibration` for the calibration's `text`. The directory `recipes/` of the
repository has examples.

```toml
method = "gptq"
bits = 4

[calibration]
num_samples = 128

[layers."model.layers.0.mlp.down_proj"]
bits = 6
```
"""
STUDY = """
A study is a TOML file that converts one model by several recipes and measures each:
`splitquant-mlx run study.toml`. Each `[[variants]]` table has a `name` and the settings of a
recipe, or the `path` of a checkpoint that another program made of the same model. A `[recipe]`
table holds the settings that all variants share.
"""


def values(annotation: Any) -> str:
    """Return what a field may hold, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list: {values(arguments[0])}"
    if arguments and type(None) in arguments:
        return values(next(kind for kind in arguments if kind is not type(None)))
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}
    return names.get(annotation, "table")


def default(field: dataclasses.Field) -> str:
    """Return a field's default, empty where the description gives it."""
    info = field.default
    value = getattr(info, "default", info)
    if value in (None, (), "") or not isinstance(value, str | int | float | tuple):
        return ""
    return ", ".join(f"`{item}`" for item in (value if isinstance(value, tuple) else (value,)))


def section(title: str, kind: type, *, skip: tuple[str, ...] = ()) -> str:
    """Return the table of a settings class."""
    lines = [f"\n## {title}\n", "| key | values | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name not in skip:
            text = descriptions(kind)[field.name].replace("|", "\\|")
            lines.append(
                f"| `{field.name}` | {values(field.type)} | {default(field)} "
                f"| {text[0].upper()}{text[1:]} |"
            )
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the text of docs/recipes.md."""
    layers = ", ".join(f"`{name}`" for name in LayerSettings.__annotations__)
    return "".join(
        (
            INTRODUCTION,
            section("Recipe", Recipe, skip=("layers", "calibration")),
            section("[calibration]", Calibration),
            '\n## [layers."path"]\n\n',
            f"Settings of single layers, which override the recipe: {layers}.\n",
            section("Study", Study, skip=("name", "variants", "measure")).replace(
                "## Study\n", f"## Study\n{STUDY}"
            ),
            section("[measure]", Measure),
        )
    )


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name}: run python docs/recipes.py")
