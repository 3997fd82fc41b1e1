"""`chosen`: the best of a prompt apart, for good."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    KV,
    InputMark,
    Mark,
    New,
    chain,
    chosen,
    commit,
    finish,
    init_cache,
    marked,
    prune,
    share,
    store,
    tokens_held,
)
from kvjax.cache.scores.score import key_norm
from kvjax.codecs import quantize
from kvjax.models import Config

CONFIG = Config(50, 32, 48, 2, 4, 2, 8)
B, T, MORE = 2, 24, 6
LENGTHS = (24, 13)
WORTH = Mark("worth")
quick = jax.jit(lambda cache, new, phase: commit(cache, new, phase=phase), static_argnums=2)


def rows(first, lengths, size, worth=None, seed=0):
    draw = np.random.default_rng(seed)
    k, v = draw.standard_normal((2, 2, B, 2, T + MORE, 8)).astype(np.float32)
    pos = np.stack([np.where(np.arange(size) < n, f + np.arange(size), -1)
                    for f, n in zip(first, lengths)])  # fmt: skip
    take = lambda x: np.take_along_axis(x, np.maximum(pos, 0)[None, :, None, :, None], 3)  # noqa: E731
    extra = {}
    if worth is not None:
        extra["worth"] = np.broadcast_to(
            np.take_along_axis(worth, np.maximum(pos, 0), 1)[None, :, None], (2, B, 2, size)
        )
    return New(jax.tree.map(jnp.asarray, KV(take(k), take(v), pos[None, :, None], extra)))


def run(method, worth=None):
    """The cache after a prompt and after MORE tokens."""
    cache = init_cache(CONFIG, method, B, T + MORE, prompt=T)
    cache = finish(quick(cache, rows((0, 0), LENGTHS, T, worth), "prefill"))
    first = cache
    for i in range(MORE):
        new = rows([n + i for n in LENGTHS], (1, 1), 1, np.zeros((B, T + MORE)))
        cache = quick(cache, new, "decode")
    return first, cache


def positions(state, b, layer=0, head=0):
    pos = np.asarray(state.pos)
    return sorted(int(p) for p in pos[layer % len(pos), b, head % pos.shape[2]] if p >= 0)


def test_the_best_are_held_and_all_others_flow_on():
    worth = np.random.default_rng(1).standard_normal((B, T + MORE)).astype(np.float32)
    first, last = run(chain(chosen(5, marked(WORTH)), store()), worth)
    for b, n in enumerate(LENGTHS):
        best = sorted(np.argsort(-worth[b, :n])[:5].tolist())
        assert positions(first.state[0][0], b) == positions(last.state[0][0], b) == best
        rest = sorted(set(range(n + MORE)) - set(best))
        assert positions(last.state[0][1], b) == rest
    assert tokens_held(last) == 2 * 2 * (sum(LENGTHS) + B * MORE)
    assert "worth" not in last.state[0][1].extra  # the mark is for those who name it


def test_heads_may_choose_differently():
    first, _ = run(chain(chosen(6, key_norm()), store()))
    norm = np.linalg.norm(np.asarray(rows((0, 0), LENGTHS, T).kv.k), axis=-1)
    for layer, head in np.ndindex(2, 2):
        assert positions(first.state[0][0], 0, layer, head) == sorted(
            np.argsort(norm[layer, 0, head])[:6].tolist()
        )


def test_without_a_score_the_oldest_in_whole_units():
    codec = quantize(2, "channel", 8)
    first, last = run(chain(chosen(share(1), None, store(codec)), store()))
    assert [positions(first.state[0][0], b) for b in range(B)] == [
        list(range(24)), list(range(8))
    ]  # fmt: skip
    assert positions(last.state[0][1], 1) == list(range(8, 13 + MORE))
    assert first.state[0][0].k_ring.shape[3] == 0  # no exact slots where nothing waits
    for b, n in enumerate((24, 8)):
        k = rows((0, 0), LENGTHS, T).kv.k  # as committed: position 0 is not rotated
        assert k.shape[3] >= n
        assert int(first.state[0][0].seen[0, b, 0]) == n


def test_a_short_prompt_that_fills_no_unit_loses_nothing():
    """The row of 13 tokens leaves all of them to the store behind, more than the full one does."""
    codec = quantize(2, "channel", 16)
    _, last = run(chain(chosen(share(1), None, store(codec)), store()))
    assert positions(last.state[0][1], 1) == list(range(13 + MORE))
    assert tokens_held(last) == 2 * 2 * (sum(LENGTHS) + B * MORE)


def test_what_is_worth_nothing_is_never_chosen():
    worth = np.full((B, T + MORE), -np.inf, np.float32)
    worth[0, [3, 9]] = 1.0
    first, last = run(chain(chosen(5, marked(WORTH, refuses=True)), store()), worth)
    assert positions(first.state[0][0], 0) == [3, 9] and positions(first.state[0][0], 1) == []
    assert tokens_held(last) == 2 * 2 * (sum(LENGTHS) + B * MORE)


def test_a_cache_without_a_prompt_holds_all_downstream():
    cache = init_cache(CONFIG, chain(chosen(5), store()), B, 8)
    new = rows((0, 0), (4, 4), 4)
    cache = commit(cache, new, phase="append")
    assert tokens_held(cache) == 2 * 2 * 2 * 4


def test_marks_that_are_missing_are_asked_for():
    @dataclasses.dataclass(frozen=True)
    class Seen(InputMark):
        name: str = "seen"

        def of_input(self, x):
            return x[..., 0]

    cache = init_cache(CONFIG, chain(chosen(5, marked(Seen())), store()), B, 30, prompt=T)
    with pytest.raises(ValueError, match=r"columns \['seen'\].*forward"):
        commit(cache, rows((0, 0), LENGTHS, T), phase="prefill")


def test_refusals():
    from kvjax.cache import Window
    from kvjax.cache.budgets import adaptive
    from kvjax.codecs import across_heads

    for call, message in (
        (lambda: chosen(0), "at least 1"),
        (lambda: chosen(5, None, store(keys=Window(4))), "never changes"),
        (
            lambda: init_cache(
                CONFIG, chain(prune(8, key_norm(), budget=adaptive()), chosen(5), store()), B, 30, T
            ),
            "equal budget",
        ),
        (
            lambda: init_cache(
                CONFIG, chain(prune(8, key_norm()), store(across_heads(quantize(4)))), B, 30, T
            ),
            "other tokens for each head",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
