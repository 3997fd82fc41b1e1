"""Prompts of two kinds of tokens: paragraphs, each opened by a heading. What chunks of them lose
when they do not see each other, and what pooling loses of those that a question does not need.

    python -m experiments.chunks --methods='video_xl_2(chunk=1, previous=3, stride=4, block=1)'

One paragraph has a fact; the question comes when the prompt is done. Methods name a stage `levels`;
`--relevance` says who tells it which paragraphs matter: "gold" (the one with the fact), or "asked",
the rows of the question by the method's own scorer. Figures are of the answer's tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import common
from experiments.exact import Exact, under_rule
from kvjax import cache as kv
from kvjax.compress import parse
from kvjax.decode import extend, score
from kvjax.evaluate import load_text
from kvjax.evaluate.tasks.vocabulary import numbers, phrases
from kvjax.models import forward, load

CAUSAL = "video_xl_2(chunk=1, previous=10000, stride=1, block=1, relevant=1)"
config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", CAUSAL, "Expressions separated by semicolons.")
flags.DEFINE_list("relevance", ["gold"], "Who says what is relevant: gold, asked.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("paragraphs", 24, "Groups of a prompt.", lower_bound=2)
flags.DEFINE_integer("length", 40, "Tokens of a paragraph, its heading included.", lower_bound=32)
flags.DEFINE_integer("samples", 8, "Prompts.", lower_bound=1)
flags.DEFINE_integer("batch", 4, "Prompts at a time.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of facts, numbers and places.")
flags.DEFINE_string("out", "results/chunks", "Folder for results.json.")
FLAGS = flags.FLAGS
NAMES = ("model", "text", "paragraphs", "length", "samples", "seed")
COLUMNS = {
    "name": "method, relevance",
    "logprob": "log p|.2f",
    "difference": "- causal|+.2f",
    "spread": "+-|.2f",
    "right": "right|.0%",
    "found": "found|.0%",
    "held": "held|.1%",
    "pairs": "pairs|.1%",
    "computed": "computed|.1%",
}


def prompts_of(
    tokenizer: Any, text: str, paragraphs: int, length: int, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Prompts: tokens, type [S, T]; question, answer [S, N] each, -1: padding; gold [S].

    Raises:
      ValueError: the fact is longer than a paragraph.
    """
    encode = lambda text: list(tokenizer.encode(text, special=False))  # noqa: E731
    random = np.random.default_rng(seed)
    words = encode(text)
    out: dict[str, list] = {n: [] for n in ("tokens", "type", "question", "answer", "gold")}
    for _ in range(count):
        gold = int(random.integers(1, paragraphs - 1))  # the first and the last are always dense
        key, number = phrases(random, 1)[0], numbers(random, 1)[0]
        tokens, kinds = [], []
        for part in range(paragraphs):
            heading = encode(f"\nPart {part + 1}:")
            body = encode(f" The magic number of the {key} is {number}.") if part == gold else []
            if len(heading) + len(body) > length:
                raise ValueError(f"length={length}: a heading and the fact have more tokens")
            start = int(random.integers(len(words) - length))
            body = (body + words[start : start + length])[: length - len(heading)]
            tokens += heading + body
            kinds += [1] * len(heading) + [2] * len(body)
        out["tokens"].append(tokens)
        out["type"].append(kinds)
        out["question"].append(encode(f"\nThe magic number of the {key} is"))
        out["answer"].append(encode(f" {number}"))
        out["gold"].append(gold)
    for name in ("question", "answer"):
        most = max(map(len, out[name]))
        out[name] = [row + [-1] * (most - len(row)) for row in out[name]]
    return {name: np.asarray(rows, np.int32) for name, rows in out.items()}


@jax.jit
def _ask(model: Any, tokens: Any, positions: Any, cache: Any) -> Any:
    _, new = forward(
        model, tokens, positions, cache, phase="append", statistics=True, logits="none"
    )
    return kv.relevance(cache, new)


_finish, _hold = jax.jit(kv.finish), jax.jit(kv.commit, static_argnames="phase")


def measure(
    model: Any, chain: Any, exact: Exact, prompts: dict[str, np.ndarray], who: str
) -> dict[str, Any]:
    """What one method makes of prompts that were computed under its rule."""
    asks, more = prompts["question"].shape[1], prompts["answer"].shape[1]
    cache = kv.init_cache(
        model.config, chain, exact.batch, exact.time + asks + more, prompt=exact.time,
        dtype=model.embed.dtype,
    )  # fmt: skip
    cache = _hold(cache, exact.new, phase="prefill")
    question = jnp.asarray(prompts["question"])
    place = jnp.where(question >= 0, exact.time + jnp.arange(asks), -1)
    if who == "asked":
        worth = _ask(model, question, place, cache)
        each, kinds = levels_of(chain).block, prompts["type"][0]
        last = (np.sum(np.diff(kinds, prepend=2) < 0) - 1) // each  # headings open the groups
        # The first block and the last are dense whatever is asked.
        found = 1 + np.argmax(np.asarray(worth)[:, 1:last], 1) == prompts["gold"] // each
    else:
        stage = levels_of(chain)
        worth = kv.named(prompts["gold"][:, None], each=stage.block)
        found = np.full(exact.batch, np.nan)
    cache = _finish(cache, {"relevance": worth})
    heads = model.config.kv_heads * len(model.config.attention_layers)
    held = kv.tokens_held(cache) / (heads * exact.batch * exact.time)
    logits, cache = extend(model, cache, question, place)
    answer = jnp.asarray(prompts["answer"])
    logprobs, before, _ = score(model, cache, logits, answer, keep_logits=True)
    right = (jnp.argmax(before, -1) == answer) | (answer < 0)
    return {
        "logprob": np.asarray(jnp.sum(logprobs, 1)).tolist(),
        "right": np.asarray(jnp.all(right, 1)).tolist(),
        "found": found.tolist(),
        "held": held,
    }


def levels_of(chain: Any) -> kv.Levels:
    """The stage that is told what is relevant."""
    found = [s for s in chain.stages if isinstance(s, kv.Levels)]
    if not found:
        raise ValueError(f"{chain}: expected a method with a stage `levels`, such as video_xl_2")
    return found[0]


def shares(chain: Any, prompts: dict[str, np.ndarray]) -> tuple[float, float]:
    """Allowed and computed pairs of the prompt's attention, over those of causal attention."""
    time = prompts["tokens"].shape[1]
    pos = jnp.broadcast_to(jnp.arange(time), prompts["tokens"].shape)
    seen = chain.rule.start(pos, {"type": jnp.asarray(prompts["type"], jnp.float32)})
    allowed, computed = seen.shares()
    return float(allowed), float(computed)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = common.settings(FLAGS, NAMES, ("methods", "relevance", "batch", "out"))
        methods = list(dict([*parse(CAUSAL), *parse(FLAGS.methods)]).items())
        for _, chain in methods:
            levels_of(chain)
        for who in FLAGS.relevance:
            if who not in ("gold", "asked"):
                raise ValueError(f"relevance: {who!r}: expected gold, asked")
        model, tokenizer = load(chosen["model"])
        prompts = prompts_of(
            tokenizer, load_text(chosen["text"]), chosen["paragraphs"], chosen["length"],
            chosen["samples"], chosen["seed"],
        )  # fmt: skip
        results = common.Results(FLAGS.out, chosen, key="name")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    base = f"{methods[0][0]}, gold"
    pairs = [(f"{t}, {w}", t, c, w) for t, c in methods for w in FLAGS.relevance]
    pairs = [(base, methods[0][0], methods[0][1], "gold")] + [
        p for p in pairs if p[1] != methods[0][0]
    ]
    todo = [p for p in pairs if results.get(p[0]) is None]
    for rule in dict.fromkeys(chain.rule for _, _, chain, _ in todo):
        mine = [p for p in todo if p[2].rule == rule]
        parts: dict[str, list] = {p[0]: [] for p in mine}
        for start in range(0, chosen["samples"], FLAGS.batch):
            batch = {n: x[start : start + FLAGS.batch] for n, x in prompts.items()}
            exact = computed(model, batch, mine[0][2])
            for name, _, chain, who in mine:
                parts[name].append(measure(model, chain, exact, batch, who))
        for name, label, chain, who in mine:
            results.put(
                {"name": name, "method": label, "relevance": who}
                | summary(parts[name], shares(chain, prompts), results.get(base))
            )
    names = [p[0] for p in pairs]
    results.write(names)
    common.table("Paragraphs", COLUMNS, [r for r in results.rows if r["name"] in names])
    common.console.print(f"wrote {results.path}", highlight=False, soft_wrap=True)


def computed(model: Any, batch: dict[str, np.ndarray], chain: Any) -> Exact:
    """Prompts as the chain's rule computes them."""
    tokens = jnp.asarray(batch["tokens"])
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    bare = kv.New(kv.KV((), (), pos[None, :, None]))
    kinds = {"type": jnp.asarray(batch["type"], jnp.float32)}
    return under_rule(model, Exact(bare, None, *tokens.shape, 0.0, tokens), chain, columns=kinds)


def summary(
    parts: list[dict], shares: tuple[float, float], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Means over samples; the difference to causal attention with its standard error."""
    logprobs = [x for part in parts for x in part["logprob"]]
    found = [x for part in parts for x in part["found"]]
    row = {
        "logprob": float(np.mean(logprobs)),
        "logprobs": [round(x, 4) for x in logprobs],
        "right": float(np.mean([x for part in parts for x in part["right"]])),
        "found": None if np.isnan(found).any() else float(np.mean(found)),
        "held": float(np.mean([part["held"] for part in parts])),
        "pairs": shares[0],
        "computed": shares[1],
    }
    apart = np.asarray(row["logprobs"]) - np.asarray((base or row)["logprobs"])
    row["difference"] = float(apart.mean())
    row["spread"] = float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else 0.0
    return row


if __name__ == "__main__":
    app.run(main)
