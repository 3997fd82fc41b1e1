"""Models with recurrent layers: one forward pass, one cache, one contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Recurrence, chain, commit, finish, init_cache, store
from kvjax.codecs import Codec, dense, quantize
from kvjax.decode import generate, prefill, score
from kvjax.models import Config, checkpoint, init
from kvjax.models.decoder import forward
from kvjax.models.llama import dtype_of, flatten, parameters
from kvjax.models.mamba2 import Mamba2, scan_chunks
from kvjax.models.plan import layer_plan, scan_layers
from tests.golden import reference
from tests.models.recurrent_zoo import BATCH, CONFIGS, KIND, LENGTHS, PROMPT, VOCAB, model, prompts

ROOM = PROMPT + 16
# float32 and, between two ways to sum, a few roundings per layer on logits of size about 10.
CLOSE = {"rtol": 0, "atol": 3e-5}


@functools.partial(jax.jit, static_argnames="phase")
def step(model, cache, tokens, positions, phase="decode", keep=None):
    logits, new = forward(model, tokens, positions, cache, phase=phase)
    return logits, commit(cache, new, keep=keep, phase=phase)


@functools.cache
def begun(name):
    """(model, cache after both prompts, each of its own length)."""
    own, length = model(name), np.array(LENGTHS)[:, None]
    cache = init_cache(own.config, chain(store()), BATCH, ROOM, prompt=PROMPT)
    at = np.arange(PROMPT)[None]
    _, cache = step(own, cache, prompts(), jnp.where(at < length, at, -1), "prefill")
    return own, finish(cache)


def same(a, b, scale=1e-6):
    """Two caches hold the same up to `scale` of each array's largest value."""
    np.testing.assert_array_equal(a.length, b.length)
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state)):
        if x.size:
            top = max(float(np.abs(y).max()), 1.0)
            np.testing.assert_allclose(x, y, rtol=0, atol=scale * top)


chunks = jax.jit(scan_chunks, static_argnums=5)


@pytest.mark.parametrize("chunk", [1, 4, 37])
def test_chunked_scan_is_the_recurrence(chunk):
    time, (h, p, n, g) = 37, (4, 3, 5, 2)
    draw = np.random.default_rng(0)
    decay = -draw.uniform(0, 3, (BATCH, time, h)).astype(np.float32)
    decay[:, 20] = -2000.0  # all is forgotten; what comes later must not lose digits
    decay[:, 21:] *= 1e-3
    u = draw.normal(size=(BATCH, time, h, p)).astype(np.float32)
    b, c = draw.normal(size=(2, BATCH, time, g, n)).astype(np.float32)
    start = draw.normal(size=(BATCH, h, p, n)).astype(np.float32)
    state, want = start.astype(np.float64), []
    for t in range(time):
        wide = [np.repeat(x[:, t].astype(np.float64), h // g, 1) for x in (b, c)]
        state = np.exp(decay[:, t].astype(np.float64))[..., None, None] * state
        state = state + u[:, t][..., None] * wide[0][:, :, None]
        want.append((state * wide[1][:, :, None]).sum(-1))
    y, memory = chunks(start, decay, u, b, c, chunk)
    # float32 sums of up to 37 * 5 terms of size about 1.
    np.testing.assert_allclose(y, np.stack(want, 1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(memory, state, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(chunks(start, 0 * decay, 0 * u, b, None, chunk)[1], start)


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_forward_is_the_reference_and_causal(name):
    own = model(name)
    tokens = prompts()[:1]
    run = jax.jit(lambda t: forward(own, t, jnp.arange(PROMPT)[None])[0][0])
    found = run(tokens)
    want = reference.forward(own.config, flatten(own), np.asarray(tokens[0]), PROMPT)
    np.testing.assert_allclose(found, want, **CLOSE)
    other = run(tokens.at[0, 12].add(1))
    np.testing.assert_allclose(other[:12], found[:12], **CLOSE)
    assert np.abs(other[12:] - found[12:]).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_accepting_some_of_several_rows_is_decoding_those_alone(name):
    """The state is replayed to the last bit from the same rows (tests/cache/test_recurrent.py);
    rows themselves come out of matrix products that round by their number of rows: 1e-6."""
    own, cache = begun(name)
    drafts = jax.random.randint(jax.random.key(2), (BATCH, 6), 0, VOCAB)
    accepted = np.array([5, 2])
    keep = np.where(np.arange(6) < accepted[:, None], np.arange(6), -1)
    logits, verified = step(
        own, cache, drafts, cache.length[:, None] + jnp.arange(6), "verify", jnp.asarray(keep)
    )
    alone = cache
    for t in range(max(accepted)):
        there = t < accepted
        position = jnp.where(there, alone.length, -1)[:, None]
        said, alone = step(own, alone, drafts[:, t : t + 1], position)
        np.testing.assert_allclose(said[there, 0], logits[there, t], **CLOSE)
    same(verified, alone, 3e-6)
    none = step(own, cache, drafts, cache.length[:, None] + jnp.arange(6), "verify", -1 + 0 * keep)
    for a, b in zip(jax.tree.leaves(none[1].state), jax.tree.leaves(cache.state)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_in_chunks_with_padding_anywhere(name):
    own, whole = begun(name)
    tokens = np.asarray(prompts())
    spread, at = np.zeros((BATCH, 28), int), np.full((BATCH, 28), -1)
    for b, n in enumerate(LENGTHS):
        where = np.sort(np.random.default_rng(b).choice(28, n, replace=False))
        spread[b, where], at[b, where] = tokens[b, :n], np.arange(n)
    cache = init_cache(own.config, chain(store()), BATCH, ROOM, prompt=28)
    for start in range(0, 28, 7):
        cut = slice(start, start + 7)
        _, cache = step(own, cache, spread[:, cut], at[:, cut], "prefill")
    same(finish(cache), whole, 3e-6)


@pytest.mark.parametrize(
    "name", ["mamba2", "hybrid", pytest.param("average", marks=pytest.mark.slow)]
)
def test_loops_run_and_rows_are_alone(name):
    """prefill (folded), generate and score; each row as if it were by itself."""
    own, cache = begun(name)
    logits, folded = prefill(
        own, prompts(), chain(store()), lengths=jnp.array(LENGTHS), max_length=ROOM, chunk=8
    )
    same(folded, cache, 3e-6)
    out = generate(own, folded, logits, 8, stop=())
    for b, n in enumerate(LENGTHS):
        tokens = np.concatenate([np.asarray(prompts()[b, :n]), np.asarray(out.tokens[b])])
        if name == "average":  # what NumPy does not say, one pass without a cache does
            at = jnp.arange(len(tokens))[None]
            want = jax.jit(lambda t, at=at: forward(own, t, at)[0][0])(tokens[None])
        else:
            want = reference.forward(own.config, flatten(own), tokens, ROOM)
        assert out.tokens[b].tolist() == np.argmax(want[n - 1 : -1], -1).tolist()
        np.testing.assert_allclose(out.logits[b], want[-1], **CLOSE)
    found, _, _ = score(own, folded, logits, out.tokens)
    np.testing.assert_allclose(found, out.logprobs, rtol=0, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Coded(Recurrence):
    """Holds the memory in another form: that is the cache's matter, not the model's."""

    kind: Mamba2
    codec: Codec

    def init(self, layers, batch, dtype):
        return self._coded(self.kind.init(layers, batch, dtype))

    def read(self, state):
        return state | {"memory": self.codec.decode(state["memory"], jnp.float32)}

    def advance(self, state, rows, valid):
        return self._coded(self.kind.advance(self.read(state), rows, valid))

    def _coded(self, state):
        return state | {"memory": self.codec.encode(state["memory"])}


def test_a_cache_may_hold_the_state_coded():
    own, exact = begun("hybrid")
    at = jnp.arange(PROMPT)[None]
    positions = jnp.where(at < np.array(LENGTHS)[:, None], at, -1)

    def after(codec):
        how = Coded(KIND, codec)
        cache = init_cache(own.config, chain(store()), BATCH, ROOM, PROMPT, recurrence=how)
        cache = finish(step(own, cache, prompts(), positions, "prefill")[1])
        return step(own, cache, prompts()[:, :1], cache.length[:, None])

    want, _ = step(own, exact, prompts()[:, :1], exact.length[:, None])
    np.testing.assert_array_equal(after(dense())[0], want)
    logits, cache = after(quantize(8, group=KIND.state_size))
    assert cache.state[1]["memory"]["codes"].dtype == jnp.uint8
    error = float(np.abs(logits - want).max())
    assert 0 < error < 2e-2 * float(np.abs(want).max())  # eight bits


def test_bfloat16_keeps_what_recurs_in_float32():
    own = model("mamba2", jnp.bfloat16)
    kept = {name for name, x in flatten(own).items() if x.dtype == jnp.float32}
    assert kept == {"recurrent.A_log", "recurrent.D", "recurrent.dt_bias"}
    cache = init_cache(own.config, chain(), BATCH, ROOM, dtype=jnp.bfloat16)
    logits, cache = step(
        own, cache, prompts(), jnp.arange(PROMPT)[None].repeat(BATCH, 0), "prefill"
    )
    state = cache.state[0]
    assert (state["memory"].dtype, state["tail"].dtype) == (jnp.float32, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), own)
    want = forward(exact, prompts(), jnp.arange(PROMPT)[None].repeat(BATCH, 0))[0]
    assert np.abs(logits - want).max() < 3e-2 * np.abs(want).max()  # bfloat16: 2**-8 per operation


def test_what_cannot_be_done_is_refused():
    own, cache = begun("hybrid")
    tree = jnp.ones((1, 3, 3), bool)
    for mask in (tree, "full"):
        with pytest.raises(ValueError, match=r"recurrent layers.*expected 'causal'"):
            forward(own, jnp.zeros((BATCH, 3), int), jnp.zeros((BATCH, 3), int), cache, mask=mask)
    for how, match in (
        ({"recurrent_layers": (3,)}, "recurrent_layers"),
        ({"recurrent_layers": ()}, "both or neither"),
        ({"recurrent_layers": (1,)}, "for 2 attention layers"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(CONFIGS["mamba2"], **how)
    with pytest.raises(ValueError, match="multiple of groups"):
        Mamba2(heads=3, head_dim=8, state_size=8, groups=2)
    with pytest.raises(ValueError, match="dt_min"):
        Mamba2(heads=4, head_dim=8, state_size=8, dt_min=1.0, dt_max=0.5)


def equations(jaxpr):
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values()]
    inner = [x for v in inner for x in (v if isinstance(v, (tuple, list)) else [v])]
    return len(jaxpr.eqns) + sum(
        equations(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")
    )


def written_in(jaxpr):
    """Files of kvjax in which the operations of a program were written."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {frame.file_name for frame in eqn.source_info.traceback.frames}
        inner = [v for v in eqn.params.values()]
        inner = [x for v in inner for x in (v if isinstance(v, (tuple, list)) else [v])]
        for x in inner:
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                found |= written_in(getattr(x, "jaxpr", x))
    return {name.split("/kvjax/")[1] for name in found if "/kvjax/" in name}


def test_models_of_attention_alone_pay_nothing():
    """Their decode step has no operation of recurrent layers, and one plain scan over layers."""

    def program(config):
        own = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        cache = jax.eval_shape(lambda: init_cache(config, chain(store()), 1, 8))
        one = jnp.zeros((1, 1), jnp.int32)

        def run(own, cache):
            logits, new = forward(own, one, cache.length[:, None], cache)
            return logits, commit(cache, new)

        return jax.make_jaxpr(run)(own, cache).jaxpr, own, cache

    recurrent = {"models/mamba2.py", "models/recurrent.py", "cache/recurrent.py"}
    jaxpr, _, _ = program(CONFIGS["hybrid"])
    assert recurrent <= written_in(jaxpr)
    plain = dataclasses.replace(CONFIGS["hybrid"], recurrence=None, recurrent_layers=())
    jaxpr, own, cache = program(plain)
    assert not recurrent & written_in(jaxpr) and "models/plan.py" in written_in(jaxpr)
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 1
    assert own.recurrent is None and cache.recurrent is None and len(cache.state) == 1


def test_program_does_not_grow_with_depth():
    def size(layers):
        recurrent = tuple(i for i in range(layers) if i % 4 != 3)
        config = Config(8, 8, 8, layers, 2, 2, 4, recurrence=KIND, recurrent_layers=recurrent)
        own = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        one = jnp.zeros((1, 1), jnp.int32)
        cache = jax.eval_shape(lambda: init_cache(config, chain(store()), 1, 8))
        return equations(jax.make_jaxpr(lambda m, c: forward(m, one, one, c))(own, cache).jaxpr)

    assert size(8) == size(16) == size(32)


@pytest.mark.parametrize("kinds", ["a", "aab", "aabaab", "abababab", "aaabaaabaa", "babaabaabaabb"])
def test_layers_run_in_order(kinds):
    plan = layer_plan(kinds)
    assert "".join("".join(k * n for k, n in runs) * times for runs, times in plan) == kinds
    numbers = {k: jnp.array([i for i, x in enumerate(kinds) if x == k]) for k in set(kinds)}
    blocks = {
        k: lambda carry, xs: ((carry[0] + 1, carry[1] & (carry[0] == xs[0])), (xs[0], xs[1]))
        for k in numbers
    }
    (count, ordered), out = scan_layers(kinds, blocks, (0, True), numbers)
    assert count == len(kinds) and bool(ordered)
    for kind, at in numbers.items():
        np.testing.assert_array_equal(out[kind][0], at)
        np.testing.assert_array_equal(out[kind][1], np.arange(len(at)))


def test_hidden_states_are_those_that_enter_each_layer():
    own = model("hybrid")
    at = jnp.arange(PROMPT)[None].repeat(BATCH, 0)
    new = jax.jit(lambda t: forward(own, t, at, hidden=range(6))[1])(prompts())
    np.testing.assert_array_equal(new.hidden[0], own.embed[...][prompts()])
    steps = [np.abs(new.hidden[i + 1] - new.hidden[i]).max() for i in range(5)]
    assert min(steps) > 1e-3 and new.kv.k.shape[0] == 2
    assert jax.tree.leaves(new.recurrent)[0].shape[0] == 3


def test_gradients_flow_through_recurrent_layers():
    config = dataclasses.replace(CONFIGS["hybrid"], layers=2, recurrent_layers=(0,))
    own = init(config, jax.random.key(0))
    tokens, at = prompts()[:, :9], jnp.arange(9)[None].repeat(BATCH, 0)

    @jax.jit
    def loss(own):
        logits = forward(own, tokens, at, differentiable=True)[0]
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 3])

    slope = jax.jit(jax.grad(loss))(own)
    for name, x in flatten(slope).items():
        assert np.isfinite(x).all() and np.abs(x).max() > 0, name
    moved = lambda e: jax.tree.map(lambda w, g: w + e * g, own, slope)  # noqa: E731
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(slope))
    e = 1e-2 / square**0.5
    rise = float(loss(moved(e)) - loss(moved(-e))) / (2 * e)
    assert abs(rise / square - 1) < 1e-2


def test_checkpoints_name_the_kind_of_recurrence(tmp_path):
    own = model("hybrid")
    checkpoint.save(tmp_path / "own", own)
    again = checkpoint.load(tmp_path / "own", dtype=jnp.bfloat16)
    assert again.config == own.config and hash(again.config) == hash(own.config)
    for name, value in flatten(again).items():
        assert value.dtype == dtype_of(own.config, name, jnp.bfloat16)
        np.testing.assert_array_equal(value, flatten(own)[name].astype(value.dtype))
    with pytest.raises(ValueError, match="RECURRENCES"):
        checkpoint.save(tmp_path / "other", model("average"))
    assert not (tmp_path / "other").exists()


def test_parameters_of_a_kind_must_not_take_the_names_of_a_block():
    @dataclasses.dataclass(frozen=True)
    class Taken(type(CONFIGS["average"].recurrence)):
        def parameters(self, width):
            return super().parameters(width) | {"gate": ((width,), (None,))}

    with pytest.raises(ValueError, match=r"\['gate'\] are taken"):
        parameters(dataclasses.replace(CONFIGS["average"], recurrence=Taken()))
