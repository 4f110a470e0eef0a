"""Fused stacks of experts of newer programs become mlx-lm's tensors."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import transformers
from architecture_variants import Variant
from architectures import settings_of
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.expert_stacks import separate_experts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": tiny.VOCAB,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Write transformers' gpt-oss in floating point; return its directory and tensors."""
    directory = tmp_path_factory.mktemp("gpt") / "bf16"
    torch = pytest.importorskip("torch", reason='pip install ".[parity]"')
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory, {name: w.numpy() for name, w in model.state_dict().items()}


def experts(tensors, layer=1):
    stem = f"model.layers.{layer}.mlp.experts."
    return {name.removeprefix(stem): w for name, w in tensors.items() if name.startswith(stem)}


@pytest.mark.slow  # the oracle is transformers with torch
def test_gpt_oss_in_floating_point(gpt_oss):
    directory, stored = gpt_oss
    checkpoint = open_checkpoint(directory)
    assert any("range of YaRN" in note for note in checkpoint.warnings)
    ours, theirs = experts(checkpoint.weights), experts(stored)
    gate_up = theirs["gate_up_proj"]  # (experts, hidden, 2 inner), gate and up interleaved
    expected = {
        "gate_proj.weight": gate_up[..., ::2].swapaxes(1, 2),
        "up_proj.weight": gate_up[..., 1::2].swapaxes(1, 2),
        "down_proj.weight": theirs["down_proj"].swapaxes(1, 2),
        "gate_proj.bias": theirs["gate_up_proj_bias"][..., ::2],
        "up_proj.bias": theirs["gate_up_proj_bias"][..., 1::2],
        "down_proj.bias": theirs["down_proj_bias"],
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(ours[name]), value)


@pytest.mark.slow
def test_gpt_oss_in_mxfp4(gpt_oss, tmp_path):
    directory, stored = gpt_oss
    tensors, values = {name: mx.array(w) for name, w in stored.items()}, {}
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")
    random = np.random.default_rng(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        _, inputs, outputs = stored[name].shape
        codes = random.integers(0, 16, (4, outputs, inputs // 32, 32)).astype(np.uint8)
        exponents = random.integers(118, 124, codes.shape[:-1]).astype(np.uint8)
        del tensors[name]
        tensors[f"{name}_blocks"] = mx.array(codes[..., ::2] | codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = mx.array(exponents)
        scaled = levels[codes] * (2.0 ** (exponents.astype("f4") - 127))[..., None]
        values[name] = scaled.reshape(4, outputs, inputs)
    (tmp_path / "m").mkdir()
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), tensors)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(tmp_path / "m")
    ours = experts(open_checkpoint(tmp_path / "m").weights)
    whole = experts(values)
    for name, expected in (
        ("gate_proj", whole["gate_up_proj"][:, ::2]),
        ("up_proj", whole["gate_up_proj"][:, 1::2]),
        ("down_proj", whole["down_proj"]),
    ):
        actual = np.array(ours[f"{name}.weight"].astype(mx.float32))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("model_type", "block"),
    [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp"), ("glm4_moe", "mlp")],
)
def test_stacks_of_other_mixtures(model_type, block):
    gate_up, down = mx.random.normal((4, 6, 8)), mx.random.normal((4, 8, 3))
    stem = "model.layers.3.mlp.experts"
    tensors = {f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down, "other": down}
    ours = separate_experts(tensors, model_type)
    stack = f"model.layers.3.{block}.switch_mlp"
    names = {f"{stack}.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert ours.keys() == names | {"other"}
    assert mx.array_equal(ours[f"{stack}.gate_proj.weight"], gate_up[:, :3])
    assert mx.array_equal(ours[f"{stack}.up_proj.weight"], gate_up[:, 3:])
    assert mx.array_equal(ours[f"{stack}.down_proj.weight"], down)


def test_a_mixtral_is_read_under_the_names_of_transformers_5(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", "mixtral")
    stored = mx.load(str(source / "model.safetensors"))
    fused = {name: w for name, w in stored.items() if "block_sparse_moe" not in name}
    for i in range(tiny.LAYERS):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        w1, w2, w3 = (
            mx.stack([stored[f"{old}.experts.{e}.{name}.weight"] for e in range(tiny.EXPERTS)])
            for name in ("w1", "w2", "w3")
        )
        fused[f"{new}.gate.weight"] = stored[f"{old}.gate.weight"]
        fused[f"{new}.experts.gate_up_proj"] = mx.concatenate([w1, w3], axis=1)
        fused[f"{new}.experts.down_proj"] = w2
    (tmp_path / "fused").mkdir()
    tiny.write_weights(tmp_path / "fused", fused)
    (tmp_path / "fused" / "config.json").write_bytes((source / "config.json").read_bytes())
    expected, actual = (open_checkpoint(path).weights for path in (source, tmp_path / "fused"))
    assert actual.keys() == expected.keys()
    assert all(mx.array_equal(actual[name], w) for name, w in expected.items())


@pytest.mark.slow  # the oracle is transformers with torch
@pytest.mark.parametrize(
    "architecture", ["mixtral", "olmoe", "deepseek_v3", "glm4_moe", "lfm2_moe", "ernie4_5_moe"]
)
def test_both_formats_of_transformers_give_the_same_tensors(architecture, tmp_path):
    torch = pytest.importorskip("torch", reason='pip install ".[parity]"')
    torch.manual_seed(0)
    settings = settings_of(Variant(architecture=architecture))
    config = CONFIG_MAPPING[architecture](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = []
    for original in (True, False):
        directory = tmp_path / str(original)
        model.save_pretrained(directory, save_original_format=original)
        tiny.write_tokenizer(directory)
        weights.append(open_checkpoint(directory).weights)
    assert weights[0].keys() == weights[1].keys()
    assert all(mx.array_equal(weights[1][name], w) for name, w in weights[0].items())


def test_stacks_of_qwen3_vl_in_both_layouts():
    """transformers saves them transposed, compared with the published checkpoints."""
    stem = "model.language_model.layers.0.mlp.experts"
    for inner, hidden in ((3, 8), (4, 8), (8, 8)):  # 2 inner, or inner, may equal hidden
        gate_up, down = mx.zeros((4, 2 * inner, hidden)), mx.zeros((4, hidden, inner))
        saved = {f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}
        published = {name: w.swapaxes(1, 2) for name, w in saved.items()}
        assert separate_experts(published, "qwen3_vl_moe") == published  # mlx-lm reads it
        ours = separate_experts(saved, "qwen3_vl_moe")
        shapes = {name.split(".")[-2]: w.shape for name, w in ours.items()}
        assert shapes["gate_proj"] == shapes["up_proj"] == (4, inner, hidden)
        assert shapes["down_proj"] == (4, hidden, inner)


def test_separate_experts_are_stacked():
    stem = "model.language_model.layers.2.mlp"
    w = mx.random.normal((12, 6, 8))  # more than ten, to test the numerical order
    tensors = {f"{stem}.experts.{e}.up_proj.weight": w[e] for e in (11, *range(11))}
    ours = separate_experts({**tensors, f"{stem}.gate.weight": w[0]}, "qwen3_5_moe")
    assert ours.keys() == {f"{stem}.switch_mlp.up_proj.weight", f"{stem}.gate.weight"}
    assert mx.array_equal(ours[f"{stem}.switch_mlp.up_proj.weight"], w)


def test_identity_experts_of_longcat_are_dropped():
    """transformers saves their unused input projections."""
    stem, w = "model.layers.0.mlp.experts", mx.zeros((2, 2))
    used = {f"{stem}.0.{name}_proj.weight": w for name in ("gate", "up", "down")}
    unused = {f"{stem}.1.{name}_proj.weight": w for name in ("gate", "up")}
    assert separate_experts({**used, **unused, "other": w}, "longcat_flash") == {**used, "other": w}
