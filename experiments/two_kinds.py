"""Prompts of two kinds of tokens: a document, taken for what an image would be, and text around it.

    python -m experiments.two_kinds

The document hides a number that the question behind it asks for. Compared at equal mean numbers of
document tokens per layer: filters by what the question attends to behind several layers, with and
without a protected key set (the most attended of the document by itself), the best share behind one
layer, and random shares. Thresholds are found on other documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array
from ml_collections import config_flags

from experiments import common
from kvjax import cache as kv
from kvjax.compress import mustdrop
from kvjax.decode import generate, positions_of, prefill, score
from kvjax.evaluate import first_right, load_text, needles
from kvjax.models import forward, load

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("document", 384, "Tokens of the document.", lower_bound=64)
flags.DEFINE_integer("samples", 12, "Prompts, and as many others for thresholds.", lower_bound=1)
flags.DEFINE_list("targets", ["0.5", "0.33", "0.17"], "Mean part of the document in a layer.")
flags.DEFINE_list("layers", ["2", "6", "10", "14"], "Layers behind which tokens are dropped.")
flags.DEFINE_float("key", 0.08, "Part of the document that is protected.")
flags.DEFINE_integer("steps", 7, "Of the search for thresholds.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the needles and of what is random.")
flags.DEFINE_string("out", "results/two_kinds", "Folder for results.json.")
FLAGS = flags.FLAGS
NAMES = ("model", "text", "document", "samples", "targets", "layers", "key", "steps", "seed")
SYSTEM = "Read the following text and answer the question about it.\n\n"
COLUMNS = {
    "name": "how",
    "mean": "in a layer|.1%",
    "last": "in the end|.1%",
    "answer": "log-lik. of the answer|.3f",
    "found": "found|.0%",
    "used_bytes": "used/tok|,.0f",
    "allocated_bytes": "alloc/tok|,.0f",
}


class Prompts:
    """`count` prompts as arrays: [system][document][question], answers, and types of tokens."""

    def __init__(self, model: Any, tokenizer: Any, text: str, settings: dict, seed: int):
        found = needles(text, tokenizer, settings["document"], settings["samples"], seed)
        system = tokenizer.encode(SYSTEM, special=False)
        rows = [[*system, *s.context, *s.question] for s in found]
        answers = [tokenizer.encode(" " + s.answer, special=False) for s in found]
        size = min(map(len, answers))  # numbers have five digits, one token each
        self.samples, self.tokens = found, jnp.asarray(rows, jnp.int32)
        self.answers = jnp.asarray([a[:size] for a in answers], jnp.int32)
        at = np.arange(self.tokens.shape[1])
        inside = (at >= len(system)) & (at < len(system) + settings["document"])
        self.visual = jnp.broadcast_to(jnp.asarray(inside), self.tokens.shape)
        best = _received(model, self.tokens, self.visual)
        number = int(np.ceil(settings["key"] * settings["document"]))
        order = jnp.argsort(jnp.argsort(-jnp.where(self.visual, best, -1.0), axis=1), axis=1)
        self.key = self.visual & (order < number)

    def columns(self, protected: bool) -> dict[str, Array]:
        return {"visual": self.visual, **({"key": self.key} if protected else {})}


@jax.jit
def _received(model: Any, tokens: Array, visual: Array) -> Array:
    """Attention that tokens receive from the document, mean over layers and heads: [B, T]."""
    pos = positions_of(tokens)
    _, new = forward(model, tokens, pos, phase="prefill", logits="none", statistics=True)
    rope = kv.rope_of(model.config, tokens.shape[1])
    turned = kv.rotate(new.kv.k, new.kv.pos, rope)
    got = kv.received(turned, new.kv.pos, new.seen, visual.astype(jnp.float32))
    return jnp.mean(got, (0, 2))


@functools.partial(jax.jit, static_argnames="rule")
def _parts(model: Any, tokens: Array, columns: Any, rule: Any) -> Array:
    """Which part of the document takes part in each layer, [L + 1]; last: what is left."""
    _, new = forward(
        model, tokens, positions_of(tokens), phase="prefill", logits="none", statistics=True,
        columns=columns, rule=rule,
    )  # fmt: skip
    there = (new.seen.sum[:, :, 0] > 0) & (columns["visual"] > 0)
    left = (new.kv.pos[-1, :, 0] >= 0) & (columns["visual"] > 0)
    there = jnp.concatenate([there, left[None]])
    return jnp.sum(there, (1, 2)) / jnp.sum(columns["visual"])


def search(part: Callable[[float], float], target: float, steps: int) -> float:
    """The threshold at which `part`, which falls with it, is nearest to the target."""
    low, high = np.log(1e-5), np.log(0.3)
    tried = []
    for _ in range(steps):
        middle = float(np.exp((low + high) / 2))
        found = part(middle)
        tried.append((abs(found - target), middle))
        low, high = (np.log(middle), high) if found > target else (low, np.log(middle))
    return min(tried)[1]


def measure(model: Any, prompts: Prompts, chain: Any, columns: Any) -> dict[str, Any]:
    """Figures of one chain."""
    parts = np.asarray(_parts(model, prompts.tokens, columns, chain.rule))
    room = prompts.answers.shape[1] + 3
    logits, cache = prefill(model, prompts.tokens, chain, new_tokens=room, columns=columns)
    logprobs, _, _ = score(model, cache, logits, prompts.answers)
    out = generate(model, cache, logits, room, stop=())
    texts = [prompts.decode(row) for row in np.asarray(out.tokens)]
    size = prompts.tokens.size
    per_token = 2 * model.config.head_dim * jnp.dtype(model.embed.dtype).itemsize
    return {
        "mean": float(parts[:-1].mean()),
        "last": float(parts[-1]),
        "layers": [round(float(x), 4) for x in parts],
        "answer": float(jnp.mean(jnp.sum(logprobs, 1))),
        "found": float(np.mean([first_right(s, t) for s, t in zip(prompts.samples, texts)])),
        "used_bytes": kv.tokens_held(cache) * per_token / size,
        "allocated_bytes": kv.nbytes(cache) / (size + len(texts) * room),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        settings = common.settings(FLAGS, NAMES, ("out",))
        targets = [float(x) for x in settings["targets"]]
        layers = tuple(int(x) for x in settings["layers"])
        model, tokenizer = load(settings["model"])
        text = load_text(settings["text"])
        prompts = Prompts(model, tokenizer, text, settings, settings["seed"])
        others = Prompts(model, tokenizer, text, settings, settings["seed"] + 1)
        results = common.Results(FLAGS.out, {**settings, "targets": None}, key="name")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    prompts.decode = lambda row: tokenizer.decode([int(i) for i in row])
    names = ["dense"]

    def run(name: str, chain: Any, protected: bool, **more: Any) -> dict[str, Any]:
        names.append(name)
        if results.get(name) is None:
            row = measure(model, prompts, chain, prompts.columns(protected))
            results.put({"name": name, **more, **row})
        return results.get(name)

    names.clear()
    run("dense", mustdrop(0.0, 0.0, layers=layers), False)
    total = len(model.config.attention_layers)
    for target in targets:
        for protected in (False, True):
            name = f"{target:g}, several layers" + (", key set" if protected else "")
            found = results.get(name)
            tau = found["tau"] if found else search(
                lambda tau, protected=protected: float(np.mean(np.asarray(_parts(
                    model, others.tokens, others.columns(protected),
                    mustdrop(tau, tau, layers=layers).stages[0].rule,
                ))[:-1])), target, settings["steps"],
            )  # fmt: skip
            row = run(name, mustdrop(tau, tau, layers=layers), protected, tau=tau)
            if not protected:
                plain = row
        # As many as the filters left behind each layer, or on average behind the first.
        left = [min(max(plain["layers"][i + 1], 1e-4), 1.0) for i in layers]
        before = layers[0] + 1
        one = min(max((plain["mean"] * total - before) / (total - before), 1e-4), 1.0)
        first = mustdrop(layers=layers[:1], shares=(round(one, 4),))
        run(f"{target:g}, best share behind layer {layers[0]}", first, False)
        chance = mustdrop(layers=layers, shares=tuple(left), seed=settings["seed"])
        run(f"{target:g}, random, several layers", chance, False)
    results.write(names)
    common.table(
        "Documents in place of images", COLUMNS, [r for r in results.rows if r["name"] in names]
    )
    common.console.print(f"wrote {results.path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
