"""Which probe finds what a window asks for: a needle's blocks among those that the window reads.

    python -m experiments.probe --context=1536 --windows=64,256 --samples=8

A number is hidden in text and asked for at the end of a window whose other rows are text too. What
came before the window is committed once, exactly; then the window chooses blocks by each probe.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from experiments import common
from kvjax import cache as kv
from kvjax.cache.look import reads
from kvjax.cache.readers.probe import WEIGHTS
from kvjax.compress import actqkv
from kvjax.decode import prefill, score
from kvjax.evaluate import TASKS, load_text
from kvjax.models import forward, load

flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("context", 1536, "Tokens of each sample.", lower_bound=64)
flags.DEFINE_list("windows", ["64", "256"], "Rows of the last window, the question among them.")
flags.DEFINE_integer("samples", 8, "Samples, the needle before window and exact tokens.")
flags.DEFINE_integer("blocks", 8, "Blocks read per layer.", lower_bound=1)
flags.DEFINE_integer("block", 16, "Tokens per block.", lower_bound=4)
flags.DEFINE_integer("local", 64, "Newest tokens, always read.", lower_bound=1)
flags.DEFINE_integer("sinks", 16, "First tokens, always read.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the samples.")
flags.DEFINE_string("out", "results/probe", "Folder for results.json.")
FLAGS = flags.FLAGS

SETTINGS = ("model", "text", "context", "samples", "blocks", "block", "local", "sinks", "seed")
COLUMNS = {
    "case": "case",
    "recall": "recall|.1%",
    "best_layer": "best layer|.1%",
    "chance": "chance|.1%",
    "logprob": "log p(answer)|.2f",
    "flatness": "flatness|.4f",
}


def find(tokenizer: Any, text: str, settings: dict[str, Any], largest: int) -> list[Any]:
    """Samples whose needle lies between the first tokens and what a window is sure to read."""
    task, found = TASKS["niah_single_2"], []
    many = task.samples(
        tokenizer, settings["context"], 8 * settings["samples"], text=text,
        seed=settings["seed"], spare=2,
    )  # fmt: skip
    newest = largest + settings["local"] + settings["block"]
    for sample in many:
        start, stop = sample.spans[0]
        whole = len(sample.context) + len(sample.question)
        if start >= settings["sinks"] and stop <= whole - newest:
            found.append(sample)
    if len(found) < settings["samples"]:
        raise ValueError(f"context={settings['context']}: too short for windows of {largest} rows")
    return found[: settings["samples"]]


@jax.jit
def _window(model: Any, cache: kv.Cache, tokens: Array, positions: Array) -> Any:
    logits, new = forward(
        model, tokens, positions, cache, phase="append", statistics=True, logits="last"
    )
    return logits[:, 0], new, kv.commit(cache, new, phase="append")


def measure(
    model: Any, tokenizer: Any, samples: list[Any], settings: dict[str, Any], window: int
) -> list[dict[str, Any]]:
    """One row per probe, and of reading the same blocks, or all, at their own distance."""
    how = {name: settings[name] for name in ("blocks", "block", "sinks", "local")}
    methods = {probe: actqkv(**how, probe=probe, dynamic=False) for probe in WEIGHTS}
    stand = dict(constant=False, dynamic=False)
    methods["activation, where keys stand"] = actqkv(**how, **stand)
    every = how | {"blocks": -(-settings["context"] // settings["block"])}
    methods["everything, where keys stand"] = actqkv(**every, **stand)  # dense attention
    whole = [(*s.context, *s.question) for s in samples]
    answers = [tokenizer.encode(" " + s.answer) for s in samples]
    size = max(map(len, answers))
    tail = np.asarray([[*a, *[-1] * (size - len(a))] for a in answers], np.int32)
    before = max(map(len, whole)) - window
    prompt = np.zeros((len(whole), before), np.int32)
    lengths = np.asarray([len(ids) - window for ids in whole])
    for row, ids, n in zip(prompt, whole, lengths):
        row[:n] = ids[:n]
    _, cache = prefill(
        model, prompt, methods["mean"], lengths=jnp.asarray(lengths), new_tokens=window + size
    )
    last = jnp.asarray([ids[-window:] for ids in whole], jnp.int32)
    at = jnp.asarray(lengths[:, None] + np.arange(window), jnp.int32)
    found = []
    for probe, method in methods.items():
        asked = dataclasses.replace(cache, transforms=(method,))
        logits, new, after = _window(model, asked, last, at)
        read = reads(asked, new)[:, :, 0]  # all heads of a layer read the same
        there = np.stack(
            [read[:, b, slice(*s.spans[0])].mean(-1) for b, s in enumerate(samples)], -1
        )
        blocks = (lengths - settings["sinks"] - settings["local"]) // settings["block"]
        logprobs = np.asarray(score(model, after, logits, tail)[0]).sum(1)
        flat = after.state[0][-1].index.samples[..., 0]
        found.append({
            "case": f"{probe}, window of {window}",
            "recall": float(there.mean()),
            "best_layer": float(there.mean(1).max()),
            "recall_of_layers": there.mean(1).tolist(),
            "chance": float(np.minimum(method.stages[1].reader.pages / blocks, 1).mean()),
            "logprob": float(logprobs.mean()),
            "logprobs": logprobs.tolist(),
            "flatness": float(flat.mean()),
            "flatness_of_layers": np.asarray(flat).mean((1, 2)).tolist(),
        })  # fmt: skip
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        windows = [int(n) for n in FLAGS.windows]
        if not windows or min(windows) <= 16:
            raise ValueError(f"windows={FLAGS.windows}: expected more than 16 rows each")
        settings = {name: FLAGS[name].value for name in SETTINGS}
        results = common.Results(FLAGS.out, settings, key="case")
        text = load_text(FLAGS.text)
        model, tokenizer = load(FLAGS.model)
        samples = find(tokenizer, text, settings, max(windows))
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    for window in windows:
        if results.get(f"mean, window of {window}") is None:
            for row in measure(model, tokenizer, samples, settings, window):
                results.put(row)
    common.table("Blocks that a window reads, by probe", COLUMNS, results.rows)
    common.console.print(f"wrote {results.path}", highlight=False)


if __name__ == "__main__":
    app.run(main)
