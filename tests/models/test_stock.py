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

from splitquant_mlx import Recipe, convert, load

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FLAGS = {"rtn": [], "imatrix": [], "gptq": [], "auto": [], "splitquant": ["--trust-remote-code"]}
FLAGS["lut"] = FLAGS["splitquant"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Return the Python of a new environment that has mlx-lm, of our versions, and nothing else."""
    home = tmp_path_factory.mktemp("stock")
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    extra = "[cpu]" if sys.platform == "linux" else ""
    wanted = [f"mlx{extra}=={version('mlx')}", f"mlx-lm=={version('mlx-lm')}"]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    missing = subprocess.run([python, "-c", "import splitquant_mlx"], capture_output=True, cwd=home)
    assert b"ModuleNotFoundError" in missing.stderr
    return python


@pytest.fixture(scope="module")
def converted(stories, tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    source = shutil.copytree(stories, home / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    own = {
        "lut": {"outliers": "1%"},
        "auto": {"target_bpw": 6.0},
    }  # float32 scales take 1 bit a weight
    for method in FLAGS:
        convert(source, home / method, recipe=Recipe(method=method, **own.get(method, {})))
    return {method: home / method for method in FLAGS}


def run(python, *arguments, home):
    """Run stock mlx-lm away from this repository; returns stdout."""
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


@pytest.mark.parametrize("method", FLAGS)
def test_logits_agree_with_our_load(stock, converted, method, tmp_path):
    import mlx.core as mx

    code = (
        "import sys, numpy, mlx.core as mx; from mlx_lm import load\n"
        "model, _ = load(sys.argv[1], trust_remote_code=sys.argv[2] == 'True')\n"
        "numpy.save('logits.npy', numpy.array(model(mx.array([list(range(1, 100))]))))\n"
    )
    run(stock, "-c", code, converted[method], str(bool(FLAGS[method])), home=tmp_path)
    theirs = np.load(tmp_path / "logits.npy")
    ours = np.array(load(converted[method])[0](mx.array([list(range(1, 100))])))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


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
