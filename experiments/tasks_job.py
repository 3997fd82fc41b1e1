"""What `experiments.tasks` runs: samples as arrays, one exact prefill for all methods, scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import constants_of
from experiments.exact import Exact, asked, compressed, exact_prefill, under_rule
from kvjax import cache as kv
from kvjax.decode import extend, generate, repeat_words
from kvjax.evaluate import TASKS, Sample, contained, first_right, load_text
from kvjax.models import load

ROOM = 32, 16  # contexts and questions are padded to multiples of these, to compile seldom
CLEAR = 0.25  # dense must be that far above chance, and by two standard errors


def clear(row: dict[str, Any]) -> bool:
    """Whether dense is clearly above chance in a row of its own."""
    scores = np.asarray(row["scores_agnostic"])
    error = scores.std(ddof=1) / np.sqrt(len(scores))
    return bool(scores.mean() - max(CLEAR, 2 * error) >= row["chance"])


class Batch:
    """All samples of one task as arrays, and their exact prefill."""

    def __init__(self, model: Any, samples: list[Sample], marks: tuple):
        self.samples = samples
        sizes = sizes_of(samples)
        self.asked, self.answer = sizes[1], max(s.new_tokens for s in samples)
        context, length = _padded([s.context for s in samples], sizes[0])
        self.question, more = _padded([s.question for s in samples], sizes[1])
        index = np.arange(sizes[1])
        positions = np.where(index < more[:, None], length[:, None] + index, -1)
        self.positions = jnp.asarray(positions, jnp.int32)
        self.exact = exact_prefill(model, context, False, marks, length)
        self.whole = asked(
            model, self.exact, self.question, self.positions, marks, dtype=model.embed.dtype
        )

    def rolled(self) -> tuple[Any, Any]:
        """Each sample's question after the context of the next: (question, positions)."""
        length = jnp.max(self.exact.new.kv.pos[0, :, 0], 1) + 1
        own = self.positions - length[:, None]
        turn = lambda x: jnp.roll(x, 1, 0)  # noqa: E731
        positions = turn(own) + length[:, None]
        return turn(self.question), jnp.where(turn(self.positions) >= 0, positions, -1)


def sizes_of(samples: list[Sample]) -> tuple[int, int]:
    """Tokens that contexts and questions of one task are padded to."""
    parts = [s.context for s in samples], [s.question for s in samples]
    return tuple(-(-max(map(len, p)) // unit) * unit for p, unit in zip(parts, ROOM))


def _padded(rows: list[tuple[int, ...]], size: int) -> tuple[Any, Any]:
    """Right-padded (tokens int32 [B, size], lengths int32 [B])."""
    tokens = np.zeros((len(rows), size), np.int32)
    for own, row in zip(tokens, rows):
        own[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


class Job:
    """Model, samples and sizes of a run; everything that can be wrong is said at construction."""

    def __init__(self, settings: dict[str, Any], names: list[str], methods: Any, calibration: str):
        self.settings = settings
        self.dtype = jnp.dtype(settings["dtype"])
        self.model, self.tokenizer = load(settings["model"], dtype=self.dtype)
        self.config = self.model.config
        self.words = repeat_words(self.tokenizer, settings["chat"])
        self.constants = {}  # by label: equal chains may have been calibrated differently
        for label, chain in methods:
            self.constants[label] = constants_of(
                calibration, label, chain, self.model, self.tokenizer
            )
        self.marks = tuple(dict.fromkeys(m for _, c in methods for m in c.input_marks))
        text = load_text(settings["text"])
        self.samples = {
            name: TASKS[name].samples(
                self.tokenizer, settings["length"], settings["samples"], text=text,
                seed=settings["seed"], chat=settings["chat"], spare=settings["answer"] or None,
            )
            for name in names
        }  # fmt: skip
        for label, chain in methods:
            for own in self.samples.values():
                self._check(label, chain, own)

    def _check(self, label: str, chain: Any, samples: list[Sample]) -> None:
        """Refuses a method that does not fit the sizes that it will be asked for."""
        context, asked = sizes_of(samples)
        most = context + asked + max(s.new_tokens for s in samples)
        for prompt in (context, context + asked):
            try:
                jax.eval_shape(
                    lambda prompt=prompt: kv.init_cache(
                        self.config, chain, len(samples), most, prompt=prompt,
                        constants=self.constants[label],
                    )
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{label}, prompt of {prompt} tokens: {error}") from None

    def batch(self, name: str) -> Batch:
        return Batch(self.model, self.samples[name], self.marks)

    def run(self, batch: Batch, label: str, chain: Any) -> dict[str, Any]:
        """Scores of one method on one task."""
        row: dict[str, Any] = {}
        exact = under_rule(self.model, batch.exact, chain)
        cache = self._compressed(exact, label, chain, batch.asked + batch.answer)
        pairs = self.config.kv_heads * len(self.config.attention_layers)
        tokens = sum(len(s.context) for s in batch.samples)
        row["held"] = kv.tokens_held(cache) / (pairs * tokens)
        room = len(batch.samples) * cache.max_length
        row["bytes_per_token"] = kv.nbytes(cache) / room
        row |= self._ask(batch, cache, batch.question, batch.positions, "agnostic")
        whole = under_rule(self.model, batch.whole, chain)
        cache = self._compressed(whole, label, chain, batch.answer)
        row |= self._answer(batch, cache, whole.logits, "aware")
        if label == "dense":
            cache = self._compressed(batch.exact, label, chain, batch.asked + batch.answer)
            swapped = self._ask(batch, cache, *batch.rolled(), "swapped", roll=True)
            guess = float(np.mean([s.chance for s in batch.samples]))
            row |= {"swapped": swapped["swapped"], "guess": guess}
            row["chance"] = max(guess, swapped["swapped"])
        return row

    def _compressed(self, exact: Exact, label: str, chain: Any, room: int) -> Any:
        given = self.constants[label]
        return compressed(
            self.model, exact, chain, room, self.dtype, constants=given, words=self.words
        )[0]

    def _ask(
        self, batch: Batch, cache: Any, question: Any, positions: Any, mode: str, roll: bool = False
    ) -> dict[str, Any]:
        logits, cache = extend(self.model, cache, question, positions, phase="append")
        return self._answer(batch, cache, logits, mode, roll)

    def _answer(
        self, batch: Batch, cache: Any, logits: Any, mode: str, roll: bool = False
    ) -> dict[str, Any]:
        samples = batch.samples[-1:] + batch.samples[:-1] if roll else batch.samples
        out = generate(self.model, cache, logits, batch.answer, donate=True)
        texts = self.tokenizer.decode_batch(np.asarray(out.tokens))
        scores = [contained(s, text) for s, text in zip(samples, texts)]
        first = [first_right(s, text) for s, text in zip(samples, texts)]
        return {
            mode: float(np.mean(scores)),
            f"first_{mode}": float(np.mean(first)),
            f"scores_{mode}": scores,
            f"answers_{mode}": [text[:200] for text in texts],
        }
