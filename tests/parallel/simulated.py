"""What runs on eight simulated CPU devices, in a process of its own (`test_sharded.py`).

    python -m tests.parallel.simulated '[["dense", "data=2,tensor=2,context=2", 4], ...]'

Prints one line of JSON per case (method, mesh, rows of the batch).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import apart, commit, finish, init_cache, together
from kvjax.compress import parse
from kvjax.decode import generate, prefill
from kvjax.models import Config, forward, llama
from kvjax.parallel import Layout, Rules, make_mesh, parameter_sharding, replicated, shard

CONFIG = Config(320, 64, 128, layers=2, heads=8, kv_heads=4, head_dim=16)
PROMPT, NEW, LONG = 72, 24, 4096


def step(model, moving, rest, token):
    cache = together(moving, rest)
    out, new = forward(model, token, cache.length[:, None], cache)
    return jnp.argmax(out[:, 0], -1), apart(commit(cache, new))[0]


def compiled_step(config, method, layout, batch, dtype=jnp.float32, length=LONG, room=256):
    """The compiled decode step of a model and cache that exist as shapes only; and the cache."""
    where = parameter_sharding(layout.mesh, layout.rules)
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where(name, shape))
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


def case(name, mesh, batch):
    method = dict(parse(name))[name]
    rules = Rules()
    model = llama.init(CONFIG, jax.random.key(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, 320))
    lengths = np.asarray([PROMPT - 8 * (i % 2) for i in range(batch)])
    logits, cache = prefill(model, tokens, method, lengths=lengths, new_tokens=NEW)
    single = generate(model, cache, logits, NEW, stop=())

    layout = Layout(make_mesh(mesh), rules)
    placed = shard(model, layout.mesh, rules)
    first, cache = prefill(
        placed, layout.rows(tokens), method, lengths=layout.rows(lengths), new_tokens=NEW,
        layout=layout,
    )  # fmt: skip
    out = generate(placed, cache, first, NEW, stop=())
    # The same cache on one device: whatever prefill rounded differently, decoding starts alike.
    copy = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), cache.replace(layout=None))
    same = generate(model, copy, jnp.asarray(np.asarray(first)), NEW, stop=())

    compiled, moving = compiled_step(CONFIG, method, layout, batch)
    large = [n for n, x in zip(shard_sizes(moving), jax.tree.leaves(moving)) if x.size >= LONG // 4]
    memory = compiled.memory_analysis()
    far = lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b))))  # noqa: E731
    split = layout.shardings(cache).state[0]
    return {
        "prefill": far(first, logits),
        "tokens": bool((np.asarray(out.tokens) == np.asarray(single.tokens)).all()),
        "logprobs": far(out.logprobs, single.logprobs),
        "same_tokens": bool((np.asarray(out.tokens) == np.asarray(same.tokens)).all()),
        "same_logprobs": far(out.logprobs, same.logprobs),
        "moved": max(n for _, n in moved(compiled.as_text())),
        "smallest": min(large),
        "alias": memory.alias_size_in_bytes,
        "state": sum(
            n * x.dtype.itemsize for n, x in zip(shard_sizes(moving), jax.tree.leaves(moving))
        ),
        "context": sum("context" in str(s.spec) for s in jax.tree.leaves(split)),
        "held": [
            dataclasses.asdict(x.spec)["shards"] for x in cache.state[0] if hasattr(x, "spec")
        ],
    }


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        print(json.dumps(case(*arguments)), flush=True)
