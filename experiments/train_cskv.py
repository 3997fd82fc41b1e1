"""Trains the factors of CSKV to give back each layer's keys and values, and keeps them.

    python -m experiments.train_cskv --methods="cskv(factors='trained')"

Several methods share each forward pass of the frozen model and are trained as if each were alone;
those with bits below 16 through their quantiser, rounding passed straight through. The constants
go where `experiments.calibrate` keeps those of other methods. Stopped and started again with the
same --out a run goes on where the last checkpoint was, bit for bit. The folder --out gets
results.json, training.png and the checkpoints.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import common
from experiments.common import setting, settings
from experiments.training import BY_STEP, resumed, texts
from kvjax.calibrate import CALIBRATIONS, folder_of, save
from kvjax.calibrate.cskv import PROGRAM, factors_of, refuse, statistics_of
from kvjax.compress import cskv, parse
from kvjax.data import batches
from kvjax.models import load
from kvjax.train import combine, fit, measure, reconstruction, start, train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", "cskv(factors='trained')", "Separated by semicolons.")
flags.DEFINE_enum("start", "asvd", ["svd", "asvd", "pca"], "Factors before the first step.")
flags.DEFINE_integer("samples", 16, "Sequences that these are found from.", lower_bound=1)
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("offset", 63000, "First token to train on.", lower_bound=0)
flags.DEFINE_integer("held_out", 1000, "First token of the sequences held out.", lower_bound=0)
flags.DEFINE_integer("held_out_samples", 3, "How many sequences are held out.", lower_bound=1)
flags.DEFINE_integer("tokens", 512, "Tokens per sequence.", lower_bound=8)
flags.DEFINE_integer("batch", 1, "Sequences per step.", lower_bound=1)
flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=1)
flags.DEFINE_float(
    "learning_rate", 0.03,
    "Of Adam in the first step, in units of each factor's root mean square; falls linearly to 0.",
    lower_bound=0.0,
)  # fmt: skip
flags.DEFINE_integer("seed", 0, "Of the order of sequences.")
flags.DEFINE_integer("report_every", 10, "Steps between points of the curve.", lower_bound=1)
flags.DEFINE_integer("evaluate_every", 50, "Steps between evaluations.", lower_bound=1)
flags.DEFINE_integer("checkpoint_every", 20, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_string("calibration", "results/calibration", "Folder of the methods' folders.")
flags.DEFINE_string("out", "results/train_cskv", "Folder of the run.")
FLAGS = flags.FLAGS

# What a run is: a folder of results belongs to one value of all these.
SETTINGS = (
    "model", "methods", "start", "samples", "text", "offset", "held_out", "held_out_samples",
    "tokens", "batch", "steps", "learning_rate", "seed", "report_every",
    "evaluate_every",
)  # fmt: skip
TRAINABLE = r"^constants.*_(down|up)$"
OTHERS = ("checkpoint_every", "calibration", "out")


class Job:
    """The model, its texts, and for each method its codecs and the factors to start from.

    Raises:
      ValueError: methods that are not trained, or texts that are too short.
    """

    def __init__(self, settings: dict[str, Any]):
        methods = parse(settings["methods"], {"cskv": cskv})
        how = dict(parse(settings["methods"], CALIBRATIONS))
        for label, _ in methods:
            if how[label].program != PROGRAM:
                raise ValueError(f"methods: {label}: expected cskv(factors='trained', ...)")
        self.settings = settings
        self.codecs = {label: chain.stages[0].codec for label, chain in methods}
        length = settings["tokens"]
        self.model, tokenizer = load(settings["model"])
        for label, pair in self.codecs.items():
            pair.check(self.model.config.head_dim)
            if length % (block := math.lcm(pair.k.block, pair.v.block)):
                raise ValueError(f"tokens={length}: {label} codes {block} tokens together")
        self.source, self.tests, few = texts(settings, tokenizer)
        refuse(self.model, settings["start"])
        common.console.print(f"{len(self.source)} sequences; factors from {len(few)} of them")
        seen = statistics_of(self.model, few)
        self.constants = {
            label: factors_of(
                self.model,
                seen,
                called="trained",
                **how[label].arguments | {"factors": settings["start"]},
            )
            for label in how
        }


def optimizer_of(settings: dict[str, Any]) -> optax.GradientTransformation:
    """Adam with steps relative to each factor's size: of large keys the encoding factor is small
    and the decoding one large, and one step for both suits neither (on SmolLM2-135M 60 steps bring
    the loss from 64.4 to 46.2; with one step of 1e-3 to 55.7, of 4e-3 to 50.0; the least is 42.8).
    """
    rate = optax.linear_schedule(settings["learning_rate"], 0.0, settings["steps"])
    return optax.chain(
        optax.scale_by_adam(), optax.scale_by_param_block_rms(), optax.scale_by_learning_rate(rate)
    )


def train(job: Job, results: common.Results, out: pathlib.Path, every: int) -> Any:
    """Trains what is left to train; the constants by method."""
    settings = job.settings
    optimizer = optimizer_of(settings)
    loss, key = reconstruction(job.codecs), jax.random.key(settings["seed"])
    whole = {"base": job.model, "constants": job.constants}
    state, frozen = start(whole, optimizer, key, TRAINABLE)
    data = iter(batches(job.source, settings["batch"], seed=settings["seed"]))
    measured = jax.jit(loss)
    with resumed(out, every, state, data, settings["steps"], results) as ongoing:

        def evaluate(model: Any, step: int) -> None:
            found = {"step": step, "seconds": ongoing.elapsed()}
            found |= {"held_out": measure(measured, model, job.tests, key)}
            results.put({"row": f"after {step}", **found})

        if int(ongoing.state.step) == 0:
            evaluate(whole, 0)
        state = fit(
            train_step(loss, optimizer), ongoing.state, frozen, data, settings["steps"],
            checkpoints=ongoing.checkpoints, report=ongoing.report,
            report_every=settings["report_every"], evaluate=evaluate,
            evaluate_every=settings["evaluate_every"],
        )  # fmt: skip
    return combine(state.params, frozen)["constants"]


def plot(rows: Sequence[dict[str, Any]], labels: Sequence[str], path: pathlib.Path) -> None:
    """The training loss, and what each method gets wrong of keys and values held out."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curve = [r for r in rows if "loss" in r]
    left.plot([r["step"] for r in curve], [r["loss"] for r in curve])
    left.set(xlabel=BY_STEP, ylabel="loss, all methods")
    tested = [r for r in rows if "held_out" in r]
    for number, label in enumerate(labels):
        for side, style in (("k", "--"), ("v", "-")):
            right.plot(
                [r["step"] for r in tested], [r["held_out"][f"{label} {side}"] for r in tested],
                style, color=f"C{number}", label=label if side == "v" else None,
            )  # fmt: skip
    right.set(xlabel=BY_STEP, ylabel="squared error / square, held out", yscale="log")
    right.set_title("values: lines, keys: dashes", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # orbax says some 30 lines per checkpoint
    try:
        chosen = settings(FLAGS, SETTINGS, OTHERS)
        out, root = (pathlib.Path(setting(FLAGS, name)) for name in ("out", "calibration"))
        every = setting(FLAGS, "checkpoint_every")
        results = common.Results(str(out), chosen, key="row")
        job = Job(chosen)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    constants = train(job, results, out, every)
    first, last = (
        next(r for r in rows if "held_out" in r) for rows in (results.rows, results.rows[::-1])
    )
    about = {n: chosen[n] for n in ("text", "start", "offset", "tokens", "batch", "steps", "seed")}
    shown = []
    for label, found in constants.items():
        folder = folder_of(root, label, chosen["model"], job.model.config)
        save(folder, label, found, job.model, chosen["model"], about | {"seconds": last["seconds"]})
        common.console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
        row = {"method": label}
        for side in ("k", "v"):
            row[f"{side} before"] = first["held_out"][f"{label} {side}"]
            row[f"{side} after"] = last["held_out"][f"{label} {side}"]
        shown.append(row)
    plot(results.rows, list(constants), out / "training.png")
    columns = {n: f"{n}|.4f" for n in ("k before", "k after", "v before", "v after")}
    common.table("Squared error / square, held out", {"method": "method"} | columns, shown)
    for path in (results.path, out / "training.png"):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
