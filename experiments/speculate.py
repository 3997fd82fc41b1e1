"""Speculative decoding: accepted tokens, speed beside plain decoding, and whether it is lossless.

    python -m experiments.speculate --drafters='prompt_lookup; token_recycling'

One prompt after the other, plain decoding and every drafter by turns, each drafter's state carried
from request to request; then batches of unequal prompts, with random drafts too; then through
compressed caches. Everything is compared with plain greedy decoding through the same cache.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import common
from kvjax.cache import chain, store
from kvjax.compress import parse
from kvjax.decode import generate, prefill, score
from kvjax.decode.text import pad
from kvjax.evaluate import load_text
from kvjax.models import load
from kvjax.speculate import DRAFTERS, Context, Drafter, Template, Tree, small_tree, speculate

METHODS = (
    "snapkv(keep=0.5, window=16); kivi(bits=2, residual=32, release=8); h2o(keep=0.5, release=8)"
)
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string(
    "drafters",
    "prompt_lookup; token_recycling(tree=15); token_recycling",
    "Expressions separated by semicolons.",
)
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_string("questions", "", "A .jsonl file with 'turns' or 'question', in place of text.")
flags.DEFINE_integer("prompts", 50, "Requests.", lower_bound=1)
flags.DEFINE_integer("longest", 160, "Tokens of the longest prompt.", lower_bound=16)
flags.DEFINE_integer("new_tokens", 32, "Tokens decoded per request.", lower_bound=2)
flags.DEFINE_integer("cold", 8, "Last requests run with fresh states too.", lower_bound=0)
flags.DEFINE_integer("batch", 10, "Prompts per batch in the second and third part.", lower_bound=1)
flags.DEFINE_string("methods", METHODS, "Caches of the third part; empty: none.")
flags.DEFINE_float(
    "margin", 0.01, "A first difference is excused where the best two logits are closer than this."
)
flags.DEFINE_string("out", "results/speculate", "Folder for results.json and accepted.png.")
flags.DEFINE_bool("compile_cache", True, "Keep compiled programs in the user's cache folder.")
FLAGS = flags.FLAGS
SETTINGS = (
    "model", "drafters", "text", "questions", "prompts", "longest", "new_tokens", "cold", "batch",
    "methods", "margin",
)  # fmt: skip
COLUMNS = {
    "drafter": "drafter",
    "mean_accepted_tokens": "tok/forward|.2f",
    "cold_accepted_tokens": "cold|.2f",
    "warm_accepted_tokens": "warm|.2f",
    "forwards_per_token": "forwards/tok|.2f",
    "tokens_per_second": "tok/s|.1f",
    "ratio_to_plain": "vs plain|.2f",
    "lossless": "lossless|",
    "excused": "near ties|d",
}
RANDOM = "random trees"


@dataclasses.dataclass(frozen=True)
class RandomTrees(Drafter):
    """The adversary: a tree of tokens drawn at random."""

    tree: Template

    def draft(self, state: Any, context: Context) -> Tree:
        vocab = context.model.config.vocab_size
        size = (context.root.shape[0], self.tree.size)
        tokens = jax.random.randint(context.key, size, 0, vocab).at[:, 0].set(context.root)
        return Tree(tokens, self.tree.parent(), self.tree.depth)


def questions_of(path: str) -> list[str]:
    """The (first) questions of a .jsonl file, as of Spec-Bench ("turns") or GSM8K ("question").

    Raises:
      FileNotFoundError: no such file. ValueError: a line has no question; it is named.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"questions={path!r}: no such file")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            text = item["turns"][0] if "turns" in item else item["question"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f"questions={path!r}, line {number}: expected an object with 'turns' (a list of "
                "texts) or 'question'"
            )
        found.append(text)
    return found


def prompts_of(settings: dict[str, Any], tokenizer: Any) -> list[list[int]]:
    """Token lists of unequal lengths: questions through the chat template, or pieces of a text."""
    count, longest = settings["prompts"], settings["longest"]
    if settings["questions"]:
        asked = questions_of(settings["questions"])
        rows = [tokenizer.chat([{"role": "user", "content": text}]) for text in asked]
        rows = [row for row in rows if len(row) <= longest]
        if len(rows) < count:
            raise ValueError(
                f"questions={settings['questions']!r}: {len(rows)} have at most longest={longest} "
                f"tokens, expected at least prompts={count}"
            )
        return [rows[i * len(rows) // count] for i in range(count)]
    ids = tokenizer.encode(load_text(settings["text"]), special=False)
    if len(ids) < longest + count:
        raise ValueError(
            f"text={settings['text']!r} has {len(ids)} tokens, expected at least "
            f"longest + prompts = {longest + count}"
        )
    # Lengths between a quarter and all of the longest, in no order.
    lengths = [longest // 4 + (i * 37) % (longest - longest // 4) + 1 for i in range(count)]
    starts = [i * (len(ids) - longest) // count for i in range(count)]
    return [list(ids[start : start + length]) for start, length in zip(starts, lengths)]


@dataclasses.dataclass
class Tally:
    """What one decoder did, request after request (or batch after batch)."""

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    different: int = 0
    excused: int = 0
    passes: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def add(self, out: Any, seconds: float, plain_seconds: float) -> None:
        tokens, forwards = int(out.count.sum()), int(out.forwards.sum())
        self.tokens += tokens
        self.forwards += forwards
        self.seconds += seconds
        self.plain_seconds += plain_seconds
        self.passes.append((tokens, forwards))

    def row(self, name: str) -> dict[str, Any]:
        tokens, forwards = np.cumsum(self.passes, 0).T
        return {
            "drafter": name,
            "requests": len(self.passes),
            "tokens": self.tokens,
            "mean_accepted_tokens": self.tokens / max(self.forwards, 1),
            "forwards_per_token": self.forwards / self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "plain_tokens_per_second": self.tokens / self.plain_seconds,
            "ratio_to_plain": self.plain_seconds / self.seconds,
            "lossless": self.different == self.excused,
            "different": self.different,
            "excused": self.excused,
            "accepted_so_far": (tokens / np.maximum(forwards, 1)).tolist(),
        }


class Job:
    """The model, the prompts, and the decoders, timed and compared."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.drafters = dict(parse(settings["drafters"], DRAFTERS, "drafters"))
        self.methods = dict(parse(settings["methods"])) if settings["methods"].strip() else {}
        self.model, tokenizer = load(settings["model"])
        self.prompts = prompts_of(settings, tokenizer)
        self.width = pad(self.prompts)[0].shape[1]

    def filled(self, rows: Sequence[Sequence[int]], method: Any = None) -> tuple[Any, ...]:
        """(prompt with -1 for padding, logits, cache); all prompts padded to one width."""
        tokens, lengths = pad(rows, self.width)
        logits, cache = prefill(
            self.model, tokens, chain(store()) if method is None else method,
            lengths=jnp.asarray(lengths), new_tokens=self.settings["new_tokens"],
        )  # fmt: skip
        shown = jnp.where(jnp.arange(self.width) < lengths[:, None], tokens, -1)
        return jax.block_until_ready((shown, logits, cache))

    def plain(self, filled: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        out = generate(self.model, filled[2], filled[1], self.settings["new_tokens"])
        jax.block_until_ready(out.tokens)
        return out, time.perf_counter() - start

    def drafted(self, filled: Any, drafter: Drafter, state: Any = None) -> tuple[Any, float]:
        start = time.perf_counter()
        shown, logits, cache = filled
        out = speculate(
            self.model, cache, logits, self.settings["new_tokens"], drafter, prompt=shown,
            state=state, key=jax.random.key(len(self.prompts)),
        )  # fmt: skip
        jax.block_until_ready(out.tokens)
        return out, time.perf_counter() - start

    def compare(self, tally: Tally, filled: Any, plain: Any, mine: Any) -> None:
        """Counts rows that differ, and those whose first difference is between two near ties."""
        differs = np.asarray(plain.tokens != mine.tokens)
        if not differs.any():
            return
        _, before, _ = score(self.model, filled[2], filled[1], plain.tokens, keep_logits=True)
        best = np.asarray(jax.lax.top_k(before, 2)[0])
        for row in np.flatnonzero(differs.any(1)):
            first = int(differs[row].argmax())
            tally.different += 1
            gap = best[row, first, 0] - best[row, first, 1]
            tally.excused += bool(gap < self.settings["margin"])

    def requests(self, progress: Any) -> list[dict[str, Any]]:
        """One prompt at a time; states carried, and fresh ones for the last few."""
        tallies = {name: Tally() for name in self.drafters}
        fresh = {name: Tally() for name in self.drafters}
        states: dict[str, Any] = dict.fromkeys(self.drafters)
        cold = self.settings["cold"]
        for number, prompt in enumerate(self.prompts):
            filled = self.filled([prompt])
            if number == 0:  # compile
                self.plain(filled)
                for drafter in self.drafters.values():
                    self.drafted(filled, drafter)
            plain, plain_seconds = self.plain(filled)
            for name, drafter in self.drafters.items():
                out, seconds = self.drafted(filled, drafter, states[name])
                states[name] = out.drafter
                tallies[name].add(out, seconds, plain_seconds)
                self.compare(tallies[name], filled, plain, out)
                if number >= len(self.prompts) - cold and jax.tree.leaves(out.drafter):
                    fresh[name].add(*self.drafted(filled, drafter), plain_seconds)
            if (number + 1) % 10 == 0:
                means = [f"{t.tokens / t.forwards:.2f} {name}" for name, t in tallies.items()]
                progress(f"{number + 1} requests, tokens per forward: {', '.join(means)}")
        rows = []
        for name, tally in tallies.items():
            row = tally.row(name)
            if fresh[name].passes:
                row["cold_accepted_tokens"] = fresh[name].tokens / fresh[name].forwards
                tokens, forwards = map(sum, zip(*tally.passes[-cold:]))
                row["warm_accepted_tokens"] = tokens / forwards
            rows.append(row)
        return rows

    def batches(self, label: str, drafter: Drafter, method: Any, prompts: Any) -> dict[str, Any]:
        """Batches of unequal prompts through one kind of cache."""
        size = min(self.settings["batch"], len(prompts))
        tally, state = Tally(), None
        for start in range(0, len(prompts) - size + 1, size):
            filled = self.filled(prompts[start : start + size], method)
            if start == 0:
                self.plain(filled)
                self.drafted(filled, drafter)
            plain, plain_seconds = self.plain(filled)
            out, seconds = self.drafted(filled, drafter, state)
            state = out.drafter
            tally.add(out, seconds, plain_seconds)
            self.compare(tally, filled, plain, out)
        return tally.row(label) | {"requests": len(tally.passes) * size, "batch": size}


def picture(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Accepted tokens and speed per drafter; accepted tokens after so many requests."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 0.4 * len(rows) + 3), layout="constrained")
    place = np.arange(len(rows))[::-1]
    for shift, key, label in (
        (0.2, "mean_accepted_tokens", "tokens per forward pass"),
        (-0.2, "ratio_to_plain", "speed over plain decoding"),
    ):
        bars = axes[0].barh(place + shift, [row[key] for row in rows], 0.38, label=label)
        axes[0].bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes[0].set_yticks(place, [row["drafter"] for row in rows], fontsize=8)
    axes[0].margins(x=0.08)
    axes[0].axvline(1.0, color="gray", lw=0.8)
    axes[0].legend(fontsize=8, loc="lower right")
    for row in rows:
        if "batch" not in row:
            values = row["accepted_so_far"]
            axes[1].plot(np.arange(1, len(values) + 1), values, label=row["drafter"])
    axes[1].set_xlabel("request")
    axes[1].set_ylabel("tokens per forward pass, mean so far")
    axes[1].grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(settings: dict[str, Any], results: common.Results) -> None:
    """All rows that are not there yet."""
    job = Job(settings)
    say = lambda text: common.console.print(text, highlight=False)  # noqa: E731
    if any(results.get(name) is None for name in job.drafters):
        for row in job.requests(say):
            results.put(row)
    name, first = next(iter(job.drafters.items()))
    size = settings["batch"]
    todo = [
        (f"{RANDOM}, batches of {size}", RandomTrees(small_tree(5)), None, job.prompts),
        (f"{name}, batches of {size}", first, None, job.prompts[: 2 * size]),
    ]
    for label, method in job.methods.items():
        todo.append((f"{name} in {label}", first, method, job.prompts))
    for label, drafter, method, prompts in todo:
        if results.get(label) is None:
            say(label)
            results.put(job.batches(label, drafter, method, prompts))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    settings = {name: FLAGS[name].value for name in SETTINGS}
    try:
        results = common.Results(FLAGS.out, settings, key="drafter")
        if FLAGS.compile_cache:
            common.compile_cache()
        run(settings, results)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    results.write()
    common.table("Speculative decoding, greedy", COLUMNS, results.rows)
    path = results.path.parent / "accepted.png"
    picture(results.rows, path)
    for written in (results.path, path):
        common.console.print(f"wrote {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
