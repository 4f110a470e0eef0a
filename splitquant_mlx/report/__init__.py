"""Reports: tables, plots and one HTML page of a study, from its JSON results."""

from splitquant_mlx.report.page import html
from splitquant_mlx.report.rows import Report, Row, build_report, load_report, values
from splitquant_mlx.report.text import markdown, terminal

__all__ = [
    "Report",
    "Row",
    "build_report",
    "html",
    "load_report",
    "markdown",
    "terminal",
    "values",
]
