"""GGUF files made from a real tiny checkpoint come back as that checkpoint."""

import json
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx.errors import CheckpointError, SourceError
from splitquant_mlx.formats.gguf import open_gguf, read_tensor
from splitquant_mlx.formats.gguf_import import import_gguf
from splitquant_mlx.formats.model_card import read_source_card

gguf = pytest.importorskip("gguf")

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "stories260K"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleave(rows, heads):
    """Reorder q and k rows as llama.cpp's convert_hf_to_gguf.py does (`permute`)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture(scope="module")
def stories():
    """Return the weights and config of the checkpoint."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is absent: the tiny real checkpoints are not on this machine")
    loaded = mx.load(str(STORIES / "model.safetensors"))
    weights = {name: np.array(value) for name, value in loaded.items()}
    return weights, json.loads((STORIES / "config.json").read_text())


def write_gguf(path, weights, config, kind="F32", *, metadata=None, tensors=None, drop=()):
    """Write `weights` as a GGUF file; matrices as `kind`, or F16 where its blocks do not fit.

    Returns what the importer should store, by Hugging Face name.
    """
    writer = gguf.GGUFWriter(path, "llama")
    settings = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.dimension_count": config["head_dim"],
    }
    reals = {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    entries = {f"llama.{key}": value for key, value in (settings | reals).items()}
    for key, value in (entries | tokenizer_metadata() | (metadata or {})).items():
        if value is not None:
            add_value(writer, key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    type_number = gguf.GGMLQuantizationType[kind]
    block_size, _ = gguf.GGML_QUANT_SIZES[type_number]
    stored = {}
    for name, value in weights.items():
        if name in drop:
            continue
        projection = name.split(".")[-2]
        rows = interleave(value, heads[projection]) if projection in heads else value
        fits = rows.shape[-1] % block_size == 0
        number = type_number if fits else gguf.GGMLQuantizationType.F16
        if rows.ndim == 1:
            number = gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(rows.astype(np.float32), number)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=number)
        read = gguf.quants.dequantize(raw, number).astype(np.float32).reshape(rows.shape)
        if projection in heads:
            count = heads[projection]
            read = read.reshape(count, -1, 2, *read.shape[1:]).swapaxes(1, 2).reshape(read.shape)
        stored[name] = read
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_value(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tokenizer_metadata():
    model = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(259 - i) for i in range(259, len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def imported(path, directory):
    """Import `path`; returns the stored weights and config."""
    directory.mkdir()
    import_gguf(path, directory)
    weights = {}
    for shard in directory.glob("*.safetensors"):
        weights |= mx.load(str(shard))
    return weights, json.loads((directory / "config.json").read_text())


def logits(directory, dtype=mx.float32):
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    model.set_dtype(dtype)
    return np.array(model(mx.array([[1, 403, 407, 261, 378, 432, 383, 286]])))


@contextmanager
def refused(directory, message):
    """Expect a CheckpointError of one line, and that nothing was written."""
    directory.mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert not list(directory.iterdir())


def test_float32_file_is_the_original_bit_for_bit(stories, tmp_path):
    weights, config = stories
    write_gguf(tmp_path / "a.gguf", weights, config)
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert ours[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(ours[name]), value)
    assert our_config == config
    np.testing.assert_array_equal(logits(tmp_path / "hf"), logits(STORIES))


def test_directory_loads_and_generates_like_the_original(stories, tmp_path):
    from mlx_lm import generate, load

    write_gguf(tmp_path / "a.gguf", *stories)
    imported(tmp_path / "a.gguf", tmp_path / "hf")
    texts = []
    for directory in (STORIES, tmp_path / "hf"):
        model, tokenizer = load(str(directory))[:2]
        texts.append(generate(model, tokenizer, "Once upon a time", max_tokens=24))
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_stored_weights_are_those_of_the_gguf_package(stories, tmp_path, kind):
    weights, config = stories
    stored = write_gguf(tmp_path / "a.gguf", weights, config, kind)
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    dtype = mx.bfloat16 if kind == "BF16" else mx.float16
    assert our_config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")
    assert ours.keys() == weights.keys()
    for name, value in stored.items():
        assert ours[name].dtype == dtype
        assert mx.array_equal(ours[name], mx.array(value).astype(dtype)), name
    if not kind.startswith("Q4"):
        distance = np.abs(logits(tmp_path / "hf") - logits(STORIES)).max()
        assert distance < {"F16": 0.02, "BF16": 0.2, "Q8_0": 0.4}[kind]


def test_quantized_embedding_with_an_output_of_its_own(stories, tmp_path):
    weights, config = stories
    head = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    stored = write_gguf(tmp_path / "a.gguf", {**weights, "lm_head.weight": head}, config, "Q8_0")
    ours, our_config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert our_config["tie_word_embeddings"] is False
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(np.array(ours[name]), stored[name].astype(np.float16))
    assert logits(tmp_path / "hf").shape == (1, 8, 512)


def test_biases_are_reordered_with_their_rows(stories, tmp_path):
    weights, config = stories
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
    assert np.isfinite(logits(tmp_path / "hf")).all()


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
def test_llama3_rope_factors_become_rope_scaling(stories, tmp_path, factor):
    weights, config = stories
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

    rope = load_model(tmp_path / "hf")[0].layers[0].self_attn.rope
    plain = 500000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(np.array(rope._freqs), plain * factors, rtol=1e-4)


@pytest.mark.parametrize("factors", [[1, 1.5, 4, 4], [1, 1, 1], [0, 0, 0, 0], [np.nan] * 4])
def test_other_rope_factors_are_refused(stories, tmp_path, factors):
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(tmp_path / "a.gguf", *stories, tensors=tensors)
    with refused(tmp_path / "hf", "'rope_freqs.weight' holds factors"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_rope_factors_of_endless_heads_take_no_memory(stories, tmp_path):
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    metadata = {f"llama.{key}": 1 << 31 for key in keys}
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "a.gguf", *stories, metadata=metadata, tensors=tensors)
    with refused(tmp_path / "hf", r"\(4,\) up to 1.0, wanted \(1073741824,\)"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def test_factors_of_one_are_plain_rope(stories, tmp_path):
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "a.gguf", *stories, tensors=tensors)
    assert "rope_scaling" not in imported(tmp_path / "a.gguf", tmp_path / "hf")[1]


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_rope_scaling(stories, tmp_path, metadata):
    write_gguf(tmp_path / "a.gguf", *stories, metadata=metadata)
    _, config = imported(tmp_path / "a.gguf", tmp_path / "hf")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_the_licence_is_carried_over(stories, tmp_path):
    metadata = {
        "general.license": "apache-2.0",
        "general.license.link": "https://example.org/\x1b]0;owned",
        "general.languages": ["en", "no"],
    }
    write_gguf(tmp_path / "a.gguf", *stories, metadata=metadata)
    imported(tmp_path / "a.gguf", tmp_path / "hf")
    found = read_source_card(tmp_path / "hf")
    assert found == {"license": "apache-2.0", "language": ["en", "no"]}


WRONG_METADATA = {
    "architecture": ({"general.architecture": "qwen2"}, "'qwen2', wanted 'llama'"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is None"),
    "more layers": ({"llama.block_count": 6}, r"missing.*blk\.5\.attn_k\.weight"),
    "fewer layers": ({"llama.block_count": 4}, r"unknown.*blk\.4\.attn_k\.weight"),
    "endless layers": ({"llama.block_count": 2**32 - 1}, "4294967295 layers in 47 tensors"),
    "text for a number": ({"llama.embedding_length": "64"}, "embedding_length is '64'"),
    "heads by layer": ({"llama.attention.head_count": [8, 8]}, "head_count is"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count is 0"),
    "width": ({"llama.feed_forward_length": 176}, r"ffn_gate.weight' has shape \(172, 64\)"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, "4 of them rotated"),
    "odd groups": ({"llama.attention.head_count_kv": 3}, "3 value heads"),
    "head size": ({"llama.attention.key_length": 16}, "16 channels"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
    "theta": ({"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "'yarn', not supported"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "tokens None"),
    "tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "'rwkv', wanted"),
    "vocabulary": ({"tokenizer.ggml.tokens": ["a", "b"]}, r"'token_embd.weight' has shape"),
}


@pytest.mark.parametrize("name", WRONG_METADATA)
def test_wrong_metadata_is_refused_before_writing(stories, tmp_path, name):
    metadata, message = WRONG_METADATA[name]
    if "general.architecture" in metadata:
        path = tmp_path / "a.gguf"
        write_gguf(path, *stories)
        content = path.read_bytes().replace(u64(5) + b"llama", u64(5) + b"qwen2", 1)
        path.write_bytes(content)
    else:
        write_gguf(tmp_path / "a.gguf", *stories, metadata=metadata)
    with refused(tmp_path / "hf", message):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


def u64(value):
    return value.to_bytes(8, "little")


def test_missing_and_unknown_tensors_are_named(stories, tmp_path):
    weights, config = stories
    dropped = "model.layers.2.mlp.up_proj.weight"
    unknown = {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    write_gguf(tmp_path / "a.gguf", weights, config, drop=[dropped], tensors=unknown)
    message = r"missing.*blk\.2\.ffn_up\.weight.*unknown.*blk\.0\.ffn_gate_inp\.weight"
    with refused(tmp_path / "hf", message):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_values_that_float16_cannot_hold_are_refused(stories, tmp_path, value):
    weights, config = stories
    norm = weights["model.norm.weight"].copy()
    norm[3] = value
    write_gguf(tmp_path / "a.gguf", {**weights, "model.norm.weight": norm}, config, "F16")
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' has values not finite"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


def test_infinite_scales_of_a_quantized_tensor_are_refused(stories, tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, *stories, "Q4_0")
    tensor = open_gguf(path).tensors["blk.1.attn_v.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 2] = np.float16("inf").tobytes()
    path.write_bytes(content)
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"'blk\.1\.attn_v\.weight' has values not finite"):
        import_gguf(path, tmp_path / "hf")


def test_absent_file_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match=r"absent\.gguf: cannot be read"):
        import_gguf(tmp_path / "absent.gguf", tmp_path)


def test_progress_reaches_the_announced_total(stories, tmp_path):
    write_gguf(tmp_path / "a.gguf", *stories)
    seen = []

    class Recorder:
        @contextmanager
        def task(self, label, total=None):
            seen.append(-total)
            yield seen.append

    (tmp_path / "hf").mkdir()
    import_gguf(tmp_path / "a.gguf", tmp_path / "hf", Recorder())
    assert len(seen) == 48 and sum(seen) == 0


@pytest.fixture(scope="module")
def one_layer(stories, tmp_path_factory):
    """Return the bytes of a one-layer file, where its tensors start, and a scratch directory."""
    weights, config = stories
    scratch = tmp_path_factory.mktemp("corrupt")
    kept = {n: w for n, w in weights.items() if ".layers." not in n or ".layers.0." in n}
    write_gguf(scratch / "a.gguf", kept, {**config, "num_hidden_layers": 1}, "Q8_0")
    start = min(tensor.offset for tensor in open_gguf(scratch / "a.gguf").tensors.values())
    return (scratch / "a.gguf").read_bytes(), start, scratch


@settings(max_examples=60, deadline=5000)
@given(data=st.data())
def test_changed_or_cut_file_imports_or_is_refused(one_layer, data):
    content, start, scratch = one_layer
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed) - 1))]
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
