"""What runs on eight simulated CPU devices, in a process of its own (`test_sharded.py`).

    python -m tests.parallel.simulated '[["dense", "data=2,tensor=2,context=2", 4, true]]'

Prints one line of JSON per case: a method with a mesh, rows of the batch and whether the prefill
runs on the mesh too; or "hybrid" or "diffusion" with a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Window, apart, chain, commit, finish, init_cache, store, together
from kvjax.codecs import per_kv, quantize
from kvjax.compress import parse
from kvjax.decode import generate, prefill
from kvjax.diffusion import dkv_decode, llada
from kvjax.diffusion import generate as diffuse
from kvjax.models import Config, forward, llama
from kvjax.models.mamba2 import Mamba2
from kvjax.parallel import Layout, make_mesh, parameter_sharding, replicated, shard
from kvjax.speculate import prompt_lookup, speculate

CONFIG = Config(320, 64, 128, layers=2, heads=8, kv_heads=4, head_dim=16)
PROMPT, NEW, LONG = 72, 24, 4096


# KIVI with scales that are not rounded to float16.
WIDE = "kivi, float32 scales"


def method_of(name):
    if name != WIDE:
        return dict(parse(name))[name]
    k, v = (quantize(4, axis, 16, scale_dtype="float32") for axis in ("channel", "token"))
    return chain(store(per_kv(k=k, v=v), keys=Window(0, 16), values=Window(16, 1)))


def step(model, moving, rest, token):
    cache = together(moving, rest)
    out, new = forward(model, token, cache.length[:, None], cache)
    return jnp.argmax(out[:, 0], -1), apart(commit(cache, new))[0]


def compiled_step(config, method, layout, batch, dtype=jnp.float32, length=LONG, room=256):
    """The compiled decode step of a model and cache that exist as shapes only; and the cache."""
    where = parameter_sharding(layout.mesh, layout.rules).all(config)
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where[name])
        for name, (shape, _) in llama.parameters(config).items()
    }
    cache = jax.eval_shape(
        lambda: finish(
            init_cache(config, method, batch, length, length - room, dtype, layout=layout)
        )
    )
    cache = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        cache, layout.shardings(cache),
    )  # fmt: skip
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=replicated(layout.mesh))
    moving, rest = apart(cache)
    run = jax.jit(step, donate_argnums=1)
    return run.lower(llama.Model(config, params), moving, rest, token).compile(), moving


def shard_sizes(tree):
    """Numbers per device of every array."""
    return [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)]


def moved(hlo):
    """(what, numbers) of every collective of a compiled program."""
    found = []
    names = (
        "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|collective-broadcast"
    )
    for kind, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", hlo):
        sizes = [
            math.prod(map(int, filter(None, n.split(","))))
            for n in re.findall(r"\[([\d,]*)\]", kind)
        ]
        found.append((name, max(sizes)))
    return found


def far(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def same(a, b):
    return bool((np.asarray(a) == np.asarray(b)).all())


@functools.cache
def prompts(batch):
    """A model, prompts of two lengths, and their exact keys and values, on one device."""
    model = llama.init(CONFIG, jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, 320))
    lengths = np.asarray([PROMPT - 8 * (i % 2) for i in range(batch)])
    positions = np.where(np.arange(PROMPT) < lengths[:, None], np.arange(PROMPT), -1)
    run = jax.jit(lambda *x: forward(*x, phase="prefill", logits="last", statistics=True))
    logits, new = run(model, tokens, positions)
    return model, tokens, lengths, logits[:, 0], new


@jax.jit
def fill(moving, rest, new):
    return apart(finish(commit(together(moving, rest), new, phase="prefill")))[0]


def filled(method, batch, new, layout=None):
    """The cache of a method after these prompts."""
    moving, rest = apart(init_cache(CONFIG, method, batch, PROMPT + NEW, PROMPT, layout=layout))
    return together(fill(moving, rest, new), rest)


@functools.cache
def on_one(name, batch):
    model, _, _, logits, new = prompts(batch)
    return generate(model, filled(method_of(name), batch, new), logits, NEW, stop=())


def differing(a, b, dtype):
    """Share of the numbers of a dtype that two caches hold which differ."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    pairs = [(x, y) for x, y in pairs if x.dtype == dtype]
    return sum(int(np.sum(x != y)) for x, y in pairs) / max(sum(x.size for x, _ in pairs), 1)


def decoding(name, mesh, batch, whole):
    """Decoding on a mesh beside decoding on one device; `whole`: also with the prefill there."""
    method = method_of(name)
    model, tokens, lengths, logits, new = prompts(batch)
    single = on_one(name, batch)
    layout = Layout(make_mesh(mesh))
    placed = shard(model, layout.mesh)
    put = functools.partial(jax.device_put, device=replicated(layout.mesh))
    cache = filled(method, batch, put(new), layout)
    out = generate(placed, cache, put(logits), NEW, stop=())
    row = {
        "tokens": same(out.tokens, single.tokens),
        "logprobs": far(out.logprobs, single.logprobs),
    }
    if whole:
        first, other = prefill(
            placed, layout.rows(tokens), method, lengths=layout.rows(lengths), new_tokens=NEW,
            layout=layout,
        )  # fmt: skip
        out = generate(placed, other, first, NEW, stop=())
        copy = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), other.replace(layout=None))
        again = generate(model, copy, jnp.asarray(np.asarray(first)), NEW, stop=())
        row |= {
            "prefill": far(first, logits),
            "whole_tokens": same(out.tokens, single.tokens),
            "whole_logprobs": far(out.logprobs, single.logprobs),
            "copied_logprobs": far(out.logprobs, again.logprobs),
            "other_codes": differing(other.state, cache.state, np.uint8),
            "other_scales": differing(other.state, cache.state, np.float16),
        }
    split = layout.shardings(cache).state[0]
    row["context"] = sum("context" in str(s.spec) for s in jax.tree.leaves(split))
    return row | compiled(method, layout, batch)


def compiled(method, layout, batch):
    """What the compiled decode step of a cache of 4,096 tokens moves and aliases, per device."""
    step, moving = compiled_step(CONFIG, method, layout, batch)
    sizes = shard_sizes(moving)
    large = [n for n, x in zip(sizes, jax.tree.leaves(moving)) if x.size >= LONG // 4]
    return {
        "moved": max(n for _, n in moved(step.as_text())),
        "smallest": min(large),
        "alias": step.memory_analysis().alias_size_in_bytes,
        "state": sum(n * x.dtype.itemsize for n, x in zip(sizes, jax.tree.leaves(moving))),
    }


def hybrid(mesh):
    """Attention and Mamba-2 layers, with speculation: drafts are verified and replayed."""
    kind = Mamba2(heads=8, head_dim=16, state_size=16, groups=2, chunk=32)
    config = dataclasses.replace(CONFIG, layers=3, recurrence=kind, recurrent_layers=(0, 2))
    model = llama.init(config, jax.random.key(0))
    tokens = np.tile(np.asarray(jax.random.randint(jax.random.key(1), (4, 8), 0, 320)), (1, 4))
    lengths = np.asarray([32, 24, 32, 24])
    layout = Layout(make_mesh(mesh))
    found = []
    for run, rows, place in (
        (model, jnp.asarray, None), (shard(model, layout.mesh), layout.rows, layout)
    ):  # fmt: skip
        logits, cache = prefill(
            run, rows(tokens), chain(store()), lengths=rows(lengths), new_tokens=16, layout=place
        )
        plain = generate(run, cache, logits, 12, stop=())
        drafted = speculate(run, cache, logits, 12, prompt_lookup(), prompt=tokens, stop=())
        found.append((logits, plain, drafted))
    (logits, plain, drafted), (other, out, again) = found
    return {
        "prefill": far(other, logits),
        "tokens": same(out.tokens, plain.tokens),
        "logprobs": far(out.logprobs, plain.logprobs),
        "drafted": same(drafted.tokens, plain.tokens) and same(again.tokens, plain.tokens),
        "passes": [int(drafted.passes), int(again.passes)],
        "split": sorted({str(s.spec) for s in jax.tree.leaves(layout.shardings(cache).state[1])}),
    }


def diffusion(mesh):
    """Masked diffusion with kept keys and values, slots by position split over context."""
    config = dataclasses.replace(CONFIG, bidirectional=True, mask_token=319)
    model = llama.init(config, jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (4, 16), 0, 300))
    layout = Layout(make_mesh(mesh))
    schedule, unmasker = llada(new_tokens=16, steps=8, block=8)
    how = {"schedule": schedule, "unmasker": unmasker, "cache": dkv_decode(refresh=4)}
    one = diffuse(model, tokens, 16, sizes=(32, 16), **how)
    out = diffuse(
        shard(model, layout.mesh), layout.rows(tokens), 16, sizes=(32, 16), layout=layout, **how
    )
    return {
        "tokens": same(out.tokens, one.tokens),
        "computed": [int(out.computed), int(one.computed)],
        "keys": far(out.cache.state[0][0].kv.k, one.cache.state[0][0].kv.k),
        "context": sum(
            "context" in str(s.spec) for s in jax.tree.leaves(layout.shardings(out.cache).state)
        ),
    }


if __name__ == "__main__":
    for what, *arguments in json.loads(sys.argv[1]):
        run = {"hybrid": hybrid, "diffusion": diffusion}.get(what)
        begin = time.perf_counter()
        row = decoding(what, *arguments) if run is None else run(*arguments)
        print(json.dumps({**row, "seconds": round(time.perf_counter() - begin, 1)}), flush=True)
