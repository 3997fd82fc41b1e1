"""Meshes and rules: data, equal by value, with errors that name what does not fit."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kvjax.cache import (
    Partial,
    adaptive,
    by_position,
    chain,
    finish,
    first,
    init_cache,
    merge,
    merge_over,
    partial_attention,
    prune,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import quantize
from kvjax.models import Config, llama
from kvjax.models.mamba2 import Mamba2
from kvjax.parallel import Layout, Rules, make_mesh, parse_mesh, shard, shardings
from kvjax.parallel.rules import parameter_sharding

CONFIG = Config(64, 32, 48, 2, 6, 3, 8)
EVEN = Config(64, 32, 48, 2, 8, 4, 8)
KIND = Mamba2(heads=4, head_dim=8, state_size=8, groups=2)
HYBRID = Config(64, 32, 48, 4, 4, 4, 8, recurrence=KIND, recurrent_layers=(0, 2))


def grid(data=1, tensor=1, context=1):
    """A mesh without devices: enough for rules."""
    axes = ("data", "tensor", "context")
    return AbstractMesh((data, tensor, context), axes, axis_types=(AxisType.Auto,) * 3)


def test_mesh_from_text():
    assert parse_mesh(" tensor=4, data=2 ") == {"data": 2, "tensor": 4, "context": 1}
    for text in ("data", "data=0", "data=2,data=2", "model=2", "data=x", "data=-1"):
        with pytest.raises(ValueError, match="axis=size"):
            parse_mesh(text)
    assert make_mesh("data=1").axis_names == ("data", "tensor", "context")
    assert make_mesh() == make_mesh({"context": 1})
    with pytest.raises(ValueError, match="grid of 4 devices, but there are 1"):
        make_mesh("data=4")


def test_rules_are_values():
    rules = Rules().replace(mlp="tensor", slots=None)
    assert rules == Rules().replace(slots=None).replace(mlp=("tensor",))
    assert hash(rules) == hash(Rules().replace(slots=None, mlp="tensor"))
    assert rules.of("slots") == () and rules.of(None) == () and rules.of("heads") != ()


def test_specs():
    mesh, rules = grid(2, 2, 2), Rules()
    held = ("layers", "batch", "kv_heads", "slots", None)
    assert rules.spec(held, (2, 4, 4, 64, 8), mesh) == P(None, "data", "tensor", "context")
    assert rules.spec(("embed", "mlp"), (32, 48), mesh) == P(None, ("tensor", "context"))
    assert rules.spec(held, (2, 1, 4, 64, 8), mesh) == P(None, None, "tensor", "context")
    # Few slots may be replicated: the rules say so.
    assert rules.spec(held, (2, 4, 4, 7, 8), mesh) == P(None, "data", "tensor")
    assert rules.spec(held, (2, 4, 4, 64, 8), grid()) == P()


def test_what_does_not_divide_is_refused_or_replicated():
    mesh = grid(tensor=2)
    with pytest.raises(ValueError, match=r"'kv_heads' of size 3 .* tensor=2 .*replicate"):
        Rules().spec(("kv_heads",), (3,), mesh)
    rules = Rules().replace(replicate=("kv_heads", "heads"))
    assert rules.spec(("kv_heads",), (3,), mesh) == P()
    # The longest run of mesh axes that divides: 6 over tensor=2, not over tensor x context = 8.
    assert rules.spec(("heads",), (6,), grid(tensor=2, context=4)) == P("tensor")
    with pytest.raises(ValueError, match=r"parameter 'layers.k'.* tensor=16"):
        parameter_sharding(grid(tensor=16)).all(CONFIG)
    with pytest.raises(ValueError, match="no axis 'expert'"):
        Rules().replace(mlp="expert").spec(("mlp",), (8,), mesh)
    with pytest.raises(ValueError, match="both 'batch' and 'mlp' over the mesh axis 'data'"):
        Rules().replace(mlp="data").spec(("batch", "mlp"), (4, 4), grid(data=2))


def test_every_parameter_has_a_sharding():
    axes = llama.logical_axes(CONFIG)
    shapes = {name: shape for name, (shape, _) in llama.parameters(CONFIG).items()}
    found = shardings(axes, shapes, make_mesh())
    assert found.keys() == shapes.keys() and all(s.spec == P() for s in found.values())
    assert parameter_sharding(make_mesh()).all(CONFIG) == found


def test_weights_are_split_along_what_is_parallel():
    """[out, in]: projections into heads and channels along their outputs, those back along their
    inputs, so that one sum over devices follows each pair."""
    both = ("tensor", "context")
    specs = {n: s.spec for n, s in parameter_sharding(grid(2, 2, 1)).all(HYBRID).items()}
    out, into = P(None, "tensor"), P(None, None, "tensor")
    for name in ("q", "k", "v", "gate", "up"):
        assert specs[f"layers.{name}"] == out
    assert specs["layers.o"] == specs["layers.down"] == into
    assert specs["embed"] == P("tensor") and specs["norm"] == P()
    assert specs["recurrent.gate"] == out and specs["recurrent.down"] == into
    assert specs["recurrent.A_log"] == out and specs["recurrent.out"] == into
    # 2 x 32 + 2 x 2 x 8 + 4 = 100 outputs: into 2 parts, and of 4 x 2 parts into 4.
    assert specs["recurrent.project"] == out
    wide = parameter_sharding(grid(tensor=4, context=2), Rules().replace(heads="tensor"))
    assert wide.all(HYBRID)["recurrent.project"].spec == out
    assert wide.all(HYBRID)["recurrent.conv"].spec == P(None, both)


def test_every_array_of_a_cache_has_a_sharding():
    """Stores, windows, pools, pending prompts, recurrent state, slots by position."""
    mesh = grid(2, 2, 2)
    layout = Layout(mesh)
    for config, method in (
        (EVEN, chain(prune(keep=0.5, score=window_attention(4), budget=adaptive()), store())),
        (EVEN, chain(first(4), recent(16), store(quantize(4)))),
        (EVEN, by_position(32)),
        (HYBRID, chain(store())),
    ):
        cache = init_cache(config, method, 2, 32, 16)
        for held in (cache, jax.eval_shape(finish, cache)):
            found = layout.shardings(held)
            assert jax.tree.structure(found) == jax.tree.structure(held)
            assert any("data" in s.spec for s in jax.tree.leaves(found.state))


def test_sharding_on_one_device_changes_nothing():
    mesh = make_mesh()
    model = shard(llama.init(CONFIG, jax.random.key(0)), mesh)
    assert model.layers.q[...].sharding.mesh == mesh
    layout = Layout(mesh)
    cache = init_cache(CONFIG, chain(store()), 1, 16, layout=layout)
    plain = init_cache(CONFIG, chain(store()), 1, 16)
    assert shard(plain, mesh).layout == layout == cache.layout
    assert jax.tree.structure(shard(plain, mesh)) == jax.tree.structure(cache)
    with pytest.raises(ValueError, match="expected a Model or a Cache"):
        shard({}, mesh)
    with pytest.raises(ValueError, match="kernels='tpu' on a mesh of 2 devices"):
        init_cache(CONFIG, chain(store()), 1, 16, kernels="tpu", layout=Layout(grid(data=2)))


def test_slots_of_a_store_divide():
    """Every part of a token on one device: codes of keys and values, positions."""
    from kvjax.cache import Window
    from kvjax.cache.types import Spec
    from kvjax.codecs import per_kv

    codec = per_kv(k=quantize(2, axis="channel", group=16), v=quantize(2, axis="token", group=8))
    stage = store(codec, keys=Window(0, 32), values=Window(32, 1))
    spec = Spec(1, 1, 4, 4, 16, max_length=100, shards=3)
    state = jax.eval_shape(lambda: stage.init(spec))
    assert state.pos.shape[-1] == 144  # 100 in whole units of 16 for each of 3
    for x in jax.tree.leaves((state.k, state.v)):
        assert x.shape[3] % 3 == 0 and 144 % x.shape[3] == 0
    with pytest.raises(ValueError, match="slots split over 2 devices, but the cache was made for"):
        shard(init_cache(CONFIG, chain(store()), 1, 16), FAKE)


class _Fake:
    """A mesh of two, as far as `shard` looks before it refuses."""

    shape = {"data": 1, "tensor": 1, "context": 2}  # noqa: RUF012
    axis_names = ("data", "tensor", "context")


FAKE = _Fake()


def test_merge_over_devices_is_merge():
    """On an axis of `vmap`, whose collectives are those of `shard_map`."""
    logits = 30 * jax.random.normal(jax.random.key(0), (4, 2, 3, 5, 7))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, logits.shape).at[2].set(False)
    values = jax.random.normal(jax.random.key(2), (4, 7, 8))

    def part(i: int) -> Partial:
        return partial_attention(logits[i], mask[i], lambda p: p @ values[i])

    @jax.jit
    def both() -> tuple[Partial, Partial]:
        parts = [part(i) for i in range(4)]
        return functools.reduce(merge, parts), jax.tree.map(lambda *x: jnp.stack(x), *parts)

    folded, stacked = both()
    every = jax.jit(jax.vmap(lambda p: merge_over(p, "i"), axis_name="i", out_axes=None))
    over = every(stacked)
    for a, b in zip(jax.tree.leaves(over), jax.tree.leaves(folded)):
        assert jnp.array_equal(jnp.isneginf(a), jnp.isneginf(b))
        assert jnp.allclose(a, b, rtol=2e-6, atol=2e-6)

    nothing = jax.tree.map(lambda x: jnp.stack([x] * 4), Partial.identity((2, 3), 8))
    over = every(nothing)
    assert not over.out.any() and not over.sum.any() and jnp.isneginf(over.max).all()

    def total(out: Array) -> Array:
        one = lambda o, p: merge_over(Partial(o, p.max, p.sum), "i").out.sum()  # noqa: E731
        return jax.vmap(one, axis_name="i")(out, stacked).sum()

    assert jnp.isfinite(jax.jit(jax.grad(total))(stacked.out)).all()
