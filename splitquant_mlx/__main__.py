"""Run the command line; the only place that prints errors and exits."""

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command in sys.argv. Errors are one line on stderr and exit code 2."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where nohup ignores it
        signal.signal(signal.SIGINT, _leave)
    gc.set_threshold(50_000)  # imports and tokenizers create many objects that stay
    from splitquant_mlx.cli import run

    code = run(sys.argv[1:])
    if code > 128:  # interrupted: wait for no thread and no device
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)
    gc.freeze()  # the collections at exit would visit all objects
    sys.exit(code)


def _leave(signum: int, frame: object) -> None:
    """End the process before there is anything to go on from, or after all is done.

    An exception would be lost where a module that is imported catches all of them.
    """
    os.write(2, b"Interrupted.\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
