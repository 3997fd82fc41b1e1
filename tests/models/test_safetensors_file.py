import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kvjax.models import CheckpointError
from kvjax.models.safetensors_file import open_folder, open_safetensors
from tests.models.files import entry, safetensors_bytes, unchanged


def refuse(tmp_path, raw: bytes, match: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with unchanged(tmp_path), pytest.raises(CheckpointError, match=match) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)


def test_reads_what_the_safetensors_package_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.normal(size=(5, 3)).astype(np.float32),
        "half": rng.normal(size=(4,)).astype(np.float16),
        "brain": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.0, np.float32),
        "ints": np.arange(6).reshape(2, 3),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with unchanged(tmp_path):
        found = open_safetensors(path)
        assert found.keys() == tensors.keys()
        for name, expected in tensors.items():
            array = found[name].array()
            assert array.dtype == expected.dtype and array.shape == expected.shape
            np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(found["matrix"].rows(1, 3), tensors["matrix"][1:3])
    assert not found["matrix"].rows(0, 5).flags.writeable
    with pytest.raises(CheckpointError, match=r"'ints' has dtype int64"):
        found["ints"].rows(0, 1)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 1000])
def test_header_length_is_checked_before_anything_is_allocated(tmp_path, length):
    refuse(tmp_path, safetensors_bytes(b"{}", length=length), "header")


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0\0", b"\x02\0\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0{"])
def test_truncated_header(tmp_path, raw):
    refuse(tmp_path, raw, f"file is {len(raw)} bytes, (the )?header")


def test_truncated_data_says_how_much_is_missing(tmp_path):
    raw = safetensors_bytes({"a": entry(0, 16)}, bytes(12))
    refuse(tmp_path, raw, f"file is {len(raw)} bytes, header wants {len(raw) + 4}")


def test_bytes_after_the_last_tensor(tmp_path):
    refuse(tmp_path, safetensors_bytes({"a": entry(0, 16)}, bytes(20)), "header wants")


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ([(0, 16), (8, 24)], "'b' starts at byte .* overlaps"),
        ([(0, 16), (0, 16)], "overlaps"),
        ([(0, 8), (12, 24)], "leaves a hole"),
        ([(4, 12), (12, 24)], "'a' starts .* leaves a hole"),
        ([(0, 8), (8, 2**62)], "header wants"),
        ([(-8, 8), (8, 24)], "data_offsets"),
        ([(8, 0), (8, 24)], "data_offsets"),
    ],
)
def test_byte_ranges_must_tile_the_file(tmp_path, ranges, match):
    header = {name: entry(*bounds) for name, bounds in zip("ab", ranges)}
    for name, (start, stop) in zip("ab", ranges):
        header[name]["shape"] = [max(stop - start, 0) // 4]
    refuse(tmp_path, safetensors_bytes(header, bytes(24)), match)


@pytest.mark.parametrize("shape", [[3], [5], [2**32, 2**32], [2**63, 2], [4, 2**64], [0]])
def test_shape_times_dtype_must_be_the_range_without_overflow(tmp_path, shape):
    raw = safetensors_bytes({"a": entry(0, 16, shape)}, bytes(16))
    refuse(tmp_path, raw, r"'a': data_offsets hold 16 bytes, but F32 .* is \d+ bytes")


@pytest.mark.parametrize("shape", [[-4], [4.0], ["4"], [True], None, 4, {}, [1] * 9, [[4]]])
def test_shape_must_be_a_list_of_counts(tmp_path, shape):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}
    refuse(tmp_path, safetensors_bytes(header, bytes(16)), "shape")


@pytest.mark.parametrize("offsets", [[0], [0, 16, 16], ["0", "16"], [0.0, 16.0], None, [0, None]])
def test_offsets_must_be_two_counts(tmp_path, offsets):
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}
    refuse(tmp_path, safetensors_bytes(header, bytes(16)), "data_offsets")


@pytest.mark.parametrize("dtype", ["F4", "I4", "F6_E2M3", "C64", "f32", "", None, 7, ["F32"]])
def test_unknown_and_sub_byte_dtypes(tmp_path, dtype):
    header = {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 16]}}
    refuse(tmp_path, safetensors_bytes(header, bytes(16)), "'a': dtype")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'"x"', "expected an object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "expected dtype"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":{"x":1}}', "expected dtype, shape"),
        (b'{"a":[]}', "expected dtype, shape"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"__metadata__":[]}', "__metadata__"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b'{"a":1,"a":2}', "'a' appears twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', "appears twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', "appears twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "a"),
    ],
)
def test_malformed_headers(tmp_path, header, match):
    refuse(tmp_path, safetensors_bytes(header), match)


def test_values_are_counted_before_they_are_parsed(tmp_path):
    # 12 MB of text would become 400 MB of lists.
    refuse(tmp_path, safetensors_bytes(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"), "JSON values")


def test_duplicates_are_found_in_linear_time(tmp_path):
    keys = ",".join(f'"{i}":0' for i in [*range(200_000), 199_999])
    refuse(tmp_path, safetensors_bytes(f"{{{keys}}}".encode()), "'199999' appears twice")


def shards(tmp_path, weight_map, files):
    for name, header in files.items():
        size = max((e["data_offsets"][1] for e in header.values()), default=0)
        (tmp_path / name).write_bytes(safetensors_bytes(header, bytes(size)))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))


def refuse_folder(tmp_path, match):
    with unchanged(tmp_path), pytest.raises(CheckpointError, match=match):
        open_folder(tmp_path)


def test_shards_are_joined(tmp_path):
    one, two = {"a": entry(0, 8)}, {"b": entry(0, 8), "c": entry(8, 16)}
    shards(tmp_path, {"a": "1.st", "b": "2.st", "c": "2.st"}, {"1.st": one, "2.st": two})
    assert open_folder(tmp_path).keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "sub/x.st", "..", ".", "", "a\\..\\b", "nul\0.st", "./1.st"],
)
def test_index_names_may_not_leave_the_folder(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_bytes(safetensors_bytes({"a": entry(0, 8)}, bytes(8)))
    shards(home, {"a": name}, {})
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="without folders"):
        open_folder(home)


@pytest.mark.parametrize("index", [True, False])
def test_links_out_of_the_folder_are_refused(tmp_path, index):
    home, secret = tmp_path / "home", tmp_path / "secret"
    home.mkdir()
    secret.write_bytes(safetensors_bytes({"a": entry(0, 8)}, bytes(8)))
    (home / "model.safetensors").symlink_to(secret)
    if index:
        shards(home, {"a": "model.safetensors"}, {})
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="outside"):
        open_folder(home)


def test_links_into_the_hub_cache_are_followed(tmp_path):
    home, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_bytes(safetensors_bytes({"a": entry(0, 8)}, bytes(8)))
    (home / "model.safetensors").symlink_to("../../blobs/123")
    assert open_folder(home).keys() == {"a"}


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "1.st").mkdir()
    shards(tmp_path, {"a": "1.st"}, {})
    refuse_folder(tmp_path, "not a regular file")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "1.st", "b": "1.st", "gone": "1.st"}, "1 tensors are in no file, first 'gone'"),
        ({"a": "1.st"}, "'b' is in 1.st, but the index says nothing of it"),
        ({"a": "1.st", "b": "2.st"}, "'b' is in 1.st, but the index says 2.st"),
        ({"a": "1.st", "b": "1.st", "c": "2.st", "d": "3.st"}, "'3.st' is missing"),
        ({"a": 1}, "expected a name"),
        ({str(i): f"{i}.st" for i in range(257)}, "257 files, expected at most 256"),
        (dict.fromkeys(map(str, range(250_001)), "1.st"), "at most 250000 tensors"),
        ([], "expected a weight_map"),
        (None, "expected a weight_map"),
    ],
)
def test_index_and_files_must_agree(tmp_path, weight_map, match):
    files = {"1.st": {"a": entry(0, 8), "b": entry(8, 16)}, "2.st": {"c": entry(0, 8)}}
    shards(tmp_path, weight_map, files)
    refuse_folder(tmp_path, match)


def test_a_tensor_in_two_files(tmp_path):
    one, two = {"a": entry(0, 8)}, {"a": entry(0, 8), "b": entry(8, 16)}
    shards(tmp_path, {"a": "1.st", "b": "2.st"}, {"1.st": one, "2.st": two})
    refuse_folder(tmp_path, "'a' is in two files")


def test_duplicate_names_in_the_index(tmp_path):
    text = '{"weight_map": {"a": "1.st", "a": "2.st"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refuse_folder(tmp_path, "'a' appears twice")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        open_folder(tmp_path)
