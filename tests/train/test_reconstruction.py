"""Reconstruction training: the loss by hand, layers and methods apart, and resumption."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.calibrate.cskv import constants_of
from kvjax.codecs import quantize
from kvjax.compress import cskv
from kvjax.data import TokenWindows, batches
from kvjax.models import Config, forward, init
from kvjax.train import Checkpoints, combine, fit, reconstruction, start, train_step

CONFIG = Config(50, 32, 48, 2, 4, 2, 8)
SOURCE = TokenWindows(np.random.default_rng(0).integers(0, 50, 16 * 12), 16)
OPTIMIZER = optax.adamw(optax.linear_schedule(3e-2, 0.0, 60), weight_decay=0.0)
TRAINABLE = r"^constants.*_(down|up)$"
METHODS = {
    "half": cskv(window=8, factors="trained"),
    "coded": cskv(0.25, 0.5, window=8, bits=4, factors="trained"),
}
CODECS = {name: chain.stages[0].codec for name, chain in METHODS.items()}
LOSS = reconstruction(CODECS)
STEP = train_step(LOSS, OPTIMIZER)
KEY = jax.random.key(0)
slope_of = jax.jit(jax.value_and_grad(LOSS, has_aux=True, allow_int=True))


@functools.cache
def whole(kind="asvd"):
    base = init(CONFIG, jax.random.key(0))
    few = [jnp.asarray(SOURCE[i]["tokens"][None]) for i in range(12)]
    parts = {"half": (0.5, 0.5), "coded": (0.25, 0.5)}
    constants = {
        name: constants_of(
            base, few, key_density=k, value_density=v, factors=kind, called="trained"
        )
        for name, (k, v) in parts.items()
    }
    return {"base": base, "constants": constants}


def new(batch=4):
    return iter(batches(SOURCE, batch, seed=0))


def padded():
    tokens = np.stack([SOURCE[i]["tokens"] for i in range(3)])
    tokens[1, 8:] = -1
    return {"tokens": jnp.asarray(tokens)}


def test_the_loss_by_hand():
    model, batch = whole(), padded()
    (value, metrics), slope = slope_of(model, batch, KEY)
    tokens = np.asarray(batch["tokens"])
    positions = np.where(tokens >= 0, np.arange(16), -1)
    _, kv = forward(model["base"], jnp.maximum(tokens, 0), positions, phase="prefill")
    want = 0.0
    for name, rank in (("half", {"k": 8, "v": 8}), ("coded", {"k": 4, "v": 8})):
        for side, word in (("k", "key"), ("v", "value")):
            x = np.asarray(getattr(kv.kv, side), np.float64)
            wide = np.moveaxis(x, 2, 3).reshape(2, 3, 16, 16)
            down, up = (
                np.asarray(model["constants"][name][f"cskv_trained_{word}_{n}"], np.float64)[:, 0]
                for n in ("down", "up")
            )
            c = wide @ down
            assert c.shape[-1] == rank[side]
            if name == "coded":
                split = jnp.asarray(np.moveaxis(c.reshape(2, 3, 16, 2, -1), 3, 2), jnp.float32)
                codec = quantize(4, "channel", 8) if side == "k" else quantize(4)
                split = codec.decode(
                    codec.encode(split, jnp.asarray(positions >= 0)[None, :, None])
                )
                c = np.moveaxis(np.asarray(split, np.float64), 2, 3).reshape(c.shape)
            error = ((wide - c @ up) ** 2)[:, positions >= 0]
            size = (wide**2)[:, positions >= 0]
            want += error.mean((1, 2)).sum()
            got = float(metrics[f"{name} {side}"])
            np.testing.assert_allclose(got, error.sum() / size.sum(), rtol=2e-3)
    np.testing.assert_allclose(value, want, rtol=2e-3)
    for n, g in slope["constants"]["half"].items():
        assert np.abs(g).max() > 0, n
    for g in jax.tree.leaves(slope["base"]):  # the model is given, not trained
        assert g.dtype == jax.dtypes.float0 or not np.any(g)


def test_what_one_layer_gets_wrong_reaches_no_other():
    """Another factor in layer 0 leaves gradients of layer 1, and of other methods, as they are."""
    model, batch = whole(), padded()
    before = slope_of(model, batch, KEY)[1]["constants"]
    constants = jax.tree.map(jnp.copy, model["constants"])
    name = "cskv_trained_key_down"
    constants["half"][name] = constants["half"][name].at[0].mul(-3.0)
    after = slope_of({**model, "constants": constants}, batch, KEY)[1]["constants"]
    assert not np.allclose(after["half"][name][0], before["half"][name][0])
    for n, g in after["half"].items():
        np.testing.assert_array_equal(g[1], before["half"][n][1])
        if "value" in n:
            np.testing.assert_array_equal(g, before["half"][n])
    jax.tree.map(np.testing.assert_array_equal, after["coded"], before["coded"])


def run(steps, **more):
    state, frozen = start(whole(), OPTIMIZER, KEY, TRAINABLE)
    return fit(STEP, state, frozen, new(), steps, **more), frozen


def test_training_comes_near_the_best_and_no_further():
    """The optimum without codes is known: the principal directions of keys and values."""
    seen = {}
    state, frozen = run(60, report=seen.__setitem__, report_every=5)
    everything = {"tokens": jnp.asarray(np.stack([SOURCE[i]["tokens"] for i in range(12)]))}
    first, last, best = (
        slope_of(m, everything, KEY)[0][1]
        for m in (whole(), combine(state.params, frozen), whole("pca"))
    )
    for side in ("k", "v"):
        start_, end, least = (float(m[f"half {side}"]) for m in (first, last, best))
        assert least * 0.999 <= end < start_ - 0.8 * (start_ - least)
        start_, end = (float(m[f"coded {side}"]) for m in (first, last))
        assert end < start_ - 0.03
    losses = list(seen.values())
    assert losses[-1]["loss"] < losses[0]["loss"]
    base = combine(state.params, frozen)["base"]
    jax.tree.map(np.testing.assert_array_equal, base, whole()["base"])


def test_cut_off_and_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    straight, _ = run(6)

    def killed(step, metrics):
        raise KeyboardInterrupt

    with Checkpoints(tmp_path, every=2) as checkpoints, pytest.raises(KeyboardInterrupt):
        run(6, checkpoints=checkpoints, report=killed, report_every=5)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        data = new()
        state, frozen = start(whole(), OPTIMIZER, jax.random.key(9), TRAINABLE)
        state = checkpoints.restore(state, data)
        assert int(state.step) == 4
        resumed = fit(STEP, state, frozen, data, 6, checkpoints=checkpoints)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.optimizer, straight.optimizer)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, run(4)[0].params, straight.params)


def test_methods_trained_together_are_trained_alone():
    codecs = {"half": CODECS["half"]}
    alone = {"base": whole()["base"], "constants": {"half": whole()["constants"]["half"]}}
    state, frozen = start(alone, OPTIMIZER, KEY, TRAINABLE)
    state = fit(train_step(reconstruction(codecs), OPTIMIZER), state, frozen, new(), 3)
    both, _ = run(3)
    for n, x in state.params["constants"]["half"].items():
        if x is not None:
            np.testing.assert_allclose(x, both.params["constants"]["half"][n], atol=1e-6)
