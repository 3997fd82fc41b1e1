"""Reverse-mode gradients through forward with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Window, chain, commit, first, init_cache, recent, store
from kvjax.models import llama
from kvjax.models.config import Config
from kvjax.models.decoder import forward

CONFIG = Config(19, 16, 16, 2, 4, 2, 8)
HELD, NEW = 5, 4
CHAINS = {
    "store": chain(store()),
    "many blocks": chain(first(2), store(keys=Window(0, 4))),
    "slots": chain(first(2), recent(1100)),
}


@jax.jit
@jax.grad
def plain(model, tokens, pos):
    out, _ = forward(model, tokens, pos, phase="prefill", differentiable=True)
    return jnp.sum(jnp.sin(out[:, HELD:]))


@pytest.mark.parametrize(
    "name", [pytest.param("store", marks=pytest.mark.slow), "many blocks", "slots"]
)
def test_gradient_through_the_cache_is_that_without(name):
    """Tokens are held, then others attend to them: both as functions of the parameters."""
    transform = CHAINS[name]
    model = llama.init(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, HELD + NEW), 0, 19)
    pos = jnp.broadcast_to(jnp.arange(HELD + NEW), tokens.shape)
    pos = pos.at[1, 2].set(-1)  # padding
    length = 1100  # more than one block of slots

    def cached(model):
        cache = init_cache(CONFIG, transform, 2, length)
        _, new = forward(
            model, tokens[:, :HELD], pos[:, :HELD], cache, phase="prefill", differentiable=True
        )
        cache = commit(cache, new, phase="prefill")
        out, _ = forward(model, tokens[:, HELD:], pos[:, HELD:], cache, differentiable=True)
        return jnp.sum(jnp.sin(out))

    got = jax.jit(jax.grad(cached))(model)
    want = plain(model, tokens, pos)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert np.isfinite(a).all()
        # Sums over all rows of float32 products: 1e-5 of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
