"""The table of architectures and the comparison with transformers that it records."""

from pathlib import Path

import pytest
from architecture_page import write_page
from typer.testing import CliRunner

from splitquant_mlx.cli import app
from splitquant_mlx.inspection.architectures import recorded

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_shows_the_recorded_table(tmp_path):
    write_page(recorded(), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


def test_every_recorded_difference_is_warned_or_refused_with_a_reason():
    for result in recorded().results:
        assert result.verdict in ("same", "warned", "refused"), result
        assert bool(result.remark) == (result.verdict != "same"), result
        assert result.verdict != "same" or result.difference <= 1e-4, result


def test_doctor_lists_architectures(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["doctor", "--architectures"])
    assert result.exit_code == 0
    assert "llama" in result.output and "longer than the window" in result.output


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_architecture_computes_the_same_as_transformers():
    """The verdicts are the recorded ones, with another seed."""
    pytest.importorskip("torch")
    import architectures

    compared = architectures.compare_all(seed=1)
    assert not [result for result in compared.results if result.verdict == "WRONG"]
    if compared.versions == recorded().versions:
        verdicts = {(r.architecture, r.variant): r.verdict for r in compared.results}
        assert verdicts == {(r.architecture, r.variant): r.verdict for r in recorded().results}
    for result in compared.results:
        assert result.correlation is None or result.correlation > 0.5, result
