"""Importing a GGUF file restores the checkpoint that it was made from, or is refused."""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx.errors import CheckpointError, SourceError, SplitQuantWarning
from splitquant_mlx.formats.gguf import Gguf, TensorInfo, open_gguf, read_tensor
from splitquant_mlx.formats.gguf_config import model_config
from splitquant_mlx.formats.model_card import read_source_card
from splitquant_mlx.inspection.overview import describe, describe_gguf
from splitquant_mlx.models.gguf_import import import_gguf
from splitquant_mlx.models.loader import load

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS = 320, 64, 172, 8, 4
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


@pytest.fixture(scope="module")
def small():
    """Return the weights and config of a small random llama with odd widths."""
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()}
    return {
        f"{name}.weight": random.normal(len(shape) == 1, shape[-1] ** -0.5, shape).astype("f4")
        for name, shape in shapes.items()
    }, CONFIG


def write_gguf(path, weights, config, kind="F32", *, metadata=None, tensors=None, drop=()):
    """Write `weights` as a GGUF file; matrices as `kind`, or F16 where its blocks do not fit.

    Returns what the importer should store, by Hugging Face name.
    """
    number = gguf.GGMLQuantizationType[kind]
    block_size, _ = gguf.GGML_QUANT_SIZES[number]
    entries = {f"llama.{key}": value for key, value in gguf_models.settings(config).items()}
    entries |= gguf_models.words(VOCAB) | (metadata or {})
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    in_file, stored = dict(tensors or {}), {}
    for name, value in weights.items():
        if name in drop:
            continue
        ((old, rows),) = gguf_models.tensors({name: value}, config).items()
        fits = rows.shape[-1] % block_size == 0
        used = number if fits else gguf.GGMLQuantizationType.F16
        used = gguf.GGMLQuantizationType.F32 if rows.ndim == 1 else used
        raw = gguf.quants.quantize(rows.astype(np.float32), used)
        in_file[old] = (raw, used)
        read = gguf.quants.dequantize(raw, used).astype(np.float32).reshape(rows.shape)
        projection = name.split(".")[-2]
        if projection in heads:
            read = gguf_models.half_split(read, heads[projection])
        stored[name] = read
    gguf_models.write(path, "llama", entries, in_file)
    return stored


def imported(path, directory):
    """Import `path`; return the stored weights and config."""
    directory.mkdir()
    import_gguf(path, directory)
    weights = {}
    for shard in directory.glob("*.safetensors"):
        weights |= dict(mx.load(str(shard)))  # type: ignore[arg-type]
    return weights, json.loads((directory / "config.json").read_text())


@contextmanager
def refused(directory, message):
    """Expect a CheckpointError of one line, and that nothing was written."""
    directory.mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert not list(directory.iterdir())


def test_a_file_is_described_from_its_header(small, tmp_path, monkeypatch):
    weights, config = small
    write_gguf(tmp_path / "a.gguf", weights, config, "Q8_0")
    imported(tmp_path / "a.gguf", tmp_path / "hf")
    monkeypatch.setattr("splitquant_mlx.formats.gguf.read_tensor", None)
    overview, unpacked = describe_gguf(tmp_path / "a.gguf"), describe(tmp_path / "hf")
    for name in ("architecture", "parameters", "context", "vocabulary", "has_chat_template"):
        assert getattr(overview, name) == getattr(unpacked, name), name
    assert {(layer.path, layer.shape) for layer in overview.layers} == {
        (layer.path, layer.shape) for layer in unpacked.layers
    }
    assert "Q8_0" in overview.method and {layer.mode for layer in overview.layers} >= {"Q8_0"}
    data = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors)
    assert overview.stored_bytes == data
    assert overview.bits_per_weight == pytest.approx(8 * data / overview.parameters)


def test_float32_file_is_the_original_bit_for_bit(small, tmp_path):
    weights, config = small
    write_gguf(tmp_path / "a.gguf", weights, config)
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert ours[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(ours[name]), value)
    expected = {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "float32"}
    assert our_config.items() >= (config | expected).items()
    assert (our_config["bos_token_id"], our_config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q5_0", "BF16"])
def test_stored_weights_are_those_of_the_gguf_package(small, tmp_path, kind):
    weights, config = small
    stored = write_gguf(tmp_path / "a.gguf", weights, config, kind)
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    dtype = mx.bfloat16 if kind == "BF16" else mx.float16
    assert our_config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")
    assert ours.keys() == weights.keys()
    for name, value in stored.items():
        assert ours[name].dtype == dtype
        assert mx.array_equal(ours[name], mx.array(value).astype(dtype)), name


def test_quantized_embedding_with_an_untied_output(small, tmp_path):
    weights, config = small
    head = np.random.default_rng(0).normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    stored = write_gguf(tmp_path / "a.gguf", {**weights, "lm_head.weight": head}, config, "Q8_0")
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert our_config["tie_word_embeddings"] is False
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(np.array(ours[name]), stored[name].astype(np.float16))


def test_biases_are_reordered_with_their_rows(small, tmp_path):
    weights, config = small
    random = np.random.default_rng(0)
    biased = dict(weights)
    for name, value in weights.items():
        if "_proj." in name:
            biased[name.replace("weight", "bias")] = random.normal(size=len(value)).astype("f4")
    write_gguf(tmp_path / "a.gguf", biased, config)
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert our_config["attention_bias"] and our_config["mlp_bias"]
    for name, value in biased.items():
        np.testing.assert_array_equal(np.array(ours[name]), value)


def llama3_factors(head_dim, theta, factor):
    """Compute rope_freqs as llama.cpp's convert_hf_to_gguf.py does for Llama 3.1."""
    factors = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (channel / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_rope_scaling(small, tmp_path, factor):
    weights, config = small
    config = {**config, "rope_theta": 500000.0}
    factors = llama3_factors(8, 500000.0, factor)
    assert len(set(factors)) >= 3
    write_gguf(tmp_path / "a.gguf", weights, config, tensors={"rope_freqs.weight": factors})
    _, ours = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert ours["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from mlx_lm.utils import load_model

    layers: Any = load_model(tmp_path / "hf")[0].layers
    rope = layers[0].self_attn.rope
    plain = 500000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(np.array(rope._freqs), plain * factors, rtol=1e-4)


@pytest.mark.parametrize("factors", [[1, 1.5, 4, 4], [1, 1, 1], [0, 0, 0, 0], [np.nan] * 4])
def test_other_rope_factors_are_refused(small, tmp_path, factors):
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(tmp_path / "a.gguf", *small, tensors=tensors)
    with refused(tmp_path / "hf", "'rope_freqs.weight': expected the 4 factors"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_rope_factors_of_huge_heads_take_no_memory(small, tmp_path):
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    metadata = {f"llama.{key}": 1 << 31 for key in keys}
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata, tensors=tensors)
    with refused(tmp_path / "hf", r"expected the 1073741824 .* got shape \(4,\), up to 1.0"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_factors_of_one_are_plain_rope(small, tmp_path):
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "a.gguf", *small, tensors=tensors)
    assert "rope_scaling" not in imported(tmp_path / "a.gguf", tmp_path / "hf")[1]


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_rope_scaling(small, tmp_path, metadata):
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata)
    _, config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_the_licence_is_written(small, tmp_path):
    metadata = {
        "general.license": "apache-2.0",
        "general.license.link": "https://example.org/\x1b]0;owned",
        "general.languages": ["en", "no"],
    }
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata)
    imported(tmp_path / "a.gguf", tmp_path / "hf")
    actual = read_source_card(tmp_path / "hf")
    assert actual == {"license": "apache-2.0", "language": ["en", "no"]}


WRONG_METADATA = {
    "no layers": ({"llama.block_count": None}, "block_count: .*got None"),
    "more layers": ({"llama.block_count": 3}, r"missing.*blk\.2\.attn_k\.weight"),
    "fewer layers": ({"llama.block_count": 1}, r"unknown.*blk\.1\.attn_k\.weight"),
    "endless layers": ({"llama.block_count": 2**32 - 1}, "4294967295 layers, got 20"),
    "text for a number": ({"llama.embedding_length": "64"}, "embedding_length: .*got '64'"),
    "heads by layer": ({"llama.attention.head_count": [8, 4]}, "head_count: .*got"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count: .*got 0"),
    "width": ({"llama.feed_forward_length": 176}, r"ffn_gate.weight': expected shape \(176, 64\)"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, "4 rotated"),
    "odd groups": ({"llama.attention.head_count_kv": 3}, "3 value heads"),
    "head size": ({"llama.attention.key_length": 16}, r"expected shape \(128, 64\)"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon: .*got nan"),
    "theta": ({"llama.rope.freq_base": float("inf")}, "freq_base: .*got inf"),
    "yarn": ({"llama.rope.scaling.type": "dynamic"}, "linear or yarn, got 'dynamic'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens None"),
    "tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "got 'rwkv'"),
    "vocabulary": (gguf_models.words(VOCAB + 1), "expected at least 321 rows"),
}


@pytest.mark.parametrize("name", WRONG_METADATA)
def test_wrong_metadata_is_refused_before_writing(small, tmp_path, name):
    metadata, message = WRONG_METADATA[name]
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata)
    with refused(tmp_path / "hf", message):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    gguf_models.write(tmp_path / "a.gguf", "mamba", {}, {"x": np.ones(4)})
    with refused(tmp_path / "hf", "one of llama, .*qwen3moe.* got 'mamba'"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_unknown_settings_give_a_warning(small, tmp_path):
    write_gguf(tmp_path / "a.gguf", *small, metadata={"llama.brand_new": 1.5})
    with pytest.warns(SplitQuantWarning, match="are left out: brand_new"):
        imported(tmp_path / "a.gguf", tmp_path / "hf")


@pytest.mark.parametrize(("factor", "noted"), [(1.0, False), (0.5, True)])
def test_an_attention_factor_other_than_1_gives_a_warning(small, tmp_path, factor, noted):
    metadata = {"llama.rope.scaling.attn_factor": factor}
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata)
    with pytest.warns(SplitQuantWarning, match="attn_factor") if noted else nullcontext():
        imported(tmp_path / "a.gguf", tmp_path / "hf")


@pytest.mark.parametrize("pattern", [2, [True, False]])
def test_the_layers_with_a_window_are_those_of_the_file(small, tmp_path, pattern):
    metadata = {"llama.attention.sliding_window": 8}
    metadata |= {"llama.attention.sliding_window_pattern": pattern}
    write_gguf(tmp_path / "a.gguf", *small, metadata=metadata)
    config = imported(tmp_path / "a.gguf", tmp_path / "hf")[1]
    assert (config["sliding_window"], config["num_hidden_layers"]) == (8, 2)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


def test_parts_are_imported_as_one_file(small, tmp_path):
    weights, config = small
    stored = gguf_models.tensors(weights, config)
    entries = {f"llama.{key}": value for key, value in gguf_models.settings(config).items()}
    names = list(stored)
    for number, part in enumerate((names[:7], names[7:])):
        split = {"split.no": number, "split.count": 2}
        gguf_models.write(
            tmp_path / f"m-{number + 1:05d}-of-00002.gguf",
            "llama",
            split if number else split | entries | gguf_models.words(VOCAB),
            {name: stored[name] for name in part},
        )
    ours, _ = imported(tmp_path / "m-00002-of-00002.gguf", tmp_path / "hf")
    for name, value in weights.items():
        np.testing.assert_array_equal(np.array(ours[name]), value)


def test_a_vocabulary_may_have_fewer_tokens_than_rows(small, tmp_path):
    write_gguf(tmp_path / "a.gguf", *small, metadata=gguf_models.words(VOCAB - 5))
    assert imported(tmp_path / "a.gguf", tmp_path / "hf")[1]["vocab_size"] == VOCAB


def test_all_end_tokens_are_in_the_config(small, tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 300, "tokenizer.ggml.eom_token_id": 301}
    write_gguf(tmp_path / "a.gguf", *small, metadata=ends)
    assert imported(tmp_path / "a.gguf", tmp_path / "hf")[1]["eos_token_id"] == [2, 300, 301]
    assert load(tmp_path / "a.gguf")[1].eos_token_ids == {2, 300, 301}


@pytest.mark.parametrize("factors", [(4.0, 2.0), (1.0, 1.0)])
def test_long_rope_factors_of_phi3(tmp_path, factors):
    random = np.random.default_rng(0)
    stored = {"token_embd.weight": (VOCAB, 64), "output_norm.weight": (64,)}
    stored |= {"output.weight": (VOCAB, 64), "blk.0.attn_qkv.weight": (192, 64)}
    stored |= {"blk.0.attn_output.weight": (64, 64), "blk.0.ffn_up.weight": (192, 64)}
    stored |= {"blk.0.ffn_down.weight": (64, 96), "blk.0.attn_norm.weight": (64,)}
    stored |= {"blk.0.ffn_norm.weight": (64,)}
    tensors = {name: random.normal(size=shape) for name, shape in stored.items()}
    for length, factor in zip(("long", "short"), factors, strict=True):
        tensors[f"rope_factors_{length}.weight"] = np.full(8, factor)
    config = {**CONFIG, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    settings = gguf_models.settings(config) | {"rope.scaling.original_context_length": 128}
    entries = {f"phi3.{key}": value for key, value in settings.items()}
    gguf_models.write(tmp_path / "a.gguf", "phi3", entries | gguf_models.words(VOCAB), tensors)
    _, config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert config["original_max_position_embeddings"] == 128
    scaling = {"long_factor": [factors[0]] * 8, "short_factor": [factors[1]] * 8}
    assert config["rope_scaling"] == {"type": "longrope", **scaling}


def test_missing_and_unknown_tensors_are_named(small, tmp_path):
    weights, config = small
    dropped = "model.layers.1.mlp.up_proj.weight"
    unknown = {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    write_gguf(tmp_path / "a.gguf", weights, config, drop=[dropped], tensors=unknown)
    message = r"missing.*blk\.1\.ffn_up\.weight.*unknown.*blk\.0\.ffn_gate_inp\.weight"
    with refused(tmp_path / "hf", message):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_values_that_overflow_float16_are_refused(small, tmp_path, value):
    weights, config = small
    norm = weights["model.norm.weight"].copy()
    norm[3] = value
    write_gguf(tmp_path / "a.gguf", {**weights, "model.norm.weight": norm}, config, "F16")
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight': values not finite"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


def test_infinite_scales_of_a_quantized_tensor_are_refused(small, tmp_path):
    path = tmp_path / "a.gguf"
    weights, config = small
    write_gguf(path, weights, config, "Q4_0")
    tensor = open_gguf(path).tensors["blk.1.attn_v.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 2] = np.float16("inf").tobytes()
    path.write_bytes(content)
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_v\.weight': values not finite"):
        import_gguf(path, tmp_path / "hf")


def test_absent_file_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match=r"absent\.gguf: cannot be read"):
        import_gguf(tmp_path / "absent.gguf", tmp_path)


def test_progress_reaches_its_total(small, tmp_path):
    write_gguf(tmp_path / "a.gguf", *small)
    seen = []

    class Recorder:
        @contextmanager
        def task(self, label, total=None):
            seen.append(-(total or 0))
            yield seen.append

    (tmp_path / "hf").mkdir()
    recorder: Any = Recorder()
    import_gguf(tmp_path / "a.gguf", tmp_path / "hf", recorder)
    assert len(seen) == 21 and sum(seen) == 0


@pytest.fixture(scope="module")
def one_layer(small, tmp_path_factory):
    """Return the bytes of a one-layer file, where its tensors start, and a scratch directory."""
    weights, config = small
    scratch = tmp_path_factory.mktemp("corrupt")
    kept = {n: w for n, w in weights.items() if ".layers." not in n or ".layers.0." in n}
    write_gguf(scratch / "a.gguf", kept, {**config, "num_hidden_layers": 1}, "Q8_0")
    start = min(tensor.offset for tensor in open_gguf(scratch / "a.gguf").tensors.values())
    return (scratch / "a.gguf").read_bytes(), start, scratch


SHARE = st.floats(0, 1, exclude_max=True)


@pytest.mark.filterwarnings("ignore::splitquant_mlx.errors.SplitQuantWarning")
@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(SHARE, st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | SHARE,
)
def test_changed_or_cut_file_imports_or_is_refused(one_layer, changes, cut):
    content, start, scratch = one_layer
    changed = bytearray(content)
    for place, value in changes:
        changed[int(place * start)] = value
    if cut is not None:
        changed = changed[: int(cut * len(changed))]
    path = scratch / "changed.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(changed)
    target = scratch / "hf"
    target.mkdir(exist_ok=True)
    try:
        import_gguf(path, target)
    except CheckpointError as exc:
        assert "\n" not in str(exc)


@pytest.mark.slow
def test_real_model_answers_through_its_chat_template(tmp_path, smollm2):
    from mlx_lm import generate, tokenizer_utils
    from mlx_lm.utils import load_model

    ours = open_gguf(smollm2)
    for tensor in gguf.GGUFReader(smollm2).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(read_tensor(ours, tensor.name), expected)
    imported(smollm2, tmp_path / "hf")
    model, _ = load_model(tmp_path / "hf")
    model.set_dtype(mx.float32)
    tokenizer = tokenizer_utils.load(tmp_path / "hf")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=16)


def described(architecture, **metadata):
    """Return the config.json of a file of four layers, without its weights."""
    settings = gguf_models.settings({**CONFIG, "num_hidden_layers": 4}) | metadata
    settings = {f"{architecture}.{key}": value for key, value in settings.items()}
    settings |= {"general.architecture": architecture, **gguf_models.words(VOCAB)}
    tensors = {
        f"blk.{n}.attn_norm.weight": TensorInfo("", (HIDDEN,), "F32", 0, 0) for n in range(4)
    }
    tensors["token_embd.weight"] = TensorInfo("", (VOCAB, HIDDEN), "F32", 0, 0)
    return model_config(Gguf(Path(), settings, tensors, ()), "float32")


def test_settings_that_files_omit():
    assert (
        described("gemma")["hidden_act"]
        == described("starcoder2", **{"attention.layer_norm_epsilon": 1e-5})["hidden_act"]
        == "gelu_pytorch_tanh"
    )
    assert "sliding_window" not in described("phi3", **{"attention.sliding_window": 0})  # Phi-4
    heads = {"attention.head_count_kv": [0, 4, 0, 4], "shortconv.l_cache": 3}
    types = ["conv", "full_attention"] * 2
    assert described("lfm2", **heads)["layer_types"] == types
    windows: Any = {"attention.sliding_window": 8}
    windows["attention.sliding_window_pattern"] = [True, True, True, False]
    assert described("exaone4", **windows)["sliding_window_pattern"] == "LLLG"


def test_a_gpt_oss_without_scaling_has_plain_rotary_embeddings():
    # transformers uses YaRN if config.json has no rope_parameters
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    config = described("gpt-oss", **experts, **{"attention.sliding_window": 8})
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


GROUPED = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
    "leading_dense_block_count": 0,
    "expert_gating_func": 2,
}


def test_layers_that_predict_further_tokens_are_not_counted():
    config = described("glm4moe", **GROUPED, nextn_predict_layers=1)
    assert config["num_hidden_layers"] == 3 and config["first_k_dense_replace"] == 0
    assert (config["n_group"], config["norm_topk_prob"]) == (1, False)


DELTA_NET = {
    "ssm.time_step_rank": 4,
    "ssm.state_size": 16,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 2,
    "ssm.inner_size": 64,
}
HYBRID = {
    "attention.head_count_kv": [0, 4, 0, 0],
    "attention.scale": 0.1,
    "embedding_scale": 12.0,
    "residual_scale": 0.2,
    "logit_scale": 8.0,
    "expert_shared_feed_forward_length": 48,
    "ssm.time_step_rank": 8,
    "ssm.state_size": 16,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 1,
    "ssm.inner_size": 128,
}
LATENT = {
    "rope.dimension_count": 16,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,
    "attention.value_length": 24,
}


def test_old_deepseek_files_omit_expert_groups_and_head_sizes():
    config = described("deepseek2", **GROUPED, **LATENT)
    assert (config["model_type"], config["n_group"], config["topk_group"]) == ("deepseek_v3", 1, 1)
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (32, 24)
    config = described("deepseek2", **GROUPED | LATENT | {"expert_count": 256})
    assert (config["n_group"], config["topk_group"]) == (8, 4)
    second = {key: value for key, value in GROUPED.items() if key != "expert_gating_func"}
    config = described("deepseek2", **second | LATENT | {"expert_count": 160})
    assert (config["model_type"], config["n_group"], config["topk_group"]) == ("deepseek_v2", 8, 3)
    assert config["topk_method"] == "group_limited_greedy"


@pytest.mark.parametrize(
    "architecture, metadata, message",
    [
        (
            "qwen35",
            {**DELTA_NET, "rope.dimension_sections": 3},
            "sections: expected 3 numbers, got 3",
        ),
        ("qwen35", {**DELTA_NET, "ssm.time_step_rank": 0}, "time_step_rank: expected a positive"),
        ("granitehybrid", {**HYBRID, "ssm.time_step_rank": 0}, "time_step_rank: expected a positi"),
        ("granitehybrid", {**HYBRID, "rope.scaling.finetuned": True}, "got Bamba"),
        ("deepseek2", {**GROUPED, **LATENT, "expert_gating_func": 3}, "expected 2 .*, got 3"),
        ("glm4moe", {**GROUPED, "expert_gating_func": 1}, "expected 2 .sigmoid., got 1"),
        ("deepseek2", {**GROUPED, "rope.dimension_count": 16}, "kv_lora_rank: expected"),
        ("lfm2", {"shortconv.l_cache": 3}, "KV heads per layer, got 4"),
        ("lfm2", {"attention.head_count_kv": [0, 4, "4", 0]}, "KV heads per layer, got"),
        ("glm4moe", {**GROUPED, "nextn_predict_layers": 4}, "expected 0 to 3, got 4"),
        ("glm4moe", {**GROUPED, "nextn_predict_layers": "1"}, "expected 0 to 3, got '1'"),
        ("mistral3", {}, "scaling.type: expected yarn, got 'none'"),
        ("mistral3", {"rope.scaling.type": "linear"}, "scaling.type: expected yarn, got 'linear'"),
        ("ernie4_5-moe", {}, "architecture: expected one of llama, .* use the model"),
    ],
)
def test_files_of_other_models_of_an_architecture_are_refused(architecture, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        described(architecture, **metadata)
