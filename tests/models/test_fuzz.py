"""Damaged files: every reader returns a result or raises CheckpointError, in bounded memory.

A damaged file that once did something else is kept in cases/ and read again here.
"""

import contextlib
import json
import pathlib
import signal
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvjax.models import CheckpointError
from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_model import load_gguf
from kvjax.models.gguf_tokenizer import gguf_tokenizer
from kvjax.models.huggingface_config import parse_config
from kvjax.models.safetensors_file import open_safetensors
from tests import golden
from tests.models.files import entry, gguf_bytes, safetensors_bytes, unchanged

CASES = pathlib.Path(__file__).parent / "cases"
MEMORY = 2**20  # bytes that any file may take beside twice its size: modules, messages, a tokenizer
SECONDS = 5  # on a busy machine; one file takes milliseconds

numbers = st.sampled_from([0, 1, 7, 8, 31, 32, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
place = st.integers(0, 2**14)
edits = st.one_of(
    st.tuples(st.just("digit"), place, st.integers(0, 32)),
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(st.just("word"), place, numbers),
    st.tuples(st.just("half"), place, numbers),
    st.tuples(st.just("cut"), place, st.integers(1, 40)),
    st.tuples(st.just("end"), place, st.just(0)),
    st.tuples(st.just("again"), place, st.integers(1, 80)),
    st.tuples(st.just("digit"), place, st.integers(0, 2**64)),
)


def damage(raw: bytes, changes: list) -> bytes:
    """Applies edits (kind, place, argument) to a file."""
    data = bytearray(raw)
    for kind, at, argument in changes:
        at %= len(data) + 1
        if kind == "byte" and at < len(data):
            data[at] = argument
        elif kind in ("word", "half"):
            width = 8 if kind == "word" else 4
            data[at : at + width] = (argument % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del data[at : at + argument]
        elif kind == "end":
            del data[at:]
        elif kind == "again":
            data[at:at] = data[at : at + argument]
        elif kind == "digit":  # a number in JSON text
            found = [i for i, byte in enumerate(data[:1000]) if i > 7 and 48 <= byte < 58]
            if found:
                i = found[at % len(found)]
                text = str(argument).encode()
                data[i : i + 1] = text
                if data[:4] != b"GGUF":  # the header's length is to stay right
                    length = int.from_bytes(data[:8], "little") + len(text) - 1
                    data[:8] = (length % 2**64).to_bytes(8, "little")
    return bytes(data)


def read_safetensors(path: pathlib.Path) -> None:
    for tensor in open_safetensors(path).values():
        tensor.array()


def read_gguf(path: pathlib.Path) -> None:
    file = open_gguf(path)
    for tensor in file.tensors.values():
        with contextlib.suppress(CheckpointError):
            tensor.rows(0, tensor.shape[0])
    with contextlib.suppress(CheckpointError):
        load_gguf(file)
    gguf_tokenizer(file)


READERS = {".safetensors": read_safetensors, ".gguf": read_gguf}


def survives(path: pathlib.Path) -> None:
    """Reads a file; CheckpointError is a good answer, other exceptions and waiting are not."""
    tracemalloc.start()
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.suppress(CheckpointError), np.errstate(all="ignore"):
            READERS[path.suffix](path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY + 2 * path.stat().st_size
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tracemalloc.stop()


def _too_long(*_: object) -> None:
    raise AssertionError(f"a small file took over {SECONDS} s to read")


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """A well-formed file of each kind."""
    header = {"__metadata__": {"format": "pt"}, "a": entry(0, 16, [2, 2]), "b": entry(16, 24)}
    header["c"] = entry(24, 28, [1, 2], "BF16")
    shapes = {"token_embd.weight": (9, 8), "output_norm.weight": (8,)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (8,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (8, 8)
    sizes = {"block_count": 1, "context_length": 16, "embedding_length": 8}
    sizes |= {"feed_forward_length": 8, "attention.head_count": 2, "rope.freq_base": 1e4}
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in sizes.items()}
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "c", "d", "e", "f", "g"],
        "tokenizer.ggml.token_type": [3] + [1] * 8,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    return {
        ".safetensors": safetensors_bytes(header, bytes(28)),
        ".gguf": gguf_bytes(metadata, tensors),
    }


def fuzz(whole, folder, suffix, examples):
    path = folder / f"x{suffix}"
    path.write_bytes(whole[suffix])
    READERS[suffix](path)  # the undamaged file is read whole

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.lists(edits, min_size=1, max_size=4))
    def run(changes):
        path.write_bytes(damage(whole[suffix], changes))
        with unchanged(folder):
            survives(path)

    run()


@pytest.mark.parametrize("suffix", READERS)
def test_damaged_files(whole, tmp_path, suffix):
    fuzz(whole, tmp_path, suffix, 500)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", READERS)
def test_ten_thousand_damaged_files(whole, tmp_path, suffix):
    fuzz(whole, tmp_path, suffix, 10_000)


@pytest.mark.parametrize("path", sorted(CASES.glob("*.*")), ids=lambda path: path.name)
def test_kept_cases(path):
    survives(path)


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
CONFIGS = []
for _path in golden.cases():
    with np.load(_path) as _file:
        CONFIGS += [json.loads(str(_file[key])) for key in ("config", "config_v5")]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(CONFIGS), st.data())
def test_damaged_configurations(config, data):
    config = json.loads(json.dumps(config))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(config)))
        target = config
        if isinstance(config[key], dict) and config[key] and data.draw(st.booleans()):
            target = config[key]
            key = data.draw(st.sampled_from(sorted(target)))
        target[key] = data.draw(odd)
    with contextlib.suppress(CheckpointError):
        parse_config(config)
