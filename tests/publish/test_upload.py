"""A converted model is uploaded completely, with its card; the token is sent only to the hub."""

import json
import shutil

import mlx.core as mx
import pytest
import tiny
from fake_hub import Failure, FakeHub
from fake_xet import TOKEN as STORAGE_TOKEN

from splitquant_mlx import Recipe, cli, convert, load
from splitquant_mlx.publish.card import is_own

TOKEN = "hf_doNotShowThisToken"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Original\n"
# raised by the HTTP library for calls of huggingface_hub
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with FakeHub() as hub, hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"):
        yield hub


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    home = tmp_path_factory.mktemp("published")
    source = tiny.write_checkpoint(home / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("Apache License")
    for method in ("splitquant", "rtn"):
        convert(source, home / method, recipe=Recipe(method=method))
    return home


@pytest.fixture
def model(converted, tmp_path):
    """Return a copy of the split model."""
    return shutil.copytree(converted / "splitquant", tmp_path / "model")


@pytest.fixture
def upload(capfd):
    """Return a function that runs `upload` and returns exit code, stdout and stderr."""

    def run(path, *options, repo="user/model"):
        arguments = ["upload", "--path", path, "--upload-repo", repo, *options]
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert TOKEN not in out + err
        return code, out, err

    return run


@pytest.fixture
def refused(upload):
    """Return a function that runs `upload`, which must fail, and returns the error message."""

    def run(*arguments, **options):
        code, out, err = upload(*arguments, **options)
        _, prefix, line = err.partition("splitquant-mlx: error: ")
        line = line.removesuffix("\n")
        assert code == 2 and prefix and line.isprintable()
        assert "unexpected" not in line and "Traceback" not in err and "Uploaded" not in out
        return line

    return run


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def arrived(hub, repo="user/model"):
    return {name: body for name, body in hub.repos[repo].items() if name != ".gitattributes"}


@pytest.mark.parametrize("way", ["whole", "in parts", "xet"])
def test_all_bytes_arrive_and_the_model_loads(hub, model, upload, monkeypatch, way):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way != "xet")
    hub.chunk_size = 50_000 if way == "in parts" else None
    code, out, err = upload(model)
    assert code == 0, err
    assert f"Uploaded 9 files to {hub.endpoint}/user/model" in out
    assert arrived(hub) == contents(model)
    assert len(hub.stored) == (4 if way == "in parts" else 1)
    assert hub.commits == [("user/model", "main", "Upload a model converted by splitquant-mlx")]
    tokens = mx.array([[2, 3, 4]])
    here, there = load(model)[0], load("user/model")[0]
    assert mx.array_equal(here(tokens), there(tokens))


@pytest.mark.parametrize("way", ["whole", "xet"])
def test_the_token_is_sent_only_in_headers_to_the_hub(hub, model, upload, monkeypatch, way):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way != "xet")
    assert upload(model)[0] == 0
    assert hub.tokens <= {f"Bearer {TOKEN}", f"Bearer {STORAGE_TOKEN}", None}
    assert len(hub.received) > 6
    assert not any(TOKEN.encode() in seen for _, _, seen in hub.received)
    assert not any(TOKEN.encode() in body for body in contents(model).values())
    stored = [sent for path, sent, _ in hub.received if path.startswith(("/storage/", "/cas/"))]
    assert stored and f"Bearer {TOKEN}" not in stored


def test_convert_uploads_its_output(hub, converted, tmp_path, capfd):
    arguments = ["convert", "--model", converted / "source", "--mlx-path", tmp_path / "out"]
    arguments += ["--method", "rtn", "--upload-repo", "user/other"]
    assert cli.run([str(argument) for argument in arguments]) == 0
    assert "Uploaded 8 files to" in capfd.readouterr().out
    assert arrived(hub, "user/other") == contents(tmp_path / "out")
    assert is_own(hub.repos["user/other"]["README.md"].decode())


@pytest.mark.parametrize("repo", ["model", "a/b/c", "us er/model", "user/", "user/a--b", "x" * 200])
def test_an_invalid_repo_name_is_refused(hub, model, converted, tmp_path, refused, capfd, repo):
    assert "expected a repo name USER/NAME" in refused(model, repo=repo)
    arguments = ["convert", "--model", converted / "source", "--mlx-path", tmp_path / "out"]
    assert cli.run([*map(str, arguments), "--upload-repo", repo]) == 2
    assert "expected a repo name USER/NAME" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_a_dry_run_writes_the_card_and_sends_nothing(hub, model, upload):
    code, out, _ = upload(model, "--dry-run")
    card = (model / "README.md").read_text()
    assert code == 0 and card in out and is_own(card)
    for name, body in contents(model).items():
        assert any(line.split()[-1:] == [name] for line in out.splitlines()), name
        assert body
    assert "nothing was" in out and hub.requests == []
    report = json.loads(upload(model, "--dry-run", "--json", "-")[1])
    assert report["card"] == card and report["address"] is None and hub.requests == []
    assert report["files"] == {file.name: file.stat().st_size for file in model.iterdir()}


def test_only_files_of_the_model_are_sent(hub, model, upload):
    before = {*contents(model), "README.md"}
    for name in (
        "notes.txt", "results.json", ".DS_Store", ".env", ".tokenizer.json", "shard-00001.partial",
        "old.safetensors", "evil.py", "model.safetensors.partial",
    ):  # fmt: skip
        (model / name).write_text("mine")
    for name in (".cache", "__pycache__", "sub"):
        (model / name).mkdir()
        (model / name / "tokenizer.json").write_text("mine")
    code, _, err = upload(model)
    assert code == 0 and set(arrived(hub)) == before
    assert "not sent" in err and "notes.txt" in err.replace("and 4 more", "notes.txt")


def test_a_link_out_of_the_directory_is_not_followed(hub, model, tmp_path, refused):
    (tmp_path / "secret").write_text("secret")
    for name in ("vocab.txt", "README.md"):
        (model / name).symlink_to("../secret")
        assert "links to a file outside" in refused(model)
        (model / name).unlink()
    assert hub.requests == []


def edit(name, **changes):
    def change(model):
        file = model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


DAMAGED = {
    "no manifest": (lambda m: (m / "splitquant.json").unlink(), "was not made by"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "is missing"),
    "no model file": (lambda m: (m / "splitquant_model.py").unlink(), "is missing or not a file"),
    "another's manifest": (edit("splitquant.json", stored_bytes=7), "expected 7 bytes"),
    "a recipe of its own": (edit("splitquant.json", recipe={"a": 1}), "a: unknown key"),
    "foreign code": (edit("config.json", model_file="evil.py"), "other code is never published"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "a pipe of a card": (lambda m: (m / "README.md").mkdir(), "is not a file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_an_incomplete_checkpoint_is_not_sent(hub, model, refused, damage, message):
    damage(model)
    before = {path.name for path in model.iterdir()}
    assert message in refused(model)
    assert hub.requests == [] and {path.name for path in model.iterdir()} == before


def test_a_card_written_by_hand_is_kept_or_replaced_by_option(hub, model, upload, refused):
    assert upload(model, "--dry-run")[0] == 0
    generated = (model / "README.md").read_text()
    assert upload(model, "--dry-run")[0] == 0, "a generated card is replaced"
    changed = generated.replace("Not measured.", "It is good.")
    for text in (changed, "# Mine\n", generated.rstrip("\n"), ""):
        (model / "README.md").write_text(text)
        assert "--card keep" in refused(model)
        assert (model / "README.md").read_text() == text
    (model / "README.md").write_text(changed)
    assert upload(model, "--card", "keep")[0] == 0
    assert hub.repos["user/model"]["README.md"].decode() == changed
    assert upload(model, "--card", "replace")[0] == 0
    assert hub.repos["user/model"]["README.md"].decode() == generated
    assert "expected keep or replace" in refused(model, "--card", "burn")


FAILURES = {
    "no right": (Failure(status=403, where="/api/repos/create"), "refused access (403)"),
    "token unknown": (Failure(status=401, where="whoami"), "refused access (401)"),
    "no right to commit": (
        Failure(status=403, where="/commit/", message="You need write access, ]0;owned"),
        "(You need write access",
    ),
    "private quota": (
        Failure(status=403, where="/commit/", message="Private repository storage limit reached"),
        "storage quota exceeded",
    ),
    "storage full": (Failure(status=507, where="/storage/"), "storage quota exceeded"),
    "too large": (Failure(status=413, where="/commit/"), "storage quota exceeded"),
    "too many": (Failure(status=429, where="whoami"), "wait some minutes"),
    "bad request": (Failure(status=400, where="/commit/", message="Bad\nyaml"), "(Bad yaml)"),
    "broken": (Failure(status=500, where="whoami"), "HTTP status 500"),
}


@pytest.mark.parametrize(("failure", "message"), FAILURES.values(), ids=FAILURES)
def test_errors_of_the_hub_are_reported_on_one_line(hub, model, refused, failure, message):
    hub.failure = failure
    assert message in refused(model)
    assert hub.commits == []


def test_upload_requires_a_login(hub, model, converted, tmp_path, refused, capfd, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "you are not logged in" in refused(model)
    arguments = ["convert", "--model", converted / "source", "--mlx-path", tmp_path / "out"]
    assert cli.run([*map(str, arguments), "--upload-repo", "user/model"]) == 2
    assert "you are not logged in" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_a_read_only_token_is_refused(hub, model, refused):
    hub.role = "read"
    assert "the token is read-only" in refused(model)
    assert hub.requests == ["/api/whoami-v2"] and not (model / "README.md").exists()


def test_an_unreachable_hub(hub, model, refused, monkeypatch):
    from huggingface_hub import constants

    hub.close()
    assert "cannot be reached" in refused(model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(model)


def test_a_hub_that_does_not_answer(hub, model, refused, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.silent = True
    assert "no answer within 0.2 s" in refused(model)


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}\x01", f"{TOKEN}é"])
@pytest.mark.parametrize("where", ["whoami", "/commit/"])
def test_a_traceback_hides_the_token(hub, model, monkeypatch, capfd, token, where):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.failure = Failure(status=403, where=where, message=f"Bearer {TOKEN} may not, {TOKEN}")
    arguments = ["upload", "--path", str(model), "--upload-repo", "user/model"]
    assert cli.run(arguments, debug=True) == 2
    out, err = capfd.readouterr()
    assert "Traceback" in err and "doNotShow" not in out + err
    assert all(character.isprintable() or character in "\r\n" for character in err)


def test_an_interrupted_upload_resumes(hub, model, upload, refused):
    hub.failure = Failure(status=403, where="/commit/")
    refused(model)
    assert len(hub.stored) == 1 and hub.commits == []
    hub.failure = None
    assert upload(model)[0] == 0
    assert len(hub.stored) == 1, "stored files are not sent again"
    assert arrived(hub) == contents(model)
    assert upload(model)[0] == 0, "nothing is left to send"


def test_ctrl_c_names_the_command_that_resumes(hub, model, upload, monkeypatch):
    from huggingface_hub import HfApi

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "upload_folder", interrupt)
    code, _, err = upload(model)
    assert code == 130 and "Run `splitquant-mlx upload` to resume." in err


def test_an_older_conversion_is_replaced_completely(hub, model, converted, upload):
    assert upload(converted / "rtn")[0] == 0
    hub.repos["user/model"]["model-00002-of-00002.safetensors"] = b"older"
    hub.repos["user/model"]["picture.png"] = b"of the user"
    assert upload(model)[0] == 0
    assert arrived(hub) == {**contents(model), "picture.png": b"of the user"}
    assert upload(converted / "rtn")[0] == 0
    assert arrived(hub) == {**contents(converted / "rtn"), "picture.png": b"of the user"}


def test_another_model_is_overwritten_only_by_option(hub, model, upload, refused):
    before = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"original"}
    hub.repos["user/model"] = dict(before)
    assert "contains a model that splitquant-mlx did not make" in refused(model)
    assert hub.repos["user/model"] == before
    assert upload(model, "--overwrite")[0] == 0
    assert arrived(hub) == contents(model)


def test_private_branch_and_pull_request(hub, model, upload, refused):
    assert upload(model, "--private", "--revision", "4-bit")[0] == 0
    assert hub.private == {"user/model"} and arrived(hub) == {}
    assert arrived(hub, "user/model@4-bit") == contents(model)
    code, out, err = upload(model, "--create-pr")
    assert code == 0, err
    assert f"{hub.endpoint}/user/model/discussions/1" in out
    assert arrived(hub, "user/model@refs/pr/1") == contents(model) and arrived(hub) == {}
    assert "leave out --revision" in refused(model, "--create-pr", "--revision", "x")
