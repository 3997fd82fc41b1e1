"""MustDrop against NumPy: who is dropped behind which layer, what caches hold, the encoder part."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import attending, chain, dropping, init_cache, nbytes, store
from kvjax.compress import mustdrop, parse
from kvjax.compress.mustdrop import key_set, merge_windows
from kvjax.decode import prefill
from kvjax.models import forward
from tests.compress import plain_model
from tests.compress.harness import CONFIG, LENGTHS, PROMPT, held, inputs, model

LAYERS = (0, 1)  # the tiny model has two


@functools.cache
def types():
    """bool [3, PROMPT] each: visual (two runs of them), and some of those in the key set."""
    visual = np.zeros((3, PROMPT), bool)
    visual[:, 2:8] = visual[1:, 10:15] = visual[0, 12:19] = True
    key = visual & (np.random.default_rng(4).random(visual.shape) < 0.2)
    return visual, key


def plainly(x, visual, key, tau_g, tau_x, layers=LAYERS):
    """(logits, alive by layer on entry and at the end) of one sequence."""
    n = len(x)
    alive = [np.ones(n, bool)]

    def attention(l, q, k, v):
        mine = alive[-1]
        p = plain_model.probabilities(q, k, mine[:, None] & mine)
        new = mine.copy()
        if l in layers:
            rows, columns = np.flatnonzero(mine & ~visual), np.flatnonzero(mine & visual)
            m = p.mean(0)[np.ix_(rows, columns)]
            g, most = m.sum(0), m.max(0)
            gone = (g < tau_g * g.sum()) & (most < tau_x) & ~key[columns]
            new[columns[gone]] = False
        alive.append(new)
        return plain_model.mix(p, v)

    return plain_model.run(x, np.arange(n), attention), alive


@functools.partial(jax.jit, static_argnames="rule")
def under(model, x, pos, columns, rule):
    return forward(model, None, pos, phase="prefill", embeddings=x, columns=columns, rule=rule)


@pytest.mark.parametrize("taus", [(0.1, 0.2), (0.2, 0.08)])
def test_drops_and_computes_as_stated(taus):
    x, pos, *_ = inputs(fill=np.nan)
    visual, key = types()
    rule = dropping(LAYERS, *taus)
    logits, new = under(model(), x, pos, {"visual": visual, "key": key}, rule)
    dropped = []
    for b, n in enumerate(LENGTHS):
        v, k = visual[b, :n], key[b, :n]
        want, alive = plainly(inputs()[0][b, :n], v, k, *taus)
        last = alive[1]  # what the last of the two layers still computed
        np.testing.assert_allclose(logits[b, :n][last], want[last], atol=2e-5)
        for l in range(CONFIG.layers):
            there = np.asarray(new.kv.pos[l, b, 0, :n]) >= 0
            np.testing.assert_array_equal(there, alive[-1])
        assert (alive[1] <= alive[0]).all() and (alive[2] <= alive[1]).all()
        assert alive[2][~v].all() and alive[2][k].all()
        dropped.append([int((~a).sum()) for a in alive[1:]])
    dropped = np.asarray(dropped)
    assert (dropped[:, 0] > 0).all() and (dropped[:, 1] > dropped[:, 0]).any()


def test_layers_before_the_first_hold_everything():
    tokens = np.random.default_rng(1).integers(0, 50, (3, PROMPT))
    visual, key = types()
    taus, table = (0.2, 0.2), np.asarray(model().embed[...], np.float64)
    _, cache = prefill(
        model(), jnp.asarray(tokens), mustdrop(*taus, layers=(1,)), lengths=jnp.asarray(LENGTHS),
        new_tokens=4, columns={"visual": visual, "key": key},
    )  # fmt: skip
    got, some = held(cache), 0
    for b, n in enumerate(LENGTHS):
        _, alive = plainly(table[tokens[b, :n]], visual[b, :n], key[b, :n], *taus, layers=(1,))
        assert got[0][b] == [list(range(n))] * 2
        assert got[1][b] == [np.flatnonzero(alive[-1]).tolist()] * 2
        some += (~alive[-1]).sum()
    assert some > 0 and cache.length.tolist() == list(LENGTHS)


@pytest.mark.parametrize(
    ("how", "brought"),
    [
        ({"total": 0.0}, {}),
        ({"single": 0.0}, {}),
        ({"total": 9.0, "single": 9.0}, {"key": "visual"}),
        ({"total": 9.0, "single": 9.0, "span": (0, 99)}, {"visual": None}),
    ],
    ids=str,
)
def test_limits_change_no_bit(how, brought):
    """A threshold of 0; everything in the key set; nothing that is visual."""
    x, pos, *_ = inputs()
    visual, _ = types()
    columns = {"visual": visual}
    for name, what in brought.items():
        columns[name] = visual if what else np.zeros_like(visual)
    rule = dropping(LAYERS, **({"total": 0.1, "single": 0.1} | how))
    logits, new = under(model(), x, pos, columns, rule)
    np.testing.assert_array_equal(logits, _dense()[0])
    np.testing.assert_array_equal(new.kv.pos, np.broadcast_to(pos[:, None], (2, 3, 1, PROMPT)))


@functools.cache
def _dense():
    x, pos, *_ = inputs()
    columns = {"visual": types()[0]}
    return under(model(), x, pos, columns, dropping(LAYERS, 0.0, 0.0))


def test_dense_is_dense():
    """What the limits are compared with equals the model without a rule."""
    x, pos, *_ = inputs()
    plain, _ = jax.jit(lambda m, x: forward(m, None, pos, phase="prefill", embeddings=x))(
        model(), x
    )
    np.testing.assert_allclose(_dense()[0], plain, atol=1e-6)


def test_by_positions_as_by_columns():
    x, pos, *_ = inputs()
    visual = np.broadcast_to((np.arange(PROMPT) >= 3) & (np.arange(PROMPT) < 9), (3, PROMPT))
    a, one = under(model(), x, pos, {"visual": visual}, dropping(LAYERS, 0.2, 0.2))
    b, two = under(model(), x, pos, {}, dropping(LAYERS, 0.2, 0.2, span=(3, 9)))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.kv.pos, two.kv.pos)
    assert (one.kv.pos[0] < pos[:, None]).any()


def test_shares_leave_as_many():
    x, pos, *_ = inputs()
    visual, key = types()
    for seed in (None, 3):
        rule = dropping(LAYERS, shares=(0.5, 0.3), seed=seed)
        _, new = under(model(), x, pos, {"visual": visual, "key": key}, rule)
        for b, n in enumerate(LENGTHS):
            there = np.asarray(new.kv.pos[1, b, 0, :n]) >= 0
            v = visual[b, :n]
            assert there[~v].all() and there[key[b, :n]].all()
            assert there[v].sum() == max(np.ceil(0.3 * v.sum()), key[b, :n].sum())


def test_room_in_one_pool():
    """With room for a part, the least attended of all layers are dropped beyond it."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, PROMPT)))
    visual, _ = types()

    def go(**how):
        return held(prefill(
            model(), tokens, mustdrop(0.1, 0.2, layers=(1,), **how), lengths=jnp.asarray(LENGTHS),
            new_tokens=4, columns={"visual": visual},
        )[1])  # fmt: skip

    free, tight = go(), go(keep=0.85)
    assert go(keep=1.0) == free
    some = 0
    for b, n in enumerate(LENGTHS):
        pairs = list(np.ndindex(2, 2))
        room = int(n * 0.85) * 4
        assert sum(len(tight[l][b][h]) for l, h in pairs) == min(
            room, sum(len(free[l][b][h]) for l, h in pairs)
        )
        assert tight[0][b] == free[0][b]
        for h in range(2):
            assert set(tight[1][b][h]) <= set(free[1][b][h])
            assert set(np.flatnonzero(~visual[b, :n])) <= set(tight[1][b][h])
            some += len(free[1][b][h]) - len(tight[1][b][h])
    assert some > 0

    def size(method):
        cache = init_cache(CONFIG, method, 1, 544, prompt=512)
        return nbytes(jax.eval_shape(lambda c: c, cache))

    assert size(mustdrop()) < 1.06 * size(chain(store()))  # positions of each layer


# --- the encoder ---


def merged_plainly(x, window, threshold):
    """Tokens of one image [N, D] in order."""
    side = int(len(x) ** 0.5)
    grid = np.arange(len(x)).reshape(side, side)
    windows = []
    for i in range(0, side, window):
        for j in range(0, side, window):
            ids = grid[i : i + window, j : j + window].ravel()
            unit = x[ids] / np.linalg.norm(x[ids], axis=1, keepdims=True)
            pairs = [unit[a] @ unit[b] for a in range(len(ids)) for b in range(len(ids)) if a != b]
            windows.append((np.mean(pairs), ids))
    merged = sorted([w for w in windows if w[0] >= threshold], key=lambda w: -w[0])
    gone = {i for _, ids in merged for i in ids}
    means = [x[ids].mean(0) for _, ids in merged]
    return np.asarray(means + [x[i] for i in range(len(x)) if i not in gone]), len(merged)


def test_windows_that_look_alike_become_one():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 36, 8)).astype(np.float32)
    base = np.repeat(np.repeat(draw.standard_normal((3, 2, 2, 8)), 3, 1), 3, 2).reshape(3, 36, 8)
    noise = np.repeat(np.repeat(draw.random((3, 2, 2, 1)) * 1.5, 3, 1), 3, 2).reshape(3, 36, 1)
    x = (base + noise * x).astype(np.float32)
    front = draw.standard_normal((3, 1, 8)).astype(np.float32)
    whole = np.concatenate([front, x], 1)
    tokens, count = jax.jit(merge_windows)(whole)
    numbers = set()
    for b in range(3):
        want, windows = merged_plainly(x[b].astype(np.float64), 3, 0.8)
        numbers.add(windows)
        assert int(count[b]) == 1 + len(want) == 37 - 8 * windows
        np.testing.assert_array_equal(tokens[b, 0], front[b, 0])
        np.testing.assert_allclose(tokens[b, 1 : 1 + len(want)], want, atol=1e-6)
        assert (tokens[b, 1 + len(want) :] == 0).all()
    assert len(numbers) > 1  # each image decides for itself
    same, count = merge_windows(jnp.asarray(whole), threshold=1.1)
    np.testing.assert_array_equal(same, whole)
    assert (count == 37).all()


def test_key_set_is_the_best_of_the_class_row():
    a = np.random.default_rng(0).random((2, 3, 26)).astype(np.float32)
    count = np.asarray([26, 14])
    got = np.asarray(key_set(a, jnp.asarray(count)))
    for b, n in enumerate(count - 1):
        score = a[b].mean(0)[1 : 1 + n]
        want = np.argsort(-score)[: int(np.ceil(0.08 * n))]
        np.testing.assert_array_equal(np.flatnonzero(got[b]), np.sort(want))
    assert key_set(a, part=1.0).all() and not key_set(a, part=0.0).any()


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mustdrop(tau_g=-1)", "total=-1"),
        ("mustdrop(layers=(2, 2))", "layers"),
        ("mustdrop(layers=())", "layers"),
        ("mustdrop(visual=(5, 2))", "span"),
        ("mustdrop(keep=1.5)", "keep=1.5"),
        ("mustdrop(keep=0.5, layers=(0, 1))", "from 1 on"),
        ("mustdrop(shares=(0.5,))", "shares"),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_parts_refuse():
    with pytest.raises(ValueError, match="merge_windows"):
        merge_windows(jnp.ones((1, 26, 4)))
    with pytest.raises(ValueError, match="key_set"):
        key_set(jnp.ones((1, 1, 4)), part=2)
    assert attending(dropping()) == mustdrop().stages[0]
