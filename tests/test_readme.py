"""Every command and example of the README and of the pages runs, with a tiny model in place."""

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitquant_mlx.bench.programs import Run
from splitquant_mlx.cli import run
from splitquant_mlx.formats.manifest import load_manifest

PROGRAM = (sys.executable, "-m", "splitquant_mlx")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = sorted((ROOT / "docs").glob("*.md"))
SMALL = {
    "meta-llama/Llama-3.2-1B-Instruct": "tiny",
    "--port 8080": "--port 0",
    "my-model": "tiny",
    "mlx chat": "mlx chat --max-tokens 8",
    "llama-3.2-1b random-1b": "tiny random-1b",
    "bench convert": "bench convert --trials 1",
    "arc_challenge --limit 200": "arc_challenge --limit 8 --data arc.jsonl",
    "arc_challenge --protocol": "arc_challenge --limit 4 --data arc.jsonl --protocol",
    "perplexity --context-length 512": "perplexity --context-length 64 --limit 4 --data text.txt",
    "--task kl": "--task kl --context-length 64 --limit 4 --data text.txt",
    "--method auto": "--method auto --num-samples 4 --sequence-length 32",
    "--method omniquant": "--method omniquant --num-samples 4 --sequence-length 32",
    "run recipes/smollm2.toml": "run small.toml --data arc_easy=arc.jsonl --data text=text.txt",
    "results/smollm2": "results/small",
}


STUDY = """
model = "tiny"
[measure]
arc = ["arc_easy"]
questions = 2
text_tokens = 128
context_length = 64
prompt_tokens = 0
[[variants]]
name = "rtn 4-bit"
method = "rtn"
group_size = 32
"""


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text=README):
    lines = "".join(blocks("bash", text)).splitlines()
    return [line for line in lines if line.startswith("splitquant-mlx ")]


# in the README's order, which is the order in which they depend on one another
OF_PAGES = {
    line: None
    for page in PAGES
    for line in commands(page.read_text(encoding="utf-8"))
    if line not in (*commands(), "splitquant-mlx demo")  # which CI runs
}


@pytest.fixture(scope="module")
def home(stories, story_text, questions_file, tmp_path_factory):
    """Return a working directory with a model of default name, and what the first command makes."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(stories, home / "tiny")
    shutil.copy(questions_file, home / "arc.jsonl")
    (home / "text.txt").write_text(story_text[:4000], encoding="utf-8")
    (home / "small.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("SPLITQUANT_CACHE", "cache")
        assert run(["convert", "--model", "tiny", "--mlx-path", "mlx_model"]) == 0
        assert run(arguments(commands()[0])) == 0
    return home


def arguments(line):
    for large, small in SMALL.items():
        line = line.replace(large, small)
    return shlex.split(line)[1:]


def convert_here(command, target):
    """Stand in for `run_conversion`, whose processes are test_bench's matter."""
    seconds = {}
    if command[:3] == list(PROGRAM):
        assert run(command[3:]) == 0
        manifest = load_manifest(target)
        assert manifest
        seconds = manifest.seconds
        shutil.rmtree(target)
    return Run(started=0, seconds=1, peak_bytes=1, output=""), seconds


@pytest.mark.parametrize(
    "line", [*commands()[1:], *(pytest.param(line, marks=pytest.mark.slow) for line in OF_PAGES)]
)
def test_command_runs(line, home, monkeypatch, capsys):
    """In this process, but for the one that a signal ends."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("SPLITQUANT_CACHE", "cache")
    if line.startswith("splitquant-mlx serve"):
        with subprocess.Popen([*PROGRAM, *arguments(line)], stdout=subprocess.PIPE) as server:
            assert server.stdout and b"at http://127.0.0.1:" in server.stdout.readline()
            server.terminate()
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n"))
    monkeypatch.setattr("splitquant_mlx.bench.conversion.run_conversion", convert_here)
    assert run(arguments(line)) == 0, capsys.readouterr().err


def test_the_two_commands_at_the_top_are_what_ci_runs():
    first, second = "".join(blocks("bash")).splitlines()[:2]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    script = [line.strip().removeprefix("time ") for line in lines]
    for part in f"{first} && {second}".split(" && "):
        wanted = part.replace("pip install", "pip install -q")
        assert any(line == wanted or line.startswith(f"{wanted} -q") for line in script), part


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "api.md"], ids=lambda p: p.name
)
def test_python_example_runs(page, stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python", page.read_text(encoding="utf-8"))
    names = {}
    exec(code.replace("path/or/repo", str(stories)), names)
    assert (tmp_path / "out" / "splitquant.json").is_file()
    assert names["manifest"].linear_bits_per_weight == pytest.approx(13.5)


def test_file_tree_names_every_package():
    tree = README[README.index("splitquant_mlx/\n") :]
    listed = set(re.findall(r"(\w+)/", tree))
    packages = {path.parent.name for path in (ROOT / "splitquant_mlx").glob("*/__init__.py")}
    assert packages <= listed


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_published_figures_are_those_of_the_json():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "figures.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
