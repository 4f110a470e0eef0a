"""`serve` under a thousand requests of OpenAI's client: all answered, and no memory kept."""

from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from serving import Process, serving

CLIENTS = 8
GROWTH_BYTES = 16 * 2**20  # from the 100th request to the 1,000th


def request(server: Process, api: openai.OpenAI, i: int) -> None:
    """Send the i-th request: all kinds, no two of them the same, and a bad one in ten."""
    text = f"Story {i}: once upon a time there were {i} cats and a dog. They"
    body = {"model": "stories", "max_tokens": 8 + i % 9, "temperature": i % 3 / 2}
    chat = {**body, "messages": [{"role": "user", "content": text}]}
    kind = i % 10
    if kind == 0:
        with pytest.raises(openai.BadRequestError):
            api.completions.create(**body, prompt=text, top_p=2 + i)
    elif kind == 1:
        server.start(**body, stream=True).close()
    elif kind < 4:
        *_, last = api.completions.create(**body, prompt=text, stream=True)
        assert last.choices[0].finish_reason in ("stop", "length")
    elif kind < 6:
        *_, last = api.chat.completions.create(**chat, stream=True)
        assert last.choices[0].finish_reason in ("stop", "length")
    elif kind < 8:
        answer = api.chat.completions.create(**chat)
        assert 0 < answer.usage.completion_tokens <= body["max_tokens"]
    else:
        seed = i if kind == 8 else None
        answer = api.completions.create(**body, prompt=text, seed=seed)
        assert 0 < answer.usage.completion_tokens <= body["max_tokens"]


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(split_stories):
    options = ["--served-model-name", "stories", "--max-concurrent", str(2 * CLIENTS)]
    with serving("--model", str(split_stories), *options) as server:
        memory = psutil.Process(server.process.pid).memory_info
        address = f"{server.url}/v1"
        with (
            openai.OpenAI(base_url=address, api_key="none", max_retries=0) as api,
            ThreadPoolExecutor(CLIENTS) as clients,
        ):
            list(clients.map(lambda i: request(server, api, i), range(100)))
            after_100 = memory().rss
            list(clients.map(lambda i: request(server, api, i), range(100, 1000)))
            after_1000 = memory().rss
        print(f"resident after 100 requests {after_100} bytes, after 1,000 {after_1000}")
        assert after_1000 - after_100 < GROWTH_BYTES
        assert not [line for line in server.log if "Traceback" in line or " 500, " in line]
