"""A decode step writes the tokens that came and copies nothing of the cache.

With donated state, on a cache of 8,192 tokens: all of the state is aliased, no instruction copies
an array as large as a leaf of the state, and temporaries are a few blocks of 1,024 tokens of one
layer, whatever the capacity. XLA decides this per program, so the whole step is compiled: forward,
which reads the cache, and commit.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache import (
    Window,
    accumulated_attention,
    adaptive,
    best_blocks,
    best_pages,
    best_spans,
    by_position,
    chain,
    commit,
    ends_every,
    finish,
    first,
    heavy,
    init_cache,
    layer_bases,
    nbytes,
    newest_attention,
    prune,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import per_kv, quantize
from kvjax.models import llama
from kvjax.models.config import Config
from kvjax.models.decoder import forward

CONFIG = Config(64, 64, 64, 4, 4, 4, 64)
CAPACITY = 8192
kivi = per_kv(k=quantize(2, axis="channel", group=32), v=quantize(2, axis="token", group=32))
CHAINS = {
    "dense": chain(store()),
    "recent": chain(recent(CAPACITY)),
    "streaming": chain(first(4), recent(CAPACITY - 4)),
    "kivi": chain(recent(128, release=32), store(kivi)),
    "kivi windows": chain(store(kivi, keys=Window(0, 128), values=Window(120, 1))),
    "h2o": chain(recent(4096), heavy(4096, accumulated_attention())),
    "tova": chain(heavy(CAPACITY // 2, newest_attention())),
    "mikv": chain(recent(128), heavy(2048, accumulated_attention()), store(quantize(2))),
    "pool": chain(prune(keep=0.5, score=window_attention(), budget=adaptive()), store()),
    "pool coded": chain(
        prune(keep=0.5, score=window_attention(), budget=adaptive()), recent(32, 32), store(kivi)
    ),
    "reader": chain(store(reader=best_pages(16, 16))),
    "reader of spans": chain(
        store(reader=best_spans(256, ends_every(16), first=4, recent=32, whole_steps=2))
    ),
    "reader of blocks": chain(
        first(4, 63),
        store(
            keys=Window(64, 32),
            values=Window(64, 32),
            rope="before",
            reach=63,
            reader=best_blocks(16, 32, window=64, least=8, most=32),
        ),
    ),
    "bases": chain(layer_bases(64, 96, 2), store()),
    "bases read": chain(
        layer_bases(64, 96, 2, reader=best_pages(32, 8), apart=6, newest=4), store()
    ),
    "by position": by_position(CAPACITY),
}


def step(model, moving, rest, token):
    cache = rest.replace(state=moving[0], length=moving[1])
    out, new = forward(model, token, cache.length[:, None], cache)
    cache = commit(cache, new)
    return out, (cache.state, cache.length)


@pytest.mark.parametrize("name", CHAINS)
def test_decode_step_copies_nothing(name):
    transform = CHAINS[name]

    def ready():
        prompt = 0 if transform.streaming else CAPACITY // 2
        return finish(init_cache(CONFIG, transform, 1, CAPACITY, prompt))

    cache = jax.eval_shape(ready)
    moving, rest = (cache.state, cache.length), cache.replace(state=None, length=None)
    model = jax.eval_shape(lambda: llama.init(CONFIG, jax.random.key(0)))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=1).lower(model, moving, rest, token).compile()
    used = compiled.memory_analysis()
    leaves = {x.size for x in jax.tree.leaves(moving) if x.size * x.dtype.itemsize > 2**16}
    assert not copies(compiled.as_text(), leaves)
    # All but scalars: XLA may compute a count anew rather than write over it.
    assert used.alias_size_in_bytes >= nbytes(moving) - 1024
    block = 1024 * CONFIG.kv_heads * CONFIG.head_dim * 4
    assert used.temp_size_in_bytes < 6 * block


def copies(hlo, sizes):
    """Copy instructions, outside of fusions (where nothing is stored), of arrays of these sizes."""
    found, inside = [], ""
    for line in hlo.splitlines():
        if line and not line.startswith(" "):
            inside = line
        match = re.search(r"= \w+\[([\d,]+)\]\S* copy(-start)?\(", line)
        size = math.prod(int(n) for n in match[1].split(",")) if match else 0
        if size in sizes and "fused_computation" not in inside:
            found.append(line.strip())
    return found
