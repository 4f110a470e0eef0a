"""Files of a model are copied with it; leftovers of training and secrets are not."""

import pytest
import tiny

from splitquant_mlx import Recipe, cli, convert, load, verify
from splitquant_mlx.errors import SplitQuantWarning, TargetError
from splitquant_mlx.models.companions import companions

RTN = Recipe(method="rtn")
LEFTOVERS = (
    "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "all_results.json", "train_results.json",
    "params.json", "requirements.txt", "modeling_llama.py",
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return tiny.write_checkpoint(tmp_path / "model")


def test_leftovers_of_training_are_not_copied(model, tmp_path):
    for name in LEFTOVERS:
        (model / name).write_text("{}")
    (model / "LICENSE").write_text("MIT")
    convert(model, tmp_path / "out", recipe=RTN)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "splitquant.json",
        "model.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


def test_named_chat_templates_are_copied(model, tmp_path):
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools")
    (model / "chat_template.jinja").write_text("plain")
    manifest = convert(model, tmp_path / "out", recipe=RTN)
    assert "additional_chat_templates/tool_use.jinja" in manifest.files
    tokenizer = load(tmp_path / "out")[1]
    assert tokenizer.chat_template == {"default": "plain", "tool_use": "tools"}
    assert not any(check.problems for check in verify(tmp_path / "out"))


def linked(model, directory, target=lambda file: file):
    """Create a directory of links to the files of a model."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(target(file))
    return directory


def test_links_to_another_model_or_into_a_hub_cache_are_followed(model, tmp_path):
    blobs = tmp_path / "hub" / "models--org--m" / "blobs"
    blobs.mkdir(parents=True)
    for file in model.iterdir():
        (blobs / f"sha-{file.name}").write_bytes(file.read_bytes())
    into_cache = linked(model, tmp_path / "a", lambda file: blobs / f"sha-{file.name}")
    for source in (into_cache, linked(model, tmp_path / "b"), linked(into_cache, tmp_path / "c")):
        out = tmp_path / f"{source.name}-out"
        convert(source, out, recipe=RTN)
        assert not any(file.is_symlink() for file in out.iterdir())
        assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["vocab.txt", "LICENSE", "tokenizer_extra.json"])
def test_a_link_to_a_file_of_another_name_is_refused(model, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "config.json").write_text("{}")
    (model / name).symlink_to("../secret")
    with pytest.raises(Exception, match="links to a file outside"):
        list(companions(model))


@pytest.mark.parametrize("tokenizer", [None, "tekken.json", "tokenizer.json"])
def test_an_unusable_tokenizer_gives_an_early_warning(tmp_path, tokenizer):
    source = tiny.write_checkpoint(tmp_path / "model", tokenizer=False)
    if tokenizer:
        (source / tokenizer).write_text("{}")
    with pytest.warns(SplitQuantWarning, match=r"the tokenizer cannot be loaded: .*only weights"):
        convert(source, tmp_path / "out", recipe=RTN)


@pytest.mark.filterwarnings("default::splitquant_mlx.errors.SplitQuantWarning")
def test_chat_is_not_recommended_without_a_tokenizer(tmp_path, capfd):
    source = tiny.write_checkpoint(tmp_path / "model", tokenizer=False)
    arguments = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out")]
    assert cli.run([*arguments, "--method", "rtn"]) == 0
    out, err = capfd.readouterr()
    assert "It has no usable tokenizer" in out and "Next:" not in out
    assert "it has none of tokenizer.json" in err


@pytest.mark.parametrize("name", ["out\udc80", "out\ud800", "out\0"])
def test_a_target_that_cannot_be_encoded_is_refused_early(tmp_path, name):
    with pytest.raises(TargetError, match=r"cannot write '.*out\\(x00|ud[c8])"):
        convert(tmp_path / "nosuch", tmp_path / name)


def test_a_tokenizer_with_code_gives_no_prompt(model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("convert asks to run code"))
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(tiny.json.dumps(settings))
    with pytest.warns(SplitQuantWarning, match="trust_remote_code"):
        convert(model, tmp_path / "out", recipe=RTN)
