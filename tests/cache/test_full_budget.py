"""With room for everything, every chain is dense attention, layer by layer and row by row."""

import numpy as np
import pytest

from kvjax.cache import (
    Window,
    accumulated_attention,
    adaptive,
    best_pages,
    by_position,
    chain,
    expected_attention,
    first,
    heavy,
    key_difference,
    key_norm,
    layer_bases,
    newest_attention,
    prune,
    pyramid,
    random,
    recency,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import dense as dense_codec
from kvjax.codecs import quantize
from kvjax.models.config import Config
from tests.cache.harness import (
    CONFIG,
    close,
    dense,
    empty,
    look,
    part,
    ragged_positions,
    rows,
    run,
    step,
)

PROMPT, DECODE = 24, 8
LENGTH = PROMPT + DECODE
vote = window_attention(4)
ragged = dict(
    pyramid=prune(keep=1.0, score=vote, budget=pyramid(2.0, 4)),
    adaptive=prune(keep=1.0, score=vote, budget=adaptive(0.2, 4)),
    both=prune(keep=1.0, score=random(3), budget=adaptive(0.5, 0, pyramid(3.0, 2))),
)
CHAINS = {
    "store": chain(store()),
    "first slot, recent": chain(first(3, "slot"), recent(LENGTH)),
    "recent released, store": chain(recent(5, release=4), store()),
    "all stages": chain(
        first(2), recent(6, 3), heavy(5, accumulated_attention()), heavy(4, key_norm()), store()
    ),
    "heavy newest": chain(heavy(LENGTH, newest_attention())),
    "heavy set, recent": chain(heavy(9, key_difference(), recent=4), heavy(40, recency(2))),
    "prune window": chain(prune(keep=1.0, score=vote), store()),
    "prune expected": chain(first(1), prune(keep=1.0, score=expected_attention(8, 2)), recent(40)),
    "pyramid": chain(ragged["pyramid"], store()),
    "adaptive, recent": chain(ragged["adaptive"], recent(5, 2), store()),
    "both, windows": chain(ragged["both"], store(keys=Window(0, 8), values=Window(8, 1))),
    "pyramid in slots": chain(ragged["pyramid"], heavy(7, newest_attention()), recent(40)),
    "keys later": chain(store(keys=Window(8, 1), values=Window(0, 8))),
    "before": chain(first(2), store(keys=Window(0, 8), values=Window(8, 1), rope="before")),
    "before, ragged": chain(ragged["adaptive"], store(rope="before")),
    "by position": by_position(LENGTH),
    "bases": chain(first(3), layer_bases(1.0, 1.0, 2), recent(3, 2), store()),
    "bases, few layers": chain(
        layer_bases(1.0, 1.0, 3, reader=best_pages(3, 4), apart=1, newest=2), store()
    ),
    "reads all": chain(store(reader=best_pages(4, 8))),
}


SLOW = {"heavy newest", "prune window", "pyramid", "adaptive, recent", "recent released, store"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CHAINS]
)
def test_full_budget_is_dense(name):
    r = rows(1, LENGTH, ragged_positions(7, PROMPT, DECODE))
    out, _ = run(CHAINS[name], r, PROMPT, 8)
    # Full bases are orthonormal up to float32: a product with one and back errs a little more.
    close(out, dense(r)[0], r["pos"], 3e-5 if "bases" in name else 1e-5)


@pytest.mark.parametrize("exact", [(0,), (-1, 0)])
def test_exact_layers_are_dense(exact):
    r = rows(2, LENGTH, ragged_positions(8, PROMPT, DECODE))
    out, _ = run(chain(recent(40)), r, PROMPT, 8, exact_layers=exact)
    close(out, dense(r)[0], r["pos"])


WINDOWED = Config(
    29, 16, 16, CONFIG.layers, CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim,
    attention_softcap=3.0, windows=(7, None),
)  # fmt: skip


@pytest.mark.parametrize("name", ["all stages", "before, ragged", "bases"])
def test_sliding_window_and_softcap(name):
    r = rows(3, LENGTH, ragged_positions(9, PROMPT, DECODE))
    out, _ = run(CHAINS[name], r, PROMPT, 8, config=WINDOWED)
    close(out, dense(r, WINDOWED)[0], r["pos"], 3e-5 if "bases" in name else 1e-5)


def test_groups_that_do_not_divide_a_block():
    """More than one block of slots, read in groups of 24; at eight bits, off by a hundredth."""
    r = rows(4, 1200)
    outs = []
    for codec in (dense_codec(), quantize(8, axis="channel", group=24)):
        cache = empty(store(codec), 1300)
        _, cache = step(cache, part(r, 0, 1199), "append")
        outs.append(np.asarray(look(cache, part(r, 1199, 1200))[0]))
    assert np.abs(outs[1] - outs[0]).max() < 0.02 * np.abs(outs[0]).max()
