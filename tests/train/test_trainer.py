"""The step is what it says; a resumed run is the uninterrupted one, bit for bit."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.data import batches
from kvjax.train import (
    Checkpoints,
    combine,
    fit,
    masked_diffusion,
    measure,
    partition,
    start,
    train_step,
)  # fmt: skip
from tests.train.conftest import SOURCE

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
LOSS = masked_diffusion()
STEP = train_step(LOSS, OPTIMIZER)
KEY = jax.random.key(5)


def new():
    return iter(batches(SOURCE, 4, seed=0))


def same(one, two):
    a, b = jax.tree.leaves(one), jax.tree.leaves(two)
    numbers = lambda x: (  # noqa: E731
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return len(a) == len(b) and all(
        np.array_equal(np.asarray(numbers(x)), np.asarray(numbers(y))) for x, y in zip(a, b)
    )


def test_a_step_is_the_gradient_by_hand(tiny, data):
    optimizer = optax.sgd(0.1)
    batch = next(data)
    state, frozen = start(tiny, optimizer, KEY)
    value, slope = jax.jit(
        jax.value_and_grad(lambda m: LOSS(m, batch, jax.random.fold_in(KEY, 0))[0])
    )(tiny)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(slope)))
    state, metrics = train_step(LOSS, optimizer)(state, frozen, batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1
    for new_, old, g in zip(*map(jax.tree.leaves, (state.params, tiny, slope))):
        np.testing.assert_allclose(new_, old - 0.1 * g, rtol=1e-5, atol=1e-6)


def test_every_step_draws_anew_and_the_same_again(tiny, data):
    optimizer = optax.set_to_zero()
    step, batch = train_step(LOSS, optimizer), next(data)
    runs = []
    for _ in range(2):
        state, frozen = start(tiny, optimizer, KEY)
        losses = []
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    state, frozen = start(tiny, OPTIMIZER, KEY)
    seen = {}
    straight = fit(STEP, state, frozen, new(), 7, report=seen.__setitem__, report_every=2)
    with Checkpoints(tmp_path, every=3) as checkpoints:
        state, _ = start(tiny, OPTIMIZER, KEY)
        state = checkpoints.restore(state, new())  # nothing yet: as given
        with pytest.raises(KeyboardInterrupt):  # after 5 steps, of which 3 are saved
            fit(
                STEP, state, frozen, new(), 7, checkpoints=checkpoints, report=killed,
                report_every=5,
            )  # fmt: skip
    again = {}
    with Checkpoints(tmp_path, every=3) as checkpoints:
        assert checkpoints.latest == 3
        data = new()
        state, _ = start(jax.tree.map(jnp.zeros_like, tiny), OPTIMIZER, jax.random.key(0))
        state = checkpoints.restore(state, data)
        assert int(state.step) == 3
        resumed = fit(
            STEP, state, frozen, data, 7, checkpoints=checkpoints,
            report=again.__setitem__, report_every=2,
        )  # fmt: skip
        assert checkpoints.latest == 7
    assert same(straight, resumed)
    assert list(seen) == [2, 4, 6, 7] and list(again) == [4, 6, 7]
    assert {s: seen[s] for s in (6, 7)} == {s: again[s] for s in (6, 7)}  # whole intervals


def killed(step, metrics):
    raise KeyboardInterrupt


def test_a_finished_run_stays_as_it_is(tiny, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        data = new()
        state, frozen = start(tiny, OPTIMIZER, KEY)
        state = fit(STEP, state, frozen, data, 2, checkpoints=checkpoints)
        place = data.get_state()
        assert checkpoints.latest == 2
        again = fit(STEP, state, frozen, data, 2, checkpoints=checkpoints, report=killed)
        assert again is state and data.get_state() == place


def test_the_newest_checkpoints_stay(tiny, tmp_path):
    with Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
        state, frozen = start(tiny, OPTIMIZER, KEY)
        fit(STEP, state, frozen, new(), 7, checkpoints=checkpoints)
    found = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal())
    assert found == [6, 7]
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = start(tiny, OPTIMIZER, KEY)
        assert int(checkpoints.restore(state, new(), step=6).step) == 6
        with pytest.raises(ValueError, match=r"step=2: saved are \[6, 7\]"):
            checkpoints.restore(state, new(), step=2)
        other, _ = start(tiny, optax.sgd(0.1), KEY)
        with pytest.raises(ValueError, match="another model or optimizer"):
            checkpoints.restore(other, new())
        wider = jax.tree.map(lambda x: jnp.concatenate([x, x], -1), tiny)
        state, _ = start(wider, OPTIMIZER, KEY)
        with pytest.raises(ValueError, match=r"'optimizer.*shape .*expected"):
            checkpoints.restore(state, new())


def test_the_frozen_part_stays_and_costs_no_optimizer_state(tiny):
    state, frozen = start(tiny, OPTIMIZER, KEY, trainable=r"layers\.(q|v)$")
    before = jax.tree.map(np.asarray, frozen)
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    assert len(sizes) == 2
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer)) - 1  # and the count of steps
    assert moments == 2 * sum(sizes)
    state = fit(STEP, state, frozen, new(), 2)
    assert same(frozen, before)
    params, _ = partition(tiny, r"layers\.(q|v)$")
    assert not any((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params, state.params))))
    assert jax.tree.structure(combine(state.params, frozen)) == jax.tree.structure(tiny)


@pytest.mark.usefixtures("compile_fully")
def test_the_state_is_donated_and_the_model_is_not(tiny, data):
    batch = jax.tree.map(jnp.asarray, next(data))
    state, frozen = start(tiny, OPTIMIZER, KEY)
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer)))
    memory = STEP.lower(state, frozen, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    STEP(state, frozen, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.optimizer)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(tiny))


def test_one_compilation_for_a_run(tiny):
    step = train_step(LOSS, OPTIMIZER)
    state, frozen = start(tiny, OPTIMIZER, KEY)
    fit(step, state, frozen, new(), 4)
    assert step._cache_size() == 1


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tiny, tmp_path):
    def broken(model, batch, key):
        value, metrics = LOSS(model, batch, key)
        return jnp.where(batch["tokens"].sum() == poison, jnp.nan, value), metrics

    poison = [int(b["tokens"].sum()) for b in itertools.islice(new(), 4)][3]
    state, frozen = start(tiny, OPTIMIZER, KEY)
    with (
        Checkpoints(tmp_path, every=3) as checkpoints,
        pytest.raises(FloatingPointError, match="loss of step 4 is nan"),
    ):
        fit(train_step(broken, OPTIMIZER), state, frozen, new(), 6, checkpoints=checkpoints)
    assert [p.name for p in tmp_path.iterdir() if p.name.isdecimal()] == ["3"]


def test_evaluation_during_training_sees_the_model_of_then(tiny):
    seen = {}
    few = batches(SOURCE, 4, epochs=1)
    loss = jax.jit(LOSS)

    def evaluate(model, step):
        seen[step] = measure(loss, model, few, KEY)["loss"]

    state, frozen = start(tiny, OPTIMIZER, KEY)
    state = fit(STEP, state, frozen, new(), 5, evaluate=evaluate, evaluate_every=2)
    assert list(seen) == [2, 4, 5] and len(set(seen.values())) == 3
    rows = [
        float(loss(state.params, batch, jax.random.fold_in(KEY, i))[0])
        for i, batch in enumerate(few)
    ]
    assert seen[5] == pytest.approx(np.mean(rows), rel=1e-6)


def test_refused(tiny, tmp_path):
    state, frozen = start(tiny, OPTIMIZER, KEY)
    with pytest.raises(ValueError, match="the data ends after 1 of 3 steps"):
        fit(STEP, state, frozen, iter(batches(range(4), 4, epochs=1, transforms=[example])), 3)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="no batch"):
        measure(LOSS, tiny, [], KEY)


def example(index):
    return SOURCE[int(index)]


PARALLEL = """
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kvjax.data import batches
from kvjax.models import init
from kvjax.train import fit, masked_diffusion, start, train_step
from tests.train.conftest import CONFIG, SOURCE
assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
model = init(CONFIG, jax.random.key(0))
optimizer = optax.sgd(0.1)
step = train_step(masked_diffusion(), optimizer)
out = []
for rows, whole in ((None, None), (P("data"), P())):
    place = None if rows is None else NamedSharding(mesh, rows)
    own = model if whole is None else jax.device_put(model, NamedSharding(mesh, whole))
    key = jax.random.key(1)
    key = key if whole is None else jax.device_put(key, NamedSharding(mesh, whole))
    state, frozen = start(own, optimizer, key)
    losses = []
    state = fit(step, state, frozen, iter(batches(SOURCE, 4, seed=0)), 3, sharding=place,
                report=lambda n, m: losses.append(m["loss"]), report_every=1)
    out.append((losses, jax.tree.leaves(state.params)))
np.testing.assert_allclose(out[0][0], out[1][0], rtol=1e-5)
for a, b in zip(out[0][1], out[1][1]):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
assert len(out[1][1][0].sharding.device_set) == 2
"""


@pytest.mark.slow
def test_two_devices_train_as_one():
    """The global batch on two devices: the same losses and parameters as on one."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", PARALLEL], check=True, env=environment, timeout=300)
