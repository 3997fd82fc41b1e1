"""Diffusion decoding side by side: unmaskers and cache policies on list operations.

    python -m experiments.diffuse --tasks=copy,shuffle --tokens_per_step=1,2,4,8

Every unmasker runs under every cache policy, the first of which is none: the baseline of its speed.
"""

from __future__ import annotations

import io
import pathlib
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import common
from experiments.common import setting, settings
from kvjax.cache import nbytes
from kvjax.codecs import per_kv, quantize
from kvjax.compress import parse
from kvjax.data import ListOperations
from kvjax.data.list_operations import OPERATIONS, correct
from kvjax.diffusion import (
    Choice,
    Denoised,
    DiffusionCache,
    Unmasker,
    blocks,
    denoise,
    dkv_decode,
    factor,
    no_cache,
    quota,
    threshold,
)
from kvjax.diffusion.choose import CONFIDENCES
from kvjax.evaluate import ideal_accuracy
from kvjax.models import load

UNMASKERS = {f.__name__: f for f in (quota, threshold, factor)}
CACHES = {f.__name__: f for f in (no_cache, dkv_decode, quantize, per_kv)}
SPEED = "speed"
OWN = pathlib.Path(__file__).parent / "checkpoints" / "list_operations"

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "", "A bidirectional model for kvjax.load; empty: the one kept here.")
flags.DEFINE_list(
    "tasks",
    ["copy", "shuffle"],
    f"Some of {', '.join(OPERATIONS)}; {SPEED}: prompts of random tokens, no accuracy.",
)
flags.DEFINE_list("tokens_per_step", ["1", "2", "4", "8"], "One quota each.")
flags.DEFINE_string("unmaskers", "threshold(value=0.9)", "Further ones, separated by semicolons.")
flags.DEFINE_string(
    "caches",
    "dkv_decode(refresh=8); dkv_decode(refresh=8, codec=quantize(bits=4, axis='token'))",
    "Expressions separated by semicolons; no_cache always runs, first.",
)
flags.DEFINE_integer("items", 8, "Items of every list.", lower_bound=2)
flags.DEFINE_integer("slots", 8, "Places for items in the model's layout.", lower_bound=2)
flags.DEFINE_integer("prompt", 256, f"Tokens of a prompt of {SPEED}.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 256, f"Masks after a prompt of {SPEED}.", lower_bound=1)
flags.DEFINE_integer("block", 8, "Positions per block.", lower_bound=1)
flags.DEFINE_enum("confidence", "probability", CONFIDENCES, "What is committed first.")
flags.DEFINE_float("temperature", 0.0, "Of the tokens; 0: greedy.", lower_bound=0.0)
flags.DEFINE_integer("examples", 256, "Examples per task.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Rows decoded together.", lower_bound=1)
flags.DEFINE_integer("rounds", 3, "Interleaved timing rounds.", lower_bound=1)
flags.DEFINE_integer("seed", 1000, "Of the examples and of what is drawn.")
flags.DEFINE_string("out", "results/diffuse", "Folder for results.json and diffuse.png.")
flags.DEFINE_bool("compile_cache", False, "Keep compiled programs in the user's cache folder.")
FLAGS = flags.FLAGS

COLUMNS = {
    "method": "task, unmasker, cache",
    "accuracy": "accuracy|.1%",
    "ideal": "ideal drawn|.1%",
    "evaluations": "evaluations|.2f",
    "tokens_per_evaluation": "tokens/eval|.2f",
    "positions_active": "active|.0f",
    "positions_computed": "computed|.0f",
    "cache_bytes": "cache bytes|,.0f",
    "tokens_per_second": "tokens/s|,.0f",
    "ratio_to_uncached": "x uncached|.2f",
}
PER_STEP = " per step"
SETTINGS = (
    "model", "tasks", "items", "slots", "prompt", "new_tokens", "block", "confidence",
    "temperature", "examples", "batch", "rounds", "seed",
)  # fmt: skip
OTHERS = ("tokens_per_step", "unmaskers", "caches", "out", "compile_cache")


class Job:
    """The model, and per task its canvases: what every decoder is given."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.model, _ = load(settings["model"] or OWN, tokenizer=False)
        if not self.model.config.bidirectional:
            raise ValueError(f"model={settings['model']!r}: expected a bidirectional model")
        mask = self.model.config.mask_token
        self.choice = Choice(settings["temperature"], settings["confidence"], suppress=(mask,))
        self.canvases = {task: self.canvas(task, mask) for task in settings["tasks"]}

    def canvas(self, task: str, mask: int) -> tuple[np.ndarray, int, int]:
        """(tokens int32 [examples, N] with masks, where answers begin, masks per answer)."""
        settings = self.settings
        if task == SPEED:
            prompt, new = settings["prompt"], settings["new_tokens"]
            draw = np.random.default_rng(settings["seed"])
            others = np.delete(np.arange(self.model.config.vocab_size), mask)
            tokens = draw.choice(others, (min(settings["batch"], settings["examples"]), prompt))
            tokens = np.pad(tokens, ((0, 0), (0, new)), constant_values=mask)
            return tokens.astype(np.int32), prompt, new
        items = settings["items"]
        source = ListOperations(
            settings["examples"], settings["seed"], (task,), items, items, settings["slots"]
        )
        examples = [source[i] for i in range(len(source))]
        tokens = np.stack([example["tokens"] for example in examples])
        hidden = np.stack([example["items"] for example in examples])
        return np.where(hidden, mask, tokens).astype(np.int32), source.prompt_length, items

    def decode(
        self, task: str, canvas: Any, unmasker: Unmasker, cache: DiffusionCache, key: int = 0
    ) -> Denoised:
        return denoise(
            self.model, canvas, self.canvases[task][1], schedule=blocks(self.settings["block"]),
            unmasker=unmasker, cache=cache, choice=self.choice,
            key=jax.random.fold_in(jax.random.key(self.settings["seed"]), key),
        )  # fmt: skip

    def run(self, task: str, unmasker: Unmasker, cache: DiffusionCache) -> dict[str, Any]:
        """All figures of one decoder on one task."""
        canvas, _, masks = self.canvases[task]
        batch = min(self.settings["batch"], len(canvas))
        right, evaluations, active, computed = [], [], [], 0
        for start in range(0, len(canvas), batch):
            part = canvas[start : start + batch]
            more = batch - len(part)  # the last batch: the same shape, no second compilation
            part = np.pad(part, ((0, more), (0, 0)), mode="edge")
            out = self.decode(task, part, unmasker, cache, start)
            if task != SPEED:
                right.append(correct(np.asarray(out.tokens)[: batch - more]))
            evaluations.append(np.asarray(out.steps)[: batch - more])
            active.append(np.asarray(out.active)[: batch - more])
            computed += int(out.computed) / batch * (batch - more)
        evaluations = float(np.mean(np.concatenate(evaluations)))
        return {
            "accuracy": float(np.mean(np.concatenate(right))) if right else None,
            "evaluations": evaluations,
            "tokens_per_evaluation": masks / evaluations,
            "positions_active": float(np.mean(np.concatenate(active))),
            "positions_computed": computed / len(canvas),
            "cache_bytes": nbytes(out.cache) / batch if out.cache is not None else 0,
        } | self.speed(task, canvas[:batch], unmasker, cache)

    def speed(
        self, task: str, canvas: np.ndarray, unmasker: Unmasker, cache: DiffusionCache
    ) -> dict[str, float]:
        """Rounds of this decoder and of the same without a cache by turns."""
        canvas = jnp.asarray(canvas)

        def run(cache: DiffusionCache) -> float:
            start = time.perf_counter()
            jax.block_until_ready(self.decode(task, canvas, unmasker, cache).tokens)
            return time.perf_counter() - start

        run(no_cache()), run(cache)
        pairs = [(run(no_cache()), run(cache)) for _ in range(self.settings["rounds"])]
        tokens = canvas.shape[0] * self.canvases[task][2]
        return {
            "tokens_per_second": float(np.median([tokens / mine for _, mine in pairs])),
            "ratio_to_uncached": float(np.median([base / mine for base, mine in pairs])),
        }


def settings_of(values: Any) -> dict[str, Any]:
    """Flags, with what a config file says in place of those not given on the command line.

    Raises:
      ValueError: a value that is not allowed, or a name in the config file that is no setting.
    """
    chosen = settings(values, SETTINGS, OTHERS)
    allowed = (*OPERATIONS, SPEED)
    if not chosen["tasks"] or set(chosen["tasks"]) - set(allowed):
        raise ValueError(f"tasks={chosen['tasks']}: expected some of {', '.join(allowed)}")
    for task in chosen["tasks"]:
        name = "new_tokens" if task == SPEED else "items"
        if chosen[name] % min(chosen["block"], chosen[name]):
            raise ValueError(
                f"block={chosen['block']}: expected a divisor of {name}={chosen[name]}, or more"
            )
    return chosen


def decoders(values: Any, block: int) -> list[tuple[str, Unmasker]]:
    """(label, unmasker) for every number of tokens per step, and the further ones.

    Args:
      block: masks per block.

    Raises:
      ValueError: a number of tokens that is none, or an expression that does not parse.
    """
    found: dict[str, Unmasker] = {}
    for text in setting(values, "tokens_per_step"):
        if not text.strip().isdecimal() or not 1 <= int(text) <= block:
            raise ValueError(f"tokens_per_step: {text!r} is no integer from 1 to {block}")
        found[f"{int(text)}{PER_STEP}"] = quota(-(-block // int(text)))
    if (text := setting(values, "unmaskers")).strip():
        found |= dict(parse(text, UNMASKERS, "unmaskers"))
    if not found:
        raise ValueError("tokens_per_step=[], unmaskers='': expected at least one")
    return list(found.items())


def policies(values: Any) -> list[tuple[str, DiffusionCache]]:
    """(label, policy), no_cache first.

    Raises:
      ValueError: an expression does not parse, or is no policy.
    """
    text = setting(values, "caches")
    found = dict(
        [("no_cache", no_cache()), *(parse(text, CACHES, "caches") if text.strip() else ())]
    )
    for label, policy in found.items():
        if not isinstance(policy, DiffusionCache):
            raise ValueError(f"caches: {label} is no cache policy, such as dkv_decode(refresh=4)")
    return list(found.items())


def picture(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy and positions computed against tokens per evaluation; one line per task, cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    panels = (("accuracy", "answers that are right (%)", 100.0),
              ("positions_computed", "positions computed per answer", 1.0))  # fmt: skip
    rows = [row for row in rows if not row.get("error")]
    lines = dict.fromkeys((row["task"], row["cache"]) for row in rows)
    markers = {task: "osD^v"[i % 5] for i, task in enumerate(dict.fromkeys(t for t, _ in lines))}
    colors = {c: f"C{i}" for i, c in enumerate(dict.fromkeys(c for _, c in lines))}
    for axis, (key, label, unit) in zip(axes, panels):
        for task, cache in lines:
            mine = [r for r in rows if (r["task"], r["cache"]) == (task, cache)]
            for quotas in (True, False):
                own = [r for r in mine if r["unmasker"].endswith(PER_STEP) == quotas]
                own = [r for r in own if r[key] is not None]
                own.sort(key=lambda r: r["tokens_per_evaluation"])
                if own:
                    axis.plot(
                        [r["tokens_per_evaluation"] for r in own], [r[key] * unit for r in own],
                        "-" if quotas else "", marker=markers[task] if quotas else "*",
                        color=colors[cache], alpha=0.8, markersize=7 if quotas else 12,
                        label=f"{task}, {cache}" if quotas else None,
                    )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens per network evaluation (stars: other unmaskers)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-4, 104)
    axes[1].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8,
                  ncols=2, frameon=False)  # fmt: skip
    image = io.BytesIO()
    figure.savefig(image, dpi=130)
    plt.close(figure)
    return image.getvalue()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        settings = settings_of(FLAGS)
        sizes = {task: settings["new_tokens" if task == SPEED else "items"] for task in
                 settings["tasks"]}  # fmt: skip
        unmaskers = {
            task: decoders(FLAGS, min(settings["block"], size)) for task, size in sizes.items()
        }
        caches = policies(FLAGS)
        out = setting(FLAGS, "out")
        results = common.Results(out, settings)
        if setting(FLAGS, "compile_cache"):
            common.compile_cache()
        job = Job(settings)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    order = []
    for task in settings["tasks"]:
        for label, unmasker in unmaskers[task]:
            for name, cache in caches:
                row = {"method": f"{task}, {label}, {name}"}
                order.append(row["method"])
                if results.get(row["method"]) is not None:
                    continue
                row |= {"task": task, "unmasker": label, "cache": name}
                if label.endswith(PER_STEP) and task != SPEED:
                    number = int(label.removesuffix(PER_STEP))
                    row["ideal"] = ideal_accuracy(task, settings["items"], number)
                try:
                    row |= job.run(task, unmasker, cache)
                except Exception as error:  # one decoder's failure must not cost the others
                    row["error"] = f"{type(error).__name__}: {error}"
                    common.console.print(traceback.format_exc(), markup=False, highlight=False)
                results.put(row)
    results.write(order)
    rows = [row for row in results.rows if row["method"] in order]
    common.table("Diffusion decoding", COLUMNS, rows)
    for row in rows:
        if row.get("error"):
            common.console.print(f"[red]{row['method']} failed[/]: {row['error']}", highlight=False)
    png = results.path.parent / "diffuse.png"
    png.write_bytes(picture(rows))
    for path in (results.path, png):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
