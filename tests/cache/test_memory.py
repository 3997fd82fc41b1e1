"""Stores in host memory: the same numbers, in another memory; nothing of them is copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.cache as kv
from kvjax.cache import memory
from kvjax.cache.memory import in_host
from kvjax.codecs import per_kv, quantize
from kvjax.compress import double_sparsity, parse
from kvjax.models import forward
from kvjax.parallel import make_mesh, shard
from tests.compress import harness

needs_host = pytest.mark.skipif(not memory.has_host(), reason="no host memory on this platform")
METHODS = (
    "double_sparsity(tokens=5, channels=3, dense_layers=1)",
    "double_sparsity(tokens=5, channels=4, bits=4, ahead=True)",
    "sentencekv(tokens=10, first=2, recent=2, window=4, chunk=3)",
    "actqkv(blocks=2, block=4, sinks=2, local=6)",
)


@needs_host
@pytest.mark.parametrize("text", METHODS)
def test_memory_changes_nothing_else(text):
    near, held = harness.base(text)
    far, cache = harness.base(text[:-1] + ", host=True)")
    np.testing.assert_allclose(far, near, atol=2e-6, rtol=2e-6)
    store = cache.state[0][-1]
    assert in_host(store.k) and in_host(store.v) and not in_host(store.pos)
    assert not any(map(in_host, jax.tree.leaves(store.index)))
    assert kv.nbytes(cache) == kv.nbytes(held)
    np.testing.assert_allclose(store.k, held.state[0][-1].k, atol=2e-6, rtol=2e-5)


def run(stage):
    cache = kv.init_cache(
        harness.CONFIG, kv.chain(stage), 3, harness.PROMPT + harness.STEPS, prompt=harness.PROMPT
    )
    return harness.run(harness.model(), cache, *harness.inputs())


@needs_host
def test_codes_of_several_tokens_without_a_reader():
    """Units are written once a group is complete, and read in blocks."""
    how = dict(codec=per_kv(k=quantize(4, "channel", 4), v=quantize(4)), keys=kv.Window(3, 4))
    (near, _), (far, cache) = (run(kv.store(**how, host=host)) for host in (False, True))
    np.testing.assert_allclose(far, near, atol=2e-6, rtol=2e-6)
    assert all(map(in_host, jax.tree.leaves((cache.state[0][-1].k, cache.state[0][-1].v))))


def test_where_the_platform_has_none_it_is_the_devices(monkeypatch):
    monkeypatch.setattr(memory, "has_host", lambda: False)
    _, cache = run(kv.store(host=True))
    assert not any(map(in_host, jax.tree.leaves(cache.state)))


def test_heads_of_unlike_budgets_are_refused():
    chain = parse("adakv(keep=0.5, window=4)")[0][1]
    ragged = kv.chain(*chain.stages[:-1], kv.store(host=True))
    with pytest.raises(ValueError, match=r"store\(host=True\) needs heads of equal budget"):
        cache = kv.init_cache(harness.CONFIG, ragged, 1, 32, prompt=24)
        jax.eval_shape(lambda: kv.finish(cache))


def test_slots_of_several_devices_are_refused_to_those_who_look_ahead():
    split = kv.Spec(2, 1, 4, 2, 8, 32, shards=2)
    with pytest.raises(ValueError, match="looking ahead needs slots of one device, not split"):
        double_sparsity(4, 3, ahead=True).init(split)


def test_a_mesh_is_refused():
    cache = kv.init_cache(harness.CONFIG, kv.chain(kv.store(host=True)), 1, 32)
    with pytest.raises(ValueError, match=r"store\(host=True\) lies on one device"):
        shard(cache, make_mesh())


@needs_host
def test_saved_and_restored_it_goes_on(tmp_path):
    text = METHODS[0][:-1] + ", host=True)"
    _, cache = harness.base(text)
    kv.save_cache(tmp_path / "cache", cache)
    like = jax.eval_shape(lambda: kv.finish(harness.cache_of(text)))
    for shapes in (like, cache):
        back = kv.restore_cache(tmp_path / "cache", shapes)
        assert in_host(back.state[0][-1].k) and not in_host(back.state[0][-1].pos)
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (back, cache)))
        logits, _ = step(harness.model(), back, back.length[:, None] - 1)
        want, _ = step(harness.model(), cache, cache.length[:, None] - 1)
        np.testing.assert_array_equal(logits, want)


@jax.jit
def step(model, cache, at):
    logits, new = forward(model, jnp.ones_like(at), at, cache)
    return logits, kv.commit(cache, new)


@needs_host
@pytest.mark.usefixtures("compile_fully")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_copies_nothing(ahead):
    method = double_sparsity(4, 3, dense_layers=1, ahead=ahead, host=True)
    order = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1, 4, 1))
    cache = kv.init_cache(
        harness.CONFIG, method, 2, 4096, constants={"double_sparsity_channels": order}
    )
    moving, rest = kv.apart(cache)

    @functools.partial(jax.jit, donate_argnames="moving")
    def decode(moving, rest, token):
        cache = kv.together(moving, rest)
        logits, new = forward(harness.model(), token, cache.length[:, None], cache)
        return logits, kv.apart(kv.commit(cache, new))[0]

    used = decode.lower(moving, rest, jnp.ones((2, 1), jnp.int32)).compile().memory_analysis()
    state = sum(x.nbytes for x in jax.tree.leaves(moving))
    assert used.alias_size_in_bytes >= 0.99 * state
    assert used.temp_size_in_bytes < 0.3 * state
