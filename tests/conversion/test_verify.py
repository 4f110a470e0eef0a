"""`verify` detects changes of files, of the manifest, and consistent changes of both."""

import hashlib
import json
import shutil

import mlx.core as mx
import pytest
import tiny
from damage import put_tensors
from fake_hub import FakeHub

from splitquant_mlx import Recipe, convert
from splitquant_mlx.cli import run
from splitquant_mlx.formats.manifest import MODEL_FILE
from splitquant_mlx.models.source import resolve

PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    """Return a source and a directory of its conversions, by method."""
    directory = tmp_path_factory.mktemp("conversions")
    source = tiny.write_checkpoint(directory / "source", dtype=mx.bfloat16)
    for method in ("splitquant", "rtn"):
        convert(source, directory / method, recipe=Recipe(method=method))
    return source, directory


@pytest.fixture
def model(conversions, tmp_path):
    """Return a copy of the split conversion."""
    return shutil.copytree(conversions[1] / "splitquant", tmp_path / "model")


@pytest.fixture
def verify(capsys):
    """Return a function that runs the command and returns exit code, stdout and stderr."""

    def verified(path, *options):
        code = run(["verify", str(path), *map(str, options)])
        out, err = capsys.readouterr()
        assert (code, err.count("\n")) in ((0, 0), (2, 1)) and "unexpected" not in err
        return code, out, err

    return verified


def edit_manifest(**changes):
    def edit(model):
        file = model / "splitquant.json"
        manifest = json.loads(file.read_text())
        manifest.update(changes)
        file.write_text(json.dumps(manifest))

    return edit


def edit_layer(layer_path=PATH, **changes):
    def edit(model):
        file = model / "splitquant.json"
        manifest = json.loads(file.read_text())
        next(layer for layer in manifest["layers"] if layer["path"] == layer_path).update(changes)
        file.write_text(json.dumps(manifest))

    return edit


def rehash(model):
    """Update the hashes in the manifest."""
    names = [file.name for file in model.iterdir() if file.name != "splitquant.json"]
    hashes = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in names}
    edit_manifest(files=hashes)(model)


def edit_tensor(name, change):
    """Change a tensor and the hash of its file."""

    def edit(model):
        tensors = mx.load(str(model / "model.safetensors"))
        put_tensors(model, {name: change(tensors[name])})
        rehash(model)

    return edit


def flip_byte(model):
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def second_weights(model):
    mx.save_safetensors(str(model / "model-more.safetensors"), {"x": mx.zeros(3)})


def edit_config(model):
    config = json.loads((model / "config.json").read_text())
    config["splitquant"]["layers"][PATH]["group_size"] = 32
    (model / "config.json").write_text(json.dumps(config))
    rehash(model)


@pytest.mark.parametrize("method", ["splitquant", "rtn"])
def test_conversions_pass(conversions, verify, method):
    source, directory = conversions
    code, out, _ = verify(directory / method, "--source", source)
    assert code == 0 and out.count(" ok") == 5 and "FAILED" not in out
    assert out.endswith(f"{directory / method} is valid.\n")
    code, out, _ = verify(directory / method)
    assert code == 0 and out.count(" ok") == 4


def test_repos_pass_each_at_its_revision(conversions, tmp_path, monkeypatch, capsys):
    source, directory = conversions

    def files(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    repos = {"org/split": files(directory / "splitquant"), "org/source": files(source)}
    options = ["verify", "org/split", "--revision", "v1", "--source", "org/source"]
    with (
        FakeHub(repos=repos) as hub,
        hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"),
    ):
        assert run(options) == 0
        assert capsys.readouterr().out.count(" ok") == 5
        assert run([*options, "--source-revision", "v2"]) == 2
        assert "org/source: there is no revision 'v2'" in capsys.readouterr().err


@pytest.mark.parametrize("offline", [False, True])
def test_files_that_cannot_be_downloaded_are_not_called_missing(
    conversions, tmp_path, monkeypatch, capsys, offline
):
    from huggingface_hub import constants

    files = {file.name: file.read_bytes() for file in (conversions[1] / "splitquant").iterdir()}
    with (
        FakeHub(repos={"org/split": files}) as hub,
        hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"),
    ):
        resolve("org/split")  # downloads no code
        if offline:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:
            hub.close()
        assert run(["verify", "org/split"]) == 0
        out = capsys.readouterr().out
        assert f"files         incomplete  SHA-256 of {len(files) - 2} files" in out
        reason = f"{MODEL_FILE!r} was not checked: org/split: not in the cache, and http"
        assert reason in out and ("HF_HUB_OFFLINE is set" in out) == offline
        assert out.endswith("org/split is valid, as far as it was checked.\n")


def test_a_file_that_a_repo_lacks_is_missing(conversions, tmp_path, monkeypatch, capsys):
    files = {file.name: file.read_bytes() for file in (conversions[1] / "splitquant").iterdir()}
    del files[MODEL_FILE]
    with (
        FakeHub(repos={"org/split": files}) as hub,
        hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"),
    ):
        assert run(["verify", "org/split"]) == 2
        out = capsys.readouterr().out
        assert f"{MODEL_FILE!r} is in the manifest, but is not" in out and "checked" not in out


def test_revisions_are_of_repos(conversions, verify):
    source, directory = conversions
    err = verify(directory / "rtn", "--revision", "v1", "--source", source)[2]
    assert "rtn is a local path: a revision (v1) is for hub repos only" in err
    err = verify(directory / "rtn", "--source-revision", "v1")[2]
    assert "pass --source, too" in err


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma3_text"])
def test_other_architectures_and_types_pass(verify, tmp_path, architecture, dtype):
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    recipe = Recipe(bits=8, group_size=32, dtype=dtype, embeddings="quantize")
    convert(source, tmp_path / "model", recipe=recipe, max_shard_bytes=50_000)
    code, _, err = verify(tmp_path / "model", "--source", source)
    assert code == 0, err


ALTERED = {
    "a byte of the weights": (flip_byte, "model.safetensors has changed: its SHA-256"),
    "the tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{}"),
        "tokenizer.json has changed",
    ),
    "a file lost": (lambda m: (m / "tokenizer.json").unlink(), "'tokenizer.json' is in the"),
    "more weights": (second_weights, "model-more.safetensors has no hash in the manifest"),
    "no hashes": (edit_manifest(files={}), "config.json has no hash in the manifest"),
    "a file elsewhere": (edit_manifest(files={"../x": "0"}), "'../x' is in the manifest, but"),
    "bits/weight": (edit_manifest(bits_per_weight=4.5), "parameters, got 4.5000"),
    "linear bits/weight": (
        edit_manifest(linear_bits_per_weight=4.5),
        "linear_bits_per_weight: expected",
    ),
    "stored bytes": (edit_manifest(stored_bytes=1), "stored_bytes: expected"),
    "no layers": (edit_manifest(layers=[]), "belongs to no layer in the manifest"),
    "a layer's bytes": (edit_layer(nbytes=8), ", got 8"),
    "a layer's bits": (edit_layer(bits=8), "match the manifest: split, shape [128, 64], bits 8"),
    "a layer's bits none": (edit_layer(bits=None), "match the manifest: split"),
    "a layer's group size 0": (edit_layer(group_size=0), "match the manifest: split"),
    "a layer's shape": (edit_layer(shape=[64, 64]), "match the manifest: split, shape [64, 64]"),
    "a layer's shape huge": (edit_layer(shape=[2**62] * 99), "match the manifest: split"),
    "a layer's shape empty": (edit_layer(shape=[]), "match the manifest: split"),
    "a layer's bits/weight": (edit_layer(bits_per_weight=4.5), ", got 4.5000"),
    "a layer marked as kept": (
        edit_layer(action="keep"),
        "expected weight, got weight, scales, biases",
    ),
    "a layer twice": (edit_layer("model.embed_tokens", path=PATH), "in the manifest twice"),
    "the config": (edit_config, "splitquant differs from the layers in the manifest"),
    "scales infinite": (
        edit_tensor(f"{PATH}.scales", lambda scales: scales * mx.inf),
        "the logits contain NaN",
    ),
    "a tensor of another shape": (
        edit_tensor(f"{PATH}.scales", lambda scales: scales[:, :-1]),
        "do not match the manifest: split",
    ),
}


@pytest.mark.parametrize(("edit", "problem"), ALTERED.values(), ids=ALTERED)
def test_alterations_are_detected(model, verify, edit, problem):
    edit(model)
    code, out, err = verify(model)
    assert code == 2 and "FAILED" in out
    assert problem in out and "does not match its manifest" in err


def one_row(codes):
    """Zero the codes of a row."""
    return mx.concatenate([codes[:-1], mx.zeros_like(codes[-1:])])


# consistent changes, which only the comparison with the original detects
CONSISTENT = {
    "a better ratio": (edit_layer(snr_db=40.0), "signal-to-noise ratio: expected 40.00 dB"),
    "no error": (edit_layer(snr_db=None), "ratio: expected 150.00 dB"),
    "codes of a row": (edit_tensor(f"{PATH}.weight", one_row), "signal-to-noise ratio: expected"),
    "a norm": (edit_tensor("model.norm.weight", lambda w: w * 2), "model.norm.weight differs"),
    "a norm of more bits": (
        edit_tensor("model.norm.weight", lambda w: w.astype(mx.float32)),
        "model.norm.weight differs",
    ),
    "an embedding": (
        edit_tensor("model.embed_tokens.weight", one_row),
        "model.embed_tokens.weight differs from the original",
    ),
    "the source's bytes": (edit_manifest(source_bytes=7), "the size of the original, got 7"),
    "the recipe": (edit_manifest(recipe={"bits": 99}), "the manifest's recipe is invalid"),
}


@pytest.mark.parametrize(("edit", "problem"), CONSISTENT.values(), ids=CONSISTENT)
def test_comparison_with_the_original(conversions, model, verify, edit, problem):
    edit(model)
    code, out, _ = verify(model, "--source", conversions[0])
    assert code == 2 and problem in out and out.count("FAILED") <= 2


def test_rows_outside_the_sample_are_checked(verify, tmp_path):
    """The recorded ratio of a large weight is that of every second row."""
    wide = {"model.layers.0.mlp.up_proj.weight": mx.random.normal((128, 64))}
    source = tiny.write_checkpoint(tmp_path / "source", replace=wide)
    from splitquant_mlx.conversion import original, weight

    patch = pytest.MonkeyPatch()
    patch.setattr(weight, "SAMPLE", 4096), patch.setattr(original, "SAMPLE", 4096)
    try:
        convert(source, tmp_path / "model", recipe=Recipe(bits=8))
        assert verify(tmp_path / "model", "--source", source)[0] == 0
        edit_tensor(f"{PATH}.weight", one_row)(tmp_path / "model")
        code, out, _ = verify(tmp_path / "model", "--source", source)
        assert code == 2 and f"{PATH}: ratio over all rows: expected" in out
    finally:
        patch.undo()


def test_wrong_original(model, verify, tmp_path):
    other = tiny.write_checkpoint(tmp_path / "other", "qwen2")
    code, out, _ = verify(model, "--source", other)
    assert code == 2 and "self_attn.q_proj.bias is missing" in out


def test_what_cannot_be_verified(conversions, verify, tmp_path):
    assert "has no splitquant.json" in verify(conversions[0])[2]
    assert "no such path" in verify(tmp_path / "nowhere")[2]
    (tmp_path / "splitquant.json").write_text("[]")
    assert "is not a splitquant-mlx manifest" in verify(tmp_path)[2]
    assert "no such path" in verify(conversions[1] / "rtn", "--source", "/nowhere")[2]
