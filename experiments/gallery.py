"""Which tokens of one prompt each method kept, merged or read: pictures over the text.

python -m experiments.gallery --methods='h2o(keep=0.25); snapkv(keep=0.25); kvzip(keep=0.25)'
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from experiments import common, gallery_page
from kvjax import cache as kv
from kvjax.cache.look import placed, reads
from kvjax.compress import parse
from kvjax.decode import prefill, repeat_words
from kvjax.evaluate import TASKS, load_text
from kvjax.models import forward, load

METHODS = (
    "streaming_llm(keep=0.25); h2o(keep=0.25); tova(keep=0.25); snapkv(keep=0.25, window=16); "
    "pyramidkv(keep=0.25, window=16); adakv(keep=0.25, window=16); expected_attention(keep=0.25); "
    "kvzip(keep=0.25); mikv(keep=0.25)"
)
FORMS = ("dropped", "held exactly", "held coded", "others merged into it", "held, not read")

flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", METHODS, "Expressions separated by semicolons.")
flags.DEFINE_enum("task", "niah_single_2", list(TASKS), "Whose first sample is the prompt.")
flags.DEFINE_integer("length", 224, "Tokens of that sample.", lower_bound=16)
flags.DEFINE_string("prompt", "", "A text in its place.")
flags.DEFINE_bool("question", False, "The task's question is part of the prompt.")
flags.DEFINE_string("text", "", "What the task hides things in; empty: the language reference.")
flags.DEFINE_integer("seed", 0, "Of the sample.")
flags.DEFINE_string("calibration", "results/calibration", "Folder of `experiments.calibrate`.")
flags.DEFINE_string("out", "results/gallery", "Folder for gallery.html and a PNG per method.")
FLAGS = flags.FLAGS
SPARE = 4  # tokens that a sample leaves room for beside its answers


@dataclasses.dataclass(frozen=True)
class Shown:
    """What one method did to the prompt.

    Attributes:
      label: the method.
      form: uint8 [L, H, T], an index into `FORMS`.
      bytes: allocated after the prompt. dense: by dense.
    """

    label: str
    form: np.ndarray
    bytes: int
    dense: int

    @property
    def budgets(self) -> np.ndarray:
        """Tokens held by each head, int [L, H]."""
        return (self.form > 0).sum(-1)

    @property
    def share(self) -> np.ndarray:
        """The part of all heads that hold each token, [T]."""
        return (self.form > 0).mean((0, 1))


def look(cache: kv.Cache, new: Any, time: int) -> np.ndarray:
    """Forms of the first row's tokens, uint8 [L, H, T]; see `FORMS`."""
    where = placed(cache)
    form = np.where(where.held, np.where(where.coded, 2, 1), 0)
    form = np.where(where.held & (where.others > 0), 3, form)
    form = np.where(where.held & ~reads(cache, new), 4, form)
    return form[:, 0, :, :time].astype(np.uint8)


def show(model: Any, tokens: Array, methods: Any, constants: Any, words: Any) -> list[Shown]:
    """Runs the prompt, int32 [1, T], through every method."""
    shown, dense = [], 0
    time = tokens.shape[1]
    for label, chain in [("dense", parse("dense")[0][1]), *methods]:
        logits, cache = prefill(
            model, tokens, chain, new_tokens=1, constants=constants[label], words=words
        )
        dense = dense or kv.nbytes(cache)
        following = jnp.argmax(logits, -1)[:, None].astype(jnp.int32)
        _, new = forward(model, following, jnp.full((1, 1), time), cache, statistics=True)
        shown.append(Shown(label, look(cache, new, time), kv.nbytes(cache), dense))
    return shown[1:]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        methods = list(dict(parse(FLAGS.methods)).items())
        model, tokenizer = load(FLAGS.model)
        ids, marked = _prompt(tokenizer)
        constants: dict[str, Any] = {"dense": None}
        for label, chain in methods:
            constants[label] = common.constants_of(
                FLAGS.calibration, label, chain, model, tokenizer
            )
        tokens = jnp.asarray([ids], jnp.int32)
        shown = show(model, tokens, methods, constants, repeat_words(tokenizer))
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from None
    pieces = [tokenizer.decode([i], special=True) for i in ids]
    columns = {
        "label": "method", "held": "held|.1%", "least": "fewest of a head|d",
        "most": "most of a head|d", "bytes": "bytes, of dense|.0%",
    }  # fmt: skip
    rows = [
        {
            "label": s.label, "held": float(s.share.mean()), "least": int(s.budgets.min()),
            "most": int(s.budgets.max()), "bytes": s.bytes / s.dense,
        }
        for s in shown
    ]  # fmt: skip
    common.table(f"What is held of {len(ids)} tokens", columns, rows)
    facts = {**{f: FLAGS[f].value for f in ("model", "task", "length", "seed", "question")},
             **common.environment()}  # fmt: skip
    for path in gallery_page.write(FLAGS.out, shown, pieces, marked, FORMS, facts):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _prompt(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(token ids, the indices of those that hold the answer)."""
    if FLAGS.prompt:
        return tokenizer.encode(FLAGS.prompt), []
    sample = TASKS[FLAGS.task].samples(
        tokenizer, FLAGS.length, 1, text=load_text(FLAGS.text), seed=FLAGS.seed, spare=SPARE
    )[0]
    marked = [i for start, stop in sample.spans for i in range(start, stop)]
    ids = list(sample.context) + (list(sample.question) if FLAGS.question else [])
    return ids, marked


if __name__ == "__main__":
    app.run(main)
