"""The page is valid, self-contained, accessible HTML, and a browser renders it as written."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import typer
from made_up_study import MACHINE, result, results, study, tables, write_study
from typer.testing import CliRunner

from splitquant_mlx.cli.report import report as report_command
from splitquant_mlx.errors import SplitQuantError, TargetError
from splitquant_mlx.report import build_report, html, load_report, markdown
from splitquant_mlx.study.results import Claim, Paper

VOID = {"meta", "link", "br", "img", "input", "hr", "source"}
PLOTTED = {record.part for record in results()} - {"perplexity"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><style>*{display:none}</style>",
    "{{ 7 * 7 }} {% raise %}",
    r"$\frac{1$ %s id=\"x url(#y) #010203",
    "--><svg onload=alert(1)>",
    "名前 \N{SNAKE} é",
)


class Page(HTMLParser):
    """Parse a page strictly: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.rows, self.cell = [], None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None:
            self.cell += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def text(directory):
    return html(load_report(directory))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def hostile():
    """Return a page in which every name contains markup."""
    measurements = []
    for name in HOSTILE:
        parts = ("convert", "kl", "speed", "weights")
        for part in parts if name == HOSTILE[0] else parts[:3]:
            values = next(r.values for r in results()[::-1] if r.part == part)
            values = {**values, "layer": name} if part == "weights" else values
            machine = {**MACHINE, "chip": name}
            measurements.append(
                result(name, part, values, settings={name: name}, machine=machine, study=name)
            )
    paper = Paper(source=HOSTILE[0], claims=(Claim(what=HOSTILE[1], value=1, unit=HOSTILE[2]),))
    described = study(title=HOSTILE[0], model=HOSTILE[1], notes=HOSTILE, paper=paper, order=())
    return html(build_report(described, measurements))


@pytest.fixture(scope="module")
def crowded():
    """Return a page of 36 variants with long names and similar values."""
    measurements = []
    for i in range(36):
        for known in results():
            if known.variant == "gptq-4-g64" and known.part in ("convert", "kl", "speed"):
                values = dict(known.values)
                if known.part == "kl":
                    mean = 4e-5 if i == 0 else 0.1 + 0.001 * i
                    values |= {"kl_low": 0.9 * mean, "kl_mean": mean, "kl_high": 1.1 * mean}
                elif known.part == "convert":
                    values["bits_per_weight"] += 0.01 * (i % 7)
                name = f"self-calibrated variant number {i} of many"
                measurements.append(result(name, known.part, values))
    return html(build_report(study(order=()), measurements))


def test_cells_equal_those_of_the_markdown_tables(page, directory):
    expected = tables(markdown(load_report(directory)))
    for title, rows in expected.items():
        headers = list(next(iter(rows.values())))
        at = page.rows.index(headers)
        assert page.rows[at + 1 : at + 1 + len(rows)] == [list(r.values()) for r in rows.values()]
        assert title in page.text


@pytest.mark.parametrize("which", ["text", "hostile"])
def test_page_has_no_external_resources_and_no_scripts(which, request):
    text = request.getfixturevalue(which)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"script", "svg", "iframe", "object", "embed", "base", "form", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "action"
            assert name not in ("src", "srcset") or value.startswith("data:image/svg+xml;base64,")
            assert "url(" not in (value or "")
            if name.endswith("href"):
                assert value.startswith("#") or value == "data:,"
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style


def test_page_is_accessible(page, text):
    assert text.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}] and "A made-up study" in page.text
    assert len(page.all("h1")) == 1 and len(page.all("title")) >= 1
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    drawings = page.all("img")
    assert len(drawings) == len(page.all("figure")) == len(page.all("source")) == 6
    assert all(len(drawing["alt"]) > 20 for drawing in drawings)
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)


def test_the_plots_come_first(page):
    lines = [line.strip() for line in page.text if line.strip()]
    assert lines.index("Plots") < lines.index("KL divergence from the original")
    assert lines.index("Lower left is better. Bars: 95 % interval.") < lines.index("Quality")
    assert "splitquant-mlx run made-up.toml --model SmolLM2-135M-Instruct" in lines


def drawings(text, tag="img", name="src"):
    """Return the parsed SVG images of a page."""
    uris = [attributes[name] for attributes in Page(text).all(tag)]
    return [ElementTree.fromstring(b64decode(uri.partition(",")[2])) for uri in uris]


def words(drawing):
    return {"".join(e.itertext()) for e in drawing.iter() if e.tag.endswith("text")}


def test_plots_contain_text_not_glyph_outlines(text):
    light = [words(drawing) for drawing in drawings(text)]
    assert {"KL divergence, nats per token", "size, MB", "rtn", "rtn, tensor"} <= light[0]
    assert {"imatrix", "gptq", "splitquant", "splitquant, tensor"} <= light[0]
    assert "ARC-C, % correct" in light[1] and "rtn-5-g64" in light[4] and "weight" in light[5]
    assert [words(drawing) for drawing in drawings(text, "source", "srcset")] == light


def test_points_have_the_coordinates_of_the_results(monkeypatch):
    from matplotlib.axes import Axes

    drawn, draw = [], Axes.errorbar

    def errorbar(axes, x, y, **more):
        drawn.append((x, y, more))
        return draw(axes, x, y, **more)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    html(
        build_report(study(), [record for record in results() if record.part in ("convert", "kl")])
    )
    points = {(x, y) for xs, ys, _ in drawn for x, y in zip(xs, ys, strict=True)}
    parts = {(record.variant, record.part): record.values for record in results()}
    assert points == {
        (values["stored_bytes"] / 1e6, parts[variant, "kl"]["kl_mean"])
        for (variant, part), values in parts.items()
        if part == "convert" and variant != "original"
    }
    below, above = drawn[0][2]["yerr"]
    assert list(below) == pytest.approx([0.1 * y for y in drawn[0][1]])
    assert list(above) == pytest.approx(list(below))


def test_variants_that_cannot_be_plotted_are_named():
    shapes = {"nothing": 0.0, "below": -1e-9, "endless": float("inf"), "usual": 0.3}
    convert = {"method": "rtn", "bits_per_weight": 4.5, "stored_bytes": 10**6}
    measurements = [result(name, "convert", convert) for name in shapes]
    measurements += [result(name, "kl", {"kl_mean": kl}) for name, kl in shapes.items()]
    text = html(build_report(study(order=()), measurements))
    assert "Not finite or not above 0, not drawn: below, endless, nothing." in text


def test_hostile_names_are_escaped(hostile):
    page = Page(hostile)
    cells = {cell for row in page.rows for cell in row}
    for name in HOSTILE:
        shown = " ".join(name.split())
        assert shown in cells
        assert hostile.count("7 * 7") > 2
    assert {HOSTILE[0], HOSTILE[3], HOSTILE[6]} <= set().union(*map(words, drawings(hostile)))


def test_equal_results_give_equal_bytes(directory, text):
    report = load_report(directory)
    assert html(build_report(report.study, reversed(report.results))) == text


def test_long_lists_of_question_ids_are_shortened():
    ids = [f"Mercury_{i}" for i in range(1000)]
    kl = result("v", "kl", {"kl_mean": 1.0}, settings={"questions": ids, "tokens": [1, 2]})
    text = html(build_report(study(), [kl]))
    assert "1000 entries, from &#39;Mercury_0&#39; to &#39;Mercury_999&#39;" in text
    assert "Mercury_500" not in text


def test_a_single_result_makes_a_page():
    values = {"questions": 0, "num_shots": 0, "accuracy": 0.0, "correct": []}
    Page(html(build_report(study(), [result("v", "arc_easy.letter", values)])))


@pytest.fixture
def command():
    """Return a function that runs `report` with options and returns its output."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(report_command)

    def run(*options):
        done = CliRunner().invoke(app, [str(option) for option in options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_command_prints_tables_and_writes_both_files(command, directory, text, tmp_path):
    page, table = tmp_path / "x.html", tmp_path / "x.md"
    out = command(directory, "--html", page, "--markdown", table)
    assert "59.40 ± 0.84" in out
    assert f"Saved {page}" in " ".join(out.split())
    assert page.read_text(encoding="utf-8") == text
    assert table.read_text(encoding="utf-8") == markdown(load_report(directory))


def test_command_writes_into_the_results_directory_twice(command, tmp_path):
    write_study(tmp_path, without=PLOTTED)
    command(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    command(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_command_names_unreadable_and_unwritable_files(command, tmp_path):
    with pytest.raises(SplitQuantError, match=r"study\.json cannot be read"):
        command(tmp_path)
    write_study(tmp_path, without=PLOTTED)
    with pytest.raises(TargetError, match=r"cannot write .*nowhere/x\.html"):
        command(tmp_path, "--html", tmp_path / "nowhere" / "x.html")


WIDER = """() => [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > innerWidth + 0.5
).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["text", "hostile", "crowded"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "light"), (1280, "dark")])
def test_browser_renders_the_page(browser, tmp_path, request, which, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(request.getfixturevalue(which), encoding="utf-8")
    shown = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    events = []
    shown.on("console", lambda message: events.append(message.text))
    shown.on("pageerror", lambda error: events.append(str(error)))
    shown.on("dialog", lambda dialog: events.append(dialog.message))
    local = (file.as_uri(), "data:")
    shown.on("request", lambda sent: sent.url.startswith(local) or events.append(sent.url))
    shown.goto(file.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(WIDER) == []
    cells = "table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))"
    rows = [row for table in shown.query_selector_all("table") for row in table.evaluate(cells)]
    assert rows == Page(file.read_text(encoding="utf-8")).rows
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert events == []
    shown.close()
