"""Decode speed and size of methods that hold many tokens, beside dense in the same rounds.

    python -m experiments.held --methods='xkv; kivi(bits=2)' --held=2048,8192

Caches are filled with random keys and values, as a prompt, and then decoded from: speed and size do
not depend on what they are. Methods that need more of a prompt than these are left out, and named.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import app, flags

from experiments import common
from experiments.benchmark import Bandwidth, Case, decoder, filled, interleaved, ratio, timing
from kvjax import cache as kv
from kvjax.calibrate import find
from kvjax.compress import parse
from kvjax.models import load

# --model, --rounds, --tokens and --out are those of experiments.benchmark.
flags.DEFINE_string("methods", "kivi(bits=4)", "Expressions separated by semicolons.")
flags.DEFINE_list("held", ["2048", "8192"], "Tokens held, those decoded meanwhile included.")
flags.DEFINE_string(
    "calibration", "results/calibration", "Folder of `experiments.calibrate`: constants."
)
FLAGS = flags.FLAGS
COLUMNS = {
    "case": "case",
    "milliseconds": "ms|.1f",
    "tokens_per_second": "tok/s|.1f",
    "speed_of_dense": "x dense|.2f",
    "bytes_per_token": "bytes/token|,.0f",
    "bits_per_value": "bits/value|.2f",
}


def size(model: Any, case: Case) -> dict[str, float]:
    """Bytes allocated per token held, and bits per value that dense would have."""
    cache = filled(model, case)[1]
    each = kv.nbytes(cache) / case.capacity
    config = model.config
    values = 2 * config.layers * config.kv_heads * config.head_dim
    return {"bytes_per_token": each, "bits_per_value": 8 * each / values}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    tokens = FLAGS.tokens
    try:
        lengths = [int(n) for n in FLAGS.held]
        if low := [n for n in lengths if n < 2 * tokens]:
            raise ValueError(f"held={low}: expected at least twice tokens={tokens}")
        methods = dict([*parse("dense"), *parse(FLAGS.methods)])
        model, _ = load(FLAGS.model, tokenizer=False)
        constants = {}
        for label, chain in methods.items():
            names = chain.constants(model.config.head_dim)
            constants[label] = find(FLAGS.calibration, label, names, model) if names else None
        settings = {"model": FLAGS.model, "rounds": FLAGS.rounds, "tokens": tokens}
        results = common.Results(FLAGS.out, settings, key="case")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    bandwidth = Bandwidth()
    for held in lengths:
        runs, sizes = {}, {}
        for label, chain in methods.items():
            case = Case(label, held - tokens, held, method=chain, constants=constants[label])
            try:
                sizes[label], runs[label] = size(model, case), decoder(model, case, tokens)
            except ValueError as wrong:
                common.console.print(f"left out: {label}: {wrong}", highlight=False)
        seconds = interleaved(runs, FLAGS.rounds, bandwidth)
        for label in runs:
            row = timing(f"{label}, {held} held", seconds[label], 1)
            speed = ratio(seconds, "dense", label)
            results.put(row | sizes[label] | {"speed_of_dense": float(np.round(speed, 4))})
    common.table("Decoding with many tokens held", COLUMNS, results.rows)
    common.console.print(f"wrote {results.path}", highlight=False)


if __name__ == "__main__":
    app.run(main)
