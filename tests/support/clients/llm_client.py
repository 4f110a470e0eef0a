"""Simon Willison's llm, at the command line: streamed or not, options, a schema, a tool."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from known import MODEL, SAID, SCHEMA

home = Path(tempfile.mkdtemp())
models = f"""- model_id: {MODEL}
  model_name: {MODEL}
  api_base: {os.environ["OPENAI_BASE_URL"]}
  supports_tools: true
  supports_schema: true
"""
(home / "extra-openai-models.yaml").write_text(models)
environment = {**os.environ, "LLM_USER_PATH": str(home)}


def llm(*arguments):
    command = [sys.executable, "-m", "llm", "-m", MODEL, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


assert llm("S") == llm("S", "--no-stream") == SAID
assert llm("S", "-s", "Be brief.", "-o", "temperature", "0", "-o", "max_tokens", "9") == SAID
assert llm("S", "-o", "stop", "gam") == "alpha beta"
assert json.loads(llm("S", "--schema", json.dumps(SCHEMA))) == {"a": 1}
function = "def f(x: int) -> str:\n    return 'S'"
assert llm("T", "--functions", function, "--no-stream").endswith(SAID)
assert llm("T", "--functions", function).endswith(SAID)
