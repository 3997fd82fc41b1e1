"""Trains a small masked-diffusion model on list operations and decodes several tokens per step.

    python -m experiments.train_diffusion --out=results/train_diffusion

Stopped and started again with the same --out it goes on where the last checkpoint was, bit for bit.
The folder gets `model` (config.json, model.safetensors, tokenizer.json: for `kvjax.load`, as of the
last evaluation), results.json, training.png and the checkpoints of training.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import common
from experiments.common import setting, settings
from experiments.training import BY_STEP, resumed
from kvjax.data import ListOperations, batches
from kvjax.data.list_operations import EOS, MASK, VOCABULARY, correct, tokenizer
from kvjax.diffusion import Choice, blocks, denoise, quota
from kvjax.evaluate import ideal_accuracy
from kvjax.models import Config, RopeConfig, init, save_pretrained
from kvjax.train import fit, masked_diffusion, measure, start, train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_list(
    "operations",
    ["copy", "reverse", "reverse", "sort", "replace", "shuffle"],
    "Operations to learn; one named twice is drawn twice as often.",
)
flags.DEFINE_integer("min_items", 4, "Shortest list.", lower_bound=2)
flags.DEFINE_integer("max_items", 8, "Longest list.", lower_bound=2)
flags.DEFINE_integer("layers", 4, "Layers of the model.", lower_bound=1)
flags.DEFINE_integer("width", 128, "Width of the model.", lower_bound=8)
flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
flags.DEFINE_integer("mlp_width", 512, "Width within the MLPs.", lower_bound=8)
flags.DEFINE_float("rope_base", 10000.0, "Base of the rotary frequencies.", lower_bound=1.0)
flags.DEFINE_integer("steps", 3000, "Training steps.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Examples per step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1.5e-3, "Its peak.", lower_bound=0.0)
flags.DEFINE_integer("warmup", 200, "Steps of linear warm-up; then a cosine to 5 %.", lower_bound=0)
flags.DEFINE_float("weight_decay", 0.01, "Of AdamW.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the parameters, the data and the masks.")
flags.DEFINE_integer("report_every", 50, "Steps between points of the curve.", lower_bound=1)
flags.DEFINE_integer("evaluate_every", 500, "Steps between evaluations.", lower_bound=1)
flags.DEFINE_integer("checkpoint_every", 250, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("examples", 200, "Per operation, in each evaluation.", lower_bound=1)
flags.DEFINE_integer(
    "items", 8, "Items per list where several are decoded per step.", lower_bound=2
)
flags.DEFINE_list("tokens_per_step", ["1", "2", "4", "8"], "Of the last evaluation.")
flags.DEFINE_string("out", "results/train_diffusion", "Folder for everything.")
flags.DEFINE_bool("compile_cache", False, "Keep compiled programs in the user's cache folder.")
FLAGS = flags.FLAGS

# What a run is: a folder of results belongs to one value of all these.
SETTINGS = (
    "operations", "min_items", "max_items", "layers", "width", "heads", "mlp_width", "rope_base",
    "steps", "batch", "learning_rate", "warmup", "weight_decay", "seed", "report_every",
    "evaluate_every", "examples", "items", "tokens_per_step",
)  # fmt: skip
OTHERS = ("checkpoint_every", "out", "compile_cache")
HELD_OUT = 1_000_003  # added to the seed: another set than that of training
FOREVER = 2**31 - 1  # examples, more than any run uses


def settings_of(values: Any) -> dict[str, Any]:
    """Flags, with what a config file says in place of those not given on the command line.

    Raises:
      ValueError: a value that is not allowed, or a name in the config file that is no setting.
    """
    chosen = settings(values, SETTINGS, OTHERS)
    if chosen["width"] % chosen["heads"] or chosen["width"] // chosen["heads"] % 2:
        raise ValueError(
            f"width={chosen['width']}, heads={chosen['heads']}: expected an even width per head"
        )
    counts = chosen["tokens_per_step"]
    if not counts or not all(str(n).isdecimal() and int(n) > 0 for n in counts):
        raise ValueError(f"tokens_per_step={counts}: expected positive integers")
    chosen["tokens_per_step"] = [int(n) for n in counts]
    source(chosen)
    source(chosen, items=chosen["items"])
    return chosen


def source(settings: dict[str, Any], items: int | None = None, **more: Any) -> ListOperations:
    """The examples of a run; with `items` those of lists of one length, in the same layout."""
    values = {
        "size": FOREVER,
        "seed": settings["seed"],
        "operations": tuple(settings["operations"]),
        "min_items": settings["min_items"] if items is None else items,
        "max_items": settings["max_items"] if items is None else items,
        "slots": settings["max_items"],
    }
    return ListOperations(**{**values, **more})


def model_config(settings: dict[str, Any]) -> Config:
    return Config(
        len(VOCABULARY), settings["width"], settings["mlp_width"], settings["layers"],
        settings["heads"], settings["heads"], settings["width"] // settings["heads"],
        family="llada", rope=RopeConfig(base=settings["rope_base"]), tied=False,
        max_length=3 + 2 * settings["max_items"], eos=(EOS,), mask_token=MASK, bidirectional=True,
    )  # fmt: skip


def optimizer_of(settings: dict[str, Any]) -> optax.GradientTransformation:
    peak, steps = settings["learning_rate"], settings["steps"]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(settings["warmup"], steps - 1), steps, 0.05 * peak
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings["weight_decay"]),
    )


def held_out(
    settings: dict[str, Any], operation: str, items: int | None = None
) -> dict[str, np.ndarray]:
    """Examples of one operation, stacked."""
    examples = source(
        settings, items, size=settings["examples"], seed=settings["seed"] + HELD_OUT,
        operations=(operation,),
    )  # fmt: skip
    return jax.tree.map(lambda *rows: np.stack(rows), *(examples[i] for i in range(len(examples))))


def accuracy(
    model: Any, examples: dict[str, np.ndarray], steps: int, *,
    what: str = "answer", choice: Choice | None = None, key: Any = None,
) -> float:  # fmt: skip
    """The share of examples decoded rightly.

    Args:
      steps: that the answer's slots are decoded in.
      what: "answer": it and its <eos> are decoded; "items": its form is given.
      choice: None: the most probable token, most confident first.
    """
    tokens, slots = examples["tokens"], int(examples["answer"][0].sum())
    out = denoise(
        model, jnp.where(examples[what], MASK, tokens), tokens.shape[1] - slots,
        schedule=blocks(slots), unmasker=quota(steps),
        choice=Choice(suppress=(MASK,)) if choice is None else choice, key=key,
    )  # fmt: skip
    return float(correct(np.asarray(out.tokens)).mean())


def parallel(settings: dict[str, Any], model: Any) -> list[dict[str, Any]]:
    """Accuracy at several tokens per step, greedy and drawn, beside that of a perfect model."""
    rows = []
    items = settings["items"]
    key = jax.random.key(settings["seed"] + HELD_OUT)
    ways = {
        "greedy": Choice(suppress=(MASK,)),
        "drawn": Choice(temperature=1.0, confidence="random", suppress=(MASK,)),
    }
    tests = {name: held_out(settings, name, items) for name in settings["operations"]}
    for way, choice in ways.items():
        for number in settings["tokens_per_step"]:
            row = {"row": f"{way}, {number} per step", "tokens_per_step": number}
            steps = -(-items // number)
            for name, examples in tests.items():
                row[name] = accuracy(model, examples, steps, what="items", choice=choice, key=key)
            rows.append(row)
    for number in settings["tokens_per_step"]:
        row = {"row": f"perfect model, drawn, {number} per step", "tokens_per_step": number}
        rows.append(row | {n: ideal_accuracy(n, items, number) for n in settings["operations"]})
    return rows


def plot(rows: Sequence[dict[str, Any]], settings: dict[str, Any], path: pathlib.Path) -> None:
    """The loss, the accuracy during training, and that of parallel decoding."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    curve = [r for r in rows if "loss" in r]
    left.plot([r["step"] for r in curve], [r["loss"] for r in curve])
    left.set(xlabel=BY_STEP, ylabel="loss (nats per token)", yscale="log")
    tested = [r for r in rows if "held_out_loss" in r]
    colors = {name: f"C{i}" for i, name in enumerate(settings["operations"])}
    for name, color in colors.items():
        x = [r["step"] for r in tested]
        middle.plot(x, [100 * r[name] for r in tested], color=color, label=name)
        for way, style in (("greedy", "o-"), ("perfect", ":")):
            own = [r for r in rows if r["row"].startswith(way)]
            right.plot(
                [r["tokens_per_step"] for r in own], [100 * r[name] for r in own], style,
                color=color, alpha=0.8,
            )  # fmt: skip
    middle.set(xlabel=BY_STEP, ylabel="right answers (%), one token per step")
    middle.legend(frameon=False)
    right.set(xlabel=f"tokens per step, lists of {settings['items']}", ylabel="right answers (%)")
    right.set_title("points: this model, greedy; dotted: a perfect one, drawn", fontsize=9)
    right.set_xscale("log", base=2)
    right.set_xticks(settings["tokens_per_step"], list(map(str, settings["tokens_per_step"])))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(settings: dict[str, Any], results: common.Results, out: pathlib.Path, every: int) -> None:
    """Trains what is left to train, evaluates, and writes everything."""
    optimizer, loss = optimizer_of(settings), masked_diffusion(stratified=True, remat=True)
    key = jax.random.key(settings["seed"])
    state, frozen = start(init(model_config(settings), jax.random.fold_in(key, 0)), optimizer, key)
    data = iter(batches(source(settings), settings["batch"], seed=settings["seed"]))
    tests = {name: held_out(settings, name) for name in settings["operations"]}
    together = jax.tree.map(lambda *parts: np.concatenate(parts), *tests.values())
    measured, slots = jax.jit(loss), settings["max_items"]
    with resumed(out, every, state, data, settings["steps"], results) as ongoing:

        def evaluate(model: Any, step: int) -> None:
            row = {"row": f"after {step}", "step": step, "seconds": ongoing.elapsed()}
            row["held_out_loss"] = measure(measured, model, [together], key)["loss"]
            row |= {name: accuracy(model, part, slots) for name, part in tests.items()}
            results.put(row)
            save_pretrained(model, out / "model", tokenizer())
            found = ", ".join(f"{name} {row[name]:.0%}" for name in tests)
            common.console.print(
                f"step {step} ({row['seconds'] / 60:.1f} min): held-out loss "
                f"{row['held_out_loss']:.3f}; {found}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

        state = fit(
            train_step(loss, optimizer), ongoing.state, frozen, data, settings["steps"],
            checkpoints=ongoing.checkpoints, report=ongoing.report,
            report_every=settings["report_every"], evaluate=evaluate,
            evaluate_every=settings["evaluate_every"],
        )  # fmt: skip
    save_pretrained(state.params, out / "model", tokenizer())
    rows = parallel(settings, state.params)
    for row in rows:
        results.put(row)
    plot(results.rows, settings, out / "training.png")
    shown = {"row": f"lists of {settings['items']}"}
    shown |= {name: f"{name}|.1%" for name in settings["operations"]}
    common.table("Right answers", shown, rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        settings = settings_of(FLAGS)
        out = pathlib.Path(setting(FLAGS, "out"))
        every, keep_compiled = setting(FLAGS, "checkpoint_every"), setting(FLAGS, "compile_cache")
        results = common.Results(str(out), settings, key="row")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    if keep_compiled:
        common.compile_cache()
    logging.set_verbosity(logging.WARNING)  # orbax says some 30 lines per checkpoint
    run(settings, results, out, every)
    for path in (results.path, out / "training.png", out / "model"):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
