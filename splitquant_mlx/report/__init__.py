"""Turn the results of a study into tables, plots and one HTML page."""

from splitquant_mlx.report.finding import Finding, finding
from splitquant_mlx.report.page import html
from splitquant_mlx.report.rows import Report, Row, build_report, load_report
from splitquant_mlx.report.table import markdown, terminal

__all__ = [
    "Finding",
    "Report",
    "Row",
    "build_report",
    "finding",
    "html",
    "load_report",
    "markdown",
    "terminal",
]
