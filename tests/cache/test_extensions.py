"""Shapes that later methods need, each shown by a stage that is written here, outside the core."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    KV,
    Carried,
    Partial,
    Stage,
    Window,
    adaptive,
    chain,
    commit,
    first,
    heavy,
    key_norm,
    nbytes,
    prefix,
    prune,
    recent,
    store,
)
from kvjax.cache.stage import FOREVER, most
from tests.cache.harness import (
    BATCH,
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    close,
    cut,
    dense,
    done,
    empty,
    look,
    part,
    rows,
    run,
    step,
    turn,
)

take = jax.jit(commit, static_argnames="phase")


@dataclasses.dataclass(frozen=True)
class Passing(Stage):
    """Holds nothing, lets everything flow on."""

    def init(self, spec):
        return jnp.zeros((spec.batch,), jnp.int32)

    def downstream(self, spec):
        return spec

    def attend(self, state, layer, query, carry):
        return None, carry

    def commit(self, state, kv, context):
        return state, kv

    def held(self, state):
        return state

    def tokens(self, state):
        return jnp.sum(state)

    def horizon(self, state):
        return jnp.full(state.shape, FOREVER), False


# --- a logit bias per slot ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Biased(Passing):
    """Tokens come with a logit bias and keep it wherever they go."""

    @property
    def columns(self):
        return (Carried("bias"),)


PLACES = {
    "slots": chain(Biased(), first(3), recent(4, release=2), heavy(20, key_norm())),
    "store": chain(Biased(), recent(3), store(keys=Window(0, 4), values=Window(4, 1))),
    "pool": chain(Biased(), prune(keep=1.0, score=key_norm(), budget=adaptive(0.5, 0)), store()),
}


@pytest.mark.parametrize("name", PLACES)
def test_bias_is_the_log_of_duplicates(name):
    tokens, copies = 10, np.array([1, 3, 1, 1, 2, 5, 1, 1, 4, 1])
    r = rows(1, tokens + 1)
    cache = empty(PLACES[name], tokens + 1, tokens)
    bias = np.broadcast_to(np.log(copies), (LAYERS, BATCH, KV_HEADS, tokens)).astype(np.float32)
    for i in range(0, tokens, 5):
        _, new = look(cache, part(r, i, i + 5))
        kv = dataclasses.replace(new.kv, extra={"bias": jnp.asarray(bias[..., i : i + 5])})
        cache = take(cache, dataclasses.replace(new, kv=kv), phase="prefill")
    assert not cache.needs_attention
    out, _ = look(done(cache), part(r, tokens, tokens + 1))
    many = cut(r, np.broadcast_to(np.repeat(np.arange(11), [*copies, 1]), (BATCH, 21)))
    close(out, dense(many)[0][:, :, :, -1:], r["pos"][:, -1:])


# --- something carried from layer to layer within one forward ----------------------------------


@dataclasses.dataclass(frozen=True)
class Counting(Passing):
    """Layer l adds one key of logit 0 and value l: the carry tells it which layer it is."""

    def start(self, state, pos):
        return jnp.zeros(pos.shape, jnp.float32)

    def attend(self, state, layer, query, carry):
        shape = query.q.shape[:3]
        out = jnp.broadcast_to(carry[:, None, :, None], query.q.shape)
        return Partial(out, jnp.zeros(shape), jnp.ones(shape)), carry + 1


@pytest.mark.parametrize("exact", [(), (0,)])
def test_carry_goes_from_layer_to_layer(exact):
    r = rows(2, 1)
    transform = chain(first(2), Counting(), store())
    out, _ = look(empty(transform, 4, exact_layers=exact), r)
    q, k = (turn(r[n], r["pos"][None, :, None]) for n in ("q", "k"))
    k, v = (np.repeat(x, HEADS // KV_HEADS, 2) for x in (k, r["v"]))
    weight = np.exp(np.sum(q * k, -1, keepdims=True))
    extra = np.arange(LAYERS)[:, None, None, None, None]
    if exact:  # the counting group is layer 1 alone, and starts at 0
        want = np.stack([v[0], weight[1] * v[1] / (weight[1] + 1)])
    else:
        want = (weight * v + extra) / (weight + 1)
    close(out, want, r["pos"])


# --- a commit that sees all layers -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paired(Stage):
    """Holds, for two layers, one mean of keys and values. The last stage."""

    def init(self, spec):
        from kvjax.cache import buffer

        kv = buffer.empty(spec.replace(layers=spec.layers // 2), spec.max_length)
        return kv, jnp.zeros(spec.lead, jnp.int32)

    def downstream(self, spec):
        return None

    def attend(self, state, layer, query, carry):
        from kvjax.cache import attend_slots

        return attend_slots(state[0], layer // 2, query), carry

    def commit(self, state, kv, context):
        from kvjax.cache import buffer

        held, seen = state
        mean = lambda x: 0.5 * (x[0::2] + x[1::2])  # noqa: E731
        slot = seen[..., None] + jnp.arange(kv.size)
        return (buffer.put(held, slot, KV(mean(kv.k), mean(kv.v), kv.pos)), seen + kv.count), None

    def releases(self, state, kv):
        return False

    def held(self, state):
        return most(state[1])

    def horizon(self, state):
        return jnp.ones(state[1].shape[1:2], jnp.int32), True


def test_commit_across_layers():
    r = rows(3, 9)
    same = {**r}
    for name in ("k", "v"):
        # Rotation is linear and the same in both layers: the mean of keys is the key of the mean.
        same[name] = np.broadcast_to(r[name].mean(0, keepdims=True), r[name].shape)
    out, cache = run(chain(recent(2), Paired()), r, 0, 1)
    both = {n: np.concatenate([same[n][..., :6, :], r[n][..., 6:, :]], 3) for n in ("k", "v")}
    want = dense({**r, **both})[0][:, :, :, -1:]
    close(out[:, :, :, -1:], want, r["pos"][:, -1:])
    # Of 9 tokens all but the 2 most recent can come here.
    assert nbytes(cache.state[0][1][0].k) * 2 == 7 * LAYERS * BATCH * KV_HEADS * WIDTH * 4


# --- recurrent state in place of keys and values -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linear(Stage):
    """A linear-attention memory of all that comes: one matrix per head, no slots.

    With features phi(x) = exp(x / 2) its partial is (phi(q) S / phi(q) z, 0, phi(q) z): it merges
    with softmax over the tokens that other stages hold.
    """

    @staticmethod
    def phi(x):
        return jnp.exp(0.5 * x)

    def init(self, spec):
        shape = (spec.layers, spec.batch, spec.kv_heads, spec.width)
        return jnp.zeros((*shape, spec.width)), jnp.zeros(shape)

    def downstream(self, spec):
        return None

    def attend(self, state, layer, query, carry):
        s, z = (x[layer] for x in state)
        q = self.phi(query.grouped(query.q, s.shape[1]))
        total = jnp.einsum("bhrd,bhd->bhr", q, z)
        out = jnp.einsum("bhrd,bhde->bhre", q, s) / jnp.where(total > 0, total, 1.0)[..., None]
        return query.ungroup(Partial(out, jnp.where(total > 0, 0.0, -jnp.inf), total)), carry

    def commit(self, state, kv, context):
        s, z = state
        k = jnp.where((kv.pos >= 0)[..., None], self.phi(kv.k), 0.0)
        return (s + jnp.einsum("lbhtd,lbhte->lbhde", k, kv.v), z + jnp.sum(k, 3)), None

    def releases(self, state, kv):
        return False

    def held(self, state):
        return jnp.zeros((BATCH,), jnp.int32)

    def horizon(self, state):
        return jnp.ones((BATCH,), jnp.int32), True


def test_recurrent_state_in_a_chain():
    r = rows(4, 8)
    out, _ = run(chain(first(1), recent(2), Linear()), r, 0, 1)
    q, k = (turn(r[n], r["pos"][None, :, None]) for n in ("q", "k"))
    k, v = (np.repeat(x, HEADS // KV_HEADS, 2).astype(np.float64) for x in (k, r["v"]))
    q = q[..., -1:, :]
    soft = np.exp(q @ np.swapaxes(k, -1, -2))
    linear = np.exp(0.5 * q) @ np.swapaxes(np.exp(0.5 * k), -1, -2)
    weight = np.where(np.isin(np.arange(8), [0, 5, 6, 7]), soft, linear)
    want = weight @ v / weight.sum(-1, keepdims=True)
    close(out[:, :, :, -1:], want, r["pos"][:, -1:])


# --- a prefix held once ------------------------------------------------------------------------


def test_prefix_equals_copies_and_is_counted_once():
    r = rows(5, 9)
    for name in ("k", "v"):
        r[name][:, :, :, :5] = r[name][:, :1, :, :5]
    k = turn(r["k"], r["pos"][None, :, None]).astype(np.float32)
    shared = KV(
        jnp.asarray(k[:, :1, :, :5]),
        jnp.asarray(r["v"][:, :1, :, :5]),
        jnp.arange(5, dtype=jnp.int32)[None, None, None],
    )
    later = part(r, 5, 9)
    cache = empty(chain(prefix("system"), store()), 9, constants={"system": shared})
    outs = []
    for i in range(4):
        out, cache = step(cache, part(later, i, i + 1))
        outs.append(np.asarray(out))
    close(np.concatenate(outs, 3), dense(r)[0][:, :, :, 5:], later["pos"])
    alone = nbytes(empty(store(), 4))  # rows need room for their own tokens alone
    once = 2 * LAYERS * KV_HEADS * 5 * WIDTH * 4 + 5 * 4
    assert nbytes(cache) == alone + once + 4 * BATCH


def test_prefix_refuses_exact_layers():
    shared: Any = KV(
        jnp.zeros((2, 1, 2, 5, 8)), jnp.zeros((2, 1, 2, 5, 8)), jnp.zeros((1, 1, 1, 5))
    )
    with pytest.raises(ValueError, match="exact_layers"):
        empty(prefix("p"), 9, exact_layers=(0,), constants={"p": shared})
