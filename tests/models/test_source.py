import errno
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from fake_hub import COMMIT, SHARDED, WHOLE, Failure, FakeHub

from splitquant_mlx.errors import SourceError
from splitquant_mlx.models.source import Source, cached, resolve

LLAMA = Path(__file__).resolve().parents[1] / "trained" / "llama"
TOKEN = "hf_doNotShowThisToken"
GATED = Failure(status=403, code="GatedRepo", where="/resolve/")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as hub, hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"):
        yield hub


def refusal(model: str, **options) -> str:
    """Return the error message of `resolve`: always one line, never with the token."""
    with pytest.raises(SourceError) as caught:
        resolve(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_directory_and_gguf_are_returned_unchanged(tmp_path, monkeypatch):
    gguf = tmp_path / "a.GGUF"
    gguf.write_bytes(b"GGUF")
    assert resolve(str(tmp_path)) == Source(name=str(tmp_path), path=tmp_path, revision=None)
    assert resolve(str(gguf)).path == gguf
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.GGUF").path == gguf


def test_existing_path_wins_over_a_repo_of_that_name(tmp_path, monkeypatch, hub):
    (tmp_path / "org" / "whole").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/whole").path == Path("org/whole")
    assert hub.requests == []


@pytest.mark.parametrize(
    "model", ["./x", "../x", "/no/x", "~/no-such", "a/b/c", "x.gguf", "b/x.safetensors", "a\\b"]
)
def test_a_name_like_a_path_is_never_requested(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(model).startswith(f"no such path: {model!r}")
    assert hub.requests == []


def test_other_bad_names(tmp_path, hub):
    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert "pass the model's directory" in refusal(str(weights))
    assert "is empty" in refusal(" ")
    assert "only the repo id" in refusal("https://example.org/org/whole")
    assert "File name too long" in refusal("x" * 300)
    for model in ("a b", "a--b", "org/", "-x", "a\0b", "a\nb"):
        assert "neither an existing path nor a repo id" in refusal(model)
    assert hub.requests == []


def test_revision_of_a_local_path_is_refused(tmp_path):
    assert "hub repos only" in refusal(str(tmp_path), revision="main")


def test_a_real_model_is_downloaded_completely(hub):
    files = {path.name: path.read_bytes() for path in LLAMA.iterdir()}
    hub.repos["org/stories"] = files
    source = resolve("org/stories")
    assert source == Source(name="org/stories", path=source.path, revision=COMMIT)
    fetched = {path.name: path.read_bytes() for path in source.path.iterdir()}
    assert fetched == files


def test_only_what_a_model_needs_is_fetched(hub):
    names = {path.name for path in resolve("org/whole").path.rglob("*")}
    expected = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}
    assert names == {*expected, "README.md"}  # it has the licence
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_revision_is_resolved_and_the_cache_serves_offline(hub, revision):
    first = resolve("org/sharded", revision=revision)
    assert first.revision == COMMIT
    hub.close()
    start = time.monotonic()
    assert resolve("org/sharded", revision=revision) == first
    assert cached("org/sharded", revision=revision) == first
    assert time.monotonic() - start < 5
    assert cached("org/whole") is None


@pytest.mark.parametrize("offline", [False, True])
def test_downloads_of_other_programs_are_used_offline(hub, monkeypatch, offline):
    from huggingface_hub import constants, snapshot_download

    hub.repos["org/whole"] = WHOLE | {"LICENSE": b"MIT"}
    path = snapshot_download("org/whole", allow_patterns=["config.json", "model*.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.close()
    expected = Source(name="org/whole", path=Path(path), revision=COMMIT)
    assert resolve("org/whole") == expected
    for revision in (COMMIT, COMMIT[:7]):
        assert resolve("org/whole", revision=revision) == expected
    refusal("org/whole", revision="c0ffee1")  # not a prefix of a commit in the cache


def test_a_commit_in_the_cache_is_suggested(hub):
    from huggingface_hub import snapshot_download

    path = Path(snapshot_download("org/whole", revision=COMMIT))
    hub.close()
    assert f"only commit {COMMIT}: pass one as --revision" in refusal("org/whole")
    assert resolve("org/whole", revision=COMMIT).path == path


def test_named_chat_templates_are_fetched(hub):
    name = "additional_chat_templates/tool_use.jinja"
    hub.repos["org/named"] = WHOLE | {name: b"tools", "original/chat_template.jinja": b"x"}
    path = resolve("org/named").path
    assert (path / name).read_bytes() == b"tools" and not (path / "original").exists()


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_cache_serves_while_the_hub_refuses(hub, status):
    first = resolve("org/whole")
    hub.failure = Failure(status=status)
    assert resolve("org/whole") == first


@pytest.mark.parametrize("offline", [False, True])
def test_an_incomplete_cache_is_not_used(hub, monkeypatch, offline):
    from huggingface_hub import constants

    source = resolve("org/sharded")
    (source.path / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.close()
    assert cached("org/sharded") is None
    expected = "HF_HUB_OFFLINE is set: unset it" if offline else "cannot be reached"
    assert expected in refusal("org/sharded")


def test_an_unreadable_cache_is_not_used(hub, tmp_path):
    (tmp_path / "hub").write_text("a file where the directory should be")
    assert cached("org/whole") is None
    message = refusal("org/whole")
    assert str(tmp_path / "hub") in message and "Not a directory" in message


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (GATED, "ask for access at {hub}/org/whole and log in with `hf auth login` or set"),
        (Failure(status=401, code="RepoNotFound"), "no such path, and no such repo at {hub}"),
        (Failure(status=404), "no such path, and no such repo at {hub}"),
        (Failure(status=401), "{hub} refused access (401)"),
        (Failure(status=403, where="/resolve/"), "{hub} refused access (403)"),
        (Failure(status=429), "too many requests to {hub} (429)"),
        (Failure(status=500), "{hub} answered with HTTP status 500: try again later"),
    ],
)
def test_refusals_of_the_hub(hub, failure, expected):
    hub.failure = failure
    assert expected.format(hub=hub.endpoint) in refusal("org/whole")


def test_missing_repo_and_revision(hub):
    assert "org/absent: no such path, and no such repo" in refusal("org/absent")
    assert "no revision 'v9'" in refusal("org/whole", revision="v9")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights (pytorch_model.bin)"),
        (["config.json", *(f"q{n}.gguf" for n in range(6))], "q2.gguf and 3 more): download one"),
        (["config.json", "onnx/model.safetensors"], "has no weights"),
        (["adapter_model.safetensors"], "no config.json"),
        ([], "has no weights"),
    ],
)
def test_repo_with_nothing_to_quantize_is_refused_before_a_download(hub, names, expected):
    hub.repos["org/odd"] = dict.fromkeys(names, b"x")
    assert expected in refusal("org/odd")
    assert hub.requests == ["/api/models/org/odd"]


def test_an_index_that_does_not_match_the_repo(hub):
    lacking = {name: body for name, body in SHARDED.items() if "00002-of" not in name}
    hub.repos["org/lacking"] = lacking
    assert "lacks weight files: model-00002-of" in refusal("org/lacking")
    hub.repos["org/broken"] = WHOLE | {"model.safetensors.index.json": b"[]"}
    assert "index.json is corrupt" in refusal("org/broken")


@pytest.mark.parametrize("manner", ["silent", "dribbling", "dead"])
@pytest.mark.parametrize("timeout_s", [None, 0.3])
def test_a_hub_that_does_not_answer_times_out(hub, monkeypatch, manner, timeout_s):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", timeout_s or 0.2)
    if manner == "dead":
        hub.close()
    else:
        setattr(hub, manner, True)
    start = time.monotonic()
    message = refusal("org/whole", timeout_s=timeout_s)
    assert f"not in the cache, and {hub.endpoint} cannot be reached" in message
    assert time.monotonic() - start < 5


def test_an_interrupted_download_is_not_used_and_is_resumed(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.truncated = True
    assert "run the command again" in refusal("org/whole")
    assert cached("org/whole") is None
    hub.truncated = False
    weights = resolve("org/whole").path / "model.safetensors"
    assert weights.read_bytes() == WHOLE["model.safetensors"]


DOWNLOAD = "import sys, splitquant_mlx.models.source as s; s.resolve(sys.argv[1])"


def environment_of(hub, cache):
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache.parent / "home"),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def killed_download(hub, cache, stalled):
    """Download in a process that is killed during a file."""
    hub.stalled = stalled
    command = [sys.executable, "-c", DOWNLOAD, "org/large"]
    with subprocess.Popen(command, env=environment_of(hub, cache)) as process:
        blob, deadline = sha256(hub.repos["org/large"][stalled]).hexdigest(), time.monotonic() + 60
        while not any(file.stat().st_size for file in cache.rglob(f"{blob}*incomplete")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    hub.stalled = ""


def test_a_killed_download_is_resumed(hub, tmp_path):
    weights = bytes(range(256)) * 100_000
    hub.repos["org/large"] = WHOLE | {"model.safetensors": weights}
    killed_download(hub, tmp_path / "hub", "model.safetensors")
    assert cached("org/large") is None
    hub.sent.clear()
    source = resolve("org/large")
    assert (source.path / "model.safetensors").read_bytes() == weights
    assert hub.sent == ["model.safetensors"]  # complete files are not downloaded again


def test_files_of_a_killed_download_are_removed_later(hub, tmp_path):
    source = resolve("org/whole")
    left = [source.path.parents[1] / "blobs" / f"{n}.incomplete" for n in (1, 2)]
    for file in left:
        file.write_text("half")
    os.utime(left[0], (0, 0))
    resolve("org/whole")
    assert [file.exists() for file in left] == [False, True]  # the second may be in progress


def test_a_download_killed_before_the_tokenizer_is_not_used(hub, tmp_path):
    tokenizer = b"pieces" * 4_000_000
    hub.repos["org/large"] = WHOLE | {"tokenizer.model": tokenizer}
    killed_download(hub, tmp_path / "hub", "tokenizer.model")
    assert cached("org/large") is None
    assert (resolve("org/large").path / "tokenizer.model").read_bytes() == tokenizer
    assert cached("org/large")


def test_full_disk(hub, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert f"the disk is full: free some space in {tmp_path / 'hub'}" in refusal("org/whole")


def test_malformed_token_is_not_quoted(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_hidden\x0bpart")
    message = refusal("org/whole")
    assert "LocalProtocolError" in message
    assert "hf_hidden" not in message


def test_password_in_the_endpoint_is_not_quoted(hub, monkeypatch):
    from huggingface_hub import constants

    hub.failure = Failure(status=500)
    address = hub.endpoint.replace("//", "//user:secret@")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    message = refusal("org/whole")
    assert hub.endpoint in message
    assert "secret" not in message


def test_environment_variables_reach_the_hub_and_its_import_is_late(hub, tmp_path):
    code = (
        "import sys, splitquant_mlx.models.source as s; "
        "assert 'huggingface_hub' not in sys.modules; "
        "print(s.resolve('org/whole').path)"
    )
    cache = tmp_path / "elsewhere" / "hub"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment_of(hub, cache),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(cache)
    assert run.stderr == ""
