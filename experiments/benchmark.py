"""Speed and memory of decoding, against the machine's roofline and, if asked, a peer.

    python -m experiments.benchmark --peer=transformers

Every figure is the median of interleaved runs. The roofline of a decode step is the bytes of
weights and cache that it must read, over the bandwidth of a float32 matrix-vector product; of each
round the best of those measured just before and after its runs, since a shared machine's bandwidth
changes from second to second. The best of all is reported too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import common
from kvjax import cache as kv
from kvjax.compress import dense, kivi, parse
from kvjax.decode import generate, prefill, replay
from kvjax.models import Config, Model, forward, load, save_pretrained
from kvjax.models.llama import flatten, parameters

flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_enum("peer", None, ["transformers"], "Run beside it (needs torch and transformers).")
flags.DEFINE_integer("rounds", 5, "Interleaved rounds.", lower_bound=1)
flags.DEFINE_integer("tokens", 32, "Tokens decoded per run.", lower_bound=1)
flags.DEFINE_string("methods", "", "Expressions, for decode speed beside dense in one run.")
flags.DEFINE_list("held", ["2048", "8192"], "Tokens held when `methods` are measured.")
flags.DEFINE_string(
    "calibration", "results/calibration", "Folder of `experiments.calibrate`, for `methods`."
)
PARTS = ("decode", "capacity", "long", "kivi", "compile", "prefill", "methods")
flags.DEFINE_list("only", [], f"Parts to run: {', '.join(PARTS)}; empty: all.")
flags.DEFINE_string("out", "results/benchmark", "Folder for results.json.")
FLAGS = flags.FLAGS

# Between runs: the threads of the one before spin for a while, waiting for more work.
REST = 0.5
COLUMNS = {
    "case": "case",
    "milliseconds": "ms|.2f",
    "tokens_per_second": "tok/s|.1f",
    "of_roofline": "of roofline|.0%",
    "bytes_per_token": "bytes/token|,.0f",
    "bits_per_value": "bits/value|.2f",
    "ratio_to_peer": "vs transformers|.2f",
    "note": "note",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Decoding from a cache that holds `held` tokens with room for `capacity`."""

    name: str
    held: int
    capacity: int
    batch: int = 1
    method: Any = None
    constants: Any = None  # that the method reads

    @property
    def chain(self) -> Any:
        return dense() if self.method is None else self.method


class Bandwidth:
    """Best bytes per second of a float32 matrix-vector product over 512 MiB."""

    def __init__(self) -> None:
        self.matrix = jnp.ones((16384, 8192), jnp.float32)
        self.vector = jnp.ones((8192,), jnp.float32)
        self.run = jax.jit(jnp.matmul)
        self.best = 0.0
        self.measure()

    def measure(self) -> float:
        """The best of three, in bytes per second."""
        found = 0.0
        for _ in range(3):
            start = time.perf_counter()
            self.run(self.matrix, self.vector).block_until_ready()
            found = max(found, self.matrix.nbytes / (time.perf_counter() - start))
        self.best = max(self.best, found)
        return found


def weights_bytes(model: Model) -> int:
    """Bytes of weights that one decode step reads: all but an untied embedding."""
    flat = flatten(model)
    return sum(x.nbytes for name, x in flat.items() if name != "embed" or model.config.tied)


def filled(model: Model, case: Case) -> tuple[jax.Array, Any]:
    """A cache of random keys and values: decode speed does not depend on what they are."""
    cache = kv.init_cache(
        model.config, case.chain, case.batch, case.capacity, prompt=case.held, dtype=jnp.float32,
        constants=case.constants,
    )  # fmt: skip
    config = model.config
    shape = (config.layers, case.batch, config.kv_heads, case.held, config.head_dim)
    pos = jnp.broadcast_to(jnp.arange(case.held), (case.batch, case.held))
    key = jax.random.key(0)
    moving, rest = kv.apart(cache)

    @jax.jit
    def fill(moving: Any) -> Any:
        flags = {m.name: jax.random.bernoulli(key, 0.05, shape[:4]) * 1.0 for m in case.chain.made}
        k, v = jax.random.normal(key, shape), jax.random.normal(key, shape)
        new = kv.New(kv.KV(k, v, pos[None, :, None], flags))
        if cache.needs_attention:
            queries = (*shape[:2], config.heads, *shape[3:])
            one = jnp.ones(queries[:4])
            seen = kv.Observation(
                jax.random.normal(key, queries), one, one * case.held, pos, cache.constants["span"]
            )
            new = kv.New(new.kv, seen)
        return kv.apart(kv.commit(kv.together(moving, rest), new, phase="prefill"))[0]

    cache = kv.together(fill(moving), rest)
    if cache.replays:
        cache = replay(model, cache, pos % 1000, pos)
    cache = jax.jit(kv.finish)(cache)
    logits = jnp.zeros((case.batch, config.vocab_size)).at[:, 100].set(1.0)
    return logits, cache


def decoder(model: Model, case: Case, tokens: int) -> Callable[[], float]:
    """A function that decodes `tokens` tokens and returns the seconds per token.

    The cache is donated, as one that is decoded from once should be: a copy is made beforehand.
    """
    logits, cache = filled(model, case)
    moving, rest = kv.apart(cache)
    copied = jax.jit(lambda moving: jax.tree.map(jnp.copy, moving))

    def run() -> float:
        given = kv.together(jax.block_until_ready(copied(moving)), rest)
        start = time.perf_counter()
        out = generate(model, given, logits, tokens, stop=(), donate=True)
        out.tokens.block_until_ready()
        return (time.perf_counter() - start) / tokens

    run()
    return run


def cache_bytes(model: Model, case: Case) -> int:
    """Bytes that the filled cache of a case allocates, without filling it."""
    return kv.nbytes(jax.eval_shape(lambda: filled(model, case)[1]))


def read_bytes(model: Model, case: Case, tokens: int) -> int:
    """Bytes that an average step of the run must read."""
    share = (case.held + tokens / 2) / case.capacity
    return int(weights_bytes(model) + min(share, 1.0) * cache_bytes(model, case))


class Peer:
    """Hugging Face transformers with the same weights, greedy, static inputs, eager on CPU."""

    def __init__(self, model: Model):
        import torch
        import transformers

        torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
        self.torch = torch
        self.folder = tempfile.TemporaryDirectory()
        save_pretrained(model, pathlib.Path(self.folder.name))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder.name, dtype=torch.float32
        ).eval()

    def decoder(self, case: Case, tokens: int) -> Callable[[], float]:
        torch = self.torch
        prompt = torch.randint(0, 1000, (case.batch, case.held))

        def run() -> float:
            with torch.inference_mode():
                state = self.model(prompt, use_cache=True, logits_to_keep=1)
                past, token = state.past_key_values, state.logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                for _ in range(tokens):
                    state = self.model(token, past_key_values=past, use_cache=True)
                    past, token = state.past_key_values, state.logits[:, -1:].argmax(-1)
                return (time.perf_counter() - start) / tokens

        run()
        return run

    def prefill(self, length: int) -> Callable[[], float]:
        torch = self.torch
        prompt = torch.randint(0, 1000, (1, length))

        def run() -> float:
            with torch.inference_mode():
                start = time.perf_counter()
                self.model(prompt, use_cache=True, logits_to_keep=1)
                return time.perf_counter() - start

        run()
        return run


def interleaved(
    runs: dict[str, Callable[[], float]], rounds: int, bandwidth: Bandwidth
) -> dict[str, list[float]]:
    """Seconds by name, every round running each once; and as "bandwidth" that of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, "bandwidth")}
    before = bandwidth.measure()
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(REST)
            seconds[name].append(run())
        time.sleep(REST)
        after = bandwidth.measure()
        seconds["bandwidth"].append(max(before, after))
        before = after
    return seconds


def of_roofline(seconds: dict[str, list[float]], name: str, size: int) -> float:
    """Median over rounds: the time that reading `size` bytes takes, over the time of the run."""
    return float(np.median(size / np.multiply(seconds["bandwidth"], seconds[name])))


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of how many times faster `fast` is than `slow`."""
    return float(np.median(np.divide(seconds[slow], seconds[fast])))


def decode_part(model: Model, peer: Peer | None, bandwidth: Bandwidth, results: Any) -> None:
    tokens, rounds = FLAGS.tokens, FLAGS.rounds
    room = 512 + 2 * tokens
    for case in (
        Case("decode, batch 1, 512 held", 512, room),
        Case("decode, batch 8, 512 held", 512, room, 8),
    ):
        runs = {"kvjax": decoder(model, case, tokens)}
        if peer is not None:
            runs["peer"] = peer.decoder(case, tokens)
        seconds = interleaved(runs, rounds, bandwidth)
        row = timing(case.name, seconds["kvjax"], case.batch)
        row["of_roofline"] = of_roofline(seconds, "kvjax", read_bytes(model, case, tokens))
        if peer is not None:
            row["ratio_to_peer"] = ratio(seconds, "peer", "kvjax")
        results.put(row)


def capacity_part(model: Model, bandwidth: Bandwidth, results: Any) -> None:
    tokens = FLAGS.tokens
    small, large = (Case(f"64 held, capacity {n}", 64, n) for n in (512, 8192))
    runs = {c.name: decoder(model, c, tokens) for c in (small, large)}
    seconds = interleaved(runs, FLAGS.rounds, bandwidth)
    results.put(timing(small.name, seconds[small.name], 1))
    row = timing(large.name, seconds[large.name], 1)
    speed = ratio(seconds, small.name, large.name)
    results.put(row | {"speed_of_capacity_512": speed, "note": f"{speed:.2f} x capacity 512"})


def size(model: Model, case: Case) -> dict[str, float]:
    """Bytes allocated per token of the capacity, and per value that dense would hold of it."""
    each = cache_bytes(model, case) / case.capacity / case.batch
    config = model.config
    values = 2 * config.layers * config.kv_heads * config.head_dim
    return {"bytes_per_token": each, "bits_per_value": 8 * each / values}


def long_part(
    model: Model, bandwidth: Bandwidth, results: Any, held: int, methods: dict[str, Any]
) -> None:
    """Dense and methods (label -> chain, what it reads) when `held` tokens are held at the end."""
    tokens = FLAGS.tokens
    cases = [Case(f"dense, {held} held", held - tokens, held)]
    for label, (chain, given) in methods.items():
        cases.append(Case(f"{label}, {held} held", held - tokens, held, 1, chain, given))
    runs, sizes = {}, {}
    for case in cases:
        try:
            sizes[case.name], runs[case.name] = size(model, case), decoder(model, case, tokens)
        except ValueError as wrong:  # needs more of a prompt than random keys and values
            common.console.print(f"left out: {case.name}: {wrong}", highlight=False)
    cases = [case for case in cases if case.name in runs]
    seconds = interleaved(runs, FLAGS.rounds, bandwidth)
    for case in cases:
        row = timing(case.name, seconds[case.name], 1) | sizes[case.name]
        row["of_roofline"] = of_roofline(seconds, case.name, read_bytes(model, case, tokens))
        if case.method is not None:
            row["speed_of_dense"] = ratio(seconds, cases[0].name, case.name)
            row["note"] = f"{row['speed_of_dense']:.2f} x dense"
        results.put(row)


def timing(name: str, seconds: list[float], batch: int) -> dict[str, Any]:
    middle = float(np.median(seconds))
    return {
        "case": name,
        "seconds": middle,
        "milliseconds": 1e3 * middle,
        "tokens_per_second": batch / middle,
        "spread": [float(min(seconds)), float(max(seconds))],
    }


@functools.partial(jax.jit, donate_argnames=("moving",))
def _step(model: Model, moving: Any, rest: Any, token: jax.Array) -> Any:
    cache = kv.together(moving, rest)
    logits, new = forward(model, token, cache.length[:, None], cache)
    return logits, kv.apart(kv.commit(cache, new))[0]


def compile_part(model: Model, results: Any) -> None:
    """Compile time of the decode loop, by depth; temporaries and aliasing of one step."""
    config = model.config
    times = {}
    for layers in (6, config.layers):
        shape = dataclasses.replace(config, layers=layers)
        small = jax.eval_shape(lambda c=shape: _blank(c))
        runs = []
        for _ in range(3):
            jax.clear_caches()
            cache = jax.eval_shape(lambda c=shape: kv.init_cache(c, dense(), 1, 1024))
            logits = jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32)
            start = time.perf_counter()
            jax.jit(lambda m, c, x: generate(m, c, x, 32, stop=())).lower(
                small, cache, logits
            ).compile()
            runs.append(time.perf_counter() - start)
        times[layers] = float(np.median(runs))
    deep = times[config.layers]
    results.put(
        {
            "case": f"compile the decode loop, {config.layers} layers",
            "seconds": deep,
            "milliseconds": 1e3 * deep,
            "ratio_to_6_layers": deep / times[6],
            "note": f"{deep / times[6]:.2f} x 6 layers",
        }
    )
    for name, chain in (("dense", dense()), ("kivi(bits=4)", kivi(bits=4))):
        cache = jax.eval_shape(lambda c=chain: kv.init_cache(config, c, 1, 8192))
        moving, rest = kv.apart(cache)
        whole = jax.eval_shape(lambda: _blank(config))
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        compiled = _step.lower(whole, moving, rest, token).compile()
        memory = compiled.memory_analysis()
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moving))
        temp, alias = memory.temp_size_in_bytes, memory.alias_size_in_bytes
        results.put(
            {
                "case": f"decode step at capacity 8192, {name}",
                "temporaries_mb": temp / 1e6,
                "aliased": alias / state,
                "note": f"temporaries {temp / 1e6:.1f} MB, {alias / state:.1%} aliased",
            }
        )


def _blank(config: Config) -> Model:
    return Model(config, {n: jnp.zeros(s, jnp.float32) for n, (s, _) in parameters(config).items()})


def prefill_part(model: Model, peer: Peer | None, bandwidth: Bandwidth, results: Any) -> None:
    length = 2048
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, 1000)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(prefill(model, tokens, dense(), new_tokens=64)[0])
        return time.perf_counter() - start

    run()
    runs = {"kvjax": run}
    if peer is not None:
        runs["peer"] = peer.prefill(length)
    seconds = interleaved(runs, FLAGS.rounds, bandwidth)
    row = timing(f"prefill of {length} tokens", seconds["kvjax"], 1)
    row["tokens_per_second"] = length / row["seconds"]
    if peer is not None:
        row["ratio_to_peer"] = ratio(seconds, "peer", "kvjax")
    results.put(row)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if FLAGS.peer and any(importlib.util.find_spec(m) is None for m in ("torch", "transformers")):
        raise app.UsageError("--peer=transformers: pip install 'kvjax[peers]' first")
    parts = set(FLAGS.only or PARTS)
    if unknown := sorted(parts - set(PARTS)):
        raise app.UsageError(f"only={unknown}: expected some of {', '.join(PARTS)}")
    settings = {
        "model": FLAGS.model, "peer": FLAGS.peer, "rounds": FLAGS.rounds, "tokens": FLAGS.tokens
    }  # fmt: skip
    try:
        methods = dict(parse(FLAGS.methods)) if FLAGS.methods else {}
        lengths = [int(n) for n in FLAGS.held]
        if min(lengths, default=0) <= FLAGS.tokens:
            raise ValueError(f"held={FLAGS.held}: expected more than tokens={FLAGS.tokens}")
        results = common.Results(FLAGS.out, settings, key="case")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    model, tokenizer = load(FLAGS.model, tokenizer=bool(methods))
    try:
        methods = {
            label: (c, common.constants_of(FLAGS.calibration, label, c, model, tokenizer))
            for label, c in methods.items()
        }
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    bandwidth = Bandwidth()
    peer = Peer(model) if FLAGS.peer else None
    with common.console.status("measuring"):
        if "decode" in parts:
            decode_part(model, peer, bandwidth, results)
        if "capacity" in parts:
            capacity_part(model, bandwidth, results)
        if parts & {"long", "kivi"}:
            four = {"kivi(bits=4)": (kivi(bits=4), {})} if "kivi" in parts else {}
            long_part(model, bandwidth, results, 8192, four)
        for held in lengths if "methods" in parts and methods else ():
            long_part(model, bandwidth, results, held, methods)
        if "prefill" in parts:
            prefill_part(model, peer, bandwidth, results)
        if "compile" in parts:
            compile_part(model, results)
    results.put({"case": "memory bandwidth", "bytes_per_second": bandwidth.best,
                 "note": f"{bandwidth.best / 1e9:.1f} GB/s"})  # fmt: skip
    common.table("Decode speed and memory", COLUMNS, results.rows)
    common.console.print(f"wrote {results.path}", highlight=False)


if __name__ == "__main__":
    app.run(main)
