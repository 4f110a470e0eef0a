"""Settings of a study: one model, converted in several ways, each measured alike.

A study is a TOML file with a `model`, a `[measure]` table, `[[variants]]`, and a `[recipe]` table
of settings that all recipes share. A variant has a name and is a recipe, or, with a `path`, a
checkpoint that another program made of the same model.
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

ORIGINAL, FOREIGN = "original", "foreign"  # methods of models that were not converted here


@settings
class Measure:
    """Settings of what is measured of every variant.

    Attributes:
        arc: question sets, of "arc_challenge" and "arc_easy".
        protocols: ways to ask, of "loglikelihood" and "letter".
        num_shots: answered questions before each, for "loglikelihood".
        questions: number of questions per set; 0 is all.
        text_tokens: tokens for perplexity and KL divergence; 0 measures neither.
        context_length: tokens per window, for the two; by default 512, or what the model was made
            for where that is less.
        prompt_tokens: prompt of the timing; 0 measures no speed.
        generation_tokens: generated tokens of the timing.
        trials: counted rounds of the timing.
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
        name: of the file it came from, without its suffix.
        model: repo id, directory, .gguf file, or "demo" for the model of `splitquant-mlx demo`.
        variants: by name, in the study's order, a recipe or the path of a checkpoint that another
            program made; "original" is always measured.
        title: for the report; by default the name.
        revision: branch, tag or commit of a hub repo.
        measure: what is measured.
        notes: sentences for the report.
        paper: {"source", "claims": [{"what", "value", "unit"}]}: published figures to stand beside
            those measured here.
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
    """Read a study. Raises RecipeError naming the file and the variant when it is wrong."""
    values = read_toml(path)
    try:
        return _study(path.stem, values)
    except RecipeError as exc:
        raise RecipeError(f"study {path}: {exc}") from exc


def slug(name: str) -> str:
    """Return a variant's name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "variant"


def _study(name: str, values: dict[str, Any]) -> Study:
    shared, listed = values.pop("recipe", {}), values.pop("variants", [])
    if not isinstance(shared, dict) or not isinstance(listed, list):
        raise RecipeError("expected a [recipe] table and [[variants]] tables")
    variants: dict[str, Recipe | str] = {}
    for table in listed:
        variant = table.get("name") if isinstance(table, dict) else None
        if not isinstance(variant, str) or not variant.strip() or not variant.isprintable():
            raise RecipeError(
                f"variants: expected a table with a name, one printable line, got {table!r:.80}"
            )
        if slug(variant) in {ORIGINAL, *map(slug, variants)}:
            raise RecipeError(f"variant {variant!r}: the name is taken")
        try:
            variants[variant] = _variant({k: v for k, v in table.items() if k != "name"}, shared)
        except RecipeError as exc:
            raise RecipeError(f"variant {variant!r}: {exc}") from exc
    study = from_mapping(Study, {**values, "name": name, "variants": variants})
    return study if study.title else dataclasses.replace(study, title=name)


def _variant(own: dict[str, Any], shared: dict[str, Any]) -> Recipe | str:
    if "path" in own:
        if len(own) > 1 or not isinstance(own["path"], str) or not own["path"]:
            raise RecipeError(f"path: expected a path and no recipe settings beside it, got {own}")
        return own["path"]
    settings = {**shared, **own}
    if settings.get("method") == "auto":  # which chooses them; the other variants share them
        for key in {"bits", "group_size"} - own.keys():
            settings.pop(key, None)
    return Recipe.from_dict(settings)
