"""Room in a pool of unlike heads, and prompts that come in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Spec, commit, finish, init_cache
from kvjax.cache.paging import Pool
from kvjax.compress import parse
from tests.compress import reference as ref
from tests.compress.harness import held


def test_a_full_head_drops_what_its_neighbour_would_lose():
    spec = Spec(2, 1, 2, 2, 8, 40, 8, totals=(16, 16))
    pool = Pool.init(spec, 40, 1).allocate(jnp.full((2, 1, 2), 40))
    pages = 3 * pool.page  # for 40 tokens
    x = jnp.zeros((pool.slots,))
    index = jnp.arange(pages + 4)[None, None, None]
    rows = jnp.ones((2, 1, 2, 1)) * index
    x = np.asarray(pool.write(x, index, rows))
    for start in np.asarray(pool.address).reshape(-1):
        np.testing.assert_array_equal(x[start : start + pages], np.arange(pages))


@jax.jit
def _chunk(cache, new):
    return commit(cache, new, phase="prefill")


_finish = jax.jit(finish)


@pytest.mark.parametrize(
    "text",
    ["h2o(keep=0.5)", "expected_attention(keep=0.5, sinks=2, future=16)", "mikv(keep=0.5)"],
)
def test_chunks_of_a_prompt_give_the_same_cache(text):
    whole = ref.ours(text)
    cache = init_cache(ref.CONFIG, parse(text)[0][1], ref.B, ref.T + ref.STEPS, prompt=ref.T)
    at, top, total = ref.prompt_rows()
    for cut in (slice(0, 12), slice(12, 24)):
        cache = _chunk(cache, ref.new_rows(at[:, cut], top[..., cut], total[..., cut]))
    cache = _finish(cache)
    assert held(cache) == held(whole)
    if "mikv" in text:
        a, b = (c.state[0][-1].fitted["balance"] for c in (cache, whole))
        np.testing.assert_allclose(a, b, rtol=1e-6)
