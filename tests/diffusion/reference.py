"""LLaDA's decoding and dKV-Cache-Decode in plain NumPy, float64, one row: stated from the papers.

Nothing of kvjax is used but the configuration's sizes, and `noise`, which says how the loop's
random numbers follow from its key.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


class Network:
    """A bidirectional Llama block stack over some positions of a row.

    `store` maps (layer, position) to (rotated key [H, d], value [H, d]) as kept.
    """

    def __init__(self, config, flat, code=lambda x: x):
        self.c = config
        self.p = {name: np.asarray(value, np.float64) for name, value in flat.items()}
        self.code = code  # what storing does to a key or value
        self.store, self.new = {}, {}

    def __call__(self, tokens, positions):
        """Logits [len(positions), V]; keys and values are left in `self.new` for `keep`."""
        c, p = self.c, self.p
        x = p["embed"][[tokens[n] for n in positions]]
        self.new = {}
        for layer in range(c.layers):
            w = {n[7:]: v[layer] for n, v in p.items() if n.startswith("layers.")}
            h = self.norm(x, w["attention_norm"])
            q = (h @ w["q"].T).reshape(-1, c.heads, c.head_dim)
            k = (h @ w["k"].T).reshape(-1, c.kv_heads, c.head_dim)
            v = (h @ w["v"].T).reshape(-1, c.kv_heads, c.head_dim)
            q, k = self.turn(q, positions), self.turn(k, positions)
            keys, values = {}, {}
            for (level, n), (key, value) in self.store.items():
                if level == layer:
                    keys[n], values[n] = key, value
            for i, n in enumerate(positions):  # a fresh key takes the place of a stored one
                keys[n], values[n] = k[i], v[i]
                self.new[layer, n] = k[i], v[i]
            everywhere = sorted(keys)
            k = np.repeat(np.stack([keys[n] for n in everywhere]), c.groups, 1)
            v = np.repeat(np.stack([values[n] for n in everywhere]), c.groups, 1)
            score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            x = x + np.einsum("hqk,khd->qhd", weight, v).reshape(len(positions), -1) @ w["o"].T
            h = self.norm(x, w["mlp_norm"])
            gate = h @ w["gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T
        return self.norm(x, p["norm"]) @ (p["embed"] if c.tied else p["head"]).T

    def keep(self, positions):
        for (layer, n), (k, v) in self.new.items():
            if n in positions:
                self.store[layer, n] = self.code(k), self.code(v)

    def norm(self, x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.norm_eps) * weight

    def turn(self, x, positions):
        half = self.c.head_dim // 2
        angle = np.asarray(positions)[:, None, None] * self.c.rope.base ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )


@dataclasses.dataclass
class Row:
    """A finished row: tokens, the step of each token, and what it took."""

    tokens: list
    order: list
    steps: int = 0
    computed: int = 0
    active: list = dataclasses.field(default_factory=list)  # per step


def generate(
    network,
    prompt,
    new_tokens,
    steps,
    block,
    mask,
    *,
    remasking="low_confidence",
    temperature=0.0,
    guidance=0.0,
    never=(),
    last=(),
    threshold=None,
    refresh=None,
    delay=1,
    keep_prompt=True,
    noise=None,
):
    """One row.

    Args:
      never, last: LLaDA's logits_eos_inf and confidence_eos_eot_inf, as ids.
      threshold: Fast-dLLM's, in place of the quota.
      refresh: dKV-Cache-Decode's period; None: no cache. keep_prompt: False: never read from it.
      noise: (step, position) -> (uniform [V] in (0, 1), uniform scalar).
    """
    start, size = len(prompt), len(prompt) + new_tokens
    blind = Network(network.c, network.p, network.code)  # the pass without the prompt
    x = list(prompt) + [mask] * new_tokens
    out = Row(x, [-1] * size)
    per_block = steps // (new_tokens // block)
    for begin in range(start, size, block):
        end = begin + block
        masks = x[begin:end].count(mask)
        quotas = [masks // per_block + (i < masks % per_block) for i in range(per_block)]
        network.store, blind.store = {}, {}
        before, decoded = set(), set()
        for i in range(block if threshold is not None else per_block):
            if mask not in x[begin:end] or (threshold is None and quotas[i] == 0):
                break
            before, decoded = decoded, {n for n in range(size) if x[n] != mask}  # D_{i-1}, D_i
            whole = refresh is None or i <= 1 or i % refresh == 0
            frozen = before if delay else decoded
            if not keep_prompt:
                frozen = {n for n in frozen if n >= start}
            active = [n for n in range(size) if whole or n not in frozen]
            out.active.append(active)
            logits = dict(zip(active, network(x, active)))
            if guidance:
                other = [mask if n < start else x[n] for n in range(size)]
                without = dict(zip(active, blind(other, active)))
                logits = {n: without[n] + (guidance + 1) * (logits[n] - without[n]) for n in active}
            token, confidence = {}, {}
            for n in range(begin, end):
                if x[n] != mask:
                    continue
                uniform, chance = noise(out.steps, n) if noise else (None, None)
                l = logits[n].copy()
                l[list(never)] = -np.inf
                if temperature:
                    token[n] = int(np.argmax(np.exp(l) / (-np.log(uniform)) ** temperature))
                else:
                    token[n] = int(np.argmax(l))
                l[list(last)] = -np.inf
                p = np.exp(l - l.max())
                p /= p.sum()
                confidence[n] = chance if remasking == "random" else p[token[n]]
            best = sorted(confidence, key=lambda n: (-confidence[n], n))
            if threshold is None:
                chosen = best[: quotas[i]]
            else:
                chosen = best[:1] + [n for n in best[1:] if confidence[n] >= threshold]
            if refresh is not None and i > 0:
                for one in (network, blind):
                    one.keep(decoded if delay else decoded | set(chosen))
            for n in chosen:
                x[n], out.order[n] = token[n], out.steps
            out.steps += 1
            out.computed += len(active) * (2 if guidance else 1)
    return out


def noise(key, row, vocabulary):
    """The loop's random numbers for one row of the batch."""

    def draw(step, position):
        one = jax.random.fold_in(key, row)
        one = jax.random.fold_in(jax.random.fold_in(one, step), position)
        gumbel = np.asarray(jax.random.gumbel(one, (vocabulary,)), np.float64)
        return np.exp(-np.exp(-gumbel)), float(jax.random.uniform(jax.random.fold_in(one, 1)))

    return draw
