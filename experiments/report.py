"""The pictures and the page of the main job."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.common import cell, filled


def pareto(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Bytes per token against the loss of quality; one panel per measure, points labelled."""
    rows = [r for r in rows if not r.get("error")]
    dense = next(r for r in rows if r["method"] == "dense")
    panels = [
        (
            "perplexity increase over dense (%)",
            lambda r: 100 * (r["perplexity"] / dense["perplexity"] - 1),
        )
    ]
    for key, name in (
        ("needle_accuracy", "needles found (%), question in the prompt"),
        ("needle_accuracy_agnostic", "needles found (%), question after compression"),
    ):
        if all(key in r for r in rows):
            panels.append((name, lambda r, key=key: 100 * r[key]))
    number = {r["method"]: i + 1 for i, r in enumerate(rows)}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels) + 3.4, 5.6), layout="constrained", squeeze=False
    )
    colors = plt.get_cmap("tab20")
    for axis, (label, value) in zip(axes[0], panels):
        for row in rows:
            index = number[row["method"]]
            x, y = row["bytes_per_token"], value(row)
            axis.scatter(x, y, s=70, color=colors((index - 1) % 20), edgecolor="white", zorder=3)
        axis.set_xscale("log")
        axis.set_xlabel("bytes of cache per token (log)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        ticks = [digit * 10**power for power in range(1, 7) for digit in (1, 2, 5)]
        low = min(r["bytes_per_token"] for r in rows)
        high = max(r["bytes_per_token"] for r in rows)
        ticks = [t for t in ticks if low / 1.3 <= t <= high * 1.3]
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.set_xlim(low / 1.25, high * 1.25)
    axes[0][0].set_yscale("symlog", linthresh=1.0)
    losses = [panels[0][1](r) for r in rows]
    axes[0][0].set_ylim(min(0.0, *losses) - 0.15, max(1.0, *losses) * 1.5)
    for axis in axes[0][1:]:
        axis.set_ylim(-7, 107)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", markersize=9, color=colors(i % 20),
                   label=f"{i + 1}  {row['method']}")
        for i, row in enumerate(rows)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.canvas.draw()
    for axis, (_, value) in zip(axes[0], panels):
        _label(axis, [(r["bytes_per_token"], value(r), str(number[r["method"]])) for r in rows])
    return figure


def _label(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each point's number beside it, further up where another number already stands."""
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(points, key=lambda p: (p[1], p[0])):
        left, base = axis.transData.transform((x, y))
        shift = 0.0
        while any(abs(left - a) < 18 and abs(base + shift - b) < 11 for a, b in taken):
            shift += 4
        taken.append((left, base + shift))
        scale = 72 / axis.figure.dpi
        axis.annotate(
            text, (x, y), (6, 3 + shift * scale), textcoords="offset points", fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "gray"} if shift else None,
        )  # fmt: skip


def write(
    out: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    columns: Mapping[str, str],
) -> list[pathlib.Path]:
    """Writes pareto.png and report.html into `out`; returns their paths."""
    folder = pathlib.Path(out)
    picture = pareto(rows)
    image = io.BytesIO()
    picture.savefig(image, dpi=150)
    plt.close(picture)
    png, page = folder / "pareto.png", folder / "report.html"
    png.write_bytes(image.getvalue())
    page.write_text(_page(image.getvalue(), rows, settings, environment, columns), encoding="utf-8")
    return [png, page]


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;width:100%}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left;font-family:monospace}
img{max-width:100%}
code,pre{font-size:13px;background:#f5f5f5;padding:.2rem .4rem;border-radius:4px}
pre{overflow-x:auto;padding:.8rem}
.error{color:#b00}
"""


def _page(
    image: bytes,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    columns: Mapping[str, str],
) -> str:
    """One self-contained HTML page."""
    columns = filled(columns, rows)
    head = "".join(f"<th>{html.escape(spec.split('|')[0])}</th>" for spec in columns.values())
    lines = []
    for row in rows:
        if row.get("error"):
            lines.append(
                f'<tr><td>{html.escape(row["method"])}</td><td class="error" colspan='
                f'"{len(columns) - 1}">{html.escape(row["error"])}</td></tr>'
            )
            continue
        cells = "".join(f"<td>{html.escape(cell(row.get(k), s))}</td>" for k, s in columns.items())
        lines.append(f"<tr>{cells}</tr>")
    facts = "\n".join(f"{k}: {v}" for k, v in {**settings, **environment}.items())
    data = base64.b64encode(image).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>KV-cache methods</title><style>{STYLE}</style>
<h1>KV-cache methods on {html.escape(str(settings["model"]))}</h1>
<p>Perplexity, KL divergence and top-1 agreement (both against dense) are of
{settings["continuation"]} tokens after {settings["context"]} tokens of context, fed one by one
through the compressed cache, mean of {len(settings["offsets"])} samples. Needles: five-digit
numbers hidden in texts of {", ".join(map(str, settings["needle_lengths"]))} tokens; "agnostic":
the question is asked after compression. Bytes are those really allocated, metadata and spare room
included. Speeds are medians of interleaved runs at batch {len(settings["offsets"])}.</p>
<img alt="Bytes per token against loss of quality" src="data:image/png;base64,{data}">
<table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>
<h2>Settings and environment</h2><pre>{html.escape(facts)}</pre></html>
"""
