"""`serve` and other clients of OpenAI's API, in separate environments.

The client programs are in tests/support/clients.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from known import MODEL
from local_harness import arc_task, responses
from scripted import TOOLS, write_scripted
from serving import running

from splitquant_mlx import load
from splitquant_mlx.data.questions import load_questions
from splitquant_mlx.evaluation.harness import run_task

pytestmark = pytest.mark.slow

CLIENTS = Path(__file__).resolve().parents[1] / "support" / "clients"
PACKAGES = [
    *("openai", "litellm[proxy]", "anthropic", "langchain-openai", "llm"),
    *("lm-eval[api]", "transformers"),
]
CALL = ["<tool_call>", b'{"name": "f", ', b'"arguments": {"x": 1}}', "</tool_call>"]
SCRIPTS = {"S": [b" alpha", b" be", b"ta ga", b"mma"], "T": CALL}
NO_NETWORK = r"Name or service not known|Failed to establish|timed out|ENOTFOUND|EAI_AGAIN"


def install(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(NO_NETWORK, done.stderr):
        pytest.skip(f"needs a network: {' '.join(map(str, command))}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    home = tmp_path_factory.mktemp("clients")
    install(sys.executable, "-m", "venv", home)
    install(home / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES)
    return home / "bin" / "python"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    path = write_scripted(tmp_path_factory.mktemp("scripted") / "model", SCRIPTS, TOOLS)
    with running(path, served_model_name=(MODEL,)) as server:
        yield server


def run(server, *command, **variables):
    """Run a client program, which must succeed; return its standard output."""
    client = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", **variables}
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=inherited | client, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("client", ["openai", "litellm", "anthropic", "langchain", "llm"])
def test_clients_in_python(client, python, talker):
    run(talker, python, CLIENTS / f"{client}_client.py")


def test_the_client_in_javascript(talker, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    program = shutil.copy(CLIENTS / "openai_client.mjs", tmp_path)
    install("npm", "install", "--silent", "--prefix", tmp_path, "openai")
    run(talker, "node", program)


def test_lm_evaluation_harness(python, mixture, questions_file, tmp_path):
    lines = questions_file.read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    with running(mixture, served_model_name=(MODEL,)) as server:
        program = CLIENTS / "lm_eval_client.py"
        result = json.loads(
            run(server, python, program, QUESTIONS=str(file), TOKENIZER=str(mixture))
        )
    model, tokenizer = load(mixture)
    questions = load_questions(file)
    for ours, theirs in zip(
        responses(run_task(model, tokenizer, arc_task(questions), num_shots=0, limit=None)),
        result["choices"],
        strict=True,
    ):
        assert [float(value) for value, _ in theirs] == pytest.approx(ours, abs=1e-3)
    for question, (said,) in zip(questions, result["written"], strict=True):
        message = {"role": "user", "content": f"Question: {question.question}"}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        whole = mlx_lm.generate(model, tokenizer, prompt, max_tokens=20)
        assert said == whole.split("\n")[0]
