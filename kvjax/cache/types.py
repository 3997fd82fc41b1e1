"""The values that move through a cache: keys and values, queries, and partial attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.barrier import computed

Phase = Literal["prefill", "append", "decode", "verify"]
PHASES = ("prefill", "append", "decode", "verify")


def pytree(*static: str):
    """Class decorator: a frozen dataclass that is a pytree; the fields named are static."""

    def wrap(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data, list(static))

    return wrap


@pytree()
class KV:
    """Tokens: their keys and values for all layers of a scan group, with what travels along.

    In flight (between stages) tokens are compact: valid ones first, by ascending position.
    In a buffer slot order means nothing.

    Attributes:
      k: [L, B, H, T, D]. v: [L, B, H, T, Dv]. In the buffer of a stage with a codec each is a
        pytree of arrays [L, B, H, T, ...] instead.
      pos: int32 [L or 1, B, H or 1, T], the token's position, -1 where there is none. A size of 1
        says that all layers (heads) hold the same tokens.
      extra: columns such as scores, logit biases or counts, each float32 [L, B, H, T].
    """

    k: Any
    v: Any
    pos: Array
    extra: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """T, valid or not."""
        return self.pos.shape[3]

    @property
    def lead(self) -> tuple[int, int, int]:
        """L, B, H."""
        return jax.tree.leaves(self.k)[0].shape[:3]

    @property
    def count(self) -> Array:
        """Valid tokens, int32 [L or 1, B, H or 1]."""
        return jnp.sum(self.pos >= 0, -1, dtype=jnp.int32)


@pytree()
class Partial:
    """Softmax attention over some of the keys, float32: a monoid under `merge`.

    Attributes:
      out: [B, Hq, T, Dv], normalised over the keys seen so far (0 where none).
      max: [B, Hq, T], the largest logit (-inf where none).
      sum: [B, Hq, T], the sum of exp(logit - max) (0 where none).
    """

    out: Array
    max: Array
    sum: Array

    @property
    def lse(self) -> Array:
        """log sum exp of the logits, [B, Hq, T]; -inf where no key was seen."""
        return self.max + jnp.log(self.sum)

    def weight(self, top: Array) -> Array:
        """The sum of exp(logit - top): what this part weighs beside others, top the largest."""
        safe = jnp.where(jnp.isneginf(top), 0.0, top)
        return self.sum * jnp.exp(self.max - safe)

    @staticmethod
    def identity(shape: tuple[int, ...], width: int) -> Partial:
        """Attention over no key. `shape` is that of max and sum, `width` the value size."""
        return Partial(
            jnp.zeros((*shape, width), jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys.

        m = max(ma, mb);  wi = si exp(mi - m);  out = (wa oa + wb ob) / (wa + wb)

    Commutative with `Partial.identity` as identity, exactly; associative up to float32 rounding.
    The maximum only stabilises and carries no gradient.

    >>> one = partial_attention(jnp.zeros((1, 1, 2, 3)), None, lambda p: p @ jnp.eye(3))
    >>> bool(jnp.all(merge(one, Partial.identity((1, 1, 2), 3)).out == one.out))
    True
    """
    top = jnp.maximum(a.max, b.max)
    wa, wb = a.weight(top), b.weight(top)
    total = wa + wb
    whole = jnp.where(total > 0, total, 1.0)  # w / w is exactly 1: the identity changes no bit
    out = a.out * (wa / whole)[..., None] + b.out * (wb / whole)[..., None]
    return Partial(out, top, total)


def merge_over(part: Partial, axis: str | tuple[str, ...]) -> Partial:
    """`merge` of the partials of all devices along mesh axes, on each of them.

    For use inside `shard_map`: the same formula, with its maximum and its sums over devices.
    """
    top = jax.lax.pmax(jax.lax.stop_gradient(part.max), axis)
    weight = part.weight(top)
    total = jax.lax.psum(weight, axis)
    whole = jnp.where(total > 0, total, 1.0)
    return Partial(jax.lax.psum(part.out * (weight / whole)[..., None], axis), top, total)


def partial_attention(logits: Array, mask: Array | None, mix: Any) -> Partial:
    """Attention from logits.

    Args:
      logits: float32 [..., N]; whatever stands where `mask` is false is not felt.
      mask: bool, broadcastable to logits, or None: all keys are seen.
      mix: function from weights [..., N] to the weighted sum of values [..., D].
    """
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, -1))
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top)[..., None])
    total = jnp.sum(weights, -1)
    out = mix(weights).astype(jnp.float32) / jnp.where(total > 0, total, 1.0)[..., None]
    return Partial(out, top, total)


@pytree()
class Rope:
    """Rotary frequencies of some layers.

    Attributes:
      freq: float32 [L, R / 2] (or [R / 2] for one layer), radians per token; R channels rotate.
      factor: float32 [L] (or scalar), multiplies cos and sin.
    """

    freq: Array
    factor: Array

    def __getitem__(self, index: Any) -> Rope:
        return Rope(self.freq[index], self.factor[index])


def rotate(x: Array, pos: Array, rope: Rope, inverse: bool = False) -> Array:
    """Rotates channel pairs (i, i + R/2) of x by pos * freq_i, in float32.

    Args:
      x: [..., T, D]; channels from R on pass through.
      pos: int [..., T], broadcastable to x without its last axis.
      rope: freq and factor broadcastable: freq[..., R / 2] against x's leading axes, or one layer.
      inverse: undo the rotation (and the factor).
    """
    half = rope.freq.shape[-1]
    lead = x.ndim - 2
    freq = rope.freq.reshape(
        rope.freq.shape[:-1] + (1,) * (lead + 1 - (rope.freq.ndim - 1)) + (half,)
    )
    angle = pos[..., None].astype(jnp.float32) * freq
    factor = rope.factor.reshape(rope.factor.shape + (1,) * (lead + 2 - rope.factor.ndim))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cos, sin = (cos / factor, -sin / factor) if inverse else (cos * factor, sin * factor)
    cos, sin = computed(cos), computed(sin)  # once, not for every head
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], -1)


@pytree("softcap", "window", "differentiable", "kernels", "layout")
class Query:
    """What one layer asks of the cache.

    Attributes:
      q: [B, Hq, T, D], rotated and scaled: logits are q.k.
      raw: the same before rotation.
      pos: int32 [B, T], -1 for rows that are padding.
      rope: this layer's frequencies.
      span: int32 scalar, how many positions back a query sees (itself included); read only where
        `window` is true.
      constants: arrays that belong to the transform, never donated.
      gap: int32 [B], positions before the new rows whose tokens the chain no longer holds.
      softcap: c of c tanh(x / c) on logits, or None.
      window: whether any layer has a sliding window.
      differentiable: loop a static number of times, so that reverse-mode gradients exist.
      kernels: which implementation attends to held tokens; see `Cache`.
      layout: how the cache lies over devices (`kvjax.parallel.Layout`), or None.
      shard: int32 scalar where the stage is given one of several equal runs of its slots: which.
      columns: what these rows are marked with, float32 [B, T] by name (`TokenMark`).
      ahead: where the cache looks ahead, `q` as the next layer would make it of this layer's input.
    """

    q: Array
    raw: Array
    pos: Array
    rope: Rope
    span: Array
    constants: Any
    gap: Array
    softcap: float | None = None
    window: bool = False
    differentiable: bool = False
    kernels: str = "xla"
    layout: Any = None
    shard: Array | None = None
    columns: dict[str, Array] = dataclasses.field(default_factory=dict)
    ahead: Array | None = None

    def far(self, distance: int) -> Query:
        """The query for keys that are read unrotated, as if all stood `distance` before it."""
        return dataclasses.replace(self, q=rotate(self.raw, jnp.asarray([distance]), self.rope))

    def base(self, slots: int) -> Array | int:
        """Number of the first slot of a buffer of which `slots` are at hand: 0 unless split."""
        return 0 if self.shard is None else self.shard * slots

    def at_hand(self, mask: Array, number: Array, slots: int) -> Array:
        """`mask` of tokens `number`, without those whose slots another device holds."""
        if self.shard is None:
            return mask
        base = self.base(slots)
        return mask & (number >= base) & (number < base + slots)

    def grouped(self, q: Array, heads: int) -> Array:
        """[B, Hq, T, D] -> [B, H, G * T, D]: the query heads that share a key-value head."""
        batch, query_heads, rows, width = q.shape
        return q.reshape(batch, heads, query_heads // heads * rows, width)

    def rows(self, q: Array) -> Array:
        """Positions of the rows of grouped queries [B, H, G * T, D]: int32 [B, H, G * T]."""
        return jnp.tile(self.pos[:, None], (1, q.shape[1], q.shape[2] // self.pos.shape[1]))

    def ungroup(self, part: Partial) -> Partial:
        """Partial over [B, H, G * T] -> over [B, Hq, T]."""
        batch, query_heads, rows, _ = self.q.shape
        shape = (batch, query_heads, rows)
        return Partial(
            part.out.reshape(*shape, part.out.shape[-1]),
            part.max.reshape(shape),
            part.sum.reshape(shape),
        )

    def cap(self, logits: Array) -> Array:
        if self.softcap is None:
            return logits
        return self.softcap * jnp.tanh(logits / self.softcap)

    def sees(self, pos: Array, kv_heads: int) -> Array:
        """Which held tokens each row sees: bool [B, H or 1, G * T or 1, N].

        Held tokens come before all new rows, so only validity and the sliding window matter.

        Args:
          pos: int32 [B, H or 1, N].
          kv_heads: H.
        """
        mask = (pos >= 0)[:, :, None, :]
        if not self.window:
            return mask
        near = self.pos[:, None, :, None] - pos[:, :, None, :] < self.span
        return mask & jnp.tile(near, (1, 1, self.q.shape[1] // kv_heads, 1))


@pytree()
class Observation:
    """Attention statistics of committed rows: enough to know what any key received.

    Attributes:
      q: [L, B, Hq, T, D], rotated and scaled.
      max, sum: float32 [L, B, Hq, T], of each row's softmax over everything that it saw.
      pos: int32 [B, T], -1 for none.
      span: int32 [L], how many positions back a row of that layer sees, itself included.
    """

    q: Array
    max: Array
    sum: Array
    pos: Array
    span: Array


@pytree()
class New:
    """What a forward pass returns: these rows' keys and values, before rotation.

    Attributes:
      kv: k, v [L, B, H, T, D], pos [1, B, 1, T] ([L, B, 1, T] where a rule lets layers hold
        different rows); columns of `extra` per token (types, flags).
      seen: statistics of the rows, or None where they were not asked for.
      hidden: layer index -> hidden states entering that layer [B, T, D], where asked for.
      recurrent: what advances the recurrent layers by each row, arrays [L, B, T, ...] (see
        `kvjax.cache.Recurrence`), or None where there are no such layers.

    L counts the layers of that kind: `kv` and `seen` have the attention layers only.
    """

    kv: KV
    seen: Observation | None = None
    hidden: dict[int, Array] = dataclasses.field(default_factory=dict)
    recurrent: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a stage must be able to hold.

    Attributes:
      layers, batch, heads, kv_heads, width: L, B, Hq, H, D of the tokens to come.
      max_length: the most tokens per row (and head) that can ever arrive.
      prompt: the most of these that arrive in the one bulk commit of a prompt; 0: none.
      whole_prompt: the same at the front of the chain, for sizes given as a part of it.
      dtype: of exact keys and values.
      columns: names of the columns that tokens must carry here.
      per_layer, per_head: whether layers (heads) may hold different tokens here.
      unrotated: whether keys arrive before rotary rotation.
      totals: where heads hold different numbers of tokens: per layer, the prompt tokens of all
        heads together (per batch row), or one number for all layers together; None: every head
        holds as many.
      shards: into how many equal runs, on different devices, slots are to be split. Buffers whose
        size is free are made a multiple of it.
    """

    layers: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    max_length: int
    prompt: int = 0
    whole_prompt: int = 0
    dtype: Any = jnp.float32
    columns: tuple[str, ...] = ()
    per_layer: bool = False
    per_head: bool = False
    unrotated: bool = False
    totals: tuple[int, ...] | None = None
    shards: int = 1

    def slots(self, tokens: int, unit: int = 1) -> int:
        """Slots for `tokens` tokens that split into `shards` equal runs of whole units."""
        step = unit * self.shards
        return -(-tokens // step) * step

    def replace(self, **changes: Any) -> Spec:
        return dataclasses.replace(self, **changes)

    def less(self, tokens: int) -> Spec:
        """The spec downstream of a stage that keeps `tokens` of what comes."""
        return self.replace(
            max_length=max(self.max_length - tokens, 0), prompt=max(self.prompt - tokens, 0)
        )

    @property
    def lead(self) -> tuple[int, int, int]:
        """Leading axes of positions: [L or 1, B, H or 1]."""
        return (
            self.layers if self.per_layer else 1,
            self.batch,
            self.kv_heads if self.per_head else 1,
        )
