"""Run a command from a small process, and write down what it took.

`launch.py REPORT PIPE COMMAND...`: the number of a pipe whose other end is the caller's alone tells
when the caller was killed, which ends the command too: it would go on writing where the caller's
successor does.

On Linux a process begins its life with the peak memory of the one that started it. This file is run
as a script by an interpreter that has imported next to nothing, and so adds next to nothing.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time


def main(report: str, pipe: int, command: list[str]) -> None:
    """Run `command` to its end; write start (`time.perf_counter`), seconds, peak and exit code."""
    started = time.perf_counter()
    process = subprocess.Popen(command)

    def end_with_caller() -> None:
        os.read(pipe, 1)  # nothing is ever written: this returns when the other end is closed
        process.kill()

    threading.Thread(target=end_with_caller, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself gets Ctrl-C, and ends
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "started": started,
        "seconds": seconds,
        # ru_maxrss is in kB on Linux, in bytes on macOS
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "exit_code": process.returncode,
    }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
