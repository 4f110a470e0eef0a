"""Memory use with many concurrent clients."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI
from serving import serving

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS, GROWTH_MB = 1000, 8, 40
WORDS = "once upon a time there was a little girl who had a big red ball and a small dog".split()


def memory_mb(process):
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_constant_over_a_thousand_requests(stories):
    with serving("--model", str(stories)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(number):
            generator = random.Random(number)
            prompt = " ".join(generator.choices(WORDS, k=generator.randint(3, 30)))
            options = {
                "model": "default_model",
                "max_tokens": generator.randint(1, 24),
                "temperature": 1.0,
            }
            if number % 4 < 2:
                answer = client.completions.create(prompt=prompt, stream=number % 2 == 0, **options)
            else:
                messages = [{"role": "user", "content": prompt}]
                answer = client.chat.completions.create(
                    messages=messages, stream=number % 2 == 0, **options
                )
            chunks = list(answer) if number % 2 == 0 else [answer]
            reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
            return reasons[-1] in ("stop", "length")

        with ThreadPoolExecutor(CLIENTS) as pool:
            first = list(pool.map(ask, range(REQUESTS // 5)))
            before = memory_mb(server.process)
            rest = list(pool.map(ask, range(REQUESTS // 5, REQUESTS)))
        after = memory_mb(server.process)
        print(f"{before:.0f} MB after {len(first)} requests, {after:.0f} MB after {REQUESTS}")
        assert all(first + rest)
        assert after < before + GROWTH_MB
