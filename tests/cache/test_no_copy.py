"""A decode step writes the tokens that came and copies nothing of the cache.

With donated state, on a cache of 8,192 tokens: all of the state is aliased, no instruction copies
an array as large as a leaf of the state, and temporaries are a few blocks of 1,024 tokens of one
layer, whatever the capacity. XLA decides this per program, so the whole step is compiled: forward,
which reads the cache, and commit.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache import (
    Window,
    accumulated_attention,
    adaptive,
    apart,
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
    together,
    window_attention,
)
from kvjax.codecs import per_kv, quantize
from kvjax.models import llama
from kvjax.models.config import Config
from kvjax.models.decoder import forward

pytestmark = pytest.mark.usefixtures("compile_fully")
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


def test_a_streaming_prompt_holds_the_exact_keys_of_one_layer():
    """Committed inside the layer scan, more layers cost no more temporaries than what they hold;
    returned as new rows, as chains that wait for the whole prompt need them, they cost their own
    exact keys and values."""
    method = chain(first(4), recent(32, release=32), store(kivi))
    time = 1024
    one = 2 * time * CONFIG.kv_heads * CONFIG.head_dim * 4

    def bytes_of(layers, fold):
        config = dataclasses.replace(CONFIG, layers=layers)
        cache = jax.eval_shape(lambda: init_cache(config, method, 1, time + 64, time))
        moving, rest = apart(cache)

        @functools.partial(jax.jit, donate_argnames="moving")
        def run(model, moving, rest, tokens, positions):
            out, held = forward(
                model, tokens, positions, together(moving, rest), phase="prefill", fold=fold,
                read=False, logits="last", statistics=False,
            )  # fmt: skip
            return out, apart(held)[0] if fold else held

        tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
        model = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
        memory = run.lower(model, moving, rest, tokens, tokens).compile().memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moving))
        return memory.temp_size_in_bytes + fresh, held

    (few, held_few), (many, held_many) = bytes_of(2, True), bytes_of(10, True)
    assert many - few < held_many - held_few + one
    (few, _), (many, _) = bytes_of(2, False), bytes_of(10, False)
    assert many - few >= 8 * one
