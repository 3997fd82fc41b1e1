"""Attention, Mamba-2 and a hybrid of one size: what decoding costs as the context grows.

    python -m experiments.recurrent --out=results/recurrent

Models are random: what is measured is bytes and time, not quality. `--peer=transformers` decodes
the same Mamba-2 weights there (plain PyTorch; needs torch and transformers).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import common
from kvjax.cache import nbytes
from kvjax.compress import dense
from kvjax.decode import generate, prefill
from kvjax.models import Config, Model, init, save_pretrained
from kvjax.models.mamba2 import Mamba2
from kvjax.speculate import prompt_lookup, speculate

flags.DEFINE_list("contexts", ["256", "1024", "4096"], "Tokens of the prompt.")
flags.DEFINE_integer("layers", 24, "Layers; those with an MLP count half.", lower_bound=4)
flags.DEFINE_integer("width", 768, "Channels, a multiple of 128.", lower_bound=128)
flags.DEFINE_integer("tokens", 24, "Tokens decoded per run.", lower_bound=1)
flags.DEFINE_integer("rounds", 3, "Runs, of which the median counts.", lower_bound=1)
flags.DEFINE_enum("peer", None, ["transformers"], "Run beside it.")
flags.DEFINE_string("out", "results/recurrent", "Folder for results.json.")
FLAGS = flags.FLAGS

VOCABULARY = 4096
COLUMNS = {
    "case": "model and context",
    "parameters": "parameters|,",
    "cache_bytes": "cache bytes|,",
    "prefill_seconds": "prefill s|.2f",
    "tokens_per_second": "decode tok/s|.1f",
    "tokens_per_pass": "lookup tok/pass|.2f",
    "lookup_tokens_per_second": "lookup tok/s|.1f",
    "peer_tokens_per_second": "transformers tok/s|.1f",
}


def configurations(width: int, layers: int) -> dict[str, Config]:
    """Three models of nearly one number of parameters per layer."""
    kind = Mamba2(heads=2 * width // 64, head_dim=64, state_size=128)
    heads = width // 64
    sizes = {"vocab_size": VOCABULARY, "width": width, "eos": ()}
    none = {"mlp_width": 0, "heads": 0, "kv_heads": 0, "head_dim": 0}
    half = layers // 2
    attention = {"mlp_width": 8 * width // 3, "heads": heads, "kv_heads": heads, "head_dim": 64}
    mixed = tuple(i for i in range(half) if i % 4 != 3)
    return {
        "attention": Config(**sizes, **attention, layers=half),
        "hybrid": Config(
            **sizes, **attention, layers=half, recurrence=kind, recurrent_layers=mixed
        ),
        "mamba2": Config(
            **sizes, **none, layers=layers, family="mamba2", recurrence=kind,
            recurrent_layers=tuple(range(layers)), residual_float32=True,
        ),
    }  # fmt: skip


def median_seconds(run: Any, rounds: int) -> float:
    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(name: str, model: Model, context: int) -> dict[str, Any]:
    """One row of the table."""
    # A text that repeats itself after 64 tokens, so that lookup finds what was said before.
    period = jax.random.randint(jax.random.key(1), (1, 64), 0, VOCABULARY)
    prompt = jnp.tile(period, (1, -(-context // 64)))[:, :context]
    room, steps = context + FLAGS.tokens, FLAGS.tokens
    fill = lambda: prefill(model, prompt, dense(), max_length=room)  # noqa: E731
    logits, cache = fill()
    plain = generate(model, cache, logits, steps)
    drafter = prompt_lookup(length=5, least=1)
    guess = lambda: speculate(model, cache, logits, steps, drafter, prompt=prompt)  # noqa: E731
    quick = guess()
    same = bool(jnp.all(quick.tokens == plain.tokens))
    return {
        "case": f"{name}, {context}",
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "cache_bytes": nbytes(cache),
        "prefill_seconds": median_seconds(fill, 1),
        "tokens_per_second": steps
        / median_seconds(lambda: generate(model, cache, logits, steps), FLAGS.rounds),
        "tokens_per_pass": steps / int(quick.passes),
        "lookup_tokens_per_second": steps / median_seconds(guess, FLAGS.rounds),
        "lookup_is_lossless": same,
    }


def peer_speed(model: Model, context: int) -> float:
    """Tokens per second of transformers on the same weights."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.randint(0, VOCABULARY, (1, context))
    found = []
    with torch.no_grad():
        for _ in range(FLAGS.rounds):
            out = other(prompt, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for _ in range(FLAGS.tokens):
                out = other(token, cache=out.cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            found.append(FLAGS.tokens / (time.perf_counter() - start))
    return statistics.median(found)


def main(argv: list[str]) -> None:
    del argv
    settings = {
        k: FLAGS[k].value for k in ("contexts", "layers", "width", "tokens", "rounds", "peer")
    }
    results = common.Results(FLAGS.out, settings, key="case")
    for name, config in configurations(FLAGS.width, FLAGS.layers).items():
        model = init(config, jax.random.key(0))
        for context in map(int, FLAGS.contexts):
            if results.get(f"{name}, {context}"):
                continue
            row = measure(name, model, context)
            if FLAGS.peer and name == "mamba2":
                row["peer_tokens_per_second"] = peer_speed(model, context)
            results.put(row)
    common.table("Cost of decoding as the context grows", COLUMNS, results.rows)


if __name__ == "__main__":
    app.run(main)
