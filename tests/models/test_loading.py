import importlib.util
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import models
from kvjax.models import CheckpointError, checkpoint, embedded, load, save_pretrained
from kvjax.models.huggingface import load_pretrained
from kvjax.models.llama import flatten
from kvjax.models.tokenizer import load_tokenizer
from tests import golden
from tests.models.files import gguf_bytes, unchanged
from tests.models.test_gguf_model import convert


@pytest.fixture
def model(tmp_path):
    return load_pretrained(golden.load_case(golden.HERE / "llama2.npz", tmp_path).folder)


def same(found, expected):
    for name, value in flatten(expected).items():
        np.testing.assert_array_equal(flatten(found)[name], value)


def test_every_kind_of_path(tmp_path, model, tokenizer_folder, tokenizer_metadata):
    tokenizer = load_tokenizer(tokenizer_folder)
    save_pretrained(model, tmp_path / "hf", tokenizer)
    checkpoint.save(tmp_path / "orbax", model, tokenizer)
    metadata, tensors = convert(model)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata | tokenizer_metadata, tensors))
    for path in (tmp_path / "hf", str(tmp_path / "orbax"), tmp_path / "x.gguf"):
        with unchanged(tmp_path):
            found, text = load(path)
        same(found, model)
        assert text.encode("the x") == tokenizer.encode("the x")
        found, text = load(path, jnp.bfloat16, tokenizer=False, check_finite=True)
        assert text is None and flatten(found)["embed"].dtype == jnp.bfloat16


def test_embedded_by_name(tmp_path, model, tokenizer_metadata, monkeypatch):
    metadata, tensors = convert(model)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata | tokenizer_metadata, tensors))
    monkeypatch.setattr(embedded, "fetch_smollm2", lambda: path)
    same(load("smollm2-135m")[0], model)


def test_missing_tokenizer_matters_only_when_asked_for(tmp_path, model):
    save_pretrained(model, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="tokenizer=False"):
        load(tmp_path / "hf")
    assert load(tmp_path / "hf", tokenizer=False)[1] is None


@pytest.mark.parametrize("name", ["smollm3", "./a/b", "/a/b", "a/b/c", "~/x", "a/b.gguf", ""])
def test_names_that_are_nothing(name):
    with pytest.raises((FileNotFoundError, CheckpointError)):
        load(name)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with unchanged(tmp_path), pytest.raises(CheckpointError, match=r"expected a \.gguf file"):
        load(tmp_path / "model.pt")


def test_hub_name(tmp_path, model, monkeypatch):
    save_pretrained(model, tmp_path / "hf")
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "hf")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    same(load("owner/name", tokenizer=False)[0], model)
    assert asked == [("owner/name", ["*.json", "*.safetensors", "*.jinja"])]


def test_hub_name_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'kvjax\[hub\]'"):
        load("owner/name")


def test_public_names():
    for name in models.__all__:
        assert getattr(models, name) is not None and name in dir(models)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = models.nonsense
    assert importlib.util.find_spec("kvjax.models.load") is None  # it would hide the function


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kvjax.models import load
from kvjax.models.llama import flatten, parameters
mesh = jax.make_mesh((2, 2), ("data", "model"))
rules = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "data"}
plain, _ = load(sys.argv[1], tokenizer=False)
axes = {name: found for name, (_, found) in parameters(plain.config).items()}
def place(name, shape):
    assert shape == flatten(plain)[name].shape
    return NamedSharding(mesh, P(*(rules.get(axis) for axis in axes[name])))
table = {name: place(name, value.shape) for name, value in flatten(plain).items()}
everywhere = NamedSharding(mesh, P())
for sharding in (place, table, everywhere):
    model, _ = load(sys.argv[1], sharding=sharding, tokenizer=False)
    for name, value in flatten(model).items():
        assert value.sharding == (everywhere if sharding is everywhere else table[name])
        np.testing.assert_array_equal(value, flatten(plain)[name])
q = flatten(load(sys.argv[1], sharding=place, tokenizer=False)[0])["layers.q"]
assert q.addressable_shards[0].data.shape[1] * 2 == q.shape[1]
"""


@pytest.mark.parametrize("kind", ["hf", "orbax", "gguf"])
def test_sharded_over_four_devices(tmp_path, model, kind):
    path = tmp_path / "x.gguf"
    if kind == "hf":
        path = tmp_path / "hf"
        save_pretrained(model, path)
    elif kind == "orbax":
        path = tmp_path / "orbax"
        checkpoint.save(path, model)
    else:
        path.write_bytes(gguf_bytes(*convert(model)))
    environment = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
