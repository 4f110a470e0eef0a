"""Record `convert` and `chat` in a terminal of their own, as an animated SVG.

    python docs/recording.py --model DIRECTORY --output docs/recording.svg

The commands run in a pseudo-terminal of 80 columns, and what they print is replayed with its
timing, long waits cut short. Any small chat model will do; nothing is edited. Where other programs
leave the commands too little of a processor, nothing is written: the speed shown would be theirs.
"""

import argparse
import os
import pty
import resource
import select
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

import pyte

COLUMNS, ROWS = 80, 22
LINE_PX, CHAR_PX, MARGIN_PX = 18, 8.4, 14
LONGEST_S = 1.2  # that nothing changes
STEP_S = 0.15  # between two frames
COLORS = {
    "default": "#d8dee9",
    "blue": "#81a1c1",
    "green": "#a3be8c",
    "cyan": "#88c0d0",
    "red": "#bf616a",
    "magenta": "#b48ead",
    "brown": "#ebcb8b",
    "black": "#6b7589",
}
BOLD = ' font-weight="bold"'


def main() -> None:
    """Record, and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/recording.svg"))
    parser.add_argument("--say", default="Tell me something about the moon.")
    parser.add_argument("--least-share", type=float, default=0.5, help="of one processor")
    options = parser.parse_args()
    began = time.monotonic()
    name = options.model.resolve().name
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / name).symlink_to(options.model.resolve())
        target = f"{name.removesuffix('.gguf')}-rtn-4bit"
        frames = record(room, ["convert", name, "-q"], [])
        typed = [("you>", f"{options.say}\r"), ("tokens-per-sec", ""), ("you>", "/exit\r")]
        frames += record(room, ["chat", target, "-m", "48", "--seed", "1"], typed)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    share = (used.ru_utime + used.ru_stime) / (time.monotonic() - began)
    if share < options.least_share:
        sys.exit(f"the commands had {share:.0%} of a processor: try again on a quieter machine")
    options.output.write_text(svg(frames), encoding="utf-8")


def record(room: str, command: list[str], typed: list[tuple[str, str]]) -> list[tuple[float, list]]:
    """Run a command; return screens with the seconds that each stands.

    Args:
        room: directory to run in.
        command: arguments of splitquant-mlx.
        typed: keys to type, each after a text has appeared.
    """
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ splitquant-mlx {' '.join(command)}\r\n".encode())
    frames = [(1.0, shot(screen))]
    end, inside = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm"}
    environment["SPLITQUANT_CACHE"] = str(Path(room) / ".cache")
    process = subprocess.Popen(
        [sys.executable, "-m", "splitquant_mlx", *command],
        cwd=room, env=environment, stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    unread, last, waiting = b"", time.monotonic(), list(typed)
    while True:
        ready = select.select([end], [], [], STEP_S)[0]
        try:
            data = os.read(end, 65536) if ready else b""
        except OSError:
            break
        if ready and not data:
            break
        stream.feed(data)
        unread += data
        if waiting and waiting[0][0].encode() in unread:
            os.write(end, waiting.pop(0)[1].encode())
            unread = b""
        now = time.monotonic()
        if data and now - last >= STEP_S:
            frames.append((min(now - last, LONGEST_S), shot(screen)))
            last = now
        if not ready and process.poll() is not None:
            break
    process.wait()
    os.close(end)
    return [*frames, (2.5, shot(screen))]


def shot(screen: pyte.Screen) -> list[list[tuple[str, str, bool]]]:
    """Return the screen as runs of text, color and boldness, line by line."""
    lines = []
    for row in range(ROWS):
        runs: list[tuple[str, str, bool]] = []
        for column in range(COLUMNS):
            char = screen.buffer[row][column]
            style = (char.fg if char.fg in COLORS else "default", char.bold)
            if runs and runs[-1][1:] == style:
                runs[-1] = (runs[-1][0] + char.data, *style)
            else:
                runs.append((char.data, *style))
        lines.append([run for run in runs if run[0].strip()] and runs)
    return lines


def svg(frames: list[tuple[float, list]]) -> str:
    """Return an SVG that shows one frame after the other, over and over."""
    kept: list[tuple[float, list]] = []
    for seconds, lines in frames:
        if kept and kept[-1][1] == lines:
            kept[-1] = (min(kept[-1][0] + seconds, 2.5), lines)
        else:
            kept.append((seconds, lines))
    total = sum(seconds for seconds, _ in kept)
    width, height = COLUMNS * CHAR_PX + 2 * MARGIN_PX, ROWS * LINE_PX + 2 * MARGIN_PX
    groups, begin = [], 0.0
    for seconds, lines in kept:
        start, stop = begin / total, (begin + seconds) / total
        begin += seconds
        times = f"0;{start:.5f};{min(stop, 1):.5f}"
        groups.append(
            '<g visibility="hidden"><animate attributeName="visibility" calcMode="discrete" '
            f'dur="{total:.2f}s" repeatCount="indefinite" keyTimes="{times}" '
            f'values="hidden;visible;{"visible" if stop > 0.9999 else "hidden"}"/>'
            f"{''.join(text(number, runs) for number, runs in enumerate(lines))}</g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="ui-monospace,Menlo,Consolas,monospace" font-size="14" '
        f'xml:space="preserve"><style>text{{white-space:pre}}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#2e3440"/>'
        f"{''.join(groups)}</svg>\n"
    )


def text(number: int, runs: list[tuple[str, str, bool]]) -> str:
    """Return a line of a frame."""
    spans = "".join(
        f'<tspan fill="{COLORS[color]}"{BOLD if bold else ""}>{escape(data)}</tspan>'
        for data, color, bold in runs
    )
    y = MARGIN_PX + LINE_PX * (number + 0.8)
    return f'<text x="{MARGIN_PX}" y="{y:.1f}">{spans}</text>' if runs else ""


if __name__ == "__main__":
    main()
