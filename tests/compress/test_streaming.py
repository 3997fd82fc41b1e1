"""Methods that declare `streaming` hold the same however a stream of tokens came: through `commit`.

tests/cache/test_streaming.py has stages and cuts of every kind; here are the codecs of all methods,
those with constants too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    KV,
    New,
    Query,
    attend,
    commit,
    init_cache,
    rotate,
    start,
    tokens_held,
)
from kvjax.compress import parse
from tests.compress.harness import CONFIG, plain_constants
from tests.compress.test_common import SETTINGS

TOKENS, BATCH = 48, 2
METHODS = {
    name: chain
    for name, text in SETTINGS.items()
    for _, chain in parse(text)
    if chain.streaming and chain.rule is None
}
QUICK = ("kivi", "kvquant", "mustafar", "vidkv", "cskv", "streaming_llm 4 bits")
take = jax.jit(commit, static_argnames="phase")


@jax.jit
def look(cache, q):
    """What queries q [L, B, Hq, 1, D] see in every layer."""
    pos, none = jnp.full((BATCH, 1), TOKENS), jnp.zeros((BATCH,), jnp.int32)
    parts, carry = [], start(cache, pos)
    for layer in range(CONFIG.layers):
        rope, span = (cache.constants[name][layer] for name in ("rope", "span"))
        turned = rotate(q[layer], pos[:, None], rope)
        query = Query(turned, q[layer], pos, rope, span, cache.constants, none)
        part, carry = attend(cache, jnp.asarray(layer), query, carry)
        parts.append(part)
    return parts


def held(transform, widths):
    given = plain_constants(transform, CONFIG)
    cache = init_cache(CONFIG, transform, BATCH, TOKENS, constants=given)
    if cache.needs_attention:
        pytest.skip("what it holds depends on attention")
    draw = np.random.default_rng(3)
    shape = (CONFIG.layers, BATCH, CONFIG.kv_heads, TOKENS, CONFIG.head_dim)
    k, v = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for _ in "kv")
    pos = jnp.broadcast_to(jnp.arange(TOKENS), (1, BATCH, 1, TOKENS))
    flags = {m.name: jnp.ones(shape[:4]) for m in transform.made}
    at = 0
    for width in widths:
        cut = slice(at, at + width)
        extra = {name: x[..., cut] for name, x in flags.items()}
        rows = KV(k[..., cut, :], v[..., cut, :], pos[..., cut], extra)
        cache, at = take(cache, New(rows), phase="append"), at + width
    q = (CONFIG.layers, BATCH, CONFIG.heads, 1, CONFIG.head_dim)
    return tokens_held(cache), look(cache, jnp.asarray(draw.standard_normal(q), jnp.float32))


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_every_cut_of_a_stream_gives_the_same(name):
    bulk, chunks, single = (
        held(METHODS[name], widths) for widths in ((TOKENS,), (16,) * 3, (1,) * TOKENS)
    )
    for other in (chunks, single):
        assert other[0] == bulk[0]
        jax.tree.map(np.testing.assert_array_equal, other[1], bulk[1])
