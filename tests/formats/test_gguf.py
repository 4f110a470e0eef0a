"""The GGUF reader, compared with the gguf package, and given corrupt files."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx.errors import CheckpointError, SourceError
from splitquant_mlx.formats import gguf as module
from splitquant_mlx.formats.gguf import DEFAULT_ALIGNMENT, block_types, open_gguf, read_tensor

U32, F32_VALUE, STRING, ARRAY = 4, 6, 8, 9
F32, Q8_0, Q6_K = 0, 8, 14


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def string(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def entry(key, kind, payload):
    return string(key) + u32(kind) + payload


def array(kind, count, payload=b""):
    return u32(kind) + u64(count) + payload


def info(name, shape, kind=F32, offset=0):
    dims = b"".join(map(u64, reversed(shape)))
    return string(name) + u32(len(shape)) + dims + u32(kind) + u64(offset)


def gguf_bytes(entries=(), infos=(), data=b"", *, counts=None, version=3, alignment=32):
    tensor_count, entry_count = counts or (len(infos), len(entries))
    head = b"GGUF" + u32(version) + u64(tensor_count) + u64(entry_count)
    head += b"".join(entries) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


VECTOR = np.arange(8, dtype="<f4")
SMALL = gguf_bytes(
    [
        entry("general.architecture", STRING, string("llama")),
        entry("scores", ARRAY, array(F32_VALUE, 3, VECTOR[:3].tobytes())),
        entry("tokens", ARRAY, array(STRING, 2, string("a") + string("bc"))),
        entry("nested", ARRAY, array(ARRAY, 1, array(U32, 2, u32(5) + u32(6)))),
    ],
    [info("x", (2, 4)), info("y", (1, 32), Q8_0, 32)],
    VECTOR.tobytes() + struct.pack("<e", 0.5) + np.arange(32, dtype=np.int8).tobytes(),
)


def opened(path, content):
    path.unlink(missing_ok=True)  # do not change the bytes of an earlier memory map
    path.write_bytes(content)
    return open_gguf(path)


def test_small_file_by_hand(tmp_path):
    ours = opened(tmp_path / "a.gguf", SMALL)
    assert ours.metadata == {
        "general.architecture": "llama",
        "scores": [0.0, 1.0, 2.0],
        "tokens": ["a", "bc"],
        "nested": [[5, 6]],
    }
    assert ours.tensors["x"].shape == (2, 4)
    assert ours.tensors["y"].type == "Q8_0"
    np.testing.assert_array_equal(read_tensor(ours, "x"), VECTOR.reshape(2, 4))
    np.testing.assert_array_equal(read_tensor(ours, "y"), 0.5 * np.arange(32)[None])
    with pytest.raises(CheckpointError, match="tensor 'z' not found"):
        read_tensor(ours, "z")


def test_version_2_reads_as_version_3(tmp_path):
    ours = opened(tmp_path / "a.gguf", SMALL[:4] + u32(2) + SMALL[8:])
    np.testing.assert_array_equal(read_tensor(ours, "x"), VECTOR.reshape(2, 4))


def test_string_that_is_not_utf8_is_replaced(tmp_path):
    content = gguf_bytes([entry("general.name", STRING, string(b"caf\xe9"))])
    assert opened(tmp_path / "a.gguf", content).metadata == {"general.name": "caf\ufffd"}


def test_metadata_as_the_gguf_package_writes_it(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "uint8": 200,
        "int8": -5,
        "uint16": 60000,
        "int16": -300,
        "uint32": 4_000_000_000,
        "int32": -70000,
        "float32": 0.5,
        "uint64": 1 << 63,
        "int64": -(1 << 40),
        "float64": 0.1,
        "bool": True,
        "string": "naïve ▁ text",
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    arrays = {"ints": [1, -2, 3], "floats": [0.5, -1.5], "bools": [True, False], "texts": ["", "▁"]}
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.add_custom_alignment(256)
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("x", tensor)
    writer.add_tensor("y", -tensor)
    close(writer)
    ours = open_gguf(path)
    assert {key: ours.metadata[key] for key in (*values, *arrays)} == {**values, **arrays}
    assert ours.tensors["y"].offset % 256 == 0
    np.testing.assert_array_equal(read_tensor(ours, "x"), tensor)
    np.testing.assert_array_equal(read_tensor(ours, "y"), -tensor)


KINDS = [name for name, _, _ in block_types().values()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_decodes_as_the_gguf_package_does(tmp_path, monkeypatch, kind):
    number = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[number]
    shape = (5, 3, 2 * block_size)
    raw = np.random.default_rng(0).integers(0, 256, (5, 3, 2 * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales overflow or are NaN
        expected = gguf.quants.dequantize(raw, number).reshape(shape)
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=number)
    close(writer)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 5 * block_size)  # two of fifteen rows per chunk
    opened = open_gguf(path)
    assert opened.tensors["x"].shape == shape
    assert read_tensor(opened, "x").dtype == np.float32
    np.testing.assert_array_equal(read_tensor(opened, "x"), expected)
    with np.errstate(all="ignore"):
        half = expected.astype(np.float16)
    np.testing.assert_array_equal(read_tensor(opened, "x", np.float16), half)


def test_common_types_are_supported():
    common = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
    assert set(common.split()) <= set(KINDS)


def part(number, names, count=2):
    split = [entry("split.no", 2, struct.pack("<H", number))]
    split += [entry("split.count", 2, struct.pack("<H", count))]
    model = [entry("general.name", STRING, string("m"))] if number == 0 else []
    infos = [info(name, (8,), offset=32 * n) for n, name in enumerate(names)]
    data = b"".join((VECTOR + ord(name)).tobytes() for name in names)
    return gguf_bytes(split + model, infos, data)


def parts(directory, **contents):
    files = [directory / f"m-{n:05d}-of-00002.gguf" for n in (1, 2)]
    for file, content in zip(files, (part(0, "ab"), part(1, "c")), strict=True):
        file.write_bytes(contents.get(f"part{file.name[6]}", content))
    return files


@pytest.mark.parametrize("named", [0, 1])
def test_parts_are_one_model_whichever_is_opened(tmp_path, named):
    opened = open_gguf(parts(tmp_path)[named])
    assert opened.metadata["general.name"] == "m"
    assert list(opened.tensors) == ["a", "b", "c"]
    for name in "abc":
        np.testing.assert_array_equal(read_tensor(opened, name), VECTOR + ord(name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (part(1, "a"), "expected part 1 of 2"),
        (part(0, "c"), r"expected part 1 of 2 .*got \(0, 2\)"),
        (SMALL, r"got \(None, None\)"),
        (part(1, "c")[:-1], r"m-00002-of-00002\.gguf: tensor 'c' ends at"),
    ],
)
def test_a_part_of_another_model_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        open_gguf(parts(tmp_path, part2=content)[0])


def test_errors_name_missing_and_renamed_parts(tmp_path):
    first, second = parts(tmp_path)
    second.unlink()
    with pytest.raises(SourceError, match=r"expected 2 files .*m-00002-of-00002\.gguf not found"):
        open_gguf(first)
    with pytest.raises(CheckpointError, match=r"expected 2 files .*, got 1 by its name"):
        open_gguf(first.rename(tmp_path / "renamed.gguf"))


def test_parts_in_another_order_are_refused(tmp_path):
    first, second = parts(tmp_path)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CheckpointError, match=r"got \(0, 2\) by its metadata; it was renamed"):
        open_gguf(first)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HUGE = (1 << 64) - 1
BROKEN = {
    "no GGUF": (b"PK\3\4" + SMALL[4:], "not a GGUF file"),
    "empty": (b"", "empty"),
    "version 1": (gguf_bytes(version=1), "version 2 or 3 .*, got 1"),
    "big-endian": (gguf_bytes(version=3 << 24), "little-endian"),
    "tensor count": (gguf_bytes(counts=(HUGE, 0)), "the number of tensors"),
    "entry count": (gguf_bytes(counts=(0, 1 << 40)), "metadata entries"),
    "key length": (gguf_bytes([u64(HUGE) + u32(4) + u32(0)]), "the key of metadata entry 0"),
    "string length": (gguf_bytes([entry("k", STRING, u64(1 << 50))]), "metadata 'k' is"),
    "numbers": (gguf_bytes([entry("k", ARRAY, array(U32, 1 << 61))]), "metadata 'k' is"),
    "strings": (gguf_bytes([entry("k", ARRAY, array(STRING, 1 << 32))]), "metadata 'k' is"),
    "arrays": (gguf_bytes([entry("k", ARRAY, array(ARRAY, 1 << 32))]), "metadata 'k' is"),
    "depth": (gguf_bytes([entry("k", ARRAY, array(ARRAY, 1) * 9)], data=b"\0" * 99), "nests"),
    "value type": (gguf_bytes([entry("k", 13, u64(0))]), "value type from 0 to 12, got 13"),
    "element type": (gguf_bytes([entry("k", ARRAY, array(99, 1, u64(0)))]), "got 99"),
    "key twice": (gguf_bytes([entry("k", U32, u32(1))] * 2), "'k' occurs twice"),
    "tensor twice": (gguf_bytes([], [info("x", (1,))] * 2, bytes(64)), "'x' occurs twice"),
    "rank 0": (gguf_bytes([], [info("x", ())], bytes(64)), "'x'.*dimensions, got 0"),
    "rank 5": (gguf_bytes([], [info("x", (1,) * 5)], bytes(64)), "'x'.*dimensions, got 5"),
    "rank huge": (gguf_bytes([], [string("x") + u32(1 << 31)], bytes(64)), "dimensions"),
    "no rows": (gguf_bytes([], [info("x", (0, 4))], bytes(64)), r"got \(0, 4\)"),
    "size": (gguf_bytes([], [info("x", (1 << 63, 4))], bytes(64)), "'x' ends at"),
    "size wraps": (gguf_bytes([], [info("x", (1 << 62, 1 << 62))], bytes(64)), "'x' ends at"),
    "blocks": (gguf_bytes([], [info("x", (2, 48), Q8_0)], bytes(200)), "a multiple of 32"),
    "K quant": (gguf_bytes([], [info("x", (128,), Q6_K)], bytes(999)), "a multiple of 256"),
    "new type": (
        gguf_bytes([], [info("x", (1,), 77)], bytes(64)),
        "'x': expected ggml type .*Q4_1.*, got 77",
    ),
    "misaligned": (gguf_bytes([], [info("x", (1,), offset=4)], bytes(64)), "multiple of 32"),
    "overlap": (
        gguf_bytes([], [info("x", (16,)), info("y", (8,), offset=32)], bytes(128)),
        "'y': expected an offset of at least 64, a multiple of 32, got 32",
    ),
    "past the end": (gguf_bytes([], [info("x", (16,), offset=32)], bytes(64)), "'x' ends at"),
    "offset huge": (gguf_bytes([], [info("x", (1,), offset=1 << 63)], bytes(64)), "'x' ends at"),
    **{
        f"alignment {value}": (
            gguf_bytes([entry("general.alignment", U32, u32(value))]),
            f"expected a power of two, got {value}",
        )
        for value in (0, 3, 48)
    },
    "alignment text": (
        gguf_bytes([entry("general.alignment", STRING, string("32"))]),
        "got '32'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_in_one_line_and_little_memory(tmp_path, name):
    content, message = BROKEN[name]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            opened(tmp_path / "a.gguf", content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    content = gguf_bytes([entry("a\nb", 13, b"")])
    with pytest.raises(CheckpointError, match=r"'a\\nb'"):
        opened(tmp_path / "a.gguf", content)


def test_unreadable_path_is_a_source_error(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(SourceError, match="cannot be read"):
            open_gguf(path)


def test_every_truncation_is_refused(tmp_path):
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError):
            opened(tmp_path / "a.gguf", SMALL[:length])


def test_a_large_alignment_moves_the_data(tmp_path):
    entries = [entry("general.alignment", U32, u32(1024))]
    content = gguf_bytes(entries, [info("x", (8,))], VECTOR.tobytes(), alignment=1024)
    ours = opened(tmp_path / "a.gguf", content)
    assert ours.tensors["x"].offset == 1024 > DEFAULT_ALIGNMENT
    np.testing.assert_array_equal(read_tensor(ours, "x"), VECTOR)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "a.gguf"


@settings(max_examples=300, deadline=1000)
@given(changes=st.dictionaries(st.integers(0, len(SMALL) - 1), st.integers(0, 255), min_size=1))
def test_changed_bytes_give_a_file_or_a_checkpoint_error(scratch, changes):
    content = bytearray(SMALL)
    for position, value in changes.items():
        content[position] = value
    try:
        ours = opened(scratch, bytes(content))
        for name, tensor in ours.tensors.items():
            assert read_tensor(ours, name).shape == tensor.shape
    except CheckpointError as exc:
        assert "\n" not in str(exc)
