"""generate, eval and serve with several ranks: one prints, and all end together."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from ranks import COMMAND, finish, free_ports, running
from serving import CHAT, TEXT, Process

from splitquant_mlx.cli import run

pytestmark = pytest.mark.slow

STORY = "Once upon a time"
LIMIT_S = 30


@pytest.fixture
def model(split_32):
    return split_32


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Return a random model that two ranks can shard and whose answers never end."""
    head = mx.random.normal((tiny.VOCAB, tiny.HIDDEN), key=mx.random.key(0))
    head[1] = 0  # the logit of the end token is 0, and another one is larger
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("random") / "model",
        tie_word_embeddings=False,
        replace={"lm_head.weight": head},
    )


def generate(model, *options):
    arguments = ("--model", model, "--prompt", STORY, "--max-tokens", 40, *options)
    return [*COMMAND, "generate", "--device", "cpu", *map(str, arguments)]


def single_process(command, capfd):
    """Return the output of a command in this process."""
    capfd.readouterr()
    assert run(command[len(COMMAND) :]) == 0
    return capfd.readouterr().out


def wait_for_answer(process):
    """Wait until a process is generating its answer."""
    words = ""
    while words.count(" w") < 3:
        words += process.stdout.read(1)


@pytest.mark.parametrize("options", [[], ["--temp", 0.9, "--seed", 3]])
def test_two_ranks_generate_the_same_as_one(model, capfd, options):
    command = generate(model, "--verbose", "False", *options)
    with running(*command) as processes:
        ended = finish(processes)
    (code, out, err), other = ended
    assert (code, out) == (0, single_process(command, capfd))
    assert "error" not in err and other == (0, "", "")


def test_mlx_launch_shows_the_answer_once(model, capfd):
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = generate(model, "--verbose", "False")
    options = ["-n", "2", "--starting-port", str(free_ports(2)[0]), "--"]
    done = subprocess.run(
        [str(launcher), *options, *command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, single_process(command, capfd))


def test_mlx_launch_ends_all_when_one_is_killed(endless):
    launcher = Path(sys.executable).with_name("mlx.launch")
    options = ["-n", "2", "--starting-port", str(free_ports(2)[0]), "--"]
    # each rank prints its process id, so that one can be killed
    code = (
        "import os, sys; print(os.getpid(), file=sys.stderr, flush=True)\n"
        "from splitquant_mlx.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, *generate(endless, "-m", 1_000_000)[len(COMMAND) :]]
    with subprocess.Popen(
        [str(launcher), *options, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        ids = [int(process.stderr.readline()) for _ in range(2)]
        wait_for_answer(process)
        subprocess.run(["kill", "-9", str(ids[1])], check=True)
        began = time.monotonic()
        process.communicate(timeout=LIMIT_S)
    assert time.monotonic() - began < LIMIT_S


def test_a_rank_ends_when_its_peer_is_killed(endless):
    with running(*generate(endless, "-m", 1_000_000)) as processes:
        wait_for_answer(processes[0])
        processes[1].kill()
        code, _, error = finish(processes, LIMIT_S)[0]
    assert code == 2
    (line,) = (line for line in error.splitlines() if "Loading" not in line)
    assert line.startswith("splitquant-mlx: error: the connection to another rank was lost")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_rank_that_waits_for_another(endless, number):
    with running(*generate(endless, "-m", 1_000_000)) as processes:
        wait_for_answer(processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        processes[0].send_signal(number)
        assert processes[0].wait(timeout=LIMIT_S) == 128 + number


def test_a_signal_ends_a_rank_that_waits_to_join(endless):
    with running(*generate(endless), size=2) as processes:
        processes[1].kill()
        time.sleep(8)
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(timeout=LIMIT_S) in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--model", "./missing"], "no such path: './missing'"),
        (["generate", "--modle", "x"], "No such option: --modle. Did you"),
        (["generate", "--model", "MODEL", "--kv-bits", "7"], "--kv-bits: expected 2, 3"),
        (["generate", "--model", "MODEL", "--pipeline"], "no way to divide a llama in a pipeline"),
        (["generate", "--model", "MODEL", "-p", "-"], "no standard input under mlx.launch"),
        (["eval", "--model", "MODEL", "--task", "kl"], "give --reference"),
        (["eval", "--model", "MODEL", "--task", "perplexity", "--data", "no"], "no: "),
        (["serve", "--model", "./missing"], "no such path: './missing'"),
        (["serve", "--model", "MODEL", "--hots", "x"], "No such option: --hots. Did you"),
        (["serve", "--model", "MODEL", "--draft-model", "MODEL"], "expected one rank"),
        (["serve", "--model", "MODEL", "--port", "TAKEN"], "cannot listen on 127.0.0.1, port"),
    ],
)
def test_an_error_is_printed_once(model, command, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"MODEL": str(model), "TAKEN": str(taken.getsockname()[1])}
        with running(*COMMAND, *(values.get(word, word) for word in command)) as processes:
            ended = finish(processes, LIMIT_S)
    assert [code for code, _, _ in ended] == [2, 2]
    assert [out for _, out, _ in ended] == ["", ""]
    assert message in ended[0][2] and ended[0][2].count("error: ") == 1
    assert ended[1][2] == ""


def test_eval_prints_and_writes_the_same_as_one_process(
    model, stories, questions_file, tmp_path, capfd
):
    options = ["--device", "cpu", "--task", "arc_easy", "--data", questions_file, "--limit", 20]
    options += ["--model", model, "--reference", stories]
    command = [*COMMAND, "eval", *map(str, options)]
    cache = {"SPLITQUANT_CACHE": str(tmp_path / "cache")}
    with running(*command, "--json", tmp_path / "two.json", environment=cache) as processes:
        ended = finish(processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(tmp_path / "other"))
        patch.setenv("COLUMNS", "80")
        printed = single_process([*command, "--json", str(tmp_path / "one.json")], capfd)
    assert ended[1] == (0, "", "")
    assert ended[0][0] == 0 and ended[0][1].split() == printed.split()
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert results[0] == results[1]


def test_lm_evaluation_harness_receives_the_same_answers(model, questions_file):
    import rank_harness

    with running(sys.executable, rank_harness.__file__, model, questions_file) as processes:
        ended = finish(processes)
    expected = json.loads(json.dumps(rank_harness.work(model, questions_file, None)))
    assert len(expected["responses"]) == 12 and all(expected["texts"])
    for code, out, error in ended:
        assert code == 0, error
        assert json.loads(out.splitlines()[-1]) == expected


def serve(model, *options):
    return [*COMMAND, "serve", "--device", "cpu", "--port", 0, "--model", model, *options]


def own_lines(log):
    """Return the lines that are neither mlx's nor the log of requests."""
    return [line for line in log if not line.startswith(("[ring]", "127.0.0.1 - -"))]


def test_rank_0_serves_and_all_compute(model, capfd):
    story = single_process(generate(model, "--verbose", "False"), capfd).rstrip("\n")
    body = {"prompt": STORY, "max_tokens": 40}
    with running(*serve(model, "--log-level", "ERROR")) as processes:
        server = Process(processes[0])
        assert server.ask("GET", "/health") == (200, {"status": "ok"})
        for seed in (None, 1):  # in a batch, and separately
            answer = server.post(TEXT, **body, seed=seed)
            assert answer["choices"][0]["text"].lstrip() == story
        for seed in (None, 1):  # ranks stay in step when clients disconnect
            server.start(max_tokens=300, seed=seed, stream=True).close()
            assert server.post(TEXT, **body)["choices"][0]["text"].lstrip() == story
        samples = [server.post(TEXT, **body, temperature=1.0, seed=2) for _ in range(2)]
        assert samples[0]["choices"] == samples[1]["choices"]
        messages = [{"role": "user", "content": STORY}]
        status, _ = server.ask("POST", CHAT, {"messages": messages, "max_tokens": 5})
        assert status in (200, 400)  # the model has no chat template
        processes[0].send_signal(signal.SIGINT)
        assert processes[0].wait(timeout=LIMIT_S) == 0
        code, out, error = finish(processes[1:], LIMIT_S)[0]
    assert (code, out, error) == (0, "", "")
    assert not own_lines(server.log)


def test_a_server_ends_when_a_rank_is_killed(model):
    with running(*serve(model, "--log-level", "ERROR")) as processes:
        server = Process(processes[0])
        processes[1].kill()
        assert processes[0].wait(timeout=LIMIT_S) == 2
        deadline = time.monotonic() + 5
        while not own_lines(server.log) and time.monotonic() < deadline:
            time.sleep(0.1)
    (line,) = (line for line in server.log if "splitquant-mlx: error: " in line)
    assert "the connection to another rank was lost" in line
