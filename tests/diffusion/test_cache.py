"""Cache policies: what is computed, what is held, what cannot change the result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import apart, by_position, commit, init_cache, nbytes
from kvjax.codecs import quantize
from kvjax.diffusion import Choice, blocks, dkv_decode, generate, llada, loop, no_cache, quota
from kvjax.diffusion import threshold as at_least
from kvjax.models import Config
from kvjax.models.decoder import forward
from kvjax.models.llama import flatten, init
from tests.diffusion import reference
from tests.diffusion.test_reference import (
    CONFIG,
    KEY,
    LENGTHS,
    MASK,
    NEW,
    PROMPT,
    both,
    model,
    prompts,
    same,
)

WIDTH = PROMPT + NEW
FOUR = quantize(4, axis="token")


def test_refresh_at_every_step_is_no_cache_exactly():
    """Tokens and order, drawn ones too, whatever the codec: nothing that is stored is read."""
    choice = Choice(temperature=0.8)
    schedule, unmasker = llada(NEW, 8, 8)
    runs = [
        generate(
            model(), prompts(), NEW, lengths=jnp.asarray(LENGTHS), schedule=schedule,
            unmasker=unmasker, cache=cache, choice=choice, key=KEY,
        )
        for cache in (no_cache(), dkv_decode(1), dkv_decode(1, codec=FOUR))
    ]  # fmt: skip
    for other in runs[1:]:
        for name in ("tokens", "order", "steps", "active", "evaluations", "computed"):
            np.testing.assert_array_equal(getattr(runs[0], name), getattr(other, name))
    assert nbytes(runs[2].cache) < 0.45 * nbytes(runs[1].cache) and runs[0].cache is None


def test_only_active_positions_reach_the_network(monkeypatch):
    """Positions are recorded as they enter `forward`: step by step those of the NumPy statement,
    in arrays of the smallest size that is enough."""
    seen = []
    forward = loop.forward

    def spy(model, tokens, place, *rest, **how):
        jax.debug.callback(lambda p: seen.append(np.asarray(p)), place, ordered=True)
        return forward(model, tokens, place, *rest, **how)

    monkeypatch.setattr(loop, "forward", spy)
    sizes = (WIDTH, 15, 9)
    # A threshold that this test alone uses: its program is not yet compiled.
    cache = dkv_decode(5)
    got, rows = both(16, 8, threshold=0.41, unmasker=at_least(0.41), refresh=5, cache=cache,
                     sizes=sizes)  # fmt: skip
    same(got, rows)
    jax.effects_barrier()
    steps = max(row.steps for row in rows)
    assert len(seen) == steps == int(got.evaluations)
    for i, place in enumerate(seen):
        most = 0
        for b, row in enumerate(rows):
            expected = row.active[i] if i < row.steps else []
            assert place[b][place[b] >= 0].tolist() == expected
            most = max(most, len(expected))
        assert place.shape[1] == min(size for size in sizes if size >= most)
    assert int(got.computed) == sum(place.size for place in seen)
    assert len({place.shape for place in seen}) == len(sizes)


def test_held_are_the_tokens_known_one_step_ago():
    """At the end, the positions decoded before the last step; those of the last block's rows."""
    own = model()
    got = generate(
        own, prompts(), NEW, lengths=jnp.asarray(LENGTHS), schedule=blocks(NEW),
        unmasker=quota(8), cache=dkv_decode(3), sizes=(WIDTH,),
    )  # fmt: skip
    held = np.asarray(got.cache.state[0][0].kv.pos)[0, :, 0]
    last = np.asarray(got.order) == np.asarray(got.steps)[:, None] - 1
    inside = np.arange(WIDTH) < np.asarray(LENGTHS)[:, None] + NEW
    np.testing.assert_array_equal(held, np.where(inside & ~last, np.arange(WIDTH), -1))
    # What is stored is what NumPy stores: keys and values of layer 1 (the last), to rounding.
    network = reference.Network(CONFIG, flatten(own))
    row = prompts()[0, : LENGTHS[0]].tolist()
    reference.generate(network, row, NEW, 8, NEW, MASK, refresh=3)
    kv = got.cache.state[0][0].kv
    for n in range(LENGTHS[0] + NEW):
        if held[0, n] >= 0:
            for mine, theirs in zip((kv.k, kv.v), network.store[1, n]):
                np.testing.assert_allclose(mine[1, 0, :, n], theirs, rtol=2e-4, atol=2e-5)


def test_rows_are_independent():
    """Of each other, of what stands in padding, and of their place in the batch."""
    how = {"schedule": blocks(8), "unmasker": at_least(0.3), "cache": dkv_decode(2)}
    order = np.array([2, 0, 1])
    tokens, lengths = prompts(), np.asarray(LENGTHS)
    got = generate(model(), tokens, NEW, lengths=lengths, **how)
    padded = np.where(np.arange(PROMPT) < lengths[:, None], tokens, 10**9)
    again = generate(model(), padded[order], NEW, lengths=lengths[order], **how)
    for name in ("tokens", "order", "steps", "active"):
        np.testing.assert_array_equal(np.asarray(getattr(got, name))[order], getattr(again, name))


def test_equal_values_compile_once():
    loop._denoise.clear_cache()
    for _ in range(2):
        schedule, unmasker = llada(NEW, 16, 16)
        generate(model(), prompts(), NEW, schedule=schedule, unmasker=unmasker,
                 cache=dkv_decode(4), sizes=(WIDTH,))  # fmt: skip
    assert loop._denoise._cache_size() == 1


@pytest.mark.usefixtures("compile_fully")
def test_the_loop_copies_nothing_of_the_cache():
    """Donated and written in place in every inner loop: outside of fusions (where nothing is
    stored) no instruction copies an array like that of the keys. The cache is bfloat16 and what a
    forward pass returns float32, so that the two can be told apart."""
    config = Config(64, 64, 64, 4, 4, 4, 64, bidirectional=True, mask_token=63)
    width = 1024
    policy = dkv_decode(8)
    cache = jax.eval_shape(
        lambda: init_cache(config, policy.storage(width), 1, width, dtype=jnp.bfloat16)
    )
    moving, rest = apart(cache)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    own = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    plain = jax.jit(
        loop._denoise.__wrapped__, static_argnames=loop._static, donate_argnames="moving"
    )
    compiled = plain.lower(
        own, moving, rest, integers(1, width), integers(1), integers(1), jax.random.key(0),
        jnp.float32(0), predict=None, mask_token=63, schedule=blocks(32), unmasker=quota(32),
        policy=policy, choice=Choice(), guided=False, sizes=(width, 128),
    ).compile()  # fmt: skip
    inside, copied, written = "", [], 0
    for line in compiled.as_text().splitlines():
        inside = line if line and not line.startswith(" ") else inside
        if re.search(rf"= bf16\[4,1,4,{width},64\]", line) and "fused_computation" not in inside:
            written += " fusion(" in line
            copied += [line] if re.search(r" copy(-start)?\(", line) else []
    assert written and not copied
    assert compiled.memory_analysis().alias_size_in_bytes >= nbytes(moving) - 1024


def test_long_canvases():
    """Beyond 256 rows attention goes block by block; and with half of the positions held."""
    own, width = model(), 300
    tokens = np.random.default_rng(3).integers(0, MASK, width).astype(np.int32)
    network = reference.Network(CONFIG, flatten(own))
    expected = network(tokens.tolist(), list(range(width)))
    step = jax.jit(forward)
    cache = init_cache(CONFIG, by_position(width), 1, width)
    every = jnp.arange(width, dtype=jnp.int32)
    logits, new = step(own, tokens[None], every[None], cache)
    # Float32 against float64, some thirty operations in sequence.
    limit = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits[0], expected, atol=limit, rtol=0)
    odd = every[every % 7 != 0]  # 257 positions, still more than one block of rows
    network.keep(set(range(width)))
    changed = np.where(np.arange(width) % 7 == 1, MASK, tokens).astype(np.int32)
    expected = network(changed.tolist(), odd.tolist())
    cache = jax.jit(commit)(cache, new)
    place = jnp.pad(odd, (0, 43), constant_values=-1)[None]
    logits, _ = step(own, changed[None, np.maximum(place[0], 0)], place, cache)
    np.testing.assert_allclose(logits[0, :257], expected, atol=limit, rtol=0)
