"""A report as one HTML file that needs nothing else: no script, no outside resource."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from splitquant_mlx.report.plots import plots
from splitquant_mlx.report.rows import Report
from splitquant_mlx.report.tables import STAR, tables
from splitquant_mlx.report.text import notes_of
from splitquant_mlx.study.results import Result

LONGEST_LIST = 12


def html(report: Report) -> str:
    """Return the page: plots, tables, published figures, environment, settings.

    The same results give the same page, byte for byte. Whatever names contain, they are text.
    """
    from jinja2 import Environment, StrictUndefined

    template = (
        resources.files("splitquant_mlx.report")
        .joinpath("page.html.j2")
        .read_text(encoding="utf-8")
    )
    rules = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return rules.from_string(template).render(
        study=report.study,
        name=min((result.study for result in report.results), default="STUDY"),
        tables=tables(report),
        plots=plots(report),
        notes=notes_of(report),
        star=STAR,
        environments=_environments(report.results),
        settings=_settings(report),
        newest=max((result.created for result in report.results), default=""),
        hours=sum(sorted(result.seconds for result in report.results)) / 3600,
    )


def _environments(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return each pair of machine and versions once, with the parts measured there."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        key = json.dumps([result.machine, result.versions], sort_keys=True)
        entry = found.setdefault(
            key, {"machine": result.machine, "versions": result.versions, "parts": set()}
        )
        entry["parts"].add(result.part)
    return [{**entry, "parts": sorted(entry["parts"])} for _, entry in sorted(found.items())]


def _settings(report: Report) -> list[tuple[str, str]]:
    """Return each variant with the settings of its parts as JSON."""
    found: dict[str, dict[str, Any]] = {row.variant: {} for row in report.rows}
    for result in report.results:
        found[result.variant][result.part] = _brief(result.settings)
    return [(name, json.dumps(parts, indent=2, sort_keys=True)) for name, parts in found.items()]


def _brief(value: Any) -> Any:
    """Return settings with the count in place of a long list, such as a thousand question ids."""
    if isinstance(value, Mapping):
        return {name: _brief(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return f"{len(value)} entries, from {value[0]!r} to {value[-1]!r}"
    return value
