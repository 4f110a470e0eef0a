"""Run the ranks of a group as processes on this machine, joined by mlx's ring back end."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

COMMAND = [sys.executable, "-m", "splitquant_mlx"]


def free_ports(count: int) -> list[int]:
    """Return ports in a row that the system has just had free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, ExitStack() as others:
            port = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                for number in range(port + 1, port + count):
                    others.enter_context(socket.create_server(("127.0.0.1", number)))
                return list(range(port, port + count))


@contextmanager
def running(*command: object, size: int = 2, environment: dict[str, str] | None = None):
    """Start a command as every rank, yield the processes, kill what is left of them."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
    with ExitStack() as stack:
        hostfile = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hosts.json"
        hostfile.write_text(json.dumps(hosts))
        processes = []
        for rank in range(size):
            launched = {"MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)}
            process = subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **launched, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def finish(processes: list[subprocess.Popen], timeout_s: float = 120) -> list[tuple[int, str, str]]:
    """Wait for all; return exit code, output and errors of each, those of mlx's ring left out."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=timeout_s)
        lines = [line for line in err.splitlines() if not line.startswith("[ring]")]
        ended.append((process.returncode, out, "\n".join(lines)))
    return ended
