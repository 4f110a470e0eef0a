"""Run the command line; the only place that prints errors and exits."""

import os
import sys


def main() -> None:
    """Run the command in sys.argv. Errors are one line on stderr and exit code 2."""
    try:
        from splitquant_mlx.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before there was anything to go on from
        print("Interrupted.", file=sys.stderr)
        code = 130
    if code > 128:  # interrupted: wait for no thread and no device
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
