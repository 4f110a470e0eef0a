"""Settings of a study: variants of one model with the same measurements.

A study is a TOML file with a `model`, a `[measure]` table, `[[variants]]`, and a `[recipe]` table
of settings shared by all recipes. A variant has a name and is a recipe, or, with a `path`, a
checkpoint of the same model that another program converted.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.settings import ArcTask, Protocol
from splitquant_mlx.recipe import Recipe, read_toml
from splitquant_mlx.settings import (
    NonNegativeInt,
    PositiveInt,
    Strings,
    from_mapping,
    nested,
    settings,
)
from splitquant_mlx.study.results import Paper

ORIGINAL, FOREIGN = "original", "foreign"  # methods of models that the study did not convert


@settings
class Measure:
    """Settings of the measurements of every variant.

    Attributes:
        arc: question sets: "arc_challenge", "arc_easy".
        protocols: forms of the questions: "loglikelihood", "letter".
        num_shots: few-shot examples before each question, for "loglikelihood".
        questions: number of questions per set; 0 for all.
        text_tokens: tokens for perplexity and KL divergence; 0 for neither.
        context_length: tokens per window for perplexity and KL divergence; by default 512, or the
            model's context length if that is shorter.
        prompt_tokens: prompt tokens of the speed measurement; 0 for none.
        generation_tokens: generated tokens of the speed measurement.
        trials: trials of the speed measurement after the warm-up.
    """

    arc: Annotated[tuple[ArcTask, ...], Field(strict=False)] = ("arc_challenge",)
    protocols: Annotated[tuple[Protocol, ...], Field(strict=False)] = ("loglikelihood", "letter")
    num_shots: NonNegativeInt = 0
    questions: NonNegativeInt = 0
    text_tokens: NonNegativeInt = 8192
    context_length: Annotated[int | None, Field(ge=2)] = None
    prompt_tokens: NonNegativeInt = 512
    generation_tokens: NonNegativeInt = 128
    trials: PositiveInt = 3


@settings
class Study:
    """Settings of one study.

    Attributes:
        name: name of the study's file, without its suffix.
        model: repo id, directory, .gguf file, or "demo" for the model of `splitquant-mlx demo`.
        variants: recipe, or path of a checkpoint that another program converted, by variant name;
            "original" is always measured.
        title: title of the report; by default the name.
        revision: branch, tag or commit of a hub repo.
        measure: measurements of every variant.
        notes: sentences for the report.
        paper: {"source", "claims": [{"what", "value", "unit"}]}: published figures to compare with.
    """

    name: str
    model: Annotated[str, Field(min_length=1)]
    variants: dict[str, Recipe | str]
    title: str = ""
    revision: str | None = None
    measure: Annotated[Measure, nested(Measure)] = Field(default_factory=Measure)
    notes: Strings = ()
    paper: Annotated[Paper | None, nested(Paper)] = None


def load_study(path: Path) -> Study:
    """Read a study. Raises RecipeError, naming the file and the variant, when it is invalid."""
    values = read_toml(path)
    try:
        return _study(path.stem, values)
    except RecipeError as exc:
        raise RecipeError(f"study {path}: {exc}") from exc


def slug(name: str) -> str:
    """Convert a variant's name to a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "variant"


def _study(name: str, values: dict[str, Any]) -> Study:
    shared, tables = values.pop("recipe", {}), values.pop("variants", [])
    if not isinstance(shared, dict) or not isinstance(tables, list):
        raise RecipeError("expected a [recipe] table and [[variants]] tables")
    variants: dict[str, Recipe | str] = {}
    for table in tables:
        variant = table.get("name") if isinstance(table, dict) else None
        if not isinstance(variant, str) or not variant.strip() or not variant.isprintable():
            raise RecipeError(
                f"expected a table with a name, one printable line, got {table!r:.80}",
                field="variants",
            )
        if slug(variant) in {ORIGINAL, *map(slug, variants)}:
            raise RecipeError(f"variant {variant!r}: the name is already in use")
        try:
            variants[variant] = _variant({k: v for k, v in table.items() if k != "name"}, shared)
        except RecipeError as exc:
            raise RecipeError(f"variant {variant!r}: {exc}") from exc
    study = from_mapping(Study, {**values, "name": name, "variants": variants})
    return study if study.title else dataclasses.replace(study, title=name)


def _variant(values: dict[str, Any], shared: dict[str, Any]) -> Recipe | str:
    if "path" in values:
        if len(values) > 1 or not isinstance(values["path"], str) or not values["path"]:
            raise RecipeError(f"expected a path and no recipe settings, got {values}", field="path")
        return values["path"]
    settings = {**shared, **values}
    if settings.get("method") == "auto":  # chooses bits and group size itself
        for key in {"bits", "group_size"} - values.keys():
            settings.pop(key, None)
    return Recipe.from_dict(settings)
