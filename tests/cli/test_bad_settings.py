"""Invalid settings and targets are refused."""

import mlx.core as mx
import pytest
import tiny
from damage import model_at

from splitquant_mlx import TargetError, convert


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits: expected 2, 3, 4, 5, 6 or 8, got 7"),
        (["--bits", "four"], "--bits: expected an integer, got 'four'"),
        (["--group-size", "48"], "--group-size: expected 16, 32, 64 or 128, got 48"),
        (["--group-size", "128"], "group size 128 divides the width of no layer"),
        (["--clusters", "1"], "--clusters: expected at least 2, got 1"),
        (["--clusters", "9"], "--clusters: expected at most 8, got 9"),
        (["--q-mode", "mxfp4"], "method: expected 'rtn' with mode 'mxfp4', got 'splitquant'"),
        (
            ["--q-mode", "mxfp4", "--method", "rtn", "--bits", "8"],
            "--bits: expected 4 with mode",
        ),
        (
            ["--q-mode", "nosuch"],
            "--q-mode: expected 'affine', 'mxfp4', 'nvfp4'",
        ),
        (
            ["--method", "awq"],
            "--method: expected 'splitquant', 'rtn', 'imatrix'",
        ),
        (["--method", "rtn", "--lm-head", "split"], "--lm-head: not for method 'rtn'"),
        (["--dtype", "int8"], "--dtype: expected 'float16', 'bfloat16' or 'float32', got 'int8'"),
        (["--include", "nothing.*"], "include pattern 'nothing.*' matches no layer"),
        (["--exclude", "*.norm"], "exclude pattern '*.norm' matches no layer of this model"),
        (["--exclude", "*"], "include and exclude leave no layer to convert"),
        (["--revision", "main"], "is a local path: a revision (main) is for hub repos only"),
        (["--device", "tpu"], "--device: expected one of 'cpu', 'gpu', got 'tpu'"),
        (["--nosuch"], "No such option: --nosuch"),
        (["--recipe", "/nosuch.toml"], "cannot read /nosuch.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_settings(refusal, tmp_path, options, message):
    source = tiny.write_checkpoint(
        tmp_path / "source", replace={"model.layers.0.mlp.down_proj.weight": mx.zeros((64, 128))}
    )
    if options[-1] == "128":  # exclude the only layer of width 128
        options = [*options, "--exclude", "*.down_proj"]
    assert message in refusal(source, *options)


RECIPES = {
    b"bites = 4": "bites: unknown key, expected one of method, bits",
    b"bits = ": "is not valid TOML",
    b"bits = '4'": "bits: expected 2, 3, 4, 5, 6 or 8, got ",
    b"bits = true": "bits: expected 2, 3, 4, 5, 6 or 8, got ",
    b"clusters = true": "clusters: expected an integer, got ",
    b"clusters = [3]": "clusters: expected an integer, got ",
    b"method = 1": "method: expected 'splitquant'",
    b"mode = []": "mode: expected 'affine'",
    b"[method]\na = 1": "method: expected 'splitquant'",
    b"include = 'mlp'": "include: expected a list, got 'mlp'",
    b"include = [1]": "include.0: expected a string, got 1",
    b"exclude = 3": "exclude: expected a list, got 3",
    b"\x7fELF\x00\xff\xfe": "is not valid TOML",
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bits = " + b"1" * 5_000, "is not valid TOML"),
        (b"bits = " + b"[" * 100_000, "is not valid TOML"),
        *RECIPES.items(),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_invalid_recipe_files(refusal, tmp_path, content, message):
    tiny.write_checkpoint(tmp_path / "source")
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    error = refusal(None, "--recipe", str(recipe))
    assert message in error and str(recipe) in error


TARGETS = {
    "a file": (lambda path: path.write_text("x"), [], "exists already"),
    "a file, overwrite": (lambda p: p.write_text("x"), ["--overwrite"], "is not a directory"),
    "an empty directory": (lambda path: path.mkdir(), [], "exists already"),
    "a model": (model_at, [], "exists already: choose another --mlx-path, or pass --overwrite"),
    "a broken symlink": (lambda path: path.symlink_to("nowhere"), [], "exists already"),
    "a symlink, overwrite": (
        lambda path: (model_at(path.with_name("model")), path.symlink_to("model")),
        ["--overwrite"],
        "is not a directory",
    ),
    "no model, overwrite": (
        lambda path: (path.mkdir(), (path / "diary.txt").write_text("dear")),
        ["--overwrite"],
        "is not a model directory",
    ),
}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [pytest.param(*case, id=name) for name, case in TARGETS.items()],
)
def test_target_that_exists(refusal, tmp_path, make, options, message):
    tiny.write_checkpoint(tmp_path / "source")
    make(tmp_path / "target")
    assert message in refusal(None, *options, target=tmp_path / "target")


@pytest.mark.parametrize(
    ("target", "message"),
    {
        "file/target": "is not a directory",
        "file/deep/er/target": "is not a directory",
        "link/target": "is not a directory",
        "link/deep/target": "is not a directory",
        "/proc/target": "cannot write /proc/target",
        "/proc/deep/target": "cannot write /proc/deep/target",
        "/dev/null/target": "/dev/null is not a directory",
        "n" * 256: "File name too long",
        "n" * 256 + "/target": "File name too long",
    }.items(),
)
def test_target_that_cannot_be_created(refusal, tmp_path, target, message):
    tiny.write_checkpoint(tmp_path / "source")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert message in refusal(target=tmp_path / target)


@pytest.mark.parametrize("target", ["source", ".", "link"])
def test_target_never_replaces_the_source(refusal, tmp_path, target):
    source = tiny.write_checkpoint(tmp_path / "models" / "source")
    (source.parent / "config.json").write_text("{}")  # looks like a model directory
    (source.parent / "link").symlink_to("source")
    message = refusal(source, "--overwrite", target=source.parent / target)
    assert "is never overwritten" in message


def test_target_in_the_home_of_an_unknown_user(refusal, tmp_path):
    tiny.write_checkpoint(tmp_path / "source")
    assert "no such user's home" in refusal(target="~nosuchuser/x")


def test_target_may_be_in_the_source(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    convert(source, source / "mlx_model")
    assert sorted(path.name for path in source.iterdir()) == [
        "config.json", "mlx_model", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_target_created_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    from splitquant_mlx.conversion import pipeline

    source, target = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "target"
    write_config = pipeline.write_config

    def write_config_and_target(*args):
        write_config(*args)
        model_at(target)

    monkeypatch.setattr(pipeline, "write_config", write_config_and_target)
    with pytest.raises(TargetError, match="exists already"):
        convert(source, target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
