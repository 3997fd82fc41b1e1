"""Video-XL-2 against NumPy: whom rows see, what is pooled, where the question goes on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    chain,
    commit,
    finish,
    init_cache,
    levels,
    named,
    relevance,
    store,
    tokens_held,
)
from kvjax.cache.rules.groups import groups
from kvjax.cache.stages.levels import Levels
from kvjax.compress import parse, video_xl_2
from kvjax.decode import extend, prefill
from kvjax.models import forward
from tests.cache.test_bands import plain_mask
from tests.compress import plain_model
from tests.compress.harness import CONFIG as MODEL
from tests.compress.harness import PROMPT, model
from tests.compress.reference import (
    CONFIG,
    HQ,
    LENGTHS,
    STEPS,
    B,
    H,
    L,
    T,
    _ingest,
    advance,
    agree,
    by_group,
    new_rows,
    ours_chain,
    prompt_rows,
    row,
    turn,
)

# Two rows: prefix, groups with one or two carriers (one has text inside), a question in the first.
KINDS = (
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 2, 2, 0, 2, 2, 1, 2, 2, 2, 2, 0, 0],
    [0, 0, 1, 2, 2, 2, 2, 1, 1, 2, 2, 2, 1, 2, 2, 2, 2],
)
TYPES = np.zeros((L, B, T + STEPS))
for b, kinds in enumerate(KINDS):
    assert len(kinds) == LENGTHS[b]
    TYPES[:, b, : len(kinds)] = kinds


def parts(kinds):
    """(prefix, [group, ...], end), each a list of token numbers."""
    last = max(i for i, k in enumerate(kinds) if k)
    prefix, found = [], []
    for i, kind in enumerate(kinds[: last + 1]):
        if kind == 1 and (i == 0 or kinds[i - 1] != 1):
            found.append([])
        (found[-1] if found else prefix).append(i)
    return prefix, found, list(range(last + 1, len(kinds)))


def mixed(kinds, dense, each=1, stride=2):
    """The tokens of which each slot is the mean, in order; `dense`: set of block numbers."""
    prefix, found, end = parts(kinds)
    slots = [[i] for i in prefix]
    for number, group in enumerate(found):
        content = [i for i in group if kinds[i] == 2]
        if number // each in dense:
            slots += [[i] for i in group]
            continue
        windows = [content[i : i + stride] for i in range(0, len(content), stride)]
        slots += [[i] for i in group if kinds[i] != 2] + [w for w in windows if len(w) == stride]
    return sorted(slots + [[i] for i in end])


def blocks(kinds, each):
    found = parts(kinds)[1]
    starts = range(0, len(found), each)
    return [[i for group in found[at : at + each] for i in group] for at in starts]


def chosen(kinds, worth, most, each):
    """Blocks that are dense, from the worth of each."""
    number = len(blocks(kinds, each))
    best = [1 + i for i in np.argsort(-np.asarray(worth[1 : number - 1]), kind="stable")[:most]]
    return {0, number - 1} | {i for i in best if worth[i] > -np.inf}


def worth_of(b, by, window, each):
    """What the last rows of the prompt say of its blocks."""
    out = []
    for l in range(L):
        r = row(l, b)
        late = slice(r.n - window, r.n)
        if by == "attention":
            got = r.attention[:, late].sum(1).mean(0)
            out.append([got[list(block)].sum() for block in blocks(KINDS[b], each)])
        else:
            q = by_group(r.raw[:, late].mean(1))
            keys = [r.plain[:, block].mean(1) for block in blocks(KINDS[b], each)]
            out.append([np.mean([q[h] @ k[h] for h in range(H)]) for k in keys])
    return np.mean(out, 0)


def check(cache, slots, positions="contiguous", bias=False, i=0):
    """Our cache against means of NumPy, numbered as the paper does: from 0, the next token at
    their number."""

    def places(b):
        if positions == "contiguous":
            return np.arange(len(slots[b]))
        middle = lambda s: (len(s) - 1) // 2 if positions == "centre" else 0  # noqa: E731
        return np.asarray([s[middle(s)] for s in slots[b]])

    start = lambda b: len(slots[b]) if positions == "contiguous" else LENGTHS[b]  # noqa: E731

    def held(l, b):
        r, n = row(l, b), LENGTHS[b]
        k = np.stack([r.plain[:, s].mean(1) for s in slots[b]], 1)
        v = np.stack([r.v[:, s].mean(1) for s in slots[b]], 1)
        late = slice(n, n + i)
        k = np.concatenate([k, r.plain[:, late]], 1)
        place = np.r_[places(b), start(b) + np.arange(i)]
        return list(zip(turn(k, place), np.concatenate([v, r.v[:, late]], 1)))

    def logs(l, b, h):
        return np.log([len(s) for s in slots[b]] + [1] * i)

    agree(
        cache, held, i, positions=lambda l, b: np.asarray([start(b) + i]),
        bias=logs if bias else None,
    )  # fmt: skip
    assert tokens_held(cache) == L * H * sum(len(s) + i for s in slots)


SETTINGS = [
    {},
    {"positions": "original", "bias": True},
    {"positions": "centre", "stride": 3, "relevant": 0},
    {"by": "mean", "bias": True, "block": 2, "relevant": 1},
    {"by": "mean", "stride": 4, "relevant": 1},
    {"stride": 1, "relevant": 0, "bias": True},
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_a_mixed_prompt_is_as_stated(how):
    how = {"stride": 2, "block": 1, "relevant": 1, "window": 4} | how
    cache = ours_chain(video_xl_2(**how), extra={"type": TYPES})
    slots = []
    for b, kinds in enumerate(KINDS):
        worth = worth_of(b, how.get("by", "attention"), how["window"], how["block"])
        dense = chosen(kinds, worth, how["relevant"], how["block"])
        slots.append(mixed(kinds, dense, how["block"], how["stride"]))
    where = how.get("positions", "contiguous")
    check(cache, slots, where, how.get("bias", False))
    zero = [[np.zeros((HQ, 1))] * B] * L
    check(advance(cache, 0, zero), slots, where, how.get("bias", False), 1)
    if how["stride"] == 1:
        assert [len(s) for s in slots] == list(LENGTHS)


def test_one_exact_prompt_answers_several_questions():
    method = video_xl_2(stride=2, block=1, relevant=1, storage=store(rope="before"))
    cache = init_cache(CONFIG, method, B, T + STEPS, prompt=T)
    new = new_rows(*prompt_rows(), {"type": TYPES})
    cache = commit(cache, new, phase="prefill")
    end = jax.jit(finish)
    for units in ([[1], [1]], [[-1], [2]]):
        worth = named(units, blocks=3)
        slots = [mixed(k, chosen(k, w, 1, 1)) for k, w in zip(KINDS, np.asarray(worth))]
        check(end(cache, {"relevance": worth}), slots)
    # Units of a retriever: two of them are a group.
    assert np.isneginf(named([[3, -1]], each=2)[0]).tolist() == [True, False]
    with pytest.raises(ValueError, match="has shape"):
        finish(cache, {"relevance": jnp.zeros((B + 1, 2))})
    # Nobody asks: nothing is pooled.
    quiet = video_xl_2(stride=2, block=1, relevant=1, window=0)
    check(
        _ingest(init_cache(CONFIG, quiet, B, T, prompt=T), new),
        [mixed(k, {0, 1, 2}) for k in KINDS],
    )


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.3])
def test_no_more_than_there_is_room_for(keep):
    """Blocks in the order of first, last, worth; then the oldest windows go, then tokens."""
    room = int(np.ceil(keep * T))
    method = video_xl_2(stride=2, block=1, relevant=3, window=4, keep=keep)
    cache = ours_chain(method, extra={"type": TYPES})
    slots = []
    for b, kinds in enumerate(KINDS):
        worth = worth_of(b, "attention", 4, 1)
        order = sorted(range(3), key=lambda i: (i not in (0, 2), -worth[i]))
        dense = set()
        for block in order:
            if len(mixed(kinds, dense | {block})) > room:
                break
            dense.add(block)
        mine = mixed(kinds, dense)
        while len(mine) > room:
            mine.remove(next((s for s in mine if len(s) > 1), mine[0]))
        slots.append(mine)
    check(cache, slots)
    assert keep > 0.7 or len(slots[0]) < len(mixed(KINDS[0], {0, 1, 2}))


# --- the model: chunks, and the question that comes later ---

TOKENS = np.random.default_rng(2).integers(0, 50, (2, PROMPT))
LATER = np.random.default_rng(3).integers(0, 50, (2, 4))
SAID = np.zeros((2, PROMPT), np.float32)
for b, kinds in enumerate(KINDS):
    SAID[b, : len(kinds)] = kinds
SIZES = jnp.asarray(LENGTHS)


def plainly(b, tokens, kinds, chunk, previous):
    mask = plain_mask(kinds, chunk, previous)
    attention = lambda l, q, k, v: plain_model.mix(plain_model.probabilities(q, k, mask), v)  # noqa: E731
    table = np.asarray(model().embed[...], np.float64)
    return plain_model.run(table[tokens], np.arange(len(kinds)), attention)


@jax.jit
def answer(model, cache, tokens, place):
    """The exact prompt made ready for a question."""
    _, new = forward(model, tokens, place, cache, phase="append", statistics=True, logits="none")
    worth = relevance(cache, new)
    return new, worth, finish(cache, {"relevance": worth})


def test_prompts_are_computed_in_chunks():
    """And a question that comes later, with all blocks dense, as if it had been their end."""
    method = video_xl_2(chunk=1, previous=0, block=1, relevant=9, stride=2)
    how = dict(lengths=SIZES, columns={"type": jnp.asarray(SAID)}, new_tokens=8)
    logits, exact = prefill(model(), jnp.asarray(TOKENS), method, hold=True, **how)
    place = SIZES[:, None] + jnp.arange(4)
    new, worth, finished = answer(model(), exact, jnp.asarray(LATER), place)
    assert worth.shape[0] == 2 and (np.asarray(worth)[:, :3] > 0).all()
    assert (np.asarray(worth)[:, 3:] == 0).all()
    after, _ = extend(model(), finished, jnp.asarray(LATER), place)
    for b, kinds in enumerate(KINDS):
        want = plainly(b, TOKENS[b, : len(kinds)], kinds, 1, 0)
        np.testing.assert_allclose(logits[b], want[-1], atol=2e-5)
        tokens = np.r_[TOKENS[b, : len(kinds)], LATER[b]]
        want = plainly(b, tokens, [*kinds, 0, 0, 0, 0], 1, 0)
        np.testing.assert_allclose(after[b], want[-1], atol=2e-5)
        plain = plainly(b, tokens, [*kinds, 0, 0, 0, 0], 1, 9)
        assert np.abs(plain - want)[len(kinds) :].max() > 1e-3  # the chunks are felt
    with pytest.raises(ValueError, match="unfinished"):
        jax.eval_shape(lambda cache: relevance(finish(cache), new), exact)
    with pytest.raises(ValueError, match="chunk=8"):
        prefill(model(), jnp.asarray(TOKENS), method, chunk=8, **how)


def test_relevance_is_attention_of_the_question_and_mean_keys():
    """The same rows, asked as the prompt's end and as a question of its own."""
    cache = init_cache(CONFIG, video_xl_2(block=1, window=4), B, T + STEPS, prompt=T)
    at, top, total = prompt_rows()
    cache = commit(cache, new_rows(at, top, total, {"type": TYPES}), phase="prefill")
    late = np.asarray([np.arange(n - 4, n) for n in LENGTHS])
    pick = lambda x: np.take_along_axis(x, late[None, :, None], 3)  # noqa: E731
    new = new_rows(late, pick(top), pick(total))
    for by in ("attention", "mean"):
        got = np.asarray(relevance(cache, new, by))
        for b in range(B):
            np.testing.assert_allclose(got[b, :3], worth_of(b, by, 4, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("video_xl_2(chunk=0)", "chunk=0"),
        ("video_xl_2(previous=-1)", "previous=-1"),
        ("video_xl_2(stride=0)", "stride=0"),
        ("video_xl_2(block=0)", "block=0"),
        ("video_xl_2(relevant=-1)", "relevant=-1"),
        ("video_xl_2(keep=0)", "keep=0"),
        ("video_xl_2(keep=1.5)", "keep=1.5"),
        ("video_xl_2(positions='new')", "positions='new'"),
        ("video_xl_2(by='luck')", "by='luck'"),
        ("video_xl_2(length=4)", "carriers=4"),
        ("video_xl_2(window=-1)", "window=-1"),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_parts_refuse():
    assert levels(groups(9)) == Levels(groups(9))
    ragged = parse("adakv(keep=0.75)")[0][1].stages[0]
    for bad in (dict(units=[1], each=1), dict(units=[[1]], each=0)):
        with pytest.raises(ValueError, match="named"):
            named(**bad)
    with pytest.raises(ValueError, match="same tokens"):
        init_cache(MODEL, chain(ragged, *video_xl_2().stages[1:]), 1, 64, prompt=48)
