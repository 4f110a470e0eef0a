"""Signals while Python cannot run handlers, and progress without a terminal."""

import re
import signal
import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from splitquant_mlx.cli import console, progress

# hashing releases the GIL, as mlx does, and takes half a minute
BUSY = """
import hashlib, sys
from splitquant_mlx.cli import interrupt
with interrupt.watch_signals():
    interrupt.set_hint()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", 60_000_000)
"""


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]]
)
def test_a_signal_ends_a_long_computation(numbers):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # until it hashes
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        _, err = process.communicate(timeout=40)
    assert time.monotonic() - began < 10  # two seconds on an idle machine
    assert process.returncode == 128 + numbers[0]
    assert err == "Interrupted. Run the same command to continue.\n"


# the thread may read the signal only after the block has ended
HANDLED = """
import os, signal, time
from splitquant_mlx.cli import interrupt
with interrupt.watch_signals():
    for _ in range(3):
        received = []
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
        with interrupt.handle_signals(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
    time.sleep(2 * interrupt.GRACE_S)
    print("still running")
    with interrupt.handle_signals(1):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
"""


def test_a_block_handles_a_limited_number_of_signals():
    ended = subprocess.run(
        [sys.executable, "-c", HANDLED], capture_output=True, text=True, timeout=25
    )
    assert ended.stdout == "still running\n"
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")


# an import that discards exceptions, as callbacks from C do
IMPORTING = """
import sys, time
from splitquant_mlx.__main__ import main
class Finder:
    def find_spec(self, name, *rest):
        if name == "splitquant_mlx.cli":
            print("ready", flush=True)
            try:
                time.sleep(30)
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
sys.argv = ["splitquant-mlx", "--version"]
main()
"""


def test_a_signal_ends_a_running_import():
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")


def test_without_a_terminal_each_stage_and_minute_has_a_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.2)
    bars = progress.Bars(["Sampling text", "Quantizing"])
    with bars.task("Sampling text"):
        pass
    with bars.task("Quantizing", 4) as advance:
        advance(1)
        time.sleep(0.5)
    first, second, third, *_ = capsys.readouterr().err.splitlines()
    assert (first, second) == ("1 of 2, Sampling text", "2 of 2, Quantizing")
    assert third.startswith("2 of 2, Quantizing: 25%, 0:00 elapsed")


def test_a_bar_fits_on_one_line(monkeypatch):
    out = StringIO()
    screen = Console(file=out, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(console, "stderr", lambda: screen)
    monkeypatch.setattr(progress, "_times", lambda *_: "1:00:26 elapsed, 1:30:39 left")
    with progress._bar("1 of 1, Splitting and quantizing", 4) as advance:
        advance(1)
    assert any(re.search(r"quantizing ━.* 25% .*left", line) for line in out.getvalue().split("\r"))


def test_quiet_shows_nothing(capsys):
    console.set_quiet(True)
    try:
        with progress.Bars(["Quantizing"]).task("Quantizing", 4):
            console.note("a note")
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_the_remaining_time_is_estimated_from_progress():
    assert progress._times(30, 1, 4) == "0:30 elapsed, 1:30 left"
    assert progress._times(3700, 0, 4) == "1:01:40 elapsed"
