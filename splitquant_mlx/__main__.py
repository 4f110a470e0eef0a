"""Run the command line; the only place that prints errors and exits."""

import sys


def main() -> None:
    """Run the command in sys.argv. Errors are one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        from splitquant_mlx.cli import run
    except KeyboardInterrupt:
        sys.exit(2)
    sys.exit(run(arguments, debug=debug))


if __name__ == "__main__":
    main()
