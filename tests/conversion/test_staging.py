"""Directories next to the target, left by a killed conversion or created by others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from damage import model_at, tree
from killing import content

from splitquant_mlx import Recipe, TargetError, convert
from splitquant_mlx.cli import run
from splitquant_mlx.conversion import staging
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.recipe import Calibration
from splitquant_mlx.runtime import workspace

SHARD_BYTES = 16_000


class Killed(Exception):
    pass


@pytest.fixture
def source(tmp_path):
    return tiny.write_checkpoint(tmp_path / "source")


@pytest.fixture
def half(source, tmp_path):
    return half_converted(source, tmp_path / "target")


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Return a source, the directory of a killed conversion, and the complete conversion."""
    directory = tmp_path_factory.mktemp("common")
    source = tiny.write_checkpoint(directory / "source")
    convert(source, directory / "whole", max_shard_bytes=SHARD_BYTES)
    return source, half_converted(source, directory / "target"), content(directory / "whole")


def half_converted(source, target, recipe=None):
    """Return the directory of a conversion killed after five and a half shards."""

    def add(writer, name, tensor):
        original(writer, name, tensor)
        if len(writer._shards) == 6:
            raise Killed

    original = ShardWriter.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "add", add)
        patch.setattr(workspace, "_clear", lambda directory: None)
        with pytest.raises(Killed):
            convert(source, target, recipe=recipe, max_shard_bytes=SHARD_BYTES)
    return target.with_name(f".{target.name}.partial")


@pytest.fixture
def resumed(monkeypatch):
    """Return a list that receives the number of shards that each conversion reuses."""
    numbers, resume = [], ShardWriter.resume

    def counted(writer, *args):
        numbers.append(resume(writer, *args))
        return numbers[-1]

    monkeypatch.setattr(ShardWriter, "resume", counted)
    return numbers


def shard(half, number):
    return half / "model" / f"shard-{number:05d}.partial"


def flip(half):
    with shard(half, 3).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut(half):
    os.truncate(shard(half, 3), 1000)


def swap(half):
    shard(half, 3).rename(half / "other")
    shard(half, 4).rename(shard(half, 3))
    (half / "other").rename(shard(half, 4))


def link(half):
    shard(half, 3).rename(half.with_name("elsewhere"))
    shard(half, 3).symlink_to("../../elsewhere")


def edit_journal(change):
    """Return an edit that calls `change` with the list of records after the first line."""

    def edit(half):
        opening, *lines = (half / "journal").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        change(records)
        lines = [opening, *map(json.dumps, records)]
        (half / "journal").write_text("".join(f"{line}\n" for line in lines))

    return edit


def replace_journal(kind):
    def edit(half):
        journal = half / "journal"
        journal.unlink()
        if kind == "fifo":
            os.mkfifo(journal)
        elif kind == "directory":
            journal.mkdir()
        elif kind == "link":
            half.with_name("elsewhere").write_text("dear diary")
            journal.symlink_to("../elsewhere")
        else:
            journal.write_bytes(kind)

    return edit


def litter(half):
    (half / "model" / "config.json").symlink_to("../../elsewhere")
    (half / "model" / "evil.py").write_text("raise SystemExit")
    (half / "model" / "deep").mkdir()
    (half / "replaced").symlink_to("../source")
    (half / "held-by").write_text("1\n")  # a live process without a lock


LAYER = "model.layers.0.self_attn.k_proj"
EDITS = {
    "unchanged": (lambda half: None, 5),
    "a byte of a shard": (flip, 2),
    "a shard cut": (cut, 2),
    "two shards swapped": (swap, 2),
    "a shard that is a link": (link, 2),
    "a shard missing": (lambda half: shard(half, 1).unlink(), 0),
    "no model": (lambda half: shutil.rmtree(half / "model"), 0),
    "litter": (litter, 5),
    "the journal a pipe": (replace_journal("fifo"), 0),
    "the journal a link": (replace_journal("link"), 0),
    "the journal a directory": (replace_journal("directory"), 0),
    "the journal noise": (replace_journal(b"\x00\xff" * 50), 0),
    "the journal deep": (replace_journal(b'{"journal": ' + b"[" * 100_000), 0),
    "a record lost": (edit_journal(lambda records: records.pop(1)), 1),
    "a record of no layers": (edit_journal(lambda records: records[2].update(layers=[])), 5),
    "a record of a text": (edit_journal(lambda records: records[1].update(layers="x")), 1),
    "a record of another form": (edit_journal(lambda records: records[1].update(x=1)), 1),
    "a number as text": (edit_journal(lambda records: records[1].update(number="2")), 1),
    "all layers marked as done": (
        edit_journal(lambda records: records[0].update(layers=records[4]["layers"])),
        5,
    ),
}


@pytest.mark.parametrize(("edit", "reused"), EDITS.values(), ids=EDITS)
def test_only_valid_shards_are_reused(common, resumed, tmp_path, edit, reused):
    source, partial, expected = common
    half = shutil.copytree(partial, tmp_path / ".target.partial")
    edit(half)
    outside = {path: path.read_bytes() for path in tmp_path.glob("elsewhere")}
    convert(source, tmp_path / "target", max_shard_bytes=SHARD_BYTES)
    assert content(tmp_path / "target") == expected
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    assert resumed == [reused]
    assert {path: path.read_bytes() for path in outside} == outside
    assert not half.exists()


def change_source(source):
    """Change a weight, but not the size and time of the file."""
    file = source / "model.safetensors"
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(bytes(4))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("what", ["source", "config", "recipe", "shards"])
def test_different_conversion_starts_over(source, half, resumed, tmp_path, what):
    options = {"recipe": Recipe(), "max_shard_bytes": SHARD_BYTES}
    if what == "source":
        change_source(source)
    elif what == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    elif what == "recipe":
        options["recipe"] = Recipe(bits=8)
    else:
        options["max_shard_bytes"] = 2 * SHARD_BYTES
    convert(source, tmp_path / "target", **options)
    convert(source, tmp_path / "again", **options)
    assert content(tmp_path / "target") == content(tmp_path / "again")
    assert resumed == [0, 0]


@pytest.mark.parametrize("changed", [False, True])
def test_different_calibration_text_starts_over(source, resumed, tmp_path, changed):
    text = tmp_path / "text.txt"
    text.write_text("w2 w3 w4 w5 w6 w7 w8 " * 50)
    calibration = Calibration(text=str(text), num_samples=4, sequence_length=16)
    recipe = Recipe(calibration=calibration)
    half_converted(source, tmp_path / "target", recipe)
    if changed:
        text.write_text("w12 w3 w14 w5 w16 w7 w18 " * 50)
    convert(source, tmp_path / "target", recipe=recipe, max_shard_bytes=SHARD_BYTES)
    assert (resumed[-1] > 0) == (not changed)
    convert(source, tmp_path / "again", recipe=recipe, max_shard_bytes=SHARD_BYTES)
    assert content(tmp_path / "target") == content(tmp_path / "again")


def test_source_that_changes_while_it_is_read(source, tmp_path, monkeypatch):
    add = ShardWriter.add

    def add_and_change(writer, name, tensor):
        add(writer, name, tensor)
        if name == "model.norm.weight":
            change_source(source)

    monkeypatch.setattr(ShardWriter, "add", add_and_change)
    with pytest.raises(Exception, match="changed while it was read"):
        convert(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_replaced_model_is_restored_after_a_kill_and_an_error(source, half, tmp_path):
    """The kill came after the previous model was moved aside, before the new one was renamed."""
    target = tmp_path / "target"
    model_at(half / "replaced")
    with pytest.raises(Exception, match="group size 128"):
        convert(source, target, recipe=Recipe(group_size=128, exclude=("*.down_proj",)))
    assert [path.name for path in target.iterdir()] == ["config.json"] and not half.exists()


IN_THE_WAY = {
    "a file": lambda place: place.write_text("dear diary"),
    "a link": lambda place: place.symlink_to("source"),
    "a broken link": lambda place: place.symlink_to("nowhere"),
    "a directory of something else": lambda place: (
        place.mkdir(),
        (place / "diary.txt").write_text("dear"),
    ),
    "a mark that is a link": lambda place: (
        place.mkdir(),
        (place / "held-by").symlink_to("../source/config.json"),
    ),
    "a mark that is a second name": lambda place: (
        place.mkdir(),
        os.link(place.parent / "source" / "config.json", place / "held-by"),
    ),
    "a mark that is a pipe": lambda place: (place.mkdir(), os.mkfifo(place / "held-by")),
    "a mark that is a directory": lambda place: (place / "held-by").mkdir(parents=True),
}


@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_foreign_files_are_not_touched(source, tmp_path, make):
    make(tmp_path / ".target.partial")
    before = tree(tmp_path)
    with pytest.raises(TargetError, match=r"\.target\.partial.* is in the way: it") as caught:
        convert(source, tmp_path / "target")
    assert "\n" not in str(caught.value)
    after = tree(tmp_path)
    hard_linked = str(source / "config.json")
    assert {**after, hard_linked: None} == {**before, hard_linked: None}


def test_directory_of_another_user_is_not_trusted(source, half, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(TargetError, match="belongs to another user"):
        convert(source, tmp_path / "target")
    assert half.exists()


HOLD = """
import sys, time
from pathlib import Path
from splitquant_mlx.runtime.workspace import workspace
with workspace(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    place = tmp_path / ".target.partial"
    command = [sys.executable, "-c", HOLD, str(place)]
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": root},
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_two_conversions_into_one_target(source, tmp_path, holder, capsys):
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "target")]
    before = tree(tmp_path)
    assert run(command) == 2
    err = capsys.readouterr().err
    assert f"is already running in process {holder.pid}: wait" in err and err.count("\n") == 1
    assert tree(tmp_path) == before
    holder.kill(), holder.wait()
    assert run(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_lock_on_a_removed_directory_is_not_used(tmp_path):
    """The directory may be removed between opening and locking."""
    place = tmp_path / "place"
    flock = workspace.fcntl.flock

    def removed_meanwhile(descriptor, operation):
        workspace.fcntl.flock = flock
        place.rmdir()
        flock(descriptor, operation)

    workspace.fcntl.flock = removed_meanwhile
    with workspace.workspace(place, "x"):
        assert (place / "held-by").read_text() == f"{os.getpid()}\n"
    assert not place.exists()


def test_files_are_synchronized_before_the_rename(source, tmp_path, monkeypatch):
    """A power cut loses everything that was not synchronized before."""
    target, events = tmp_path / "new" / "target", []
    fsync, rename = os.fsync, staging.Path.rename

    def seen_fsync(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(("sync", path, os.fstat(descriptor).st_mtime_ns))

    def seen_rename(path, other):
        if other == target:
            times = {(str(p), p.stat().st_mtime_ns) for p in (path, *path.iterdir())}
            assert times <= {(name, time) for _, name, time in events}, "not synchronized"
            events.append(("rename", str(target), 0))
        return rename(path, other)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to find the file of a descriptor")
    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(staging.Path, "rename", seen_rename)
    convert(source, target, max_shard_bytes=SHARD_BYTES)
    kinds = [event[:2] for event in events]
    place = kinds.index(("rename", str(target)))
    assert ("sync", str(target.parent)) in kinds[place:]
    assert ("sync", str(tmp_path)) in kinds[:place], "the new parent's own name"


def test_resumed_conversion_needs_only_the_remaining_space(source, half, tmp_path, monkeypatch):
    from splitquant_mlx.conversion import pipeline

    needed = []
    monkeypatch.setattr(pipeline, "require_space", lambda path, nbytes: needed.append(nbytes))
    stored = sum(file.stat().st_size for file in (half / "model").iterdir())
    convert(source, tmp_path / "target", max_shard_bytes=SHARD_BYTES)
    convert(source, tmp_path / "other", max_shard_bytes=SHARD_BYTES)
    assert 0.5 * stored < needed[1] - needed[0] < stored
