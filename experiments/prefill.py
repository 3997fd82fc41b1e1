"""What rules among the rows of a prompt do: how many take part in each layer, what that costs and
saves.

    python -m experiments.prefill --methods='zipvl(tau=0.9); zipvl(tau=0.975)'

Prompts of three kinds: text, the same with a first half of repeated noise, and noise alone. Each is
computed as the method's chain says, and the tokens that follow it are scored through the cache.
`--rounds` measures the time of a whole prefill, by turns with dense.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import common
from experiments.exact import compressed, exact_prefill, under_rule
from kvjax import cache as kv
from kvjax.compress import parse
from kvjax.decode import prefill, score
from kvjax.evaluate import load_text, samples
from kvjax.evaluate.tasks.vocabulary import NOISE
from kvjax.models import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", "zipvl(tau=0.9); zipvl", "Expressions separated by semicolons.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_list("prompts", ["text", "half", "noise"], "Kinds of prompts: text, half, noise.")
flags.DEFINE_integer("context", 768, "Tokens of the prompt.", lower_bound=16)
flags.DEFINE_integer("continuation", 64, "Tokens scored after it.", lower_bound=1)
flags.DEFINE_list("offsets", ["1000", "21000", "41000", "61000"], "First token of each sample.")
flags.DEFINE_integer("rounds", 0, "Timed prefills of each method; 0: none.", lower_bound=0)
flags.DEFINE_string("out", "results/prefill", "Folder for results.json and rows.png.")
FLAGS = flags.FLAGS
NAMES = ("model", "text", "prompts", "context", "continuation", "offsets", "rounds")
KINDS = ("text", "half", "noise")
COLUMNS = {
    "name": "method, prompt",
    "rows": "rows|.1%",
    "pairs": "pairs|.1%",
    "perplexity": "ppl|.2f",
    "held": "held|.1%",
    "used_bytes": "used/tok|,.0f",
    "allocated_bytes": "alloc/tok|,.0f",
    "prefill_seconds": "prefill s|.2f",
    "prefill_ratio": "x dense|.2f",
}


def prompts_of(kind: str, windows: np.ndarray, noise: np.ndarray, context: int) -> np.ndarray:
    """Tokens [B, context + more] of a kind, from windows of text and a run of noise as long."""
    if kind not in KINDS:
        raise ValueError(f"prompts: {kind!r}: expected some of {', '.join(KINDS)}")
    out, half = windows.copy(), context // 2
    if kind == "noise":
        out[:] = noise
    if kind == "half":
        out[:, :half] = noise[:half]
    return out


def measure(model: Any, chain: Any, tokens: np.ndarray, context: int) -> dict[str, Any]:
    """Figures of one method on one kind of prompts."""
    more = tokens.shape[1] - context
    exact = exact_prefill(model, jnp.asarray(tokens[:, :context]), timed=False)
    exact = under_rule(model, exact, chain)
    took = np.asarray(exact.new.seen.sum[:, :, 0] > 0)  # [L, B, T]
    share = took.mean(-1)
    cache, _ = compressed(model, exact, chain, more, model.embed.dtype)
    logprobs, _, _ = score(model, cache, exact.logits, jnp.asarray(tokens[:, context:]))
    heads = model.config.kv_heads * len(model.config.attention_layers)
    return {
        "rows": float(share.mean()),
        "pairs": float((share**2).mean()),
        "layers": [round(float(x), 4) for x in share.mean(1)],
        "perplexity": float(np.exp(-float(jnp.mean(logprobs)))),
        "held": kv.tokens_held(cache) / (heads * exact.batch * context),
        "used_bytes": kv.used_bytes(cache) / (exact.batch * context),
        "allocated_bytes": kv.nbytes(cache) / (exact.batch * (context + more)),
    }


def timed(model: Any, methods: Any, tokens: Any, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of a whole prefill of one prompt, and those of dense over them in the same round."""
    runs: dict[str, list[float]] = {label: [] for label, _ in methods}

    def run(chain: Any) -> float:
        start = time.perf_counter()
        jax.block_until_ready(prefill(model, tokens, chain, new_tokens=1))
        return time.perf_counter() - start

    for number in range(rounds + 1):  # the first compiles
        for label, chain in methods:
            seconds = run(chain)
            if number:
                runs[label].append(seconds)
    base = runs[methods[0][0]]
    ratio = lambda mine: float(np.median([a / b for a, b in zip(base, mine)]))  # noqa: E731
    return {label: (float(np.median(mine)), ratio(mine)) for label, mine in runs.items()}


def picture(rows: list[dict[str, Any]], path: Any) -> None:
    """Share of rows by layer, a panel for each kind of prompt."""
    kinds = [k for k in KINDS if any(r["prompt"] == k for r in rows)]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.6 * len(kinds), 3.4), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for axis, kind in zip(axes[0], kinds):
        for row in (r for r in rows if r["prompt"] == kind):
            axis.plot([100 * x for x in row["layers"]], label=row["method"])
        axis.set_title(kind)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("rows that take part (%)")
    axes[0][0].set_ylim(0, 105)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = common.settings(FLAGS, NAMES, ("methods", "out"))
        methods = list(dict([*parse("dense"), *parse(FLAGS.methods)]).items())
        model, tokenizer = load(chosen["model"])
        context, more = chosen["context"], chosen["continuation"]
        windows = samples(
            load_text(chosen["text"]), tokenizer, [int(x) for x in chosen["offsets"]],
            context + more,
        )  # fmt: skip
        noise = tokenizer.encode(" ".join([NOISE] * ((context + more) // 20 + 1)), special=False)
        noise = np.asarray(noise[: context + more], np.int32)
        prompts = {k: prompts_of(k, windows, noise, context) for k in chosen["prompts"]}
        results = common.Results(FLAGS.out, chosen, key="name")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    for label, chain in methods:
        for kind, tokens in prompts.items():
            name = f"{label}, {kind}"
            if results.get(name) is None:
                row = {"name": name, "method": label, "prompt": kind}
                results.put(row | measure(model, chain, tokens, context))
    if chosen["rounds"]:
        for kind, tokens in prompts.items():
            prompt = jnp.asarray(tokens[:1, :context])
            for label, (seconds, ratio) in timed(model, methods, prompt, chosen["rounds"]).items():
                row = results.get(f"{label}, {kind}")
                results.put(row | {"prefill_seconds": seconds, "prefill_ratio": ratio})
    names = [f"{label}, {kind}" for kind in prompts for label, _ in methods]
    results.write(names)
    rows = [r for r in results.rows if r["name"] in names]
    common.table("Rows of a prompt", COLUMNS, rows)
    drawn = results.path.parent / "rows.png"
    picture([r for r in rows if r["method"] != "dense"] or rows, drawn)
    for path in (results.path, drawn):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
