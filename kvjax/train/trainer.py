"""Training as small pure functions: a state, a jitted step that donates it, and the loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kvjax.cache.types import pytree
from kvjax.train.checkpoints import Checkpoints
from kvjax.train.parts import Filter, combine, partition

Loss = Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]]


@pytree()
class TrainState:
    """What a training step changes; a pytree, saved whole.

    Attributes:
      step: int32 scalar, steps done.
      params: the trainable part of the model, None elsewhere (`partition`).
      optimizer: the optimizer's state.
      key: the run's key; step n draws from fold_in(key, n), so nothing else need be kept.
    """

    step: Array
    params: Any
    optimizer: Any
    key: Array


def start(
    model: Any, optimizer: optax.GradientTransformation, key: Array, trainable: Filter = None
) -> tuple[TrainState, Any]:
    """The state before the first step, and the frozen part of the model.

    The trainable parameters are copied: steps donate the state, and the caller's model stays.

    Args:
      model: any pytree; whatever the loss takes.
      key: a typed key, `jax.random.key(seed)`.
      trainable: see `partition`.

    Returns:
      (state, frozen); `combine(state.params, frozen)` is the model.
    """
    params, frozen = partition(model, trainable)
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.copy(key))
    return state, frozen


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]:
    """The jitted step (state, frozen, batch) -> (state, metrics). It donates the state.

    Args:
      loss: pure, (model, batch, key) -> (scalar, metrics: name -> scalar).
      optimizer: of the trainable parameters. Groups: `optax.multi_transform` with `labels`;
        accumulation over several batches: `optax.MultiSteps`.

    Returns:
      The step; its metrics are those of the loss, with "loss" and "gradient_norm" (before the
      optimizer's clipping).
    """

    @functools.partial(jax.jit, donate_argnames=("state",))
    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)

        def of(params: Any) -> tuple[Array, dict[str, Array]]:
            return loss(combine(params, frozen), batch, key)

        (value, metrics), gradients = jax.value_and_grad(of, has_aux=True)(state.params)
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "loss": value, "gradient_norm": _norm(gradients)}
        return TrainState(state.step + 1, params, inner, state.key), metrics

    return step


def fit(
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Any,
    data: Iterator[Any],
    steps: int,
    *,
    checkpoints: Checkpoints | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
    report_every: int = 100,
    evaluate: Callable[[Any, int], None] | None = None,
    evaluate_every: int = 1000,
    sharding: jax.sharding.Sharding | None = None,
) -> TrainState:
    """Trains until `steps` steps are done in all, those before a resumption included.

    Resuming: `state = checkpoints.restore(state, data)` before. Then it goes on bit for bit, since
    a step's random numbers come from its number and `data` continues after the last batch.

    Args:
      step: of `train_step`. It donates the state: do not use the given one again.
      data: batches of this process, for as long as steps are left.
      checkpoints: told after every step; saves at its own interval, and at the end.
      report: called every `report_every` steps (and at the end) with means since the last time.
      evaluate: called with (model, steps done) every `evaluate_every` steps and at the end. Both
        count from step 0 of the run, so a resumed run reports at the same steps.
      sharding: where batches go, the global batch on its first axis; None: the default device.

    Returns:
      The state; the one given, if its steps are done already.

    Raises:
      FloatingPointError: a loss is NaN or infinite; what was saved before has finite losses.
      ValueError: the data ends before the steps do.
    """
    done = int(state.step)
    seen: list[dict[str, Array]] = []
    while done < steps:
        try:
            batch = place(next(data), sharding)
        except StopIteration:
            raise ValueError(f"the data ends after {done} of {steps} steps") from None
        state, metrics = step(state, frozen, batch)
        seen.append(metrics)
        done += 1
        last = done == steps
        saving = checkpoints is not None and (last or checkpoints.due(done))
        if last or saving or done % report_every == 0:
            _check(seen, done)
        if report is not None and (last or done % report_every == 0):
            report(done, mean(seen))
        if last or done % report_every == 0:
            seen = []
        if evaluate is not None and (last or done % evaluate_every == 0):
            evaluate(combine(state.params, frozen), done)
        if saving:
            checkpoints.save(state, data)
    return state


def place(batch: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """This process's part of a batch, as arrays on devices."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, batch)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def mean(metrics: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Means of metrics over steps."""
    rows = [{name: float(value) for name, value in row.items()} for row in metrics]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _check(seen: list[dict[str, Array]], done: int) -> None:
    for back, metrics in enumerate(reversed(seen)):
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss of step {done - back} is {float(metrics['loss'])}: lower the learning "
                "rate or clip gradients (optax.clip_by_global_norm), and go on from the last "
                "checkpoint"
            )


def measure(
    loss: Loss, model: Any, data: Iterable[Any], key: Array, sharding: Any = None
) -> dict[str, float]:
    """Means of a loss and its metrics over batches, without training.

    Args:
      loss: jitted by the caller where it is called again, `jax.jit(loss)`.
      data: batches of equal size; batch n draws from fold_in(key, n).

    Raises:
      ValueError: there is no batch.
    """
    rows = []
    for number, batch in enumerate(data):
        value, metrics = loss(model, place(batch, sharding), jax.random.fold_in(key, number))
        rows.append({**metrics, "loss": value})
    if not rows:
        raise ValueError("data: no batch to measure the loss on")
    return mean(rows)
