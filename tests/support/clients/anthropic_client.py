"""Anthropic's client, as agents use it, by way of LiteLLM's proxy: docs/serving.md shows it."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from anthropic import Anthropic
from known import MODEL, PARAMETERS, SAID, TOOL_CALL, user

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
key = f"sk-{secrets.token_hex(16)}"
own = {"OPENAI_API_BASE": os.environ["OPENAI_BASE_URL"], "LITELLM_MASTER_KEY": key}
command = [Path(sys.executable).with_name("litellm"), "--model", f"openai/{MODEL}"]
proxy = subprocess.Popen(
    [*command, "--host", "127.0.0.1", "--port", str(port)], env={**os.environ, **own}
)
url = f"http://127.0.0.1:{port}"


def alive():
    try:
        return urllib.request.urlopen(f"{url}/health/liveliness", timeout=5).status == 200
    except OSError:
        return False


try:
    while not alive():
        assert proxy.poll() is None
        time.sleep(0.5)
    api = Anthropic(base_url=url, auth_token=key, max_retries=0)
    asked = {"model": f"openai/{MODEL}", "max_tokens": 99}
    whole = api.messages.create(**asked, messages=user("S"), system="Be brief.")
    assert whole.content[0].text == SAID
    with api.messages.stream(**asked, messages=user("S")) as stream:
        assert "".join(stream.text_stream) == SAID
    asked["tools"] = [{"name": "f", "input_schema": PARAMETERS}]
    called = api.messages.create(**asked, messages=user("T"))
    (use,) = [part for part in called.content if part.type == "tool_use"]
    assert (use.name, use.input) == TOOL_CALL
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "S"}
    again = [{"role": "assistant", "content": called.content}, *user([result])]
    assert api.messages.create(**asked, messages=[*user("T"), *again]).content[0].text == SAID
finally:
    proxy.terminate()
    proxy.wait()
