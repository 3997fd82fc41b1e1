import json

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import CheckpointError, checkpoint
from kvjax.models.huggingface import load_pretrained
from kvjax.models.llama import flatten
from kvjax.models.tokenizer import load_tokenizer
from tests import golden
from tests.models.files import unchanged


@pytest.fixture(scope="module", params=["gemma3", "phi3_partial", "qwen2"])
def model(request, tmp_path_factory):
    path = golden.HERE / f"{request.param}.npz"
    return load_pretrained(golden.load_case(path, tmp_path_factory.mktemp("hf")).folder)


@pytest.fixture
def folder(model, tmp_path):
    checkpoint.save(tmp_path / "saved", model)
    return tmp_path / "saved"


def test_save_and_load_is_identity(model, folder):
    with unchanged(folder):
        again = checkpoint.load(folder)
    assert again.config == model.config
    assert flatten(again).keys() == flatten(model).keys()
    for name, value in flatten(model).items():
        np.testing.assert_array_equal(flatten(again)[name], value)


def test_dtype(model, folder):
    for name, value in flatten(checkpoint.load(folder, dtype=jnp.bfloat16)).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, flatten(model)[name].astype(jnp.bfloat16))


def test_existing_checkpoint_is_kept_unless_forced(model, folder):
    with unchanged(folder), pytest.raises(FileExistsError, match="force=True"):
        checkpoint.save(folder, model)
    checkpoint.save(folder, model, force=True)
    checkpoint.load(folder)


def test_tokenizer_is_saved_beside(model, tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    checkpoint.save(tmp_path / "saved", model, tokenizer)
    assert load_tokenizer(tmp_path / "saved").encode("the x") == tokenizer.encode("the x")


def edit(folder, **changes):
    path = folder / checkpoint.CONFIG
    found = json.loads(path.read_text())
    found["config"] |= changes
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 7}, r"parameter 'embed': \(96, 32\), expected \(7, 32\)"),
        ({"tied": False}, "parameter 'head'"),
        ({"nonsense": 1}, "nonsense"),
        ({"heads": 3}, "multiple of kv_heads"),
        ({"heads": "3"}, None),
    ],
)
def test_configuration_that_contradicts_the_parameters(folder, model, changes, match):
    if changes == {"tied": False} and not model.config.tied:
        changes, match = {"tied": True}, r"\['head'\] are unknown"
    edit(folder, **changes)
    with unchanged(folder), pytest.raises(CheckpointError, match=match):
        checkpoint.load(folder)


def test_format_and_finite(folder, model):
    flat = dict(flatten(model))
    flat["norm"] = flat["norm"].at[0].set(jnp.nan)
    checkpoint.save(folder, type(model)(model.config, flat), force=True)
    checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="'norm' has NaN"):
        checkpoint.load(folder, check_finite=True)
    (folder / checkpoint.CONFIG).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99, this kvjax reads format 1"):
        checkpoint.load(folder)
