import struct

import gguf
import numpy as np
import pytest

from kvjax.models import CheckpointError
from kvjax.models.gguf_file import GGUFTensor, open_gguf
from tests.models.files import gguf_bytes, string, tensor_info, unchanged, value

KINDS = ["F32", "F16", "BF16", "F64", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def refuse(tmp_path, raw: bytes, match: str):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with unchanged(tmp_path), pytest.raises(CheckpointError, match=match) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_reads_what_the_gguf_package_writes(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("u", 7)
    writer.add_int32("i", -7)
    writer.add_float32("f", 0.5)
    writer.add_bool("b", True)
    writer.add_string("s", "naïve")
    writer.add_array("strings", ["a", "", "\u00df"])
    writer.add_array("numbers", [1, 2, 3])
    matrix = rng.normal(size=(5, 64)).astype(np.float32)
    coded = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("plain", matrix)
    writer.add_tensor("half", matrix[:2].astype(np.float16))
    writer.add_tensor("coded", coded, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with unchanged(tmp_path):
        file = open_gguf(path)
        assert {k: file.metadata[k] for k in "uifbs"} == dict(u=7, i=-7, f=0.5, b=True, s="naïve")
        assert file.metadata["strings"] == ["a", "", "\u00df"]
        assert file.metadata["numbers"] == [1, 2, 3]
        np.testing.assert_array_equal(file.tensors["plain"].rows(0, 5), matrix)
        np.testing.assert_array_equal(file.tensors["half"].rows(1, 2), matrix[1:2].astype("f2"))
    expected = gguf.quants.dequantize(coded, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(file.tensors["coded"].rows(1, 4), expected[1:4])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rows_of_the_whole_tensor(tmp_path, kind):
    code = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[code]
    row = 512 // block * size
    # Bytes 0 to 59 are finite numbers in each of these types.
    raw = np.random.default_rng(1).integers(0, 60, 6 * row, np.uint8)
    path = tmp_path / "x.gguf"
    path.write_bytes(
        gguf_bytes({}, infos=[tensor_info("a", (6, 512), code, 0)], data=raw.tobytes())
    )
    tensor = open_gguf(path).tensors["a"]
    whole = tensor.rows(0, 6)
    assert whole.shape == (6, 512) and np.isfinite(whole).all() and np.asarray(whole).any()
    for start, stop in ((0, 1), (2, 5), (5, 6)):
        np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])
    if block > 1:
        expected = gguf.quants.dequantize(raw.reshape(6, row), code)
        np.testing.assert_array_equal(whole, expected)


def test_types_without_a_decoder_are_named(tmp_path):
    tensor = GGUFTensor("x.gguf", "a", (1, 256), "TQ1_0", 0, 54)
    (tmp_path / "x.gguf").write_bytes(bytes(54))
    with pytest.raises(CheckpointError, match=r"'a' has type TQ1_0, .* expected one of F32"):
        GGUFTensor(str(tmp_path / "x.gguf"), *list(vars(tensor).values())[1:]).rows(0, 1)


@pytest.mark.parametrize("size", [0, 3, 23])
def test_shorter_than_a_header(tmp_path, size):
    refuse(tmp_path, gguf_bytes({})[:size], f"file is {size} bytes, a GGUF header wants")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"magic": b"GGML"}, "starts with"),
        ({"version": 1}, "version is 1"),
        ({"version": 4}, "version is 4"),
        ({"version": 3 << 24}, "little-endian"),
        ({"n_tensors": 2**64 - 1}, "number of tensors is 18446744073709551615"),
        ({"n_tensors": 2**63}, "number of tensors"),
        ({"n_keys": 2**64 - 1}, "number of metadata keys is 18446744073709551615"),
        ({"n_keys": 65_536}, "truncated or corrupt"),
        ({"n_tensors": 1}, "truncated or corrupt"),
    ],
)
def test_counts(tmp_path, options, match):
    refuse(tmp_path, gguf_bytes({}, **options), match)


ARRAY = struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (string("k", 2**64 - 1) + value(1), "length of a metadata key is 18446744073709551615"),
        (string("k", 1025) + value(1), "expected at most 1024"),
        (string("k", 500) + value(1), "truncated or corrupt"),
        (string("k") + struct.pack("<IQ", 8, 2**64 - 1), "length of metadata key 'k'"),
        (string("k") + struct.pack("<IQ", 8, 2**20), "truncated or corrupt"),
        (string("k") + ARRAY + struct.pack("<IQ", 0, 2**64 - 1), "length of metadata key 'k'"),
        (string("k") + ARRAY + struct.pack("<IQ", 8, 2**61), "length of metadata key 'k'"),
        (string("k") + ARRAY + struct.pack("<IQ", 12, 2**20), "truncated or corrupt"),
        (string("k") + ARRAY + struct.pack("<IQ", 8, 2**20), "truncated or corrupt"),
        (string("k") + ARRAY + struct.pack("<IQ", 9, 1) + bytes(16), "array of type 9"),
        (string("k") + struct.pack("<Ii", 13, 0), "has type 13, expected 0 to 12"),
        (string("k") + struct.pack("<ii", -1, 0), "has type 4294967295, expected 0 to 12"),
        (string("k") + ARRAY + struct.pack("<iQ", -8, 1) + bytes(8), "array of type 4294967288"),
        (string(b"\xff\xfe") + value(1), "not UTF-8"),
        (string("k") + struct.pack("<I", 8) + string(b"\xc3"), "not UTF-8"),
    ],
)
def test_lengths_and_types_of_metadata(tmp_path, entry, match):
    refuse(tmp_path, gguf_bytes([entry]), match)


def test_duplicate_key(tmp_path):
    entry = string("k") + value(1)
    refuse(tmp_path, gguf_bytes([entry, entry]), "'k' appears twice")


@pytest.mark.parametrize("alignment", [0, 3, 48, -32, "32", 32.0, [32], True])
def test_alignment_is_a_power_of_two(tmp_path, alignment):
    if alignment == -32:
        entry = string("general.alignment") + struct.pack("<Ii", 5, -32)
    else:
        entry = string("general.alignment") + value(alignment)
    refuse(tmp_path, gguf_bytes([entry]), "alignment")


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        ([tensor_info("a", (4,), 0, 1024)], "tensor 'a' wants bytes"),
        ([tensor_info("a", (2**20,), 0, 0)], "tensor 'a' wants bytes"),
        ([tensor_info("a", (2**32, 2**32), 0, 0)], "tensor 'a' wants bytes"),
        ([tensor_info("a", (2**63, 2), 0, 0)], "tensor 'a' wants bytes"),
        ([tensor_info("a", (4,), 0, 2**63)], "tensor 'a' wants bytes"),
        ([tensor_info("a", (4,), 0, 7)], "not aligned to 32"),
        ([tensor_info("a", (0, 4), 0, 0)], "sizes above zero"),
        ([tensor_info("a", (4, 33), 8, 0)], "multiple of 32"),
        ([tensor_info("a", (32,), 8, 0)], "two axes or more"),
        ([tensor_info("a", (4,), 99, 0)], "unknown type 99"),
        ([tensor_info("a", (4,), 4, 0)], "unknown type 4"),
        ([tensor_info("a", (1,) * 5, 0, 0)], "5 axes, expected 1 to 4"),
        ([tensor_info("a", (), 0, 0)], "0 axes, expected 1 to 4"),
        ([string("a") + struct.pack("<I", 2**32 - 1)], "4294967295 axes"),
        ([tensor_info("a", (4,), 0, 0)] * 2, "'a' appears twice"),
        ([tensor_info("a", (4,), 0, 0), tensor_info("b", (4,), 0, 0)], "'a' and 'b' overlap"),
        ([tensor_info("a", (16,), 0, 0), tensor_info("b", (4,), 0, 32)], "overlap"),
        ([string("a", 2**40)], "length of a tensor name"),
    ],
)
def test_tensor_descriptions(tmp_path, infos, match):
    refuse(tmp_path, gguf_bytes({}, infos=infos, data=bytes(64)), match)


def test_truncated_anywhere(tmp_path):
    whole = gguf_bytes({"a": "text", "n": [1, 2]}, {"w": np.ones((2, 8), np.float32)})
    path = tmp_path / "x.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_get_names_key_value_and_type(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({"k": "text"}))
    file = open_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="key 'k' is 'text', expected int"):
        file.get("k", int)
    with pytest.raises(CheckpointError, match="key 'gone' is missing"):
        file.get("gone", int)
    assert file.get("gone", int, 3) == 3
