"""`serve` and its clients: who is one too many, who leaves, and what is done for whom."""

import threading
import time
from contextlib import ExitStack

import pytest
from mlx_lm import server as mlx_lm_server
from serving import STORY, TEXT, check_error, serve_to

from splitquant_mlx.inference.server import CONNECTIONS

LONG = {"max_tokens": 100_000, "temperature": 0}
STOP_TOKENS = 12  # TURN_S of tokens, at 10 ms each, and some for a busy machine


@pytest.fixture
def tokens(monkeypatch):
    """Return a list that grows by one for every token computed, one in 10 ms at most."""
    tokens: list[float] = []

    class Response(mlx_lm_server.Response):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            tokens.append(time.monotonic())
            time.sleep(0.01)

    monkeypatch.setattr(mlx_lm_server, "Response", Response)
    return tokens


def wait_for(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def free(server):
    return server.ask("POST", TEXT, {"prompt": "A", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("seed", [None, 1], ids=["batch", "alone"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_stops_the_answer_and_frees_the_place(split_stories, tokens, stream, seed):
    def client(server):
        with server.start(**LONG, stream=stream, seed=seed):
            wait_for(lambda: len(tokens) > 5)
            check_error(server.ask("POST", TEXT, {"prompt": "A"}), 429, "1 requests")
        left = time.monotonic()
        wait_for(lambda: time.monotonic() - tokens[-1] > 0.3)
        assert sum(at > left for at in tokens) <= STOP_TOKENS
        wait_for(lambda: free(server))

    serve_to(client, split_stories, max_concurrent=1, max_tokens_limit=100_000)


def test_who_leaves_while_waiting_frees_the_place(split_stories, tokens):
    def client(server):
        with server.start(**LONG, seed=1) as first:
            wait_for(lambda: tokens)
            with server.start(**LONG, seed=2):
                wait_for(lambda: not free_now(server))
            # the first still has the generator: a place is free again, all the same
            wait_for(lambda: free_now(server))
            first.shutdown(2)
        wait_for(lambda: free(server))

    def free_now(server):
        with server.start(max_tokens=1, seed=3) as probe:
            probe.settimeout(0.3)
            try:
                return b" 429 " not in probe.recv(100)
            except TimeoutError:
                return True

    serve_to(client, split_stories, max_concurrent=2, max_tokens_limit=100_000)


def test_who_does_not_read_frees_the_place(split_stories, monkeypatch):
    class Response(mlx_lm_server.Response):
        def __init__(self, text, *args, **kwargs):
            # soon more than the system keeps for a reader
            super().__init__(text * 50_000, *args, **kwargs)

    monkeypatch.setattr(mlx_lm_server, "Response", Response)

    def client(server):
        with server.start(**LONG, stream=True):
            time.sleep(0.2)
            assert not free(server)
            wait_for(lambda: free(server))

    serve_to(
        client,
        split_stories,
        max_concurrent=1,
        max_tokens_limit=100_000,
        request_timeout_s=0.5,
    )


def test_one_too_many_is_told_to_come_back(split_stories):
    def client(server):
        with ExitStack() as stack:
            for _ in range(3):
                began = stack.enter_context(server.start(**LONG, stream=True))
                assert began.recv(100).startswith(b"HTTP/1.0 200 ")
            answer = server.ask("POST", TEXT, {"prompt": STORY, "max_tokens": 1})
            error = check_error(answer, 429, "3 requests are being answered")
            assert error["code"] == "rate_limit_exceeded"
            with server.start(max_tokens=1) as refused:
                assert b"\r\nRetry-After: " in refused.recv(1000)
            assert server.ask("GET", "/v1/models")[0] == 200
        wait_for(lambda: free(server))

    serve_to(client, split_stories, max_concurrent=3, max_tokens_limit=100_000)


def test_a_crowd_is_turned_away_at_the_door(split_stories):
    def client(server):
        with ExitStack() as stack:
            crowd = [stack.enter_context(server.connect()) for _ in range(CONNECTIONS + 1)]
            crowd[-1].settimeout(10)
            assert crowd[-1].recv(1) == b""
        wait_for(lambda: threading.active_count() < 10)
        assert free(server)

    serve_to(client, split_stories)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_failing_generation_is_an_error_and_not_the_end(
    split_stories, monkeypatch, stream, caplog
):
    """Whatever mlx does, all answers under way are told, and the next ones are computed."""
    sampler = mlx_lm_server.make_sampler

    def failing(temp, **settings):
        if temp != 1.25:
            return sampler(temp, **settings)

        calls = iter(range(4))

        def sample(logprobs):
            if next(calls) == 3:
                raise RuntimeError("out of\nmemory")
            return sampler(0)(logprobs)

        return sample

    monkeypatch.setattr(mlx_lm_server, "make_sampler", failing)

    def client(server):
        body = {"prompt": STORY, "max_tokens": 100_000}
        with server.start(**LONG, stream=True) as bystander:
            bystander.recv(100)
            answer = server.ask("POST", TEXT, {**body, "temperature": 1.25, "stream": stream})
            if stream:
                assert answer[0] == 200
                assert '"type": "server_error"' in answer[1].splitlines()[-2]
            else:
                check_error(answer, 500)
            received = b""
            while piece := bystander.recv(2**16):
                received += piece
            assert b'"type": "server_error"' in received and b"out of" not in received
        again = server.post(TEXT, prompt=STORY, max_tokens=3)
        assert again["usage"]["completion_tokens"] == 3

    serve_to(client, split_stories, max_tokens_limit=100_000)
    assert "out of\nmemory" in caplog.text


def test_no_thread_outlives_the_server(split_stories):
    before = threading.active_count()
    serve_to(lambda server: server.post(TEXT, prompt=STORY, max_tokens=2), split_stories)
    wait_for(lambda: threading.active_count() == before)
