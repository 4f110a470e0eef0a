"""The page is one sound, self-contained, accessible file, and the same in a real browser."""

import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import typer
from made_up_study import MACHINE, result, results, study, tables, write_study
from typer.testing import CliRunner

from splitquant_mlx.cli.report import report as report_command
from splitquant_mlx.errors import RecipeError, SplitQuantError, TargetError
from splitquant_mlx.report import build_report, html, load_report, markdown
from splitquant_mlx.study.results import Claim, Paper

pytest.importorskip("matplotlib", reason="plots need matplotlib")

VOID = {"meta", "link", "br", "img", "input", "hr"}
PLOTTED = {made.part for made in results()} - {"perplexity"}
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
    """Return a page where every name that a file can hold tries to be markup."""
    made = []
    for name in HOSTILE:
        parts = ("convert", "kl", "speed", "weights")
        for part in parts if name == HOSTILE[0] else parts[:3]:
            values = next(r.values for r in results()[::-1] if r.part == part)
            values = {**values, "layer": name} if part == "weights" else values
            machine = {**MACHINE, "chip": name}
            made.append(
                result(name, part, values, settings={name: name}, machine=machine, study=name)
            )
    paper = Paper(source=HOSTILE[0], claims=(Claim(what=HOSTILE[1], value=1, unit=HOSTILE[2]),))
    described = study(title=HOSTILE[0], model=HOSTILE[1], notes=HOSTILE, paper=paper, order=())
    return html(build_report(described, made))


@pytest.fixture(scope="module")
def crowded():
    """Return a page of 36 variants with long names and close figures."""
    made = []
    for i in range(36):
        for known in results():
            if known.variant == "gptq-4-g64" and known.part in ("convert", "kl", "speed"):
                values = dict(known.values)
                if known.part == "kl":
                    values["kl_mean"] = 4e-5 if i == 0 else 0.1 + 0.001 * i
                elif known.part == "convert":
                    values["bits_per_weight"] += 0.01 * (i % 7)
                name = f"self-calibrated variant number {i} of many"
                made.append(result(name, known.part, values))
    return html(build_report(study(order=()), made))


def test_cells_are_those_of_the_markdown_table(page, directory):
    wanted = tables(markdown(load_report(directory)))
    for title, rows in wanted.items():
        headers = list(next(iter(rows.values())))
        at = page.rows.index(headers)
        assert page.rows[at + 1 : at + 1 + len(rows)] == [list(r.values()) for r in rows.values()]
        assert title in page.text


@pytest.mark.parametrize("which", ["text", "hostile"])
def test_nothing_comes_from_outside_and_nothing_runs(which, request):
    text = request.getfixturevalue(which)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action")
            assert "url(" not in (value or "") or re.search(r"url\(#[\w-]+\)", value)
            if name.endswith("href"):
                assert value.startswith("#") or value == "data:,"
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style


def test_page_is_accessible(page, text):
    assert text.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}] and "A made-up study" in page.text
    assert len(page.all("h1")) == 1 and len(page.all("title")) >= 1
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    drawings = page.all("svg")
    assert len(drawings) == len(page.all("figure")) == 7
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 40 for svg in drawings)
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert ids and max(ids.values()) == 1
    wanted = {a["xlink:href"][1:] for _, a in page.elements if "xlink:href" in a}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= ids.keys()


def test_the_finding_comes_first(page):
    said = [line.strip() for line in page.text if line.strip()]
    headline = next(i for i, line in enumerate(said) if "stays closest to the original" in line)
    assert headline < said.index("Quality") < said.index("Plots")
    assert any("is both smaller" in line for line in said[headline : headline + 6])
    assert "splitquant-mlx run STUDY.toml\nsplitquant-mlx report DIRECTORY" in said


def test_plots_hold_their_figures_as_text(text):
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    labels = [
        [
            "".join(t.itertext())
            for t in ElementTree.fromstring(svg).iter()
            if t.tag.endswith("text")
        ]
        for svg in drawings
    ]
    assert all("rtn-5-g64" in words for words in labels[:6])
    assert "KL divergence, nats" in labels[0] and "weight" in labels[6]
    assert {"read", "cluster", "calibrate"} <= set(labels[4])
    assert "#000000" not in "".join(drawings), "ink that a dark page would swallow"


def test_hostile_names_are_text(hostile):
    page = Page(hostile)
    cells = {cell for row in page.rows for cell in row}
    for name in HOSTILE:
        shown = " ".join(name.split())
        assert shown in cells
        assert hostile.count("7 * 7") > 2
    drawings = re.findall(r"<svg.*?</svg>", hostile, re.S)
    labels = {"".join(e.itertext()) for svg in drawings for e in ElementTree.fromstring(svg).iter()}
    assert {HOSTILE[0], HOSTILE[3], HOSTILE[6]} <= labels


def test_same_results_same_bytes(directory, text):
    report = load_report(directory)
    assert html(build_report(report.study, reversed(report.results))) == text


def test_figures_that_a_plot_cannot_hold_are_named():
    shapes = {"nothing": 0.0, "below": -1e-9, "endless": float("inf"), "usual": 0.3}
    convert = {"method": "rtn", "bits_per_weight": 4.5, "linear_bits_per_weight": 4.5}
    convert |= {"stored_bytes": 10**6, "seconds": {}}
    made = [result(name, "convert", convert) for name in shapes]
    made += [result(name, "kl", {"kl_mean": kl}) for name, kl in shapes.items()]
    text = html(build_report(study(order=()), made))
    assert "Not on the plot: below (-1.00e-09), endless (inf), nothing (0.00)." in text


def test_one_histogram_for_variants_that_cut_alike():
    cut = next(made for made in results() if made.part == "weights")
    other = {**cut.values, "cut_points": [-0.03, 0.03]}
    made = [
        result(name, "weights", values)
        for name, values in (("b", cut.values), ("a", cut.values), ("c", other))
    ]
    page = Page(html(build_report(study(order=()), made)))
    captions = [line for line in page.text if "k-means cuts the weights" in line]
    assert captions == [
        "a, b: k-means cuts the weights at -0.041, 0.0423. Logarithmic counts.",
        "c: k-means cuts the weights at -0.03, 0.03. Logarithmic counts.",
    ]


def test_a_thousand_question_ids_do_not_fill_the_page():
    ids = [f"Mercury_{i}" for i in range(1000)]
    kl = result("v", "kl", {"kl_mean": 1.0}, settings={"questions": ids, "tokens": [1, 2]})
    text = html(build_report(study(), [kl]))
    assert "1000 entries, from &#39;Mercury_0&#39; to &#39;Mercury_999&#39;" in text
    assert "Mercury_500" not in text


def test_one_result_makes_a_page():
    values = {"questions": 0, "num_shots": 0, "accuracy": 0.0, "correct": []}
    Page(html(build_report(study(), [result("v", "arc_easy.letter", values)])))


def test_missing_matplotlib_is_said(directory, monkeypatch):
    report = load_report(directory)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"plots need matplotlib: pip install matplotlib"):
        html(report)


@pytest.fixture
def command():
    """Return a function that runs `report` with options, and returns what it printed."""
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
    assert "stays closest to the original" in out and "59.40 ± 0.84" in out
    assert f"Saved {page}" in " ".join(out.split())
    assert page.read_text(encoding="utf-8") == text
    assert table.read_text(encoding="utf-8") == markdown(load_report(directory))


def test_command_writes_beside_the_results_and_reads_them_again(command, tmp_path):
    write_study(tmp_path, without=PLOTTED)
    command(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    command(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_command_names_what_it_cannot_write_or_read(command, tmp_path):
    with pytest.raises(SplitQuantError, match=r"study\.json cannot be read"):
        command(tmp_path)
    write_study(tmp_path, without=PLOTTED)
    with pytest.raises(TargetError, match=r"cannot write .*nowhere/x\.html"):
        command(tmp_path, "--html", tmp_path / "nowhere" / "x.html")


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


WIDER = """() => [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > innerWidth + 0.5
).map(e => e.outerHTML.slice(0, 80))"""
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map(
        t => [t.textContent, t.getBoundingClientRect()]);
    const out = boxes.filter(([_, a]) => a.left < frame.left - 1 || a.right > frame.right + 1);
    const over = boxes.flatMap(([x, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2
    ).map(([y]) => x + " / " + y));
    return [...out.map(([x]) => x + " is cut"), ...over];
})"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["text", "hostile", "crowded"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "light"), (1280, "dark")])
def test_browser_shows_it_well(browser, tmp_path, request, which, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(request.getfixturevalue(which), encoding="utf-8")
    shown = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("dialog", lambda dialog: said.append(dialog.message))
    shown.on("request", lambda asked: asked.url == file.as_uri() or said.append(asked.url))
    shown.goto(file.as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(WIDER) == []
    assert shown.evaluate(OVERLAPS) == []
    cells = "table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))"
    rows = [row for table in shown.query_selector_all("table") for row in table.evaluate(cells)]
    assert rows == Page(file.read_text(encoding="utf-8")).rows
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert said == []
    shown.close()
