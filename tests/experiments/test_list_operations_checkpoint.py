"""The model kept in the repository does what its README says."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from kvjax.data import ListOperations
from kvjax.data.list_operations import MASK, correct, tokenizer
from kvjax.diffusion import Choice, blocks, denoise, quota
from kvjax.models import load

FOLDER = pathlib.Path(experiments.__file__).parent / "checkpoints" / "list_operations"
CHOICE = Choice(suppress=(MASK,))


@pytest.fixture(scope="module")
def model():
    return load(FOLDER)[0]


def accuracy(model, operation, steps, what="answer"):
    """On examples of a seed that training did not have."""
    source = ListOperations(
        128, seed=77, operations=(operation,), min_items=8 if what == "items" else 4, max_items=8
    )
    rows = [source[i] for i in range(len(source))]
    tokens, hidden = (np.stack([row[name] for row in rows]) for name in ("tokens", what))
    out = denoise(
        model, jnp.where(hidden, MASK, tokens), source.prompt_length,
        schedule=blocks(8), unmasker=quota(steps), choice=CHOICE,
    )  # fmt: skip
    return correct(np.asarray(out.tokens)).mean()


def test_size_and_files(model):
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    assert size < 10_000_000
    assert model.config.mask_token == MASK and model.config.bidirectional
    assert 1_000_000 < sum(value.size for value in jax.tree.leaves(model)) < 3_000_000
    stored = load(FOLDER)[1]
    assert stored.backend.get_vocab() == tokenizer().backend.get_vocab()


def test_one_token_per_step_is_right(model):
    for operation in ("copy", "reverse"):
        assert accuracy(model, operation, 8) >= 0.95


def test_all_at_once_copy_stays_and_shuffle_breaks(model):
    assert accuracy(model, "copy", 1, "items") >= 0.95
    assert accuracy(model, "shuffle", 8, "items") >= 0.9
    assert accuracy(model, "shuffle", 1, "items") <= 0.1
