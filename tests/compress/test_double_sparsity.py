"""Double Sparsity against NumPy: what is chosen by labels, what is read, and the calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import best_tokens, commit, finish, init_cache, nbytes, store
from kvjax.cache.look import reads
from kvjax.calibrate import CALIBRATIONS, find, folder_of, save
from kvjax.codecs import merge_heads
from kvjax.compress import dense, double_sparsity, parse
from kvjax.compress.double_sparsity import ORDER
from kvjax.models import Config, forward, llama
from tests.compress import harness
from tests.compress import reference as ref
from tests.compress.harness import model
from tests.compress.reference import HQ, STEPS, B, D, G, L, T, affine, row, softmax, turn

RNG = np.random.default_rng(5)
CHANNELS = np.stack([[RNG.permutation(D) for _ in range(HQ)] for _ in range(L)])
CONSTANTS = {ORDER: jnp.asarray(CHANNELS[:, None], jnp.int32)}


def asked(step, rows=1):
    raw = np.random.default_rng(7).standard_normal((L, B, HQ, rows, D)) * 1.5
    return raw, np.asarray([[n + step] * rows for n in ref.LENGTHS])


def chosen(q, k, channels, tokens, bits):
    """The tokens that a query [D] reads of keys [n, D], best first; ties to the earlier."""
    label, labels = q[channels], k[:, channels]
    if bits < 16:
        label, labels = affine(label[None], bits, -1)[0], affine(labels, bits, -1)
    return np.argsort(-(labels @ label), kind="stable")[:tokens]


def expected(l, b, h, q, n, tokens, channels, bits=16, skip=0):
    """(out, lse, mass of attention that is read, bound) over the first n tokens."""
    r = row(l, b)
    k, v = r.k[h // G, :n], r.v[h // G, :n]
    s = k @ q
    at = chosen(q, k, CHANNELS[l, h, :channels], tokens, bits)
    at = np.arange(n) if l < skip else at
    lse = np.log(np.exp(s[at] - s.max()).sum()) + s.max()
    mass = softmax(s)[at].sum()
    return softmax(s[at]) @ v[at], lse, mass, softmax(s) @ v


SETTINGS = [
    dict(tokens=5, channels=3),
    dict(tokens=5, channels=4, bits=4),
    dict(tokens=4, channels=4, bits=2, dense_layers=1),
    dict(tokens=6, channels=D),  # all channels: the true top-k
    dict(tokens=200, channels=8, bits=1),  # all tokens: dense
]


@pytest.mark.parametrize("how", SETTINGS)
def test_what_a_query_reads(how):
    how = dict(bits=16, dense_layers=0) | how
    cache = ref.ours_chain(double_sparsity(**how), constants=CONSTANTS)
    for i in range(STEPS + 1):
        if i in (0, 1, STEPS):
            raw, pos = asked(i)
            out, lse = ref._probe(cache, jnp.asarray(raw, jnp.float32), jnp.asarray(pos))
            for l, b, h in np.ndindex(L, B, HQ):
                q, n = turn(raw[l, b, h], pos[b])[0], ref.LENGTHS[b] + i
                want, weight, mass, whole = expected(
                    l, b, h, q, n, how["tokens"], how["channels"], how["bits"], how["dense_layers"]
                )
                np.testing.assert_allclose(out[l, b, h, 0], want, atol=2e-5, rtol=2e-5)
                np.testing.assert_allclose(lse[l, b, h, 0], weight, atol=2e-5, rtol=2e-5)
                largest = np.linalg.norm(row(l, b).v[h // G, :n], axis=-1).max()
                assert np.linalg.norm(want - whole) <= 2 * (1 - mass) * largest + 1e-9
        if i < STEPS:
            cache = ref.advance(cache, i, [[[np.zeros(1)] * HQ] * B] * L)


def test_rows_choose_apart_and_nothing_is_lost():
    """Several rows at once read what each would alone; more tokens read from the same cache are
    dense."""
    how = dict(channels=3, dense_layers=0)
    cache = ref.ours_chain(double_sparsity(5, **how), constants=CONSTANTS)
    raw, pos = asked(0, rows=3)
    out, _ = ref._probe(cache, jnp.asarray(raw, jnp.float32), jnp.asarray(pos))
    more = cache.replace(transforms=(double_sparsity(200, **how),))
    all_of_it, _ = ref._probe(more, jnp.asarray(raw, jnp.float32), jnp.asarray(pos))
    for l, b, h, t in np.ndindex(L, B, HQ, 3):
        q = turn(raw[l, b, h], pos[b])[t]
        want, _, _, whole = expected(l, b, h, q, ref.LENGTHS[b], 5, 3)
        np.testing.assert_allclose(out[l, b, h, t], want, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(all_of_it[l, b, h, t], whole, atol=2e-5, rtol=2e-5)


def test_the_order_within_the_labels_does_not_matter():
    turned = CHANNELS.copy()
    turned[..., :3] = turned[..., 2::-1]
    raw, pos = asked(0)
    outs = []
    for order in (CHANNELS, turned):
        given = {ORDER: jnp.asarray(order[:, None], jnp.int32)}
        cache = ref.ours_chain(double_sparsity(5, 3, dense_layers=0), constants=given)
        outs.append(ref._probe(cache, jnp.asarray(raw, jnp.float32), jnp.asarray(pos))[0])
    np.testing.assert_allclose(*outs, atol=1e-6)


@jax.jit
def one_row(cache, at, x):
    return forward(model(), None, at, cache, embeddings=x, statistics=True, logits="none")[1]


def test_a_look_at_what_is_read():
    """What any query head of a key-value head reads: k to G k tokens; all in dense layers."""
    text = "double_sparsity(tokens=5, channels=3, dense_layers=1)"
    _, cache = harness.base(text)
    at = cache.length[:, None]
    x = jnp.asarray(harness.rows()[:, :1])
    read = reads(cache, one_row(cache, at, x))
    lengths = np.asarray(harness.LENGTHS) + harness.STEPS
    assert (read[0].sum(-1) == lengths[:, None]).all()
    assert (read[1].sum(-1) >= 5).all() and (read[1].sum(-1) <= 10).all()
    assert (read[1].sum(-1) > 5).any()  # query heads differ


# --- looking ahead ---


DEEP = Config(50, 32, 48, 4, 4, 2, 8)


def test_the_layer_before_chooses():
    """Against NumPy: what a layer reads is what its query of the layer's input before would choose
    (the first and the last layer: its own), and attention has the true query."""
    deep = llama.init(DEEP, jax.random.key(3))
    rng = np.random.default_rng(11)
    order = np.stack([[rng.permutation(D) for _ in range(4)] for _ in range(4)])
    given = {ORDER: jnp.asarray(order[:, None], jnp.int32)}
    tokens = rng.integers(0, 50, (1, 25))
    embedded = np.asarray(deep.embed[...])[tokens] * 3.0
    for skip, rows in ((0, 1), (2, 3)):
        method = double_sparsity(5, 3, dense_layers=skip, ahead=True)
        cache = init_cache(DEEP, method, 1, 28, prompt=25, constants=given)
        at = np.arange(25)[None]
        _, new = forward(
            deep, None, jnp.asarray(at), cache, phase="prefill", embeddings=jnp.asarray(embedded)
        )
        cache = finish(commit(cache, new, phase="prefill"))
        keys = np.asarray(cache.state[0][-1].k, np.float64)[:, 0]  # [L, H, N, D], rotated
        pos = 25 + np.arange(rows)
        x = rng.standard_normal((1, rows, 32)) * 3
        _, new = forward(
            deep, None, jnp.asarray(pos[None]), cache, embeddings=jnp.asarray(x, jnp.float32),
            statistics=True, hidden=tuple(range(4)),
        )  # fmt: skip
        fresh = turn(np.asarray(new.kv.k, np.float64)[:, 0], pos)
        weights = {n: np.asarray(a, np.float64) for n, a in llama.flatten(deep).items()}
        for l, h, t in np.ndindex(4, 4, rows):
            q = np.asarray(new.seen.q, np.float64)[l, 0, h, t]
            asks = q
            if 0 < l < 3:
                before = np.asarray(new.hidden[l - 1], np.float64)[0, t]
                before /= np.sqrt((before**2).mean() + DEEP.norm_eps)
                own = weights["layers.q"][l].reshape(4, D, 32)[h]
                asks = own @ (before * weights["layers.attention_norm"][l])
                asks = turn(asks[None] / np.sqrt(D), pos[t : t + 1])[0]
            k = keys[l, h // 2, :25]
            read = chosen(asks, k, order[l, h, :3], 5, 16) if l >= skip else np.arange(25)
            logits = np.concatenate([k[read] @ q, fresh[l, h // 2, : t + 1] @ q])
            want = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            got = np.log(new.seen.sum[l, 0, h, t]) + new.seen.max[l, 0, h, t]
            np.testing.assert_allclose(got, want, atol=2e-4)


# --- calibration ---


@jax.jit
def states(tokens):
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    _, new = forward(model(), tokens, pos, phase="prefill", logits="none", statistics=True)
    return new.seen.q, new.kv.k


@pytest.mark.parametrize("score", ["qk", "q", "k", "pairs"])
def test_calibration(score):
    batches = [RNG.integers(0, 50, (2, 9)) for _ in range(2)]
    found = CALIBRATIONS["double_sparsity"](score=score)(model(), batches)[ORDER]
    q, k = (np.concatenate(x, 1) for x in zip(*(states(jnp.asarray(b)) for b in batches)))
    k = np.repeat(k, 2, 2)
    if score in ("q", "k"):
        plain = q if score == "k" else np.stack([turn(x, -np.arange(9)) for x in q])
        want = np.abs(plain if score == "q" else k).mean((1, 3))
    else:
        k = turn(k, np.arange(9))
        if score == "qk":
            want = np.abs(q * k).mean((1, 3))
        else:
            want = np.abs(q).mean((1, 3)) * np.abs(k).mean((1, 3))
    assert found.shape == (2, 1, 4, 8) and found.dtype == jnp.int32
    ranked = np.take_along_axis(want, np.asarray(found[:, 0]), -1)
    assert (np.diff(ranked) <= 1e-5 * ranked[..., :1]).all()
    assert (np.sort(found, -1) == np.arange(8)).all()


def test_one_calibration_serves_all_that_order_channels_alike(tmp_path):
    label = "double_sparsity(tokens=7)"
    given = {ORDER: CONSTANTS[ORDER]}
    save(folder_of(tmp_path, label, "tiny", ref.CONFIG), label, given, model(), "tiny")
    for other in ("double_sparsity(channels=4, ahead=True, host=True)", label):
        found = find(tmp_path, other, [ORDER], model())
        np.testing.assert_array_equal(found[ORDER], given[ORDER])
    with pytest.raises(ValueError, match="none made for it"):
        find(tmp_path, "double_sparsity(score='q')", [ORDER], model())


def test_calibrated_channels_find_more_than_the_last():
    """Of a model's own tokens, the best channels find more of the true top-k than the worst."""
    tokens = RNG.integers(0, 50, (2, 40))
    order = np.asarray(CALIBRATIONS["double_sparsity"]()(model(), [tokens])[ORDER])[:, 0]
    q, k = (np.asarray(x, np.float64) for x in states(jnp.asarray(tokens)))
    k = turn(np.repeat(k, 2, 2), np.arange(40))
    hits = {"best": 0, "worst": 0}
    for l, b, h in np.ndindex(2, 2, 4):
        keys, query = k[l, b, h, :-1], q[l, b, h, -1]
        true = set(np.argsort(-(keys @ query))[:8])
        for name, channels in (("best", order[l, h, :2]), ("worst", order[l, h, -2:])):
            hits[name] += len(true & set(chosen(query, keys, channels, 8, 16)))
    assert hits["best"] > 1.2 * hits["worst"], hits


# --- cost, and what is refused ---


def test_bytes():
    """Dense, and labels for every query head: r numbers of the cache's dtype, or codes of them."""
    size = lambda chain, given=None: nbytes(  # noqa: E731
        jax.eval_shape(lambda: init_cache(ref.CONFIG, chain, B, 40, prompt=T, constants=given))
    )
    plain = size(dense())
    order = 4 * L * HQ * D
    exact = size(double_sparsity(5, channels=4), CONSTANTS)
    assert exact == plain + order + L * B * HQ * 40 * 4 * 4
    coded = size(double_sparsity(5, channels=4, bits=4), CONSTANTS)
    assert coded == plain + order + L * B * HQ * 40 * (2 + 4)  # two bytes, scale and minimum


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("double_sparsity(tokens=0)", r"tokens=0\): expected an integer of at least 1"),
        ("double_sparsity(channels=1.5)", r"channels=1.5\): expected an integer"),
        ("double_sparsity(dense_layers=-1)", r"dense_layers=-1\): .* at least 0"),
        ("double_sparsity(bits=9)", r"bits=9\): expected an integer from 1 to 8"),
        ("double_sparsity(score='v')", r"score='v'\): expected one of qk, q, k, pairs"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_refuses_on_init():
    with pytest.raises(ValueError, match=f"{ORDER}.*calibrate"):
        init_cache(ref.CONFIG, double_sparsity(5, 4), B, 40)
    with pytest.raises(ValueError, match=r"channels=32\): heads have 8 channels"):
        init_cache(ref.CONFIG, double_sparsity(), B, 40, constants=CONSTANTS)
    stage = store(merge_heads(0.5, "m"), reader=best_tokens(5, 4, ORDER))
    given = {**CONSTANTS, "m": jnp.zeros((L, 1, 2, D, D))}
    with pytest.raises(ValueError, match="query heads choose apart"):
        init_cache(ref.CONFIG, stage, B, 40, constants=given)
