"""The pictures and the page of `experiments.gallery`."""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

COLORS = ("#f3f3f1", "#1f5fa8", "#7fb7e6", "#d9822b", "#c9c4dd")
ANSWER = "#b3261e"


def picture(shown: Any, pieces: Sequence[str], marked: Sequence[int], forms: Sequence[str]) -> Any:
    """Layers and heads by tokens, and beside it how many tokens each layer holds."""
    layers, heads, time = shown.form.shape
    wide = min(max(7.0, 0.085 * time), 26.0)
    high = min(max(2.6, 0.042 * layers * heads), 9.0)
    figure, (axis, side) = plt.subplots(
        1, 2, figsize=(wide + 3.0, high + 1.9), layout="constrained", sharey=True,
        width_ratios=(wide, 2.2),
    )  # fmt: skip
    rows = shown.form.reshape(layers * heads, time)
    axis.imshow(
        rows, cmap=ListedColormap(COLORS), vmin=-0.5, vmax=len(COLORS) - 0.5, aspect="auto",
        interpolation="nearest", extent=(-0.5, time - 0.5, layers - 0.5, -0.5),
    )  # fmt: skip
    for layer in range(1, layers):
        axis.axhline(layer - 0.5, color="white", lw=0.6)
    for first, last in _runs(marked):
        axis.axvspan(first - 0.5, last + 0.5, fill=False, edgecolor=ANSWER, lw=1.4)
    size = max(3.0, min(7.0, 60 * wide / time))
    axis.set_xticks(range(time), [_visible(p) for p in pieces], rotation=90, fontsize=size)
    for at in marked:
        axis.get_xticklabels()[at].set_color(ANSWER)
    axis.tick_params(axis="x", length=0, pad=1)
    axis.set_ylabel(f"layer, {heads} head{'s' * (heads > 1)} in each")
    budgets, below = shown.budgets, np.zeros(layers)
    for form in range(1, len(forms)):
        each = (shown.form == form).sum(-1).mean(1)
        side.barh(range(layers), each, left=below, height=0.75, color=COLORS[form])
        below = below + each
    side.hlines(range(layers), budgets.min(1), budgets.max(1), color="black", lw=1)
    side.set_xlim(0, time)
    side.set_xlabel("tokens held, mean of heads\n(line: fewest to most)", fontsize=8)
    side.tick_params(axis="y", length=0)
    used = [i for i in range(len(forms)) if (rows == i).any()]
    handles = [Patch(facecolor=COLORS[i], edgecolor="#999", label=forms[i]) for i in used]
    if len(marked):
        handles.append(Patch(fill=False, edgecolor=ANSWER, label="the answer"))
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9, frameon=False
    )
    figure.suptitle(f"{shown.label}: {shown.share.mean():.0%} held", x=0.01, ha="left", fontsize=11)
    return figure


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring indices as (first, last)."""
    runs: list[tuple[int, int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def _visible(piece: str) -> str:
    """A token as a label: blanks and new lines made visible, no mathematics of matplotlib."""
    piece = piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\u00b7")
    return piece.replace("$", r"\$")


def write(
    out: str,
    shown: Sequence[Any],
    pieces: Sequence[str],
    marked: Sequence[int],
    forms: Sequence[str],
    facts: Mapping[str, Any],
) -> list[pathlib.Path]:
    """Writes a PNG per method and gallery.html, which stands alone; returns their paths."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths, parts = [], []
    for number, one in enumerate(shown):
        figure = picture(one, pieces, marked, forms)
        image = io.BytesIO()
        figure.savefig(image, dpi=130)
        plt.close(figure)
        name = re.sub(r"[^a-z0-9]+", "-", one.label.lower()).strip("-")
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(image.getvalue())
        parts.append(_section(number, one, image.getvalue()))
    page = folder / "gallery.html"
    page.write_text(_page(shown, pieces, marked, forms, facts, parts), encoding="utf-8")
    return [*paths, page]


def _section(number: int, one: Any, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    budgets = one.budgets
    label = html.escape(one.label)
    return f"""<section data-method="{number}"><h2>{label}</h2>
<p>{one.share.mean():.1%} of all tokens of all heads held; {budgets.min()} to {budgets.max()} per
head; {one.bytes / one.dense:.0%} of dense bytes.</p>
<p class="text"></p>
<img alt="Tokens by layers and heads under {label}" src="data:image/png;base64,{data}"></section>"""


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:110rem;padding:0 1.5rem}
body{color:#222}
.text{font:14px/1.9 ui-monospace,monospace;max-width:78rem;white-space:pre-wrap}
.text span{border-radius:2px;padding:1px 0}
.text span.answer{outline:1.5px solid #b3261e}
h2{font:600 16px/1.4 ui-monospace,monospace;margin-top:2.5rem}
img{max-width:100%}
.pick{position:sticky;top:0;background:#fffffff0;padding:.6rem 0;border-bottom:1px solid #ddd}
.key i{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em;border:1px solid #999}
pre{font-size:12px;background:#f5f5f5;padding:.8rem;overflow-x:auto}
"""
SCRIPT = """
const d=JSON.parse(document.getElementById('data').textContent);
const pick=document.getElementById('pick');
const bytes=d.methods.map(m=>Uint8Array.from(atob(m),c=>c.charCodeAt(0)));
function option(v,t){const o=document.createElement('option');o.value=v;o.textContent=t;
  pick.append(o)}
option('all','all layers and heads (share that hold a token)');
for(let l=0;l<d.layers;l++)for(let h=0;h<d.heads;h++)option(l*d.heads+h,'layer '+l+', head '+h);
function draw(){document.querySelectorAll('section').forEach((s,m)=>{
  const p=s.querySelector('.text');p.textContent='';
  d.pieces.forEach((t,i)=>{const e=document.createElement('span');e.textContent=t;
    const rows=d.layers*d.heads;let n=0;
    for(let r=0;r<rows;r++)n+=bytes[m][r*d.pieces.length+i]>0;
    if(pick.value==='all'){const a=n/rows;e.style.background='rgba(31,95,168,'+(0.85*a)+')';
      e.style.color=a>0.55?'#fff':(a===0?'#aaa':'#222')}
    else{const f=bytes[m][pick.value*d.pieces.length+i];e.style.background=d.colors[f];
      e.style.color=f===1?'#fff':(f===0?'#aaa':'#222')}
    e.title='token '+i+': held by '+Math.round(100*n/rows)+'% of heads';
    if(d.marked.includes(i))e.className='answer';p.append(e)})})}
pick.addEventListener('change',draw);draw();
"""


def _page(
    shown: Sequence[Any], pieces: Sequence[str], marked: Sequence[int], forms: Sequence[str],
    facts: Mapping[str, Any], parts: Sequence[str],
) -> str:  # fmt: skip
    """One self-contained page: the text colored, per method, layer and head; and the pictures."""
    layers, heads, _ = shown[0].form.shape
    data = {
        "layers": layers,
        "heads": heads,
        "pieces": list(pieces),
        "marked": [int(i) for i in marked],
        "colors": list(COLORS),
        "methods": [base64.b64encode(s.form.tobytes()).decode() for s in shown],
    }
    # Nothing in the text may end the script.
    embedded = json.dumps(data).replace("<", "\\u003c")
    key = "".join(f'<i style="background:{c}"></i>{html.escape(f)}' for c, f in zip(COLORS, forms))
    said = html.escape("\n".join(f"{k}: {v}" for k, v in facts.items()))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What is kept</title><style>{STYLE}</style>
<h1>What each method keeps of a prompt of {len(pieces)} tokens</h1>
<p>The text, once per method: of all heads together, the darker a token the more heads of all
layers hold it; of one head, by form. Outlined: the answer. Below it every layer and head, and how
many tokens each layer holds.</p>
<p class="pick"><label>Show <select id="pick"></select></label> <span class="key">{key}</span></p>
{"".join(parts)}
<h2>Settings and environment</h2><pre>{said}</pre>
<script id="data" type="application/json">{embedded}</script><script>{SCRIPT}</script></html>
"""
