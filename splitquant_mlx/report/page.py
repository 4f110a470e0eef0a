"""A report as one self-contained HTML file, without scripts or external resources."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from splitquant_mlx.report.plots import plots
from splitquant_mlx.report.rows import Report
from splitquant_mlx.report.tables import STAR, tables
from splitquant_mlx.report.text import all_notes
from splitquant_mlx.study.results import Result

MAX_LIST_LENGTH = 12


def html(report: Report) -> str:
    """Return the page: plots, tables, published figures, environment, settings.

    Equal results give equal bytes. All names are escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("splitquant_mlx.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        study=report.study,
        name=min((result.study for result in report.results), default="STUDY"),
        tables=tables(report),
        plots=plots(report),
        notes=all_notes(report),
        star=STAR,
        environments=_environments(report.results),
        settings=_settings(report),
        newest=max((result.created for result in report.results), default=""),
        hours=sum(sorted(result.seconds for result in report.results)) / 3600,
    )


def _environments(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the distinct pairs of machine and versions, with the parts measured on each."""
    environments: dict[str, dict[str, Any]] = {}
    for result in results:
        key = json.dumps([result.machine, result.versions], sort_keys=True)
        entry = environments.setdefault(
            key, {"machine": result.machine, "versions": result.versions, "parts": set()}
        )
        entry["parts"].add(result.part)
    return [{**entry, "parts": sorted(entry["parts"])} for _, entry in sorted(environments.items())]


def _settings(report: Report) -> list[tuple[str, str]]:
    """Return (variant, settings of its parts as JSON) of each variant."""
    settings: dict[str, dict[str, Any]] = {row.variant: {} for row in report.rows}
    for result in report.results:
        settings[result.variant][result.part] = _shorten_lists(result.settings)
    return [(name, json.dumps(parts, indent=2, sort_keys=True)) for name, parts in settings.items()]


def _shorten_lists(value: Any) -> Any:
    """Replace long lists in settings, such as question ids, by their length and ends."""
    if isinstance(value, Mapping):
        return {name: _shorten_lists(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > MAX_LIST_LENGTH:
        return f"{len(value)} entries, from {value[0]!r} to {value[-1]!r}"
    return value
