"""Run a command in a pseudo-terminal of its own: keys go in, what a person would see comes out."""

import fcntl
import os
import struct
import subprocess
import sys
import termios
import time

TAKE_IT = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
COLUMNS = 250  # no line is wrapped
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


class Terminal:
    """A Python process in a terminal, where Ctrl-C and Ctrl-D are what they are."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._end, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_IT, *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**inherited, "TERM": "xterm", "NO_COLOR": "1", **environment},
        )
        os.close(inside)
        os.set_blocking(self._end, False)
        self._unread = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._end, keys.encode())

    def read_until(self, text: str, within_s: float = 90) -> str:
        """Return the output up to `text`."""
        deadline = time.monotonic() + within_s
        while text not in self._unread:
            assert time.monotonic() < deadline, f"no {text!r} in {self._unread!r}"
            if not self._read():
                time.sleep(0.02)
        found, _, self._unread = self._unread.partition(text)
        return found

    def read_for(self, seconds: float) -> None:
        """Read for so long, or until the process ends: what is not read would stop it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if not self._read():
                time.sleep(0.02)

    def read_to_the_end(self, within_s: float) -> str:
        """Return the rest of the output; the process must end in time."""
        self.read_for(within_s)
        assert self.process.poll() is not None, f"does not end: {self._unread!r}"
        while self._read():
            pass
        found, self._unread = self._unread, ""
        return found

    def _read(self) -> bool:
        try:
            found = os.read(self._end, 65536)
        except OSError:  # nothing there yet, or nobody there any more
            return False
        self._unread += found.decode(errors="replace")
        return bool(found)
