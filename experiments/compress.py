"""The main job: KV-cache methods side by side on a real model and real text.

    python -m experiments.compress --methods='dense; snapkv(keep=0.25); kivi(bits=2)'

One exact prefill per prompt is computed, and what it returned is committed under every method.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array
from ml_collections import config_flags
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import common, report
from experiments.common import setting, settings
from experiments.exact import (
    Exact,
    asked,
    compressed,
    exact_prefill,
    under_rule,
    with_salience,
)
from kvjax import cache as kv
from kvjax import parallel
from kvjax.compress import parse
from kvjax.compress.vidkv import SALIENCE
from kvjax.decode import extend, generate, positions_of, repeat_words, score
from kvjax.evaluate import agreement, first_right, load_text, needles, samples
from kvjax.evaluate.tasks.needle import QUESTION
from kvjax.models import load

METHODS = (
    "dense; streaming_llm(keep=0.25); h2o(keep=0.25); tova(keep=0.25); snapkv(keep=0.25); "
    "pyramidkv(keep=0.25); adakv(keep=0.25); expected_attention(keep=0.25); keydiff(keep=0.25); "
    "knorm(keep=0.25); random_eviction(keep=0.25); kvzip(keep=0.25); kivi(bits=4); kivi(bits=2); "
    "gear(bits=2); mikv; snapkv(keep=0.5, storage=kivi(bits=4))"
)

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", METHODS, "Expressions separated by semicolons.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("context", 1024, "Tokens of context per sample.", lower_bound=64)
flags.DEFINE_integer("continuation", 256, "Tokens scored after it.", lower_bound=16)
flags.DEFINE_list("offsets", ["1000", "21000", "41000", "61000"], "First token of each sample.")
flags.DEFINE_integer("needles", 8, "Needle prompts per length; 0: none.", lower_bound=0)
flags.DEFINE_list("needle_lengths", ["1024", "2048"], "Tokens per needle prompt.")
flags.DEFINE_string("needle_question", "", "How needles are asked for; empty: the usual way.")
flags.DEFINE_list(
    "needle_modes",
    ["aware", "agnostic"],
    "aware: the question is part of the prompt that is compressed. agnostic: it comes afterwards.",
)
flags.DEFINE_integer("rounds", 4, "Interleaved timing rounds per method.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the needles.")
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of parameters, exact keys and values."
)
flags.DEFINE_string(
    "mesh",
    "",
    "Devices as a grid, such as data=2,tensor=2,context=2; empty: one device, or with several "
    "processes all devices along data.",
)
flags.DEFINE_string(
    "calibration",
    "results/calibration",
    "Folder of `experiments.calibrate`, for calibrated methods.",
)
flags.DEFINE_string("out", "results/compress", "Folder for results.json, pareto.png, report.html.")
flags.DEFINE_bool("compile_cache", False, "Keep compiled programs in the user's cache folder.")
FLAGS = flags.FLAGS

COLUMNS = {
    "method": "method",
    "perplexity": "ppl|.2f",
    "kl": "KL|.4f",
    "top1_agreement": "top-1|.1%",
    "needle_accuracy": "needles|.0%",
    "needle_accuracy_agnostic": "agnostic|.0%",
    "bytes_per_token": "bytes/tok|,.0f",
    "used_bytes_per_token": "used|,.0f",
    "bits_per_value": "bits/val|.2f",
    "prefill_tokens_per_second": "prefill/s|.0f",
    "decode_tokens_per_second": "decode/s|.1f",
    "decode_ratio_to_dense": "x dense|.2f",
}
# What a run is: a folder of results belongs to one value of all these.
SETTINGS = (
    "model", "text", "context", "continuation", "offsets", "needles", "needle_lengths",
    "needle_modes", "needle_question", "rounds", "seed", "dtype",
)  # fmt: skip
OTHERS = ("methods", "out", "compile_cache", "mesh", "calibration")
SEGMENT = 32  # tokens per scoring call, also the unit of timing
ANSWER = 8  # tokens decoded per needle
ASKING = 32  # last tokens of a prompt, which say what is salient to methods that ask for it


class Job:
    """The prompts and their exact prefills, and the dense run that methods are compared with."""

    def __init__(
        self,
        settings: dict[str, Any],
        methods: list[tuple[str, Any]],
        layout: parallel.Layout | None = None,
        calibration: str = "",
    ):
        self.settings = settings
        self.layout = layout
        self.dtype = jnp.dtype(settings["dtype"])
        where = None if layout is None else parallel.parameter_sharding(layout.mesh, layout.rules)
        self.model, self.tokenizer = load(settings["model"], dtype=self.dtype, sharding=where)
        self.config = self.model.config
        self.words = repeat_words(self.tokenizer)
        self.constants = {}  # by label: equal chains may have been calibrated differently
        for label, chain in methods:
            self.constants[label] = common.constants_of(
                calibration, label, chain, self.model, self.tokenizer
            )
        self.marks = tuple(dict.fromkeys(m for _, c in methods for m in c.input_marks))
        text = load_text(settings["text"])
        context, more = settings["context"], settings["continuation"]
        windows = samples(text, self.tokenizer, settings["offsets"], context + more)
        prompts = [
            needle
            for length in settings["needle_lengths"]
            if settings["needles"]
            for needle in needles(
                text,
                self.tokenizer,
                length,
                settings["needles"],
                settings["seed"],
                question=settings["needle_question"] or QUESTION,
            )
        ]
        # Prompts of one length make one batch.
        self.needles = [
            [n for n in prompts if len(n.context) == length]
            for length in settings["needle_lengths"]
        ]
        self.needles = [batch for batch in self.needles if batch]
        self._check(methods)  # whatever is wrong is said by now; from here on things are compiled
        self.continuation = self._rows(windows[:, context:])
        self.exact = exact_prefill(
            self.model, self._rows(windows[:, :context]), timed=True, marks=self.marks
        )
        self.dense_cache: Any = None
        self.dense_logits: Array | None = None
        self.needle_exact: list[tuple[Exact, Exact]] = []  # without the question, with it
        for batch in self.needles:
            tokens = self._rows([n.context for n in batch])
            exact = exact_prefill(self.model, tokens, timed=False, marks=self.marks)
            question = self._rows([n.question for n in batch])
            both = asked(
                self.model, exact, question, positions_of(question) + exact.time, self.marks,
                self.layout, self.dtype,
            )  # fmt: skip
            self.needle_exact.append((exact, both))

    def _rows(self, tokens: Any) -> Array:
        """Token ids [B, T] on the devices that hold these rows."""
        tokens = np.asarray(tokens, np.int32)
        return jnp.asarray(tokens) if self.layout is None else self.layout.rows(tokens)

    def _check(self, methods: list[tuple[str, Any]]) -> None:
        """Refuses methods that do not fit the model or a size that the run will ask of them."""
        settings = self.settings
        parts = 1 if self.layout is None else self.layout.mesh.shape["data"]
        for name, count in (
            ("offsets", len(settings["offsets"])),
            ("needles", settings["needles"]),
        ):
            if count % parts:
                raise ValueError(f"{name}: {count} samples do not divide into data={parts} parts")
        sizes = [(len(settings["offsets"]), settings["context"], settings["continuation"])]
        for batch in self.needles:
            length, asked = len(batch[0].context), len(batch[0].question)
            if "aware" in settings["needle_modes"]:
                sizes.append((len(batch), length + asked, ANSWER))
            if "agnostic" in settings["needle_modes"]:
                sizes.append((len(batch), length, asked + ANSWER))
        for label, chain in methods:
            given = self.constants[label]
            for batch, prompt, more in sizes:
                try:
                    jax.eval_shape(
                        lambda chain=chain, given=given, batch=batch, prompt=prompt, more=more: (
                            kv.init_cache(
                                self.config,
                                chain,
                                batch,
                                prompt + more,
                                prompt=prompt,
                                layout=self.layout,
                                constants=given,
                            )
                        )
                    )
                except ValueError as error:
                    raise ValueError(f"{label}, prompt of {prompt} tokens: {error}") from None

    def _compressed(
        self, exact: Exact, label: str, chain: Any, room: int, timed: bool = False
    ) -> Any:
        given = self.constants[label]
        if SALIENCE in chain.columns:
            exact = with_salience(self.model, exact, ASKING)
        return compressed(
            self.model, exact, chain, room, self.dtype, timed, self.layout, given, self.words
        )

    def run(self, label: str, chain: Any, progress: Any) -> dict[str, Any]:
        """All figures of one method."""
        row: dict[str, Any] = {"method": label}
        figures, cache = self.quality(label, chain)
        row |= figures
        progress()
        if self.needles:
            row |= self.needle_test(label, chain)
        progress()
        row |= self.speed(cache)
        progress()
        return row

    def quality(self, label: str, chain: Any) -> tuple[dict[str, Any], Any]:
        """Figures of the continuation; and the cache as it was at the end of the context."""
        more = self.continuation.shape[1]
        exact = under_rule(self.model, self.exact, chain, timed=True)
        first, seconds = self._compressed(exact, label, chain, more, timed=True)
        cache = first
        logits = exact.logits
        size = kv.nbytes(cache)
        logprobs, kept = [], []
        for start in range(0, more, SEGMENT):
            part = self.continuation[:, start : start + SEGMENT]
            own, before, cache, logits = score(
                self.model, cache, logits, part, keep_logits=True, next_logits=True
            )
            logprobs.append(own)
            kept.append(before)
        nll = -float(jnp.mean(jnp.concatenate(logprobs, 1)))
        kept = jnp.concatenate(kept, 1)
        if label == "dense":
            self.dense_logits, self.dense_cache = kept, first
        divergence, same = agreement(kept, self.dense_logits)
        values = 2 * self.config.head_dim * kv.tokens_held(cache)
        prompt_tokens = self.exact.batch * self.exact.time
        all_tokens = prompt_tokens + self.exact.batch * more
        figures = {
            "nll": nll,
            "perplexity": float(np.exp(nll)),
            "kl": float(jnp.mean(divergence)),
            "top1_agreement": float(jnp.mean(same)),
            "cache_bytes": size,
            "bytes_per_token": size / all_tokens,
            # When the continuation is in it; what is allocated beside is room that stays empty.
            "used_bytes_per_token": kv.used_bytes(cache) / all_tokens,
            "bits_per_value": 8 * size / values,
            "prefill_tokens_per_second": prompt_tokens / (exact.seconds + seconds),
        }
        return figures, first

    def needle_test(self, label: str, chain: Any) -> dict[str, Any]:
        hits: dict[str, list[bool]] = {mode: [] for mode in self.settings["needle_modes"]}
        for batch, (exact, both) in zip(self.needles, self.needle_exact):
            question = self._rows([n.question for n in batch])
            exact, both = (under_rule(self.model, x, chain) for x in (exact, both))
            if "aware" in hits:
                cache, _ = self._compressed(both, label, chain, ANSWER)
                hits["aware"] += self._answers(cache, both.logits, batch)
            if "agnostic" in hits:
                cache, _ = self._compressed(exact, label, chain, question.shape[1] + ANSWER)
                positions = positions_of(question) + exact.time
                after, cache = extend(self.model, cache, question, positions, phase="append")
                hits["agnostic"] += self._answers(cache, after, batch)
        names = {"aware": "needle_accuracy", "agnostic": "needle_accuracy_agnostic"}
        return {names[mode]: float(np.mean(found)) for mode, found in hits.items()}

    def _answers(self, cache: Any, logits: Array, batch: Any) -> list[bool]:
        out = generate(self.model, cache, logits, ANSWER, stop=(), donate=True)
        texts = self.tokenizer.decode_batch(parallel.fetch(out.tokens))
        return [first_right(needle, text) for needle, text in zip(batch, texts)]

    def speed(self, own: Any) -> dict[str, Any]:
        """Decode speed from a cache, rounds of this method and of dense by turns."""
        part = self.continuation[:, :SEGMENT]

        def run(cache: Any) -> float:
            start = time.perf_counter()
            out = score(self.model, cache, self.exact.logits, part, keep_logits=True)
            jax.block_until_ready(out[0])
            return time.perf_counter() - start

        run(own)  # compiles
        pairs = []
        for number in range(self.settings["rounds"]):
            if number % 2:  # each goes first as often
                mine = run(own)
                pairs.append((run(self.dense_cache), mine))
            else:
                pairs.append((run(self.dense_cache), run(own)))
        tokens = part.size
        return {
            "decode_tokens_per_second": float(np.median([tokens / mine for _, mine in pairs])),
            "decode_ratio_to_dense": float(np.median([base / mine for base, mine in pairs])),
        }


def settings_of(values: Any) -> dict[str, Any]:
    """Flags, with what a config file says in place of those not given on the command line.

    Raises:
      ValueError: a value that is not allowed, or a name in the config file that is no setting.
    """
    chosen = settings(values, SETTINGS, OTHERS)
    for name in ("offsets", "needle_lengths"):
        chosen[name] = [_integer(name, x) for x in chosen[name]]
    modes = chosen["needle_modes"]
    for name in ("offsets", *(("needle_lengths", "needle_modes") if chosen["needles"] else ())):
        if not chosen[name]:
            allowed = "'aware', 'agnostic'" if name == "needle_modes" else "integers"
            raise ValueError(f"{name}=[]: expected at least one of {allowed}")
    if unknown := set(modes) - {"aware", "agnostic"}:
        raise ValueError(f"needle_modes={sorted(unknown)}: expected 'aware' and 'agnostic'")
    return chosen


def _integer(name: str, text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no integer") from None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        processes = parallel.init()
        settings = settings_of(FLAGS)
        # Dense first, since all are compared with it; each method once.
        methods = list(dict([*parse("dense"), *parse(setting(FLAGS, "methods"))]).items())
        out = setting(FLAGS, "out")
        keep_compiled = setting(FLAGS, "compile_cache")
        mesh = setting(FLAGS, "mesh") or (f"data={len(jax.devices())}" if processes > 1 else "")
        if mesh:
            settings["mesh"] = mesh
        layout = parallel.Layout(parallel.make_mesh(mesh)) if mesh else None
        calibration = setting(FLAGS, "calibration")
        results = common.Results(out, settings)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    if keep_compiled:
        common.compile_cache()
    order = [label for label, _ in methods]
    todo = [m for m in methods if results.get(m[0]) is None]
    if todo:
        run(settings, methods, todo, results, layout, calibration)
    results.write(order)
    if not parallel.is_main():
        return
    rows = [r for r in results.rows if r["method"] in order]
    common.table("KV-cache methods", COLUMNS, rows)
    for row in rows:
        if row.get("error"):
            common.console.print(f"[red]{row['method']} failed[/]: {row['error']}", highlight=False)
    paths = report.write(out, rows, results.settings, common.environment(), COLUMNS)
    for path in (results.path, *paths):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def run(
    settings: Any,
    methods: Any,
    todo: Any,
    results: common.Results,
    layout: Any = None,
    calibration: str = "",
) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    quiet = not parallel.is_main()
    with Progress(*columns, console=common.console, disable=quiet) as progress:
        task = progress.add_task("loading and exact prefill", total=1 + 3 * len(todo))
        try:
            job = Job(settings, methods, layout, calibration)
        except (ValueError, FileNotFoundError) as error:
            raise app.UsageError(str(error)) from None
        progress.advance(task)
        if todo[0][0] != "dense":  # continued: the reference is needed again
            job.quality(*methods[0])
        for number, (label, chain) in enumerate(todo, 1):
            progress.update(task, description=label)
            try:
                row = job.run(label, chain, lambda: progress.advance(task))
            except Exception as error:  # one method's failure must not cost the others
                # Nor may one process go on without the others, which wait for it.
                if label == "dense" or jax.process_count() > 1:
                    raise
                row = {"method": label, "error": f"{type(error).__name__}: {error}"}
                common.console.print(traceback.format_exc(), markup=False, highlight=False)
            results.put(row)
            common.forget_programs(number)


if __name__ == "__main__":
    app.run(parallel.fail_together(main))
