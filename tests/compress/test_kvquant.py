"""KVQuant against NumPy, its calibration, and the files that hold constants."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate import CALIBRATIONS, find, folder_of, load, save
from kvjax.calibrate.kvquant import _capture, fit_levels, ranges, weighted_kmeans
from kvjax.codecs import levels
from kvjax.compress import kvquant, parse
from kvjax.models import forward, llama
from tests.compress.harness import CONFIG, model
from tests.compress.reference import D, H, L, turn
from tests.compress.test_reference_codes import follow

C = H * D
RNG = np.random.default_rng(5)
SINKS = 2


def tables(bits):
    make = lambda: np.sort(RNG.uniform(-1, 1, (L, 2**bits)), -1)  # noqa: E731
    return {
        "kvquant_key_centre": RNG.normal(0, 0.3, (L, C)),
        "kvquant_key_range": RNG.uniform(1, 3, (L, C)),
        "kvquant_key": make(),
        "kvquant_key_read": make(),
        "kvquant_value": make(),
        "kvquant_value_read": make(),
    }


def nearest(a, table, read):
    return read[np.abs(a[..., None] - table).argmin(-1)]


def extremes(x):
    """Which entries of x [n, C] are kept exactly: the least and the largest of each token."""
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, x.argmin(-1, keepdims=True), True, -1)
    np.put_along_axis(kept, x.argmax(-1, keepdims=True), True, -1)
    return kept


def with_mean(x, kept):
    return np.where(kept, x.mean(-1, keepdims=True), x)


@pytest.mark.parametrize("bits", [2, 3])
def test_what_a_query_reads(bits):
    t = {n: np.float32(x).astype(np.float64) for n, x in tables(bits).items()}

    def read(r, n):
        at = lambda name: t[f"kvquant_{name}"][r.layer]  # noqa: E731
        join = lambda x: np.moveaxis(x[:, :n], 0, 1).reshape(n, C)  # noqa: E731
        split = lambda x: np.moveaxis(x.reshape(n, H, D), 1, 0)  # noqa: E731
        a = (join(r.plain) - at("key_centre")) / at("key_range")
        kept = extremes(a)
        coded = np.where(
            kept, np.float16(a), nearest(with_mean(a, kept), at("key"), at("key_read"))
        )
        k = turn(split(coded * at("key_range") + at("key_centre")), np.arange(n))
        x = join(r.v)
        kept = extremes(x)
        rest = with_mean(x, kept)
        high, low = rest.max(-1, keepdims=True), rest.min(-1, keepdims=True)
        extent = np.float64(np.float16((high - low) / 2))
        centre = np.float64(np.float16(low + (high - low) / 2))
        y = nearest((rest - centre) / extent, at("value"), at("value_read"))
        v = split(np.where(kept, np.float16(x), y * extent + centre))
        k[:, :SINKS], v[:, :SINKS] = r.k[:, :SINKS], r.v[:, :SINKS]
        return k, v

    given = {n: jnp.asarray(x[:, None, None], jnp.float32) for n, x in t.items()}
    follow(f"kvquant(bits={bits}, sinks={SINKS})", read, given)


def test_errors_are_within_half_a_gap():
    """Of what is not kept exactly and lies within the levels; the ends of a token are exact."""
    codec = parse("kvquant(bits=3, sinks=0)")[0][1].stages[-1].codec.k
    t = {n: x[0] for n, x in tables(3).items()}
    t["kvquant_key_read"] = t["kvquant_key"]
    given = {n: jnp.asarray(x, jnp.float32) for n, x in t.items() if "key" in n}
    a = np.random.default_rng(3).uniform(-1, 1, (40, C))
    x = (a * t["kvquant_key_range"] + t["kvquant_key_centre"]).astype(np.float32)
    rows = jnp.asarray(np.moveaxis(x.reshape(1, 40, H, D), 1, 2))
    back = codec.decode(codec.encode(rows, None, None, given), jnp.float32, given)
    error = np.abs(np.moveaxis(np.asarray(back), 2, 1).reshape(40, C) - x) / t["kvquant_key_range"]
    levels, kept = t["kvquant_key"], extremes(a)
    inside = ~kept & (a >= levels[0]) & (a <= levels[-1])
    assert inside.mean() > 0.3 and error[inside].max() <= np.diff(levels).max() / 2 + 1e-5
    assert error[inside].max() > np.diff(levels).max() / 4
    assert error[kept].max() < 1e-3  # float16


def test_levels_on_a_uniform_grid_are_the_integer_quantiser():
    grid = jnp.linspace(-1.0, 1.0, 8)
    given = {"levels": grid, "levels_read": grid}
    x = jnp.asarray(RNG.standard_normal((50, 16)), jnp.float32)
    codec = levels(3, ranged=True, scale_dtype="float32")
    found = np.asarray(codec.decode(codec.encode(x, constants=given), constants=given))
    low, high = np.min(x, -1, keepdims=True), np.max(x, -1, keepdims=True)
    s = (high - low) / 7
    np.testing.assert_allclose(found, np.round((x - low) / s) * s + low, atol=1e-5)


def test_kmeans_is_near_the_best_partition():
    """Against the best partition of the sorted numbers into runs, by dynamic programming."""
    for seed, count in ((0, 4), (1, 4), (2, 8)):
        draw = np.random.default_rng(seed)
        a, w = np.sort(draw.standard_t(5, 400)), draw.uniform(0.1, 4, 400)
        mass, first, second = (np.concatenate([[0.0], np.cumsum(x)]) for x in (w, w * a, w * a * a))
        i, j = np.ogrid[:401, :401]
        inside = np.where(j > i, mass[j] - mass[i], 1.0)
        cost = second[j] - second[i] - (first[j] - first[i]) ** 2 / inside
        cost = np.where(j > i, cost, np.inf)  # of the run [i, j) around its mean
        best = cost[0]
        for _ in range(count - 1):
            best = np.min(best[:, None] + cost, 0)
        table = weighted_kmeans(a, w, count)
        found = np.sum(w * np.abs(a[:, None] - table).min(-1) ** 2)
        assert best[-1] * (1 - 1e-9) <= found <= best[-1] * 1.03


def test_q_norm_keeps_mean_and_deviation():
    a = RNG.standard_t(4, 5000).astype(np.float32)
    table, read = fit_levels(a, np.ones_like(a), 4, True)
    coded = read[np.abs(a[:, None] - table).argmin(-1)]
    np.testing.assert_allclose([coded.mean(), coded.std()], [a.mean(), a.std()], atol=1e-3)
    assert (fit_levels(a, np.ones_like(a), 4, False)[1] == table).all()


def test_ranges_leave_out_the_extremes():
    x = RNG.standard_normal((1000, 3)).astype(np.float32)
    centre, extent, inside = ranges(x, 0.02, 0)
    assert centre.shape == extent.shape == (1, 3) and 0.975 < inside.mean() < 0.985
    assert (np.abs((x - centre) / extent)[inside] <= 1 + 1e-5).all()


def test_gradients_are_those_of_the_loss():
    """A number moved by a little changes the loss by its gradient."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8)))
    pos = jnp.tile(jnp.arange(8), (2, 1))

    @jax.jit
    def loss(shift):
        logits, _ = forward(model(), tokens, pos, phase="prefill", shift=shift)
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], 2)
        )

    k, v, gk, gv = _capture(model(), tokens)
    assert k.shape == v.shape == (CONFIG.layers, 2, 8, 16)
    zero = np.zeros((CONFIG.layers, 2, 2, 8, 8), np.float32)
    for side, got in enumerate((gk, gv)):
        step = zero.copy()
        step[1, 0, 1, 2, 3] = 1e-2
        pair = [(step, zero), (zero, step)][side]
        less = [(-step, zero), (zero, -step)][side]
        want = (float(loss(pair)) - float(loss(less))) / 2e-2
        np.testing.assert_allclose(got[1, 0, 2, 8 + 3], want, rtol=2e-2, atol=2e-6)


def batches():
    return [np.random.default_rng(i).integers(0, 50, (2, 12)) for i in range(2)]


def test_calibrated_levels_err_less_than_a_uniform_grid():
    given = CALIBRATIONS["kvquant"](bits=2, sinks=0, q_norm=False)(model(), batches())
    spread = np.linspace(-0.75, 0.75, 4)
    k, v, gk, gv = (np.concatenate([np.asarray(_capture(model(), jnp.asarray(t))[i])
                                    for t in batches()], 1) for i in range(4))  # fmt: skip
    for layer in range(CONFIG.layers):
        a = k[layer].reshape(-1, 16)
        weight = gk[layer].reshape(-1, 16) ** 2
        centre, extent = (
            given["kvquant_key_centre"][layer, 0, 0],
            given["kvquant_key_range"][layer, 0, 0],
        )
        a, weight = np.asarray((a - centre) / extent), weight * np.asarray(extent) ** 2
        inside = np.abs(a) <= 1

        def loss(table, a=a, weight=weight, inside=inside):
            near = np.abs(a[..., None] - np.asarray(table)).min(-1)
            return np.sum((weight * near**2)[inside])

        assert loss(given["kvquant_key"][layer, 0, 0]) < loss(spread)
    assert v.shape == gv.shape


def test_files_know_their_model(tmp_path):
    given = {n: jnp.asarray(x[:, None, None], jnp.float32) for n, x in tables(3).items()}
    folder = folder_of(tmp_path, "kvquant(bits=3)", "tiny", CONFIG)
    save(folder, "kvquant(bits=3)", given, model(), "tiny")
    found = load(folder, model())
    jax.tree.map(np.testing.assert_array_equal, found, given)
    label = "snapkv(keep=0.5, storage=kvquant(bits=3))"
    assert find(tmp_path, label, ["kvquant_key"], model()).keys() == {"kvquant_key"}
    # The same method, written otherwise; and another.
    assert find(tmp_path, "kvquant", ["kvquant_key"], model()).keys() == {"kvquant_key"}
    again = r"python -m experiments.calibrate --methods='kvquant\(bits=2\)'"
    with pytest.raises(ValueError, match=again):
        find(tmp_path, "kvquant(bits=2)", ["kvquant_key"], model())
    other = llama.init(CONFIG, jax.random.key(9))
    with pytest.raises(ValueError, match=r"tiny.*other weights"):
        load(folder, other)
    bigger = types.SimpleNamespace(config=type(CONFIG)(50, 32, 48, 3, 4, 2, 8), layers=other.layers)
    with pytest.raises(ValueError, match=r"another shape .layers 2, not 3"):
        find(tmp_path, "kvquant(bits=3)", ["kvquant_key"], bigger)
    half = type(other)(
        CONFIG, {n: x.astype(jnp.bfloat16) for n, x in llama.flatten(model()).items()}
    )
    assert load(folder, half)
    (folder / "calibration.json").unlink()  # cut off before it was complete
    with pytest.raises(ValueError, match="no finished calibration"):
        load(folder, model())
    save(folder, "kvquant(bits=3)", given, model(), "tiny")
    assert json.loads((folder / "calibration.json").read_text())["model"] == "tiny"


def test_what_makes_no_sense_is_refused():
    for bad in (
        {"bits": 0},
        {"outliers": 1.0},
        {"sinks": -1},
        {"q_norm": 3},
        {"range_weight": None},
    ):
        with pytest.raises(ValueError, match="kvquant"):
            kvquant(**bad)
