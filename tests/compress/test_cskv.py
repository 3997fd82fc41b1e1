"""CSKV against NumPy, the factors it starts from, and who makes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate import CALIBRATIONS, find
from kvjax.calibrate.cskv import constants_of, factorised
from kvjax.compress import cskv
from kvjax.models import forward, llama
from kvjax.models.decoder import rms_norm
from tests.compress.harness import CONFIG, base, go, model
from tests.compress.reference import D, H, L, affine, turn
from tests.compress.test_reference_codes import follow

C, W = H * D, 8
RNG = np.random.default_rng(3)
# What stands before the projections: k = h W_k, v = h W_v, by layer.
WEIGHTS = {side: RNG.standard_normal((L, C, C)) for side in ("key", "value")}
BIAS = {side: RNG.normal(0, 2, (L, C)) for side in ("key", "value")}


def constants(rank):
    found = {}
    for side, weights in WEIGHTS.items():
        pairs = [factorised(w, rank) for w in weights]
        for name, x in (*zip(("down", "up"), zip(*pairs)), ("offset", BIAS[side])):
            found[f"cskv_svd_{side}_{name}"] = jnp.asarray(np.stack(x), jnp.float32)[:, None, None]
    return found


def flat(x):
    """[H, n, D] -> [n, C]."""
    return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def heads(x):
    """[n, H r] -> [H, n, r]."""
    return np.moveaxis(x.reshape(len(x), H, -1), 1, 0)


def compressed(x, side, layer, rank, quantised=None):
    """Tokens x [H, n, D] by A and B of the layer's input: c = h A, x' = c B, plus the bias."""
    w, bias = WEIGHTS[side][layer], BIAS[side][layer]
    h = np.linalg.solve(w.T, (flat(x) - bias).T).T
    u, s, vt = np.linalg.svd(w)
    a, b = u[:, :rank] * s[:rank] ** 0.5, s[:rank, None] ** 0.5 * vt[:rank]
    c = h @ a
    if quantised is not None:
        # Signs of singular vectors are free, a rounding's are not: those of ours.
        sign = np.sign(np.sum(b * factorised(w, rank)[1], 1))
        c, b = c * sign, b * sign[:, None]
        c = flat(quantised(heads(c)))
    return heads(c @ b + bias)


def by_channel(c):
    h, n, r = c.shape
    return affine(c.reshape(h, n // W, W, r), 4, 2).reshape(h, n, r)


CASES = {
    f"cskv(window={W})": (8, lambda n: max(n - W, 0), None),
    f"cskv(window={W}, sliding=False)": (8, lambda n: n // W * W, None),
    "cskv(key_density=0.3, value_density=0.3, window=0)": (4, lambda n: n, None),
    f"cskv(window={W}, sliding=False, bits=4)": (8, lambda n: n // W * W, by_channel),
    f"cskv(window={W}, bits=4)": (8, lambda n: max(n - W, 0) // W * W, by_channel),
    "cskv(window=0, bits=4)": (8, lambda n: n, lambda c: affine(c, 4, 2)),
}


@pytest.mark.parametrize("text", CASES)
def test_what_a_query_reads(text):
    rank, coded, by_key = CASES[text]
    by_value = None if by_key is None else lambda c: affine(c, 4, 2)

    def read(r, n):
        m = coded(n)
        k = compressed(r.plain[:, :m], "key", r.layer, rank, by_key)
        k = np.concatenate([turn(k, np.arange(m)), r.k[:, m:n]], 1)
        v = compressed(r.v[:, :m], "value", r.layer, rank, by_value)
        return k, np.concatenate([v, r.v[:, m:n]], 1)

    follow(text, read, constants(rank))


def test_without_codes_a_window_of_one_is_none():
    assert cskv(window=1, sliding=False) == cskv(window=0)
    assert cskv(window=1) != cskv(window=0)  # one token beside the one being computed


def test_a_prompt_attends_to_itself_exactly():
    ours, exact = go("cskv(window=6)")[0], base("dense")[0]
    np.testing.assert_array_equal(ours[:, 0], exact[:, 0])
    assert np.abs(ours[:, -1] - exact[:, -1]).max() > 0.01


# --- factors ---


def batches():
    return [np.random.default_rng(i).integers(0, 50, (2, 12)) for i in range(3)]


def product(found, side, layer):
    kind = next(iter(found)).split("_")[1]
    down, up = (np.asarray(found[f"cskv_{kind}_{side}_{n}"][layer, 0, 0]) for n in ("down", "up"))
    return down.astype(np.float64) @ up


def weight(which, layer):
    return np.asarray(getattr(model().layers, which)[...][layer], np.float64).T


def factors(kind, part=0.5, **more):
    return constants_of(
        model(), batches(), key_density=part, value_density=part, factors=kind, **more
    )


def inputs():
    """What the projections of each layer read, [tokens, width]."""
    found = [[] for _ in range(CONFIG.layers)]
    for tokens in batches():
        positions = np.tile(np.arange(12), (2, 1))
        _, new = forward(model(), tokens, positions, phase="prefill", hidden=range(CONFIG.layers))
        for layer, rows in enumerate(found):
            norm = model().layers.attention_norm[...][layer]
            rows.append(np.asarray(rms_norm(new.hidden[layer], norm, CONFIG), np.float64))
    return [np.concatenate(rows).reshape(-1, CONFIG.width) for rows in found]


def test_svd_leaves_the_smallest_singular_values():
    found = factors("svd")
    for layer in range(CONFIG.layers):
        for side, which in (("key", "k"), ("value", "v")):
            w = weight(which, layer)
            size = np.linalg.svd(w, compute_uv=False)
            error = np.sum((w - w @ product(found, side, layer)) ** 2)
            np.testing.assert_allclose(error, np.sum(size[8:] ** 2), rtol=1e-4)
    assert found["cskv_svd_key_down"].shape == (CONFIG.layers, 1, 1, 16, 8)
    assert not np.any(found["cskv_svd_key_offset"])


def test_asvd_weighs_inputs_by_their_magnitude():
    """As the card of the method has it: A = S^-1 U_r s_r^(1/2), B = s_r^(1/2) V_r^T of S W."""
    found, plain = factors("asvd"), factors("svd")
    for layer, h in enumerate(inputs()):
        s = np.abs(h).reshape(6, 12, -1).mean(1).sum(0) ** 0.5
        for side, which in (("key", "k"), ("value", "v")):
            w = weight(which, layer)
            u, size, vt = np.linalg.svd(s[:, None] * w, full_matrices=False)
            a, b = u[:, :8] * size[:8] ** 0.5 / s[:, None], size[:8, None] ** 0.5 * vt[:8]
            got = w @ product(found, side, layer)
            np.testing.assert_allclose(got, a @ b, atol=1e-4)
            before = w @ product(plain, side, layer)
            norm = lambda x, s=s, w=w: (np.sum((s[:, None] * (w - x)) ** 2), np.sum((w - x) ** 2))  # noqa: E731
            (mine, mine_plain), (theirs, theirs_plain) = norm(got), norm(before)
            assert mine < theirs and mine_plain >= theirs_plain
    for name, x in factors("asvd", alpha=0.0).items():
        np.testing.assert_allclose(x, plain[name.replace("asvd", "svd")], atol=1e-5)


def test_nothing_is_lost_by_a_code_of_the_keys():
    """The best A and B of c = h A, x' = c B, A free, err as much as the best of c = x E."""
    found = factors("pca", 0.25)
    draw = np.random.default_rng(0)
    for layer, h in enumerate(inputs()):
        for side, which in (("key", "k"), ("value", "v")):
            x = h @ weight(which, layer)
            best = np.sum((x - x @ product(found, side, layer)) ** 2)
            b = draw.standard_normal((4, 16))
            for _ in range(500):
                a = np.linalg.lstsq(h, x @ np.linalg.pinv(b), rcond=None)[0]
                b = np.linalg.lstsq(h @ a, x, rcond=None)[0]
            free = np.sum((x - h @ a @ b) ** 2)
            np.testing.assert_allclose(best, free, rtol=1e-3)
            for kind in ("svd", "asvd"):
                other = np.sum((x - x @ product(factors(kind, 0.25), side, layer)) ** 2)
                assert best < other


def test_a_bias_is_kept_apart():
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    params = llama.flatten(llama.init(config, jax.random.key(1)))
    params["layers.k_bias"] = 30.0 + jnp.arange(32.0).reshape(2, 16)
    biased = llama.Model(config, params)
    found = constants_of(biased, (), key_density=0.5, value_density=0.5, factors="svd")
    np.testing.assert_array_equal(found["cskv_svd_key_offset"][:, 0, 0], params["layers.k_bias"])
    _, new = forward(biased, batches()[0], np.tile(np.arange(12), (2, 1)), phase="prefill")
    codec, k = cskv().stages[0].codec.k, new.kv.k
    error = lambda given: float(jnp.mean((codec.roundtrip(k, constants=given) - k) ** 2))  # noqa: E731
    assert (
        error(found) < 1 < error({**found, "cskv_svd_key_offset": 0 * found["cskv_svd_key_offset"]})
    )


def test_keys_normalised_after_projection_need_their_own_factors():
    config = dataclasses.replace(CONFIG, qk_norm=True)
    normed = llama.init(config, jax.random.key(1))
    how = {"key_density": 1.0, "value_density": 1.0}
    with pytest.raises(ValueError, match=r"normalises keys .* expected 'pca'"):
        constants_of(normed, (), factors="svd", **how)
    found = constants_of(normed, batches(), factors="pca", **how)
    for layer in range(2):
        np.testing.assert_allclose(product(found, "key", layer), np.eye(16), atol=1e-3)


def test_directions_that_weights_lack_are_zero():
    down, up = factorised(np.diag([2.0, 0.0, 0.0]), 2)
    assert np.isfinite(down).all() and not down[:, 1].any() and not up[1].any()
    down, up = factorised(np.ones((2, 4)), 3)  # fewer rows than the rank
    assert down.shape == (4, 3) and up.shape == (3, 4)
    np.testing.assert_allclose(np.ones((2, 4)) @ down @ up, 1.0)


# --- who makes them ---


def test_weights_are_enough_for_the_bare_name(tmp_path):
    names_of = lambda kind: CALIBRATIONS["cskv"](factors=kind).names  # noqa: E731
    names = names_of("svd")
    assert cskv() != cskv(factors="pca") and set(names) == set(cskv().constants(8))
    for label in ("cskv", "snapkv(keep=0.5, storage=cskv)", "cskv(bits=4)"):
        found = find(tmp_path, label, names, model())
        jax.tree.map(np.testing.assert_array_equal, found, CALIBRATIONS["cskv"]()(model()))
    with pytest.raises(ValueError, match=r"experiments.calibrate --methods=\"cskv\(factors='pca'"):
        find(tmp_path, "cskv(factors='pca')", names_of("pca"), model())
    with pytest.raises(ValueError, match=r"experiments.train_cskv --methods=\"cskv\(factors='tr"):
        find(tmp_path, "knorm(storage=cskv(factors='trained'))", names_of("trained"), model())
    with pytest.raises(ValueError, match=r"not calibrated but trained.*experiments.train_cskv"):
        CALIBRATIONS["cskv"](factors="trained")(model(), batches())
    with pytest.raises(ValueError, match="at least one batch"):
        CALIBRATIONS["cskv"](factors="asvd")(model(), [])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"key_density": 0}, r"key_density=0\): .* \(0, 1\]"),
        ({"value_density": 1.5}, r"value_density=1.5"),
        ({"window": -1}, r"window=-1\): expected an integer of at least 0"),
        ({"window": True}, r"window=True"),
        ({"window": 9, "bits": 4}, r"group is 9"),
        ({"sliding": 1}, r"sliding=1\): expected True or False"),
        ({"bits": 9}, r"bits=9"),
        ({"factors": "random"}, r"factors='random'\): expected one of svd, asvd, pca, trained"),
    ],
)
def test_what_makes_no_sense_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        cskv(**bad)


def test_widths_that_do_not_suit_are_refused():
    with pytest.raises(ValueError, match=r"part is 0\.05: of 8 channels a head it leaves none"):
        cskv(key_density=0.05).stages[0].codec.check(8)
    with pytest.raises(ValueError, match="width is 3: at 4 bits"):
        cskv(value_density=0.4, window=8, bits=4).stages[0].codec.check(8)
