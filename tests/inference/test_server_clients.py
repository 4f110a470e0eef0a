"""Concurrent clients: limits, disconnects and failures."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import mlx.core as mx
import pytest
from serving import STORY, TEXT, check_error, message, running

from splitquant_mlx.inference import engine
from splitquant_mlx.inference.server import load_service
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.inference.stops import StreamParser
from splitquant_mlx.models.source import resolve
from splitquant_mlx.runtime.ranks import join

LONG = {"max_tokens": 8000, "temperature": 0}


@pytest.fixture(scope="module")
def server(split_stories):
    settings = {"max_concurrent": 3, "request_timeout": 1.0, "max_prompt_tokens": 100}
    with running(split_stories, **settings) as server:
        yield server


@pytest.fixture
def tokens(monkeypatch):
    """Return a list of the time of every computed token, each delayed by 10 ms."""
    tokens: list[float] = []
    scored = engine._scored_token

    def slowly(*args):
        tokens.append(time.monotonic())
        time.sleep(0.01)
        return scored(*args)

    monkeypatch.setattr(engine, "_scored_token", slowly)
    return tokens


def wait_for(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def free(server):
    return server.ask("POST", TEXT, {"prompt": "A", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_disconnect_stops_the_answer_and_frees_its_slot(server, tokens, stream):
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.start(**LONG, stream=stream))
        wait_for(lambda: len(tokens) > 5)
        error = check_error(server.ask("POST", TEXT, {"prompt": "A"}), 429, "3 requests")
        assert error["code"] == "rate_limit_exceeded"
        assert server.ask("GET", "/v1/models")[0] == 200
    wait_for(lambda: time.monotonic() - tokens[-1] > 0.5)


def test_a_client_that_does_not_read_frees_its_slot(server, monkeypatch):
    much = [("normal", "x" * 50_000)]  # soon fills the socket's buffers
    monkeypatch.setattr(StreamParser, "feed", lambda *args, **options: much)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.start(**LONG, stream=True))
        wait_for(lambda: not free(server))
        wait_for(lambda: free(server))


@pytest.fixture
def uncompiled():
    """Disable mx.compile, which takes seconds for each sampler on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_eight_clients_get_the_same_answers_as_one(split_stories, uncompiled):
    prompts = ["Tom", "The dog", "One day", "She", "They ran", "Mom", "A big", "It was"]
    with running(split_stories, max_concurrent=9) as server:

        def say(prompt, **body):
            body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, **body}
            answer = server.post(TEXT, **body)
            return answer["choices"][0]["text"]

        alone = [say(prompt) for prompt in prompts]
        assert len(set(alone)) > 4  # so that a mix-up of answers is detected
        sampled = say("Tom", temperature=1.5, seed=7)
        assert sampled != alone[0] and say("Tom", temperature=1.5, seed=8) != sampled
        with ThreadPoolExecutor(8) as pool:
            hot = pool.submit(say, "Tom", temperature=1.5, seed=7)
            assert list(pool.map(say, prompts)) == alone
        # a seeded answer does not depend on the others
        assert hot.result() == sampled
        prefix = STORY + say(STORY)
        more = server.post(TEXT, prompt=prefix, max_tokens=4, temperature=0)
        details = more["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] >= more["usage"]["prompt_tokens"] - 3
        fresh = server.post(TEXT, prompt=prefix, max_tokens=4, temperature=0, echo=True, logprobs=0)
        assert fresh["choices"][0]["text"] == prefix + more["choices"][0]["text"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_failed_generation_does_not_stop_the_server(server, monkeypatch, stream, caplog):
    """After an exception, all answers in progress end with an error and later ones succeed."""
    sampler, calls = engine._sampler, iter(range(100))

    def failing(**settings):
        def sample(logprobs):
            if next(calls) == 3:
                raise RuntimeError("out of\nmemory")
            return sampler(**{**settings, "temp": 0})(logprobs)

        return sample if settings["temp"] == 1.25 else sampler(**settings)

    monkeypatch.setattr(engine, "_sampler", failing)
    with server.start(**LONG, stream=True) as bystander:
        bystander.recv(100)
        body = {"prompt": STORY, "max_tokens": 200, "temperature": 1.25, "stream": stream}
        answer = server.ask("POST", TEXT, body)
        if stream:
            assert answer[0] == 200 and '"type": "server_error"' in answer[1].splitlines()[-2]
        else:
            check_error(answer, 500)
        received = b""
        while b"server_error" not in received:
            received += (piece := bystander.recv(2**16))
            assert piece
        assert b"out of" not in received
    again = server.post(TEXT, prompt=STORY, max_tokens=3)
    assert again["usage"]["completion_tokens"] == 3
    assert "out of\nmemory" in caplog.text


def test_a_long_prompt_is_refused(server):
    error = check_error(server.ask("POST", TEXT, {"prompt": STORY * 100}), 400, "1 to 100")
    assert error["code"] == "context_length_exceeded"


def test_a_job_after_shutdown_gets_the_error(split_stories):
    """A request may arrive during shutdown."""
    source = resolve(str(split_stories))
    computing = load_service(source, ServeSettings(), False, join()).engine
    computing.close(KeyError("the end"))
    events: list[object] = []
    job = engine.AnswerJob(plan=engine.AnswerPlan(prompt=[1], max_tokens=3))
    job.emit = events.append
    computing.submit(job)
    assert [str(event) for event in events] == ["'the end'"]


def test_an_incomplete_request_ends_with_the_server(split_stories, caplog):
    with running(split_stories) as server:
        connection = server.connect()
        connection.sendall(message(b"{", length=100))
        time.sleep(0.2)
    with connection:
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert received.startswith(b"HTTP/1.1 503")
    assert b"the server is shutting down" in received
    assert not any(record.exc_info for record in caplog.records)
