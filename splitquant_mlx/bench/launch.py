"""Run a command from a small process and report its time and peak memory.

Usage: `launch.py REPORT PIPE COMMAND...`. PIPE is a file descriptor whose other end only the caller
holds: if the caller is killed, the pipe closes and the command is killed, too, so that it does not
write to the same files as the caller's next run.

On Linux, a process starts with the peak memory of its parent. This script therefore runs in an
interpreter with minimal imports.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time


def main(report: str, pipe: int, command: list[str]) -> None:
    """Run `command`; write its start (`time.perf_counter`), seconds, peak memory and exit code."""
    started = time.perf_counter()
    process = subprocess.Popen(command)

    def kill_with_caller() -> None:
        os.read(pipe, 1)  # nothing is ever written: this returns when the other end is closed
        process.kill()

    threading.Thread(target=kill_with_caller, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command receives Ctrl-C as well
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    usage_report = {
        "started": started,
        "seconds": seconds,
        # ru_maxrss is in kB on Linux, in bytes on macOS
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "exit_code": process.returncode,
    }
    with open(report, "w", encoding="utf-8") as file:
        json.dump(usage_report, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
