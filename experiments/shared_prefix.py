"""Decode speed of a batch whose rows share a prefix, held once or by every row.

    python -m experiments.shared_prefix --batch=32 --shared=512,1024,2048,4096

Keys and values are random: speed does not depend on what they are. Figures are medians of runs; the
shared caches are small and run by turns, copies are measured one length at a time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import common
from experiments.benchmark import Bandwidth, interleaved, ratio, timing
from kvjax import cache as kv
from kvjax.compress import dense, hydragen
from kvjax.decode import generate
from kvjax.models import Model, load

# `model`, `rounds`, `tokens` and `out` are those of experiments.benchmark.
flags.DEFINE_integer("batch", 32, "Rows that share a prefix.", lower_bound=1)
flags.DEFINE_list("shared", ["512", "1024", "2048", "4096"], "Tokens of the prefix, ascending.")
flags.DEFINE_bool("copies", True, "Measure the same batch with a prefix in every row, too.")
FLAGS = flags.FLAGS
FLAGS.set_default("out", "results/shared_prefix")

COLUMNS = {
    "case": "case",
    "milliseconds": "ms per step|.1f",
    "tokens_per_second": "tok/s|.1f",
    "speed_of_shortest": "x shortest|.2f",
    "shared_speed": "shared is x this|.2f",
    "cache_bytes": "bytes|,.0f",
}
OWN = 64  # tokens that each row holds of its own


def continued(
    model: Model, chain: Any, batch: int, common_tokens: int, shared: bool, tokens: int, runs: int
) -> tuple[Callable[[], float], int]:
    """(a function that decodes `tokens` tokens more and returns the seconds per step, bytes held).

    Every run goes on where the one before it ended, in place: copies of so many rows would not fit.
    """
    config = model.config
    room = OWN + (runs + 1) * tokens
    key = jax.random.key(0)
    constants, held = {}, OWN + (0 if shared else common_tokens)

    def rows(batch: int, count: int) -> tuple[jax.Array, jax.Array]:
        shape = (config.layers, batch, config.kv_heads, count, config.head_dim)
        return jax.random.normal(key, shape), jax.random.normal(key, shape)

    if shared:
        pos = jnp.arange(common_tokens, dtype=jnp.int32)[None, None, None]
        constants["prefix"] = kv.KV(*rows(1, common_tokens), pos)
    cache = kv.init_cache(
        config, chain, batch, common_tokens + room, prompt=held, constants=constants
    )

    @functools.partial(jax.jit, donate_argnames="moving")
    def fill(moving: Any, rest: Any, start: jax.Array) -> Any:
        pos = jnp.broadcast_to(start + jnp.arange(OWN, dtype=jnp.int32), (batch, OWN))
        new = kv.New(kv.KV(*rows(batch, OWN), pos[None, :, None]))
        return kv.apart(kv.commit(kv.together(moving, rest), new, phase="prefill"))[0]

    moving, rest = kv.apart(cache)
    for start in range(common_tokens if shared else 0, common_tokens + OWN, OWN):
        moving = fill(moving, rest, jnp.asarray(start))
    last = {
        "cache": kv.finish(kv.together(moving, rest)),
        "logits": jnp.zeros((batch, config.vocab_size)).at[:, 100].set(1.0),
    }

    def run() -> float:
        start = time.perf_counter()
        out = generate(model, last["cache"], last["logits"], tokens, stop=(), donate=True)
        out.tokens.block_until_ready()
        last["cache"], last["logits"] = out.cache, out.logits
        return (time.perf_counter() - start) / tokens

    run()
    return run, kv.nbytes(last["cache"])


def measure(model: Model, results: Any, lengths: list[int], bandwidth: Any) -> None:
    tokens, rounds, batch = FLAGS.tokens, FLAGS.rounds, FLAGS.batch
    runs, sizes = {}, {}
    for n in lengths:
        case = f"batch {batch}, {n} tokens shared"
        runs[case], sizes[case] = continued(model, hydragen(), batch, n, True, tokens, rounds)
    seconds = interleaved(runs, rounds, bandwidth)
    shared = list(runs)
    for case in shared:
        row = timing(case, seconds[case], batch) | {"cache_bytes": sizes[case]}
        results.put(row | {"speed_of_shortest": ratio(seconds, shared[0], case)})
    runs.clear()
    first = None
    for n, other in zip(lengths if FLAGS.copies else (), shared):
        case = f"batch {batch}, {n} tokens in every row"
        run, size = continued(model, dense(), batch, n, False, tokens, rounds)
        row = timing(case, interleaved({case: run}, rounds, bandwidth)[case], batch)
        del run  # and with it the cache
        first = first or row["seconds"]
        row["speed_of_shortest"] = first / row["seconds"]
        row["shared_speed"] = row["seconds"] / float(np.median(seconds[other]))
        results.put(row | {"cache_bytes": size})


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    names = ("model", "rounds", "tokens", "batch")
    try:
        lengths = [int(n) for n in FLAGS.shared]
        if not lengths or any(n < OWN or n % OWN for n in lengths):
            raise ValueError(f"shared={FLAGS.shared}: expected multiples of {OWN}")
        settings = {name: FLAGS[name].value for name in names}
        results = common.Results(FLAGS.out, settings, key="case")
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    except OSError as error:
        raise app.UsageError(f"out={FLAGS.out!r}: {error}") from None
    model, _ = load(FLAGS.model, tokenizer=False)
    with common.console.status("measuring"):
        measure(model, results, lengths, Bandwidth())
    common.table("A shared prefix, held once or by every row", COLUMNS, results.rows)
    common.console.print(f"wrote {results.path}", highlight=False)


if __name__ == "__main__":
    app.run(main)
