"""Converted models run in stock mlx-lm, in an environment without splitquant-mlx."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tiny

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.recipe import Calibration

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TRUST = ", trust_remote_code=True"  # older versions do not have it
FLAGS = {"rtn": [], "imatrix": [], "gptq": [], "auto": [], "splitquant": ["--trust-remote-code"]}
FLAGS["lut"] = FLAGS["salience"] = FLAGS["splitquant"]
EXPERTS = ("auto", "splitquant", "lut", "salience")  # methods that convert a mixture, too


MLX = f"mlx[cpu]=={version('mlx')}" if sys.platform == "linux" else f"mlx=={version('mlx')}"


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Return the Python of a new environment that has only mlx-lm, of our versions."""
    return environment(tmp_path_factory.mktemp("stock"), MLX, f"mlx-lm=={version('mlx-lm')}")


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """Return the Python of an environment with the older mlx-lm of many programs."""
    return environment(tmp_path_factory.mktemp("older"), MLX, "mlx-lm==0.31.3")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    """Return the Python of an environment with the newest mlx-vlm, which does not need mlx-lm."""
    return environment(tmp_path_factory.mktemp("vlm"), MLX, "mlx-vlm")


def environment(home: Path, *packages: str) -> Path:
    """Return the Python of a new environment with these packages, without this one."""
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    missing = subprocess.run([python, "-c", "import splitquant_mlx"], capture_output=True, cwd=home)
    assert b"ModuleNotFoundError" in missing.stderr
    return python


@pytest.fixture(scope="module")
def converted(stories, mixture, tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    source = shutil.copytree(stories, home / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    calibration = Calibration(num_samples=16, sequence_length=64)
    for method in FLAGS:
        own = {} if method in ("rtn", "splitquant") else {"calibration": calibration}
        # float32 scales take 1 bit per weight
        target = {
            "auto": {"target_bpw": 6.0},
            "lut": {"outliers": "1%"},
            "salience": {"group_size": 32},
        }.get(method, {})
        convert(source, home / method, recipe=Recipe(method=method, **own, **target))
        if method in EXPERTS:
            target.pop("target_bpw", None)
            recipe = Recipe(method=method, **own, **target)
            convert(mixture, home / f"{method}, experts", recipe=recipe)
    return {path.name: path for path in home.iterdir() if path != source}


def run(python, *arguments, home):
    """Run a stock program outside of this repository; return stdout."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def our_text(path, max_tokens=40):
    from mlx_lm import generate

    model, tokenizer = load(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    return generate(model, tokenizer, prompt, max_tokens=max_tokens)


@pytest.mark.parametrize("method", FLAGS)
def test_generate_gives_our_text(stock, converted, method, tmp_path):
    options = ["--model", converted[method], "--prompt", PROMPT, "--max-tokens", "40"]
    out = run(stock, "-m", "mlx_lm", "generate", *options, *FLAGS[method], home=tmp_path)
    assert out.split("==========")[1].strip() == our_text(converted[method]).strip()


def test_split_model_is_refused_without_the_flag(stock, converted, tmp_path):
    options = ["--model", converted["splitquant"], "--prompt", PROMPT]
    done = subprocess.run(
        [stock, "-m", "mlx_lm", "generate", *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


LOGITS = """
import sys, numpy, mlx.core as mx
from {program} import load
logits = load(sys.argv[1]{options})[0](mx.array([list(range(1, 96))]))
numpy.save("logits.npy", numpy.array(getattr(logits, "logits", logits).astype(mx.float32)))
"""


def logits_of(python, path, home, program="mlx_lm", options=""):
    run(python, "-c", LOGITS.format(program=program, options=options), path, home=home)
    return np.load(home / "logits.npy")


def difference(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("method", FLAGS)
def test_logits_agree_with_our_load(stock, converted, method, tmp_path):
    import mlx.core as mx

    theirs = logits_of(stock, converted[method], tmp_path, options=TRUST if FLAGS[method] else "")
    ours = np.array(load(converted[method])[0](mx.array([list(range(1, 96))])))
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("method", FLAGS)
def test_other_programs_agree_with_mlx_lm(stock, older, vlm, converted, method, tmp_path):
    for path in (path for name, path in converted.items() if name.startswith(method)):
        expected = logits_of(stock, path, tmp_path, options=TRUST if FLAGS[method] else "")
        assert difference(logits_of(older, path, tmp_path), expected) <= 1e-5
        assert difference(logits_of(vlm, path, tmp_path, "mlx_vlm"), expected) <= 1e-5


@pytest.mark.parametrize("method", EXPERTS)
def test_mlx_vlm_generates_our_text(vlm, converted, method, tmp_path):
    path = converted[f"{method}, experts"]
    options = ["--model", path, "--prompt", PROMPT, "--max-tokens", "20", "--temperature", "0"]
    out = run(vlm, "-m", "mlx_vlm", "generate", *options, home=tmp_path)
    assert out.strip() == our_text(path, 20).strip()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn"},
        {"method": "rtn", "embedding_bits": 8},
        {"method": "rtn", "exclude": ("*embed_tokens",)},
        {"method": "splitquant", "embeddings": "quantize"},
        {"method": "lut", "calibration": Calibration(num_samples=2)},
    ],
)
def test_mlx_vlm_runs_gemma_3(stock, vlm, settings, tmp_path):
    """Its head is tied to a quantized embedding: see `formats.head_file`."""
    source = tiny.write_checkpoint(tmp_path / "source", "gemma3_text")
    manifest = convert(source, tmp_path / "out", recipe=Recipe(**settings))
    assert manifest.warnings == ()
    trust = TRUST if FLAGS[settings["method"]] else ""
    expected = logits_of(stock, tmp_path / "out", tmp_path, options=trust)
    actual = logits_of(vlm, tmp_path / "out", tmp_path, "mlx_vlm")
    assert difference(actual, expected) <= 1e-5


@pytest.mark.parametrize("method", ["rtn", "auto", "splitquant"])
def test_server_answers_with_our_text(stock, converted, method, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [stock, "-m", "mlx_lm", "server", "--model", converted[method], "--port", str(port)]
    server = subprocess.Popen([*command, *FLAGS[method]], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 40}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = _ask(request)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert answer["choices"][0]["message"]["content"].strip() == our_text(converted[method]).strip()


def _ask(request):
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
