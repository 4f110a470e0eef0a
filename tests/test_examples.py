"""The notebook runs as it is, with a tiny model in place of the real one."""

import json
from pathlib import Path

import matplotlib

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "one-model.ipynb"
FETCH = "str(fetch_demo_model().path)"


def cells(kind):
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_notebook_runs(stories, monkeypatch, capsys):
    from matplotlib import pyplot

    matplotlib.use("Agg")
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    code = "\n".join("".join(cell["source"]) for cell in cells("code"))
    assert code.count(FETCH) == 1
    exec(code.replace(FETCH, repr(str(stories))), {})
    plain, split = (
        float(line.partition("KL ")[2].partition(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if "KL " in line
    )
    assert 0 < split < plain


def test_notebook_shows_what_it_printed():
    printing = [cell for cell in cells("code") if "print(" in "".join(cell["source"])]
    assert printing and all(cell["outputs"] for cell in printing)
    kinds = {output["output_type"] for cell in cells("code") for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}
