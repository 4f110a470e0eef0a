"""`serve` under a thousand requests: all answered, and no memory kept."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import CHAT, TEXT, Process, serving

CLIENTS = 8
GROWTH_BYTES = 16 * 2**20  # from the 100th request to the 1,000th


def resident_bytes(server: Process) -> int:
    ps = ["ps", "-o", "rss=", "-p", str(server.process.pid)]
    return int(subprocess.run(ps, check=True, capture_output=True, text=True).stdout) * 1024


def request(server: Process, i: int) -> None:
    """Send the i-th request: all kinds, no two of them the same, and a bad one in ten."""
    text = f"Story {i}: once upon a time there were {i} cats and a dog. They"
    body = {"max_tokens": 8 + i % 9, "temperature": i % 3 / 2}
    kind = i % 10
    if kind == 0:
        assert server.ask("POST", TEXT, {**body, "prompt": text, "top_p": 2 + i})[0] == 400
    elif kind == 1:
        server.start(**body, stream=True).close()
    elif kind < 4:
        answer = server.ask("POST", TEXT, {**body, "prompt": text, "stream": True})
        assert answer[0] == 200 and answer[1].endswith("data: [DONE]\n\n")
    elif kind < 8:
        messages = [{"role": "user", "content": text}]
        answer = server.post(CHAT, **body, messages=messages)
        assert 0 < answer["usage"]["completion_tokens"] <= body["max_tokens"]
    else:
        answer = server.post(TEXT, **body, prompt=text, seed=i if kind == 8 else None)
        assert 0 < answer["usage"]["completion_tokens"] <= body["max_tokens"]


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(split_stories):
    options = ["--log-level", "ERROR", "--max-concurrent", str(2 * CLIENTS)]
    with serving("--model", str(split_stories), *options) as server:
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda i: request(server, i), range(100)))
            after_100 = resident_bytes(server)
            list(clients.map(lambda i: request(server, i), range(100, 1000)))
            after_1000 = resident_bytes(server)
        print(f"resident after 100 requests {after_100} bytes, after 1,000 {after_1000}")
        assert after_1000 - after_100 < GROWTH_BYTES
        assert not [line for line in server.log if "Traceback" in line or '" 500 ' in line]
