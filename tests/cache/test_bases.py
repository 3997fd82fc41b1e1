"""Bases that layers share, beside other stages; and readers that are told what is free."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Carried,
    Spec,
    best_pages,
    chain,
    horizon,
    layer_bases,
    store,
    tokens_held,
)
from kvjax.cache.readers.reader import BestPages
from kvjax.cache.stage import FOREVER
from kvjax.cache.stages.bases import alike
from kvjax.codecs import low_rank, normalize
from tests.cache.harness import (
    BATCH,
    KV_HEADS,
    LAYERS,
    close,
    dense,
    done,
    empty,
    look,
    part,
    rows,
    run,
    step,
)


def test_later_tokens_flow_on_and_nothing_changes_form():
    r = rows(1, 20)
    # Without a stage behind it they are forgotten.
    _, cache = run(layer_bases(4, 6, 2), r, 16, 16)
    assert tokens_held(cache) == LAYERS * BATCH * KV_HEADS * 16
    assert cache.state[0][0].k.shape == (1, BATCH, 1, 16, 4)
    reach, final = layer_bases(4, 6, 2).horizon(cache.state[0][0])
    assert (np.asarray(reach) == FOREVER).all() and not final
    assert (np.asarray(horizon(cache)) == 1).all()


def test_ranks_are_cut_to_what_there_is():
    spec = Spec(5, 2, 4, 2, 8, 64, 20)
    state = layer_bases(1000, 0.25, 4).init(spec)
    assert state.k.shape == (2, 2, 1, 20, 20)  # no more than the prompt's tokens
    assert state.v.shape == (2, 2, 1, 20, 16) and state.v_map.shape == (5, 2, 2, 16, 8)
    none = layer_bases(4, 4).init(spec.replace(prompt=0))
    assert none.pos.shape == (1, 2, 1, 0)


def test_a_prompt_without_tokens_is_passed_through():
    r = part(rows(1, 20), 0, 4)
    cache = empty(layer_bases(4, 4), 8)
    assert tokens_held(cache) == 0 and r["pos"].shape == (2, 4)


@pytest.mark.parametrize("reader", [None, best_pages(150, 8)])
def test_many_tokens_are_read_block_by_block(reader):
    """More than one block of slots, the last one partly full; 17 rows read all, one selects all."""
    r = rows(5, 1217)
    cache = empty(chain(layer_bases(1.0, 1.0, 2, reader=reader), store()), 1300, 1210)
    _, cache = step(cache, part(r, 0, 1200), "prefill")
    cache = done(cache)
    out = np.asarray(look(cache, part(r, 1200, 1217))[0])
    close(out, dense(r)[0][:, :, :, 1200:], r["pos"][:, 1200:], 5e-5)
    one = np.asarray(look(cache, part(r, 1200, 1201))[0])
    close(one, out[:, :, :, :1], r["pos"][:, 1200:1201], 5e-5)


def index_of(*pages):
    return jnp.asarray(pages, jnp.float32)[None, None]


def test_a_reader_leaves_out_what_is_not_free():
    index = index_of([3, 0], [2, 0], [1, 0], [9, 9])
    q, complete = jnp.asarray([[[[1.0, 0.0]]]]), jnp.asarray([[3]])
    chosen = lambda free=None: best_pages(2, 4).select(index, None, q, complete, free)  # noqa: E731
    assert sorted(np.asarray(chosen())[0, 0]) == [0, 1]  # page 3 is not complete
    free = jnp.asarray([[[False, True, True, True]]])
    assert sorted(np.asarray(chosen(free))[0, 0]) == [1, 2]
    free = jnp.asarray([[[False, True, False, True]]])
    assert np.asarray(chosen(free))[0, 0].tolist() == [1, -1]


def test_softmax_gives_every_query_a_like_say():
    """A large query finds two pages alike good; a small one is sure of the third."""
    index = index_of([5.0, 0.0], [5.1, 0.0], [0.0, 4.0], [-9, -9])
    q, complete = jnp.asarray([[[[2.0, 0.0], [0.0, 2.0]]]]), jnp.asarray([[4]])
    plain, fair = (
        np.asarray(BestPages(2, 4, softmax).select(index, None, q, complete))[0, 0].tolist()
        for softmax in (False, True)
    )
    assert plain == [1, 0] and fair[0] == 2


def test_least_cosine_of_a_page():
    page = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]]])
    found = np.asarray(alike(jnp.asarray(page)))
    np.testing.assert_allclose(found, [1.0, np.sqrt(0.5), 1 / np.sqrt(10)], rtol=1e-6)


def test_what_makes_no_sense_is_refused():
    for bad in ({"key_rank": 0}, {"value_rank": 1.5}, {"layers": 0}, {"newest": -1}):
        with pytest.raises(ValueError, match=f"layer_bases.{next(iter(bad))}"):
            layer_bases(**{"key_rank": 4, "value_rank": 4} | bad)
    for codec in (low_rank(2, 8), normalize("n")):
        with pytest.raises(ValueError, match="token by token and without"):
            layer_bases(4, 4, codec=codec)
    bias = Spec(1, 1, 1, 1, 8, 8, 8, columns=(Carried("bias").name,))
    with pytest.raises(ValueError, match="logit biases"):
        layer_bases(4, 4).init(bias)
