"""Fewer KV heads folded into the weights, and what a short fine-tuning gives back.

    python -m experiments.tune_heads --methods="compress_kv_heads(kv_heads=1, rope='commuting')"

The merged projections become an ordinary model with fewer heads; its attention weights are then
trained to predict what the model predicts (or, with --loss=next, the next token). Stopped and
started again with the same --out a run goes on where the last checkpoint was, bit for bit. The
folder --out gets results.json, the checkpoints, and in `model` a Hugging Face folder, which --model
of every experiment takes.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import common
from experiments.common import setting, settings
from experiments.training import resumed, texts
from kvjax.calibrate import CALIBRATIONS
from kvjax.compress import compress_kv_heads, parse
from kvjax.compress.compress_kv_heads import KEYS, VALUES
from kvjax.data import batches
from kvjax.models import load, merge_kv_heads, save_pretrained
from kvjax.train import (
    combine,
    distillation,
    fit,
    language_modelling,
    measure,
    start,
    train_step,
)

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string(
    "methods", "compress_kv_heads(kv_heads=1, rope='commuting')", "One compress_kv_heads."
)
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("offset", 24000, "First token to train on.", lower_bound=0)
flags.DEFINE_integer("samples", 16, "Sequences that projections are found from.", lower_bound=1)
flags.DEFINE_integer("held_out", 1000, "First token of the sequences held out.", lower_bound=0)
flags.DEFINE_integer("held_out_samples", 8, "How many sequences are held out.", lower_bound=1)
flags.DEFINE_integer("tokens", 512, "Tokens per sequence.", lower_bound=8)
flags.DEFINE_integer("batch", 1, "Sequences per step.", lower_bound=1)
flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=1)
flags.DEFINE_float("learning_rate", 5e-4, "Of Adam in the first step; falls to 0.", lower_bound=0.0)
flags.DEFINE_string("trainable", r"layers\.(q|k|v|o)$", "Regular expression on parameters.")
flags.DEFINE_enum("loss", "teacher", ["teacher", "next"], "What is to be predicted.")
flags.DEFINE_integer("seed", 0, "Of the order of sequences.")
flags.DEFINE_integer("report_every", 10, "Steps between points of the curve.", lower_bound=1)
flags.DEFINE_integer("evaluate_every", 50, "Steps between evaluations.", lower_bound=1)
flags.DEFINE_integer("checkpoint_every", 20, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_string("out", "results/tune_heads", "Folder of the run.")
FLAGS = flags.FLAGS

# What a run is: a folder of results belongs to one value of all these.
SETTINGS = (
    "model", "methods", "text", "offset", "samples", "held_out", "held_out_samples", "tokens",
    "batch", "steps", "learning_rate", "trainable", "loss", "seed", "report_every",
    "evaluate_every",
)  # fmt: skip
OTHERS = ("checkpoint_every", "out")


class Job:
    """The model, that with fewer heads, and their texts.

    Raises:
      ValueError: not one method of this kind, or texts that are too short.
    """

    def __init__(self, chosen: dict[str, Any]):
        methods = parse(chosen["methods"], {"compress_kv_heads": compress_kv_heads})
        if len(methods) != 1:
            raise ValueError(f"methods={chosen['methods']!r}: expected one compress_kv_heads(...)")
        self.settings = chosen
        self.teacher, self.tokenizer = load(chosen["model"])
        self.source, self.tests, few = texts(chosen, self.tokenizer)
        found = parse(chosen["methods"], CALIBRATIONS)[0][1](self.teacher, few)
        self.student = merge_kv_heads(self.teacher, found[KEYS], found[VALUES])


def train(job: Job, results: common.Results, out: pathlib.Path, every: int) -> Any:
    """Trains what is left to train; the model with fewer heads."""
    chosen = job.settings
    rate = optax.linear_schedule(chosen["learning_rate"], 0.0, chosen["steps"])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    whole = {"student": job.student, "teacher": job.teacher}
    if chosen["loss"] == "teacher":
        loss = distillation()
    else:
        alone = language_modelling()
        loss = lambda both, batch, key: alone(both["student"], batch, key)  # noqa: E731
    key = jax.random.key(chosen["seed"])
    state, frozen = start(whole, optimizer, key, rf"^student.*{chosen['trainable']}")
    data = iter(batches(job.source, chosen["batch"], seed=chosen["seed"]))
    nll = jax.jit(language_modelling())

    def perplexity(model: Any) -> float:
        return float(np.exp(measure(nll, model, job.tests, key)["loss"]))

    with resumed(out, every, state, data, chosen["steps"], results) as ongoing:

        def evaluate(both: Any, step: int) -> None:
            found = {"step": step, "seconds": ongoing.elapsed()}
            results.put(
                {"row": f"after {step}", **found, "perplexity": perplexity(both["student"])}
            )

        if int(ongoing.state.step) == 0:
            results.put({"row": "all heads", "perplexity": perplexity(job.teacher)})
            evaluate(whole, 0)
        state = fit(
            train_step(loss, optimizer), ongoing.state, frozen, data, chosen["steps"],
            checkpoints=ongoing.checkpoints, report=ongoing.report,
            report_every=chosen["report_every"], evaluate=evaluate,
            evaluate_every=chosen["evaluate_every"],
        )  # fmt: skip
    return combine(state.params, frozen)["student"]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # orbax says some 30 lines per checkpoint
    try:
        chosen = settings(FLAGS, SETTINGS, OTHERS)
        out, every = pathlib.Path(setting(FLAGS, "out")), setting(FLAGS, "checkpoint_every")
        results = common.Results(str(out), chosen, key="row")
        job = Job(chosen)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    student = train(job, results, out, every)
    save_pretrained(student, out / "model", job.tokenizer)
    shown = [r for r in results.rows if "perplexity" in r]
    common.table("Perplexity held out", {"row": "", "perplexity": "perplexity|.2f"}, shown)
    for path in (results.path, out / "model"):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
