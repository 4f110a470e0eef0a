"""Commands in a terminal: keys in a chat, and Ctrl-C at any time."""

import json
import random
import re
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from terminal import CTRL_C, CTRL_D, ENTER, Terminal

from splitquant_mlx.cli.talk import Talk

PROGRAM = ["-m", "splitquant_mlx"]
STORY = "Once upon a time"
# two seconds on an idle machine, see cli/interrupt.py
LEAVES_WITHIN_S = 10
MOMENTS = 8


@pytest.fixture
def chat(split_stories, tmp_path):
    """Start a chat with endless answers and wait for its prompt."""
    command = [*PROGRAM, "chat", str(split_stories), "--device", "cpu", "-m", "-1"]
    with Terminal(*command, SPLITQUANT_CACHE=str(tmp_path)) as terminal:
        header = terminal.read_until("you>")
        assert "context 512 tokens" in header and "bits/weight" in header
        assert "/help" in header
        yield terminal


def ask(chat: Terminal, *lines: str) -> str:
    """Type lines at the prompt and return the output up to the next prompt."""
    shown = ""
    for line in lines:
        chat.type(f"{line}{ENTER}")
        chat.read_until("\n")  # skip the line as edited, in which the prompt is redrawn
        shown = chat.read_until("you>" if line is lines[-1] else "...>")
    return shown


def test_every_command_of_a_chat(chat, tmp_path):
    saved = tmp_path / "saved.json"
    assert '"""' in ask(chat, "/help")
    assert "max_tokens 12" in ask(chat, "/set max_tokens 12")
    assert "temp 0," in ask(chat, "/set temp 0")
    first = ask(chat, STORY)
    assert "model> " in first and "cut off at 12 tokens (--max-tokens)" in first
    assert "tokens-per-sec, context " in first and " / 512" in first
    answer = re.search(r"model> (.*?)\r\n", first)[1]
    assert f"model> {answer}\r\n" in ask(chat, "/retry")
    assert "24 tokens answered" in ask(chat, "/stats")
    ask(chat, '"""One day', 'there was a cat."""')
    assert "Saved 4 messages" in ask(chat, f"/save {saved}")
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == STORY and messages[1]["content"].strip() == answer.strip()
    assert messages[2]["content"] == "One day\nthere was a cat."
    ask(chat, "/reset")
    loaded = ask(chat, f"/load {saved}")
    assert "Loaded 4 messages" in loaded and not re.search(r"context 0\b", loaded)
    assert "cut off at 12 tokens" in ask(chat, "/continue")
    assert "expected one of temp" in ask(chat, "/set tmep 1")
    assert "cannot read" in ask(chat, "/load nowhere.json")
    assert "pirate" in ask(chat, "/system Talk like a pirate.")
    assert "unknown command /what: /help" in ask(chat, "/what")
    assert "did you mean /system?" in ask(chat, "/sytem")
    chat.type(f"/exit{ENTER}")
    assert chat.process.wait(timeout=LEAVES_WITHIN_S) == 0
    assert "+/stats" in (tmp_path / "chat_history").read_text()  # history of the next session


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat):
    for _ in range(2):
        chat.type(f"{STORY}{ENTER}")
        chat.read_until("model> ")
        chat.read_until("he")
        chat.type(CTRL_C)
        answer = chat.read_until(" / 512")
        assert "tokens-per-sec, context" in answer and "^C" not in answer
        chat.read_until("you>")
    chat.type(CTRL_C)
    chat.read_until("Ctrl-C again")
    chat.read_until("you>")
    assert "unknown command /what" in ask(chat, "/what")  # resets the count of Ctrl-C
    chat.type(CTRL_C)
    chat.read_until("Ctrl-C again")
    chat.type(CTRL_C)
    assert chat.process.wait(timeout=LEAVES_WITHIN_S) == 0


@pytest.mark.parametrize(
    ("before", "count", "full"),
    [(500, 11, False), (500, 12, True), (512, 12, False), (600, 255, False), (600, 256, True)],
)
def test_an_answer_ends_when_the_context_is_full(before, count, full):
    conversation: Any = SimpleNamespace(tokens=before + count)
    talk = Talk(conversation, None, context=512, fills_context=True)  # type: ignore[arg-type]
    assert talk._is_full(count) == full


def test_ctrl_d_leaves(chat):
    chat.type(CTRL_D)
    assert chat.process.wait(timeout=LEAVES_WITHIN_S) == 0


@pytest.mark.robustness
def test_a_terminated_chat_ends(chat):
    chat.process.terminate()
    assert chat.process.wait(timeout=LEAVES_WITHIN_S) == -signal.SIGTERM


@pytest.fixture
def commands(stories, text_file, tmp_path):
    """Return long commands with the messages of their interrupts."""
    text = text_file.read_text(encoding="utf-8") * 50
    long_text = tmp_path / "long.txt"
    long_text.write_text(text, encoding="utf-8")
    calibration = ["--calibration", str(long_text), "--num-samples", "2000"]
    target = ["--mlx-path", str(tmp_path / "target")]
    message = "Interrupted. Run the same command to continue."
    return {
        "convert": (["convert", str(stories), "--method", "gptq", *calibration, *target], message),
        "eval": (["eval", str(stories), "--data", str(long_text)], "Interrupted."),
        "generate": (["generate", str(stories), text[:30_000]], "Interrupted."),
    }


def interrupt(command: list[str], tmp_path, *, after_s: float, shown: str = "") -> str:
    """Press Ctrl-C `after_s` after the start, or after `shown` is printed; return the last line."""
    with Terminal(*PROGRAM, *command, SPLITQUANT_CACHE=str(tmp_path / "cache")) as terminal:
        if shown:
            terminal.read_until(shown)
        terminal.read_for(after_s)
        if terminal.process.poll() == 0:  # finished before
            return "Interrupted."
        began = time.monotonic()
        terminal.type(CTRL_C)
        rest = terminal.read_to_the_end(4 * LEAVES_WITHIN_S)
        assert time.monotonic() - began < LEAVES_WITHIN_S
        assert terminal.process.returncode == 130, rest
    assert "Traceback" not in rest
    return rest.strip().splitlines()[-1].removeprefix("^C")


@pytest.mark.parametrize(
    ("name", "shown"), [("convert", "elapsed"), ("eval", "elapsed"), ("generate", "=====")]
)
def test_ctrl_c_exits_and_prints_how_to_continue(commands, tmp_path, name, shown):
    command, expected = commands[name]
    assert interrupt(command, tmp_path, after_s=0.5, shown=shown) == expected
    assert not (tmp_path / "target").exists()


@pytest.mark.robustness
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["convert", "eval", "generate"])
def test_ctrl_c_at_random_moments(commands, tmp_path, name):
    command, expected = commands[name]
    rng = random.Random(name)
    for _ in range(MOMENTS):
        # before 0.2 s Python may not have started; the hint is set only after the start
        last = interrupt(command, tmp_path, after_s=rng.uniform(0.2, 12))
        assert last in (expected, "Interrupted.")
        assert not (tmp_path / "target").exists()
