"""The model kept in the repository does what its README says."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from kvjax.data import ListOperations
from kvjax.data.list_operations import MASK, correct, tokenizer
from kvjax.diffusion import Choice, blocks, denoise, dkv_decode, no_cache, quota
from kvjax.diffusion.cache import DKVDecode
from kvjax.models import load
from kvjax.models.llama import flatten
from tests.diffusion import reference

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


@dataclasses.dataclass(frozen=True)
class FreshAnswer(DKVDecode):
    """dKV-Cache-Decode that keeps the prompt alone."""

    def active(self, view):
        return super().active(view) | (view.inside & (view.position >= view.origin[:, None]))


def decoded(model, operation, cache, number=64):
    """Lists of 8, one token per step, under a cache policy."""
    source = ListOperations(number, 77, (operation,), 8, 8)
    rows = [source[i] for i in range(number)]
    tokens, hidden = (np.stack([row[name] for row in rows]) for name in ("tokens", "items"))
    canvas = np.where(hidden, MASK, tokens).astype(np.int32)
    return canvas, denoise(
        model, canvas, source.prompt_length, schedule=blocks(8), unmasker=quota(8),
        cache=cache, choice=CHOICE, sizes=(canvas.shape[1],),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["copy", "shuffle"])
@pytest.mark.parametrize("refresh", [None, 2, 4, 8])
def test_decoding_this_model_is_the_plain_statement_of_it(model, operation, refresh):
    """Whole answers and their order, beside NumPy in float64 (tests/diffusion/reference.py)."""
    cache = no_cache() if refresh is None else dkv_decode(refresh)
    canvas, out = decoded(model, operation, cache, 4)
    for b, row in enumerate(canvas):
        network = reference.Network(model.config, flatten(model))
        start = row.tolist().index(MASK)
        expected = reference.generate(
            network, row[:start].tolist(), 8, 8, 8, MASK, refresh=refresh, never=(MASK,)
        )
        assert out.tokens[b].tolist() == expected.tokens
        if operation == "shuffle":  # the confidences of a copy are all 1 up to float32's rounding
            assert out.order[b].tolist() == expected.order


@pytest.mark.slow
def test_what_is_stale_is_the_prompt(model):
    """Copies need nothing of one another; of a shuffled list the next item depends on those that
    are placed, and this model notes that on the items of the prompt. Kept, these are stale."""
    share = lambda *how: correct(np.asarray(decoded(model, *how)[1].tokens)).mean()  # noqa: E731
    assert share("copy", dkv_decode(8)) >= 0.95
    assert share("shuffle", dkv_decode(8)) <= 0.05
    assert share("shuffle", FreshAnswer(refresh=8)) <= 0.05
    assert share("shuffle", dkv_decode(8, prompt=False)) >= 0.9
    assert share("shuffle", dkv_decode(2)) <= 0.2  # one step old is too old already
