"""How far each quantiser is from the limit of nature, on Gaussian data and on real keys and values.

    python -m experiments.distortion

The rate-distortion bound of a Gaussian source of variance s^2 is D(R) = s^2 2^(-2R): no code of R
bits per value has a smaller mean squared error. Every quantiser is measured at the bits that it
stores, scales and indices included. Each layer and head is put in units of its own mean square, so
that none outweighs the others; real keys are no Gaussian noise, and may lie below the bound.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.progress import Progress

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import common
from kvjax.cache import rope_of, rotate
from kvjax.calibrate import find
from kvjax.calibrate.kvquant import fit
from kvjax.codecs import Codec, Sparse, compose, dense, quantize, sparse
from kvjax.codecs import rotate as rotated
from kvjax.compress import parse
from kvjax.decode import positions_of
from kvjax.evaluate import load_text, samples
from kvjax.models import forward, load

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("tokens", 1024, "Tokens of each source, a multiple of 128.", lower_bound=128)
flags.DEFINE_integer("offset", 1000, "First token of the text.", lower_bound=0)
flags.DEFINE_string(
    "calibration", "results/calibration", "Folder of `experiments.calibrate`; else left out."
)
flags.DEFINE_string("out", "results/distortion", "Folder for results.json and distortion.png.")
FLAGS = flags.FLAGS
NAMES = ("model", "text", "tokens", "offset", "calibration", "out")

SOURCES = ("gaussian", "keys before rope", "keys after rope", "values")
# Family -> quantisers of it by rising bits: a codec, or the method whose store has it.
FAMILIES: dict[str, list[Codec | str]] = {
    "affine, per token": [quantize(b) for b in (1, 2, 3, 4, 8)],
    "affine, per token, groups of 32": [quantize(b, group=32) for b in (1, 2, 3, 4)],
    "affine, per channel, 32 tokens": [quantize(b, "channel", 32) for b in (1, 2, 3, 4)],
    "affine, per channel, 128 tokens": [quantize(b, "channel", 128) for b in (1, 2, 3, 4)],
    "symmetric, per token": [quantize(b, symmetric=True) for b in (2, 3, 4)],
    "rotated affine, per token": [compose(rotated(0), quantize(b)) for b in (1, 2, 3, 4, 8)],
    "turboquant": [f"turboquant(bits={b})" for b in (1, 2, 3, 4)],
    "kivi": [f"kivi(bits={b})" for b in (1, 2, 4)],
    "gear": ["gear(bits=2)", "gear(bits=4)"],
    "gear, no low rank": ["gear(bits=2, rank=0)", "gear(bits=4, rank=0)"],
    "vidkv, bits of keys": [
        "vidkv(key_bits=1)",
        "vidkv(key_bits=1.25)",
        "vidkv(key_bits=1.5)",
        "vidkv(key_bits=1.75)",
        "vidkv(key_bits=2, value_bits=2)",
    ],
    "mustafar, entries of 4 bits": [sparse(s, quantize(4)) for s in (0.9, 0.7, 0.5)],
    "mustafar, entries of 16 bits": [sparse(s, dense("bfloat16")) for s in (0.9, 0.7, 0.5)],
    "rotatekv": [f"rotatekv(bits={b})" for b in (2, 3, 4)],
    "kvquant": [f"kvquant(bits={b})" for b in (2, 3, 4)],
}
COLUMNS = {
    "quantiser": "quantiser",
    "source": "source",
    "bits": "stored bits|.2f",
    "error": "error|.5f",
    "bound": "bound|.5f",
    "gap": "bits above bound|.2f",
    "best_gap": "best near|.2f",
    "reason": "why",
}
FAR = 1.0  # bits above the best quantiser of like size from which a reason is due
NEAR = 0.6  # bits within which another is of like size


def reason(family: str, label: str, source: str) -> str:
    """Why a quantiser needs more bits than the best of like size, on this source."""
    real_keys = source.startswith("keys")
    ends = "affine" in family or family == "kivi"
    if ends and ("bits=1)" in label or label.endswith(" 1 bits")):
        return "its two levels stand at the ends of the range, where few numbers are"
    if label.startswith("gear(") and "rank=0" in label:
        return "entries kept apart take over half a bit per value, and few stand out"
    if family.startswith("mustafar"):
        return (
            "no quantiser: a bit per value says where the entries are, each of them has the same "
            "width however large, and all that is pruned is error"
        )
    if family == "gear":
        return (
            "two factors of rank 2 per 64 tokens take a bit per value, and the error they code "
            "is nearly white: little of it is of low rank"
        )
    if "symmetric" in family:
        return "its grid is symmetric: a level is lost, and offsets cost range"
    if "rotat" in family or family == "turboquant":
        return (
            "it knows no channels: their means and unlike sizes, which others store or "
            "calibrate once, are coded in every token"
        )
    if "per token" in family and real_keys:
        return "few channels are many times larger than the others and stretch a token's range"
    return "range set by the extremes of small groups, with 16-bit scale and minimum each"


def codec_of(entry: Codec | str, source: str) -> tuple[Codec | None, tuple[str, ...]]:
    """The codec by which a quantiser codes a source, and the constants that it reads; None for a
    method that codes keys before rotary embedding, on keys after it."""
    if isinstance(entry, Codec):
        return entry, ()
    store = parse(entry)[0][1].stages[-1]
    if store.rope == "before" and source == "keys after rope":
        return None, ()
    codec = store.codec.v if source == "values" else store.codec.k
    return codec, tuple(codec.constants_spec(64))


@functools.partial(jax.jit, static_argnums=0)
def measure(codec: Codec, x: jax.Array, constants: Any) -> tuple[jax.Array, Any]:
    """(mean squared error in units of each head's mean square, the code) of x [L, 1, H, T, D]."""
    code = codec.encode(x, None, None, constants)
    error = jnp.mean((codec.decode(code, jnp.float32, constants) - x) ** 2, (-1, -2))
    return jnp.mean(error / jnp.mean(x * x, (-1, -2))), code


def sources(model: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """Arrays [L, 1, H, T, D] by name; tokens int32 [1, T]."""
    positions = positions_of(tokens)
    _, new = jax.jit(functools.partial(forward, phase="prefill", logits="none"))(
        model, tokens, positions
    )
    k = new.kv.k.astype(jnp.float32)
    turned = rotate(k, new.kv.pos, rope_of(model.config, tokens.shape[1]))
    gaussian = np.random.default_rng(0).standard_normal(k.shape).astype(np.float32)
    return dict(zip(SOURCES, (jnp.asarray(gaussian), k, turned, new.kv.v.astype(jnp.float32))))


def constants_for(entry: Any, source: str, names: Any, model: Any, x: Any, folder: str) -> Any:
    """From the calibration folder; on Gaussian data fitted to other Gaussian data."""
    if not names:
        return None
    if source != "gaussian":
        return find(folder, entry, names, model)
    layers, _, heads, _, width = x.shape
    if "rotatekv_order" in names:  # every order is as good
        order = np.arange(heads * width, dtype=np.int32).reshape(1, heads, width)
        return {"rotatekv_order": jnp.broadcast_to(jnp.asarray(order), (layers, *order.shape))}
    other = np.random.default_rng(1).standard_normal((1, 4096, heads * width)).astype(np.float32)
    bits, even = int(re.search(r"bits=(\d)", entry)[1]), np.ones_like(other)
    found = fit(other, other, even, even, bits=bits)
    return {n: jnp.repeat(found[n], layers, 0) for n in names}


def label_of(family: str, entry: Codec | str) -> str:
    """A name for the table: the method, or the family and the width of a code."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Sparse):
        return f"{family}, {entry.sparsity:.0%} pruned"
    return f"{family}, {getattr(entry, 'code_bits', None) or entry.parts[-1].code_bits} bits"


def rows_of(model: Any, tokenizer: Any, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per quantiser and source; those that do not fit the model are left out and named."""
    windows = samples(load_text(chosen["text"]), tokenizer, [chosen["offset"]], chosen["tokens"])
    data = sources(model, jnp.asarray(windows))
    rows, left_out = [], {}
    every = [(s, f, e) for s in SOURCES for f, entries in FAMILIES.items() for e in entries]
    with Progress(console=common.console) as progress:
        task = progress.add_task("measuring", total=len(every))
        for source, family, entry in every:
            x, label = data[source], label_of(family, entry)
            codec, names = codec_of(entry, source)
            if codec is None:
                progress.advance(task)
                continue
            try:
                given = constants_for(entry, source, names, model, x, chosen["calibration"])
                error, code = measure(codec, x, given)
            except ValueError as wrong:
                left_out[label] = str(wrong)
                continue
            finally:
                progress.advance(task)
            stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(code))
            bits, error = 8 * stored / x.size, float(error)
            rows.append({
                "name": f"{label} on {source}", "quantiser": label, "family": family,
                "source": source, "bits": bits, "error": error, "bound": 4.0**-bits,
                "gap": bits + 0.5 * math.log2(error),
            })  # fmt: skip
    for label, why in left_out.items():
        common.console.print(f"[yellow]left out: {label}[/]: {why}", highlight=False)
    return rows


def explain(rows: list[dict[str, Any]]) -> None:
    """Adds to each row the least gap of those of like size, and a reason where it is far above."""
    for row in rows:
        like = [
            r["gap"] for r in rows
            if r["source"] == row["source"] and abs(r["bits"] - row["bits"]) <= NEAR
        ]  # fmt: skip
        row["best_gap"] = min(like)
        far = row["gap"] - row["best_gap"] > FAR
        row["reason"] = reason(row["family"], row["quantiser"], row["source"]) if far else None


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """One panel per source: stored bits against error, with the bound."""
    figure, axes = plt.subplots(1, 4, figsize=(19, 6), layout="constrained", sharey=True)
    colors, marks = plt.get_cmap("tab20"), "osD^v<>Pp*Xh"
    for axis, source in zip(axes, SOURCES):
        for number, family in enumerate(FAMILIES):
            own = [r for r in rows if r["family"] == family and r["source"] == source]
            axis.plot(
                [r["bits"] for r in own], [r["error"] for r in own], color=colors(number % 20),
                marker=marks[number % len(marks)], label=family, lw=1, ms=6,
            )  # fmt: skip
        bits = np.linspace(1, 6, 50)
        axis.plot(bits, 4.0**-bits, "k--", lw=1.5, label="bound $2^{-2R}$")
        axis.set(yscale="log", xlabel="stored bits per value", title=source, xlim=(0.9, 6.2))
        axis.set_ylim(2e-4, 3)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean squared error / mean square")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = common.settings(FLAGS, NAMES, ())
        if chosen["tokens"] % 128:
            raise ValueError(f"tokens={chosen['tokens']}: expected a multiple of 128")
        model, tokenizer = load(chosen["model"])
        out = pathlib.Path(chosen["out"])
        (out / "results.json").unlink(missing_ok=True)  # minutes: made anew each time
        where = ("calibration", "out")
        results = common.Results(
            chosen["out"], {n: x for n, x in chosen.items() if n not in where}, key="name"
        )
        rows = rows_of(model, tokenizer, chosen)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    explain(rows)
    results.rows = rows
    results.write()
    for source in SOURCES:
        own = [r for r in rows if r["source"] == source]
        common.table(source, {k: s for k, s in COLUMNS.items() if k != "source"}, own)
    plot(rows, out / "distortion.png")
    for path in (results.path, out / "distortion.png"):
        common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
