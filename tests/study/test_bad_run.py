"""Full disks, code in checkpoints, damaged tokenizers and signals."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from damage import edit_config, model_at, tensor, tree

from splitquant_mlx import CheckpointError, SplitQuantError, TargetError, convert, load
from splitquant_mlx.cli import run
from splitquant_mlx.errors import SplitQuantWarning


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("overwrite", [False, True])
def test_write_that_fails(refusal, tmp_path, monkeypatch, number, overwrite):
    from splitquant_mlx.formats.shard_writer import ShardWriter

    add, count = ShardWriter.add, []

    def add_or_fail(self, name, array):
        add(self, name, array)
        count.append(name)
        if len(count) == 12:
            raise OSError(number, os.strerror(number))

    tiny.write_checkpoint(tmp_path / "source")
    model_at(tmp_path / "target")
    monkeypatch.setattr(ShardWriter, "add", add_or_fail)
    options = ["--overwrite"] if overwrite else []
    target = tmp_path / ("target" if overwrite else "other")
    message = refusal(None, *options, target=target, late=True)
    problem = os.strerror(number) if number == errno.EIO else "disk full while writing"
    assert problem in message and str(target) in message


def test_too_little_space_is_found_before_the_work(refusal, tmp_path, monkeypatch):
    from splitquant_mlx.conversion import save

    class Usage:
        free = 1000

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: Usage)
    assert re.search(r"needs \d+\.\d kB, 1\.0 kB are free", refusal())


def test_parents_that_cannot_all_be_made_are_removed(refusal, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def mkdir_or_fail(self, *args, **kwargs):
        if self.name == "er":
            mkdir(self.parent)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(self, *args, **kwargs)

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(Path, "mkdir", mkdir_or_fail)
    assert "disk full" in refusal(target=tmp_path / "deep" / "er" / "target")


@pytest.mark.parametrize("step", ["first", "second"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_replacing_that_is_interrupted_leaves_the_old_model(tmp_path, monkeypatch, step, kind):
    source, target = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "target"
    model_at(target)
    rename = Path.rename
    failing = tmp_path / ".target.partial" / "model" if step == "second" else target

    def rename_or_fail(self, other):
        if self == failing:
            raise kind("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else TargetError):
        convert(source, target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    # an interrupted conversion resumes from the finished weights; an error leaves nothing
    remaining = [".target.partial"] if kind is KeyboardInterrupt else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*remaining, "source", "target"]
    monkeypatch.undo()
    convert(source, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_code_in_the_checkpoint_is_never_run(refusal, tmp_path, key):
    source = tiny.write_checkpoint(tmp_path / "source")
    marker = tmp_path / "marker"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(**{key: "evil.py" if key == "model_file" else names})(source)
    if key == "model_file":
        assert "asks to run 'evil.py' from the checkpoint" in refusal()
    else:
        convert(source, tmp_path / "target")
        load(tmp_path / "target")
        assert not (tmp_path / "target" / "evil.py").exists()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../x", "os", "antigravity", "llama.foo", "x/../../evil"])
def test_model_type_imports_nothing_else(refusal, tmp_path, name):
    source = tiny.write_checkpoint(tmp_path / "source")
    edit_config(model_type=name)(source)
    before = {module for module in sys.modules if not module.startswith("mlx_lm")}
    assert "unknown architecture" in refusal()
    assert "antigravity" not in set(sys.modules) - before


def test_without_a_tokenizer_the_weights_are_converted(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", tokenizer=False)
    with pytest.warns(SplitQuantWarning, match="tokenizer cannot be loaded"):
        convert(source, tmp_path / "target")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load(tmp_path / "target")


def test_broken_tokenizer_is_copied_as_it_is(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    with pytest.warns(SplitQuantWarning, match="tokenizer cannot be loaded"):
        convert(source, tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{"
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load(tmp_path / "target")


def test_unreadable_tokenizer_is_found_before_the_work(refusal, tmp_path, monkeypatch):
    read_bytes = Path.read_bytes

    def read_or_fail(self):
        if self == tmp_path / "source" / "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(self)

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    assert "tokenizer.json cannot be read: Input/output error" in refusal()


def test_config_that_says_it_is_not_quantized(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", quantization_config=None)
    convert(source, tmp_path / "target")
    assert load(tmp_path / "target")


def test_checkpoint_of_symlinks_is_converted_to_files(tmp_path):
    """The hub's cache consists of symlinks."""
    home = tmp_path / "models--org--name"
    blobs = tiny.write_checkpoint(home / "blobs", shards=2)
    source = home / "snapshots" / "c0ffee"
    source.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(number))
        (source / file.name).symlink_to(f"../../blobs/{number}")
    (source / "broken.json").symlink_to("nowhere")
    convert(source, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    assert (tmp_path / "target" / "tokenizer.json").is_file()
    assert not (tmp_path / "target" / "broken.json").exists()


def test_names_cannot_drive_the_terminal(refusal, tmp_path):
    evil = "\x1b[2J\n\x07evil\u202e"
    source = tiny.write_checkpoint(tmp_path / f"so{evil}urce")
    assert "exists already" in refusal(source, target=source)
    assert "no such path" in refusal(tmp_path / evil)
    edit_config(model_type=evil)(source)
    assert "unknown architecture" in refusal(source)
    edit_config(model_type="llama")(source)
    tensor(evil, mx.zeros(3))(source)
    assert "extra tensors" in refusal(source)
    assert "No such option" in refusal(source, f"--{evil}")


SLOW = """
import sys, time
from splitquant_mlx.cli import run
from splitquant_mlx.conversion.converter import Converter
read = Converter._read
def slow_read(self, name):
    w = read(self, name)
    if "layers.1" in name:
        print("ready", flush=True)
        for _ in range(300):  # a signal to another thread does not interrupt a sleep
            time.sleep(0.1)
    return w
Converter._read = slow_read
sys.exit(run(sys.argv[1:]))
"""

LIMITED = """
import resource, signal, sys
from splitquant_mlx.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(run(sys.argv[1:]))
"""


def start(script, tmp_path):
    command = ["convert", "--model", str(tmp_path / "source"), "--mlx-path"]
    return subprocess.Popen(
        [sys.executable, "-c", script, *command, str(tmp_path / "deep" / "target")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        preexec_fn=_hear_signals,
    )


def _hear_signals():
    """A job of a shell script ignores SIGINT, one of nohup SIGHUP, and so would their children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.robustness
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_nothing(tmp_path, number):
    tiny.write_checkpoint(tmp_path / "source")
    before = tree(tmp_path)
    with start(SLOW, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        assert tree(tmp_path) != before
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == "Interrupted. Run the same command to continue."
    assert err.count("\n") == 2  # the current stage, and this message
    assert tree(tmp_path) == before


@pytest.mark.robustness
def test_file_size_limit(tmp_path):
    tiny.write_checkpoint(tmp_path / "source")
    before = tree(tmp_path)
    with start(LIMITED, tmp_path) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    last = err.splitlines()[-1]
    assert last.startswith("splitquant-mlx: error: cannot write ") and "File too large" in last
    assert err.count("\n") == 2 and out == ""
    assert tree(tmp_path) == before


def test_debug_shows_where(tmp_path, capsys):
    assert run(["convert", "--model", str(tmp_path / "nosuch")], debug=True) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("splitquant-mlx: error: no such")


def test_every_refusal_is_a_splitquant_error(tmp_path):
    with pytest.raises(SplitQuantError, match="no such path"):
        convert(tmp_path / "nosuch", tmp_path / "target")
