"""How much of a model's keys and values lies in few dimensions, over layers and over heads.

    python -m experiments.low_rank

Two tables. Over layers: the squared error that is left when groups of layers share a basis (as in
`kvjax.compress.xkv`), at equal ranks per layer, so at equal coordinates per token; the maps of a
group take as many more numbers per layer as it has layers. Over heads: what a calibrated projection
of the KV heads (as in `kvjax.compress.compress_kv_heads`) leaves of other text, for its kinds of
fit. Errors are shares of each layer's sum of squares, averaged over layers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array
from ml_collections import config_flags

from experiments import common
from kvjax.cache import rope_of, rotate
from kvjax.calibrate.compress_kv_heads import bases, capture, moments, of_weights
from kvjax.compress import compress_kv_heads
from kvjax.evaluate import load_text, samples
from kvjax.models import load

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("tokens", 1024, "Tokens of the prompt.", lower_bound=16)
flags.DEFINE_integer("offset", 1000, "First token of the prompt.", lower_bound=0)
flags.DEFINE_list("groups", ["1", "2", "3", "5"], "Layers that share a basis.")
flags.DEFINE_list("ranks", ["24", "48", "96"], "Ranks per layer.")
flags.DEFINE_list("keep", ["0.5", "0.3333", "0.25"], "Shares of the KV heads kept.")
flags.DEFINE_integer("samples", 16, "Sequences of 512 tokens to calibrate on.", lower_bound=1)
flags.DEFINE_integer("calibration_offset", 80000, "First token of these.", lower_bound=0)
flags.DEFINE_string("out", "results/low_rank", "Folder for results.json.")
FLAGS = flags.FLAGS
NAMES = (
    "model", "text", "tokens", "offset", "groups", "ranks", "keep", "samples",
    "calibration_offset", "out",
)  # fmt: skip
SOURCES = ("keys before rope", "keys after rope", "values")
# Those that suit any share, and those that need whole heads.
FITS = (
    ("before", "activations"),
    ("after", "activations"),
    ("after", "weights"),
    ("commuting", "activations"),
    ("after", "mean"),
)
LENGTH = 512


def layers_apart(x: np.ndarray, groups: list[int], ranks: list[int]) -> list[dict[str, Any]]:
    """Rows of x [L, T, C]: error by group and rank per layer."""
    rows = []
    size = (x**2).sum((1, 2))
    for group in groups:
        left = {rank: [] for rank in ranks}
        for i in range(0, len(x), group):
            part = x[i : i + group]
            wide = np.concatenate(part, 1)
            _, _, vt = np.linalg.svd(wide, full_matrices=False)
            for rank in ranks:
                v = vt[: rank * len(part)]
                rest = (wide - wide @ v.T @ v).reshape(len(wide), len(part), -1)
                left[rank] += list((rest**2).sum((0, 2)) / size[i : i + group])
        rows += [{"group": group, "rank": r, "error": float(np.mean(e))} for r, e in left.items()]
    return rows


def neighbours(x: np.ndarray, count: int = 8) -> dict[str, float]:
    """Mean cosine of the principal angles between layers' `count` leading left singular vectors."""
    u = [np.linalg.svd(layer, full_matrices=False)[0][:, :count] for layer in x]
    cosine = lambda a, b: float(np.mean(np.linalg.svd(u[a].T @ u[b])[1]))  # noqa: E731
    far = len(u) // 2
    return {
        "next": float(np.mean([cosine(i, i + 1) for i in range(len(u) - 1)])),
        "far": float(np.mean([cosine(i, i + far) for i in range(len(u) - far)])),
    }


def heads_merged(x: np.ndarray, basis: Array, group: int) -> list[float]:
    """What is left of each layer of x [L, T, H D] by projections [L, 1, H, D, W]."""
    left = []
    for layer, u in zip(x, np.asarray(basis, np.float64)[:, 0]):
        parts = np.split(layer, len(u) // group, 1)
        kept = u.reshape(len(parts), -1, u.shape[-1])
        rest = sum(((p - p @ v @ v.T) ** 2).sum() for p, v in zip(parts, kept))
        left.append(float(rest / (layer**2).sum()))
    return left


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = common.settings(FLAGS, NAMES, ())
        groups, ranks = ([int(x) for x in chosen[n]] for n in ("groups", "ranks"))
        model, tokenizer = load(chosen["model"])
        text = load_text(chosen["text"])
        prompt = samples(text, tokenizer, [chosen["offset"]], chosen["tokens"])
        starts = [chosen["calibration_offset"] + i * LENGTH for i in range(chosen["samples"])]
        other = samples(text, tokenizer, starts, LENGTH)
        results = common.Results(
            chosen["out"], {n: x for n, x in chosen.items() if n != "out"}, key="name"
        )
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    config = model.config
    k, v, pos = capture(model, jnp.asarray(prompt))
    turned = rotate(k, pos, rope_of(config, prompt.shape[1]))
    flat = lambda x: np.moveaxis(np.asarray(x, np.float64)[:, 0], 1, 2).reshape(  # noqa: E731
        len(x), x.shape[3], -1
    )
    data = dict(zip(SOURCES, map(flat, (k, turned, v))))
    rows: list[dict[str, Any]] = []
    for source, x in data.items():
        angles = neighbours(x)
        for row in layers_apart(x, groups, ranks):
            name = f"{source}, {row['group']} layers, rank {row['rank']}"
            rows.append({"name": name, "source": source, **row, **angles})
    batches = [jnp.asarray(other[i : i + 2]) for i in range(0, len(other), 2)]
    second = {
        ("after", "activations"): moments(model, batches, rotated=True),
        ("before", "activations"): moments(model, batches, rotated=False),
        ("after", "weights"): of_weights(model),
    }
    second["commuting", "activations"] = second["before", "activations"]
    for keep in map(float, chosen["keep"]):
        for rope, fit in FITS:
            how = {"keep": keep, "rope": rope, "fit": fit}
            try:
                found = bases(config, second.get((rope, fit)), **how)
            except ValueError as wrong:
                common.console.print(f"left out: {wrong}", highlight=False)
                continue
            for name, source in (
                ("merged_keys", SOURCES[rope != "before"]),
                ("merged_values", SOURCES[2]),
            ):
                codec = compress_kv_heads(**how).stages[0].codec.k
                group, _ = codec.sizes(config.kv_heads, config.head_dim)
                left = heads_merged(data[source], found[name], group)
                rows.append({
                    "name": f"{source}, keep {keep:g}, {rope}, {fit}", "source": source,
                    "keep": keep, "rope": rope, "fit": fit, "error": float(np.mean(left)),
                    "least": min(left), "most": max(left),
                })  # fmt: skip
    results.rows = rows
    results.write()
    columns = {"source": "source", "group": "layers|d", "rank": "rank|d", "error": "error|.4f",
               "next": "next layer|.2f", "far": "far layer|.2f"}  # fmt: skip
    common.table("over layers", columns, [r for r in rows if "group" in r])
    columns = {"source": "source", "keep": "keep|.2f", "rope": "rope", "fit": "fit",
               "error": "error|.4f", "least": "least|.4f", "most": "most|.4f"}  # fmt: skip
    common.table("over heads", columns, [r for r in rows if "keep" in r])
    common.console.print(f"wrote {results.path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
