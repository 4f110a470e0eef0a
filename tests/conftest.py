"""Shared fixtures: the trained tiny models, text and questions for them, and converted models."""

import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# a job of a shell script or of nohup ignores SIGINT, and so would this process and its children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread each: processes share the cores with one another, and idle threads compute to wait
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from splitquant_mlx.runtime import blas

blas.preload()

import mlx.core as mx  # noqa: E402  after OpenBLAS
from stories import held_out_questions, held_out_text  # noqa: E402

# the same numbers everywhere; test_gpu.py goes to the GPU
mx.set_default_device(mx.Device(mx.cpu))

# a machine that does other things, too, says nothing by being slow
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

TRAINED = Path(__file__).resolve().parent / "trained"
SLOW_TIMEOUT_S = 1800
MOST_WORKERS = 4


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share a whole default run out between processes; a part of it starts faster in one.

    Slow tests stay in one process: they measure time and memory.
    """
    options, whole = config.option, config.args_source is config.ArgsSource.TESTPATHS
    chosen = options.keyword or "not slow" not in options.markexpr or options.collectonly
    undecided = getattr(options, "numprocesses", 0) is None and not options.usepdb
    if whole and undecided and not chosen and not hasattr(config, "workerinput"):
        options.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
        # file by file, in their order: what tests of a file share is made once
        options.dist, options.loadscopereorder = "loadfile", False


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in tests/robustness; give slow tests more time than the default."""
    for item in items:
        if "robustness" in item.path.parts:
            item.add_marker("robustness")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


def in_float32(name: str, directory: Path) -> Path:
    """Write a trained model in float32, the type that mlx's CPU back end is fast in."""
    shutil.copytree(TRAINED / name, directory)
    file = directory / "model.safetensors"
    weights = {name: w.astype(mx.float32) for name, w in mx.load(str(file)).items()}
    mx.eval(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    return directory


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """Return a trained Llama that writes stories; down_proj's 172 inputs divide into no groups."""
    return in_float32("llama", tmp_path_factory.mktemp("trained") / "stories")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    """Return a trained Qwen3-MoE, 2 of 8 experts active, that writes stories and answers chat."""
    return in_float32("mixture", tmp_path_factory.mktemp("trained") / "mixture")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Return a file of stories that the trained models have not seen."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text(held_out_text(), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def story_text(text_file) -> str:
    """Return stories that the trained models have not seen."""
    return text_file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory) -> Path:
    """Return a file of questions in the layout of ARC, on facts the trained models have seen."""
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text(held_out_questions(), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def split_stories(stories, tmp_path_factory) -> Path:
    """Return `stories` converted with splitquant at its defaults."""
    from splitquant_mlx import convert

    target = tmp_path_factory.mktemp("converted") / "split"
    convert(stories, target)
    return target


@pytest.fixture(scope="session")
def split_32(stories, tmp_path_factory) -> Path:
    """Return `stories` split in groups of 32, which two ranks can divide."""
    from splitquant_mlx import Recipe, convert

    target = tmp_path_factory.mktemp("converted") / "split"
    convert(stories, target, recipe=Recipe(method="splitquant", group_size=32))
    return target


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file, downloaded once."""
    from splitquant_mlx.demo.model import fetch_demo_model

    path = fetch_demo_model().path
    if path.suffix != ".gguf":
        pytest.skip("SmolLM2-135M-Instruct came from the hub, these tests want the GGUF file")
    return path


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """Return a function that runs `convert`, which must fail cleanly, and returns its message."""
    started = []

    class Recorder:
        def __init__(self, stages=()):
            pass

        @contextmanager
        def task(self, label, total=None):
            started.append(label)
            yield lambda amount, note="": None

    from damage import tree

    from splitquant_mlx.cli import progress, run

    monkeypatch.setattr(progress, "Bars", Recorder)
    handler = signal.getsignal(signal.SIGTERM)

    def refuse(source=None, *options, target=None, late=False, forget=()):
        source = tmp_path / "source" if source is None else source
        target = tmp_path / "deep" / "target" if target is None else target
        before = tree(tmp_path)
        began = time.monotonic()
        code = run(["convert", "--model", str(source), "--mlx-path", str(target), *options])
        seconds = time.monotonic() - began
        out, err = capsys.readouterr()
        after = tree(tmp_path)
        for path in forget:
            before.pop(str(path), None), after.pop(str(path), None)
        assert code == 2
        assert out == ""
        assert err.startswith("splitquant-mlx: error: ")
        assert err.count("\n") == 1 and err.endswith("\n") and err.rstrip("\n").isprintable()
        assert "Traceback" not in err and "unexpected" not in err
        assert after == before
        assert bool(started) == late, "found before the work" if late else "found too late"
        assert seconds < 10
        return err.removeprefix("splitquant-mlx: error: ").strip()

    yield refuse
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium that finds every host of .example on this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    args = [
        "--no-sandbox",
        "--disable-gpu",  # without a GPU, its process can fail while a page is captured
        "--host-resolver-rules=MAP *.example 127.0.0.1",
        # the server is to refuse by itself
        "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()
