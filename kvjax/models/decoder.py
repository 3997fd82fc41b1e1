"""The forward pass: reads the cache, returns logits and what is new. It never writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import attend_new
from kvjax.cache.cache import Cache, attend, commit, start
from kvjax.cache.marks import token_columns
from kvjax.cache.rotary import rope_of, span_of
from kvjax.cache.rule import Rule, attend_chosen, blank
from kvjax.cache.stage import InputMark
from kvjax.cache.types import KV, PHASES, New, Observation, Phase, Query, merge, rotate
from kvjax.models.config import Config
from kvjax.models.linear import apply, linear
from kvjax.models.llama import Layers, Model
from kvjax.models.plan import scan_layers
from kvjax.models.recurrent import one_layer


def forward(
    model: Model,
    tokens: Array | None,
    positions: Array,
    cache: Cache | None = None,
    *,
    phase: Phase = "decode",
    mask: Array | str | None = None,
    embeddings: Array | None = None,
    logits: Array | str = "all",
    statistics: bool | None = None,
    hidden: Sequence[int] = (),
    fold: bool = False,
    read: bool = True,
    differentiable: bool = False,
    remat: bool = False,
    marks: Sequence[InputMark] | None = None,
    shift: tuple[Array, Array] | None = None,
    columns: Mapping[str, Array] | None = None,
    rule: Rule | None = None,
) -> Any:
    """Runs new rows through the model, attending to the cache and to each other.

    Args:
      tokens: int32 [B, T], or None with `embeddings`.
      positions: int32 [B, T], the position of each row in its sequence (the depth, in a tree);
        -1: padding, anywhere, never seen and never written. Under "causal", rows of long inputs
        (over 256) must ascend.
      cache: what was committed before; None: nothing.
      phase: "prefill", "append", "decode" or "verify"; static.
      mask: which new rows a new row sees: "causal" (at its position and before), "full", or bool
        [B or 1, T, T] (row, key); None: "full" where the model is bidirectional, else "causal".
        Recurrent layers take rows one after the other as they stand: models with such layers know
        "causal" alone, and valid rows must ascend.
      embeddings: [B, T, D] in place of tokens.
      logits: rows whose logits to return: "all", "last" (the valid row of highest position),
        "none", or int32 [B, K] row indices.
      statistics: whether to return what commits of attention-based methods need; None: as the
        cache asks.
      hidden: layers whose inputs to return; the number of layers stands for the final output
        (before the last norm).
      fold: commit within the layer scan, for streaming chains: then no more than one layer's exact
        new keys and values exist at a time. Returns (logits, cache) in place of (logits, new).
      read: False: the cache is known to be empty (the first chunk of a prompt), do not read it.
      differentiable: attention loops of static length, for reverse-mode gradients.
      marks: columns of the new tokens, made from what each layer reads; None: as the cache asks.
      shift: added to the keys (before rotation) and values, two arrays [L, B, H, T, d]: zeros at
        which a gradient is taken say how much each number matters.
      columns: what the caller knows of the new tokens by name, such as their type, float32 [B, T];
        they travel with the tokens where a stage asks for them. Those that the cache asks for and
        that are made from token ids are made here.
      rule: which of the new rows take part in each layer's attention; None: as the cache asks of a
        prompt (phase "prefill").
      remat: for these keep each layer's input only, and compute the rest again on the way back.

    Returns:
      (logits float32 [B, K, V] or None, new). Logits of padding rows are meaningless and finite.
    """
    config: Config = model.config
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: expected one of {', '.join(PHASES)}")
    if mask is None:
        mask = "full" if config.bidirectional else "causal"
    if isinstance(mask, str) and mask not in ("causal", "full"):
        raise ValueError(f"mask={mask!r}: expected 'causal', 'full' or a bool array [B, T, T]")
    if config.recurrent_layers and not (isinstance(mask, str) and mask == "causal"):
        raise ValueError(
            f"mask={mask if isinstance(mask, str) else f'bool {mask.shape}'}: this model has "
            "recurrent layers, which take rows one after the other; expected 'causal' (a chain of "
            "drafts, not a tree)"
        )
    if (tokens is None) == (embeddings is None):
        raise ValueError("forward needs exactly one of tokens and embeddings")
    if statistics is None:
        statistics = cache is not None and cache.needs_attention
    if marks is None:
        marks = () if cache is None else cache.input_marks
    if rule is None and cache is not None and phase == "prefill":
        rule = cache.rule
    if cache is not None:
        columns = token_columns(cache, tokens, positions, columns)
    columns = {n: jnp.asarray(x, jnp.float32) for n, x in (columns or {}).items()}
    if fold and (marks or columns or rule is not None):
        names = [*(m.name for m in marks), *columns]
        raise ValueError(f"fold=True: rules do not act there, nor are the columns {names} made")
    if rule is not None and config.recurrent_layers:
        raise ValueError(f"rule={rule}: this model has recurrent layers, which take all rows")
    valid = positions >= 0
    x = embed(model, jnp.where(valid, tokens, 0)) if embeddings is None else embeddings
    x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
    length = positions.shape[1] if cache is None else cache.max_length
    if cache is None:
        rope, span = rope_of(config, length), span_of(config)
        carry = ()
    else:
        rope, span = cache.constants["rope"], cache.constants["span"]
        carry = start(cache, positions)
    windowed = any(w is not None and w < length for w in config.windows)
    dtype = x.dtype
    if config.residual_float32:
        x = x.astype(jnp.float32)

    split = cache is not None and cache.layout is not None
    ruled = () if rule is None else rule.start(positions, _asked(rule, columns, positions))

    def attention(state: tuple[Array, Any, Any], xs: Any) -> tuple[tuple[Array, Any, Any], Any]:
        x, carry, ruled = state
        (layer, rope, span, own, shift), index = xs
        before = x
        h = rms_norm(x.astype(dtype), layer.attention_norm[...], config)
        q, k, v = _project(h, layer, config, split)
        if shift is not None:
            k, v = k + shift[0], v + shift[1]
        if split:
            q, k, v = cache.layout.heads(q, k, v)
        raw = q * config.scale
        turned = rotate(raw, positions[:, None], rope)
        keys = rotate(k, positions[:, None], rope)
        ahead = None
        if cache is not None and read and cache.looks_ahead:
            after = jnp.minimum(index + 1, len(config.attention_layers) - 1)
            following, its_rope = one_layer((model.layers, cache.constants["rope"]), after)
            h = rms_norm(x.astype(dtype), following.attention_norm[...], config)
            ahead = _project(h, following, config, split)[0] * config.scale
            ahead = rotate(ahead, positions[:, None], its_rope)
        query = Query(
            turned, raw, positions, rope, span,
            {} if cache is None else cache.constants,
            jnp.zeros((x.shape[0],), jnp.int32), config.attention_softcap, windowed, differentiable,
            "xla" if cache is None else cache.kernels, None if cache is None else cache.layout,
            columns=columns, ahead=ahead,
        )  # fmt: skip
        choice = None
        if rule is None:
            part = attend_new(query, keys, v, mask)
        else:
            choice, ruled = rule.choose(index, query, keys, ruled)
            part = attend_chosen(query, keys, v, mask, choice, rule.sizes)
        if cache is not None and read:
            held, carry = attend(cache, index, query, carry)
            if choice is not None and choice.rows is not None:
                held = blank(held, choice.rows)
            part = merge(part, held)
        if rule is not None:
            ruled = rule.after(index, query, keys, part, ruled)
        out = part.out.astype(dtype)
        out = jnp.moveaxis(out, 1, 2).reshape(*x.shape[:2], -1)
        out = apply(out, layer.o, layer.o_bias, split)
        if layer.post_attention_norm is not None:
            out = rms_norm(out, layer.post_attention_norm[...], config)
        x = x + out
        if config.mlp_width:
            h = mlp(rms_norm(x.astype(dtype), layer.mlp_norm[...], config), layer, config, split)
            if layer.post_mlp_norm is not None:
                h = rms_norm(h, layer.post_mlp_norm[...], config)
            x = x + h
        written = valid[:, None, :, None]
        k, v = (jnp.where(written, a, jnp.zeros((), a.dtype)) for a in (k, v))
        if fold:
            out = _fold(cache, own, index, k, v, positions, phase)
        else:
            marked = {mark.name: mark.of_input(before) for mark in marks}
            took = None
            if rule is not None:
                marked |= dict(rule.note(choice, ruled))
                took = valid if choice.rows is None else valid & choice.rows
            out = (k, v, (turned, part.max, part.sum) if statistics else None, marked, took)
        return (x, carry, ruled), (out, before if hidden else None)

    if config.recurrent_layers:
        kind = config.recurrence
        shared = kind.prepare(valid)
        holds = kind if cache is None else cache.transforms[cache.recurrent]
        reading = cache is not None and read
        remembered = cache.state[cache.recurrent] if reading else holds.init(1, x.shape[0], dtype)

    def recurrent(state: tuple[Array, Any, Any], xs: Any) -> tuple[tuple[Array, Any, Any], Any]:
        x, carry, ruled = state
        (layer, own), index = xs
        before = x
        h = rms_norm(x.astype(dtype), layer.mixer_norm[...], config)
        # `own`: this layer's state where it is scanned, to be replaced; else it is read in place.
        mine = own if fold else one_layer(remembered, index if reading else 0)
        h, rows = kind.mix(layer, h, holds.read(mine), valid, shared, config.norm_eps, split)
        x = x + h
        if config.mlp_width:
            h = rms_norm(x.astype(dtype), layer.mlp_norm[...], config)
            x = x + mlp(h, layer, config, split)
        if fold:
            first = lambda x: x[None]  # noqa: E731
            rows = holds.advance(jax.tree.map(first, own), jax.tree.map(first, rows), valid)
            rows = jax.tree.map(lambda x: x[0], rows)
        return (x, carry, ruled), (rows, before if hidden else None)

    _check_fold(cache, fold)
    inputs = {
        "attention": (model.layers, rope, span, _slices(cache) if fold else None, shift),
        "recurrent": (
            model.recurrent,
            cache.state[cache.recurrent] if fold and config.recurrent_layers else None,
        ),
    }
    kinds = [
        "recurrent" if i in config.recurrent_layers else "attention" for i in range(config.layers)
    ]
    blocks = {"attention": attention, "recurrent": recurrent}
    if remat:
        blocks = {k: jax.checkpoint(f, prevent_cse=False) for k, f in blocks.items()}
    (x, _, ruled), found = scan_layers(kinds, blocks, (x, carry, ruled), inputs)
    result = _logits(model, x.astype(dtype), positions, logits, split)
    out, inputs = found.get("attention", (None, None))
    rows, others = found.get("recurrent", (None, None))
    if fold:
        return result, _unslice(cache, out, rows, positions)
    empty = jnp.zeros((0, x.shape[0], 0, x.shape[1], 0), dtype)
    k, v, seen, marked, took = (empty, empty, None, {}, None) if out is None else out
    heads = lambda x: jnp.broadcast_to(x[:, :, None], k.shape[:-1])  # noqa: E731
    named = {name: x[None] for name, x in columns.items()} | marked
    extra = {name: heads(x.astype(jnp.float32)) for name, x in named.items()}
    place = positions[None]
    if rule is not None and rule.drops:
        place = jnp.where(rule.held(took, ruled), place, -1)
    kv = KV(k, v, place[:, :, None].astype(jnp.int32), extra)
    observed = None if seen is None else Observation(*seen, positions, span)

    def entering(layer: int) -> Array:
        if layer == config.layers:
            return x
        if layer in config.recurrent_layers:
            return others[config.recurrent_layers.index(layer)]
        return inputs[config.attention_layers.index(layer)]

    return result, New(kv, observed, {i: entering(i) for i in hidden}, rows)


def _asked(rule: Rule, columns: Mapping[str, Array], positions: Array) -> dict[str, Array]:
    """The columns that a rule reads, as far as there are such; those of padding are 0."""
    found = {mark.name: columns[mark.name] for mark in rule.reads if mark.name in columns}
    return {name: jnp.where(positions >= 0, x, 0.0) for name, x in found.items()}


def embed(model: Model, tokens: Array) -> Array:
    """What the first layer reads for tokens int32 [...]: [..., D]."""
    x = model.embed[...][tokens]
    scale = model.config.embed_scale
    return x if scale is None else x * jnp.asarray(scale, x.dtype)


def rms_norm(x: Array, weight: Array, config: Config) -> Array:
    """RMSNorm over the last axis, statistics in float32; weights stored as (w - 1) for Gemma."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + config.norm_eps)
    if config.norm_offset:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * wide.astype(x.dtype)


def mlp(h: Array, layer: Layers, config: Config, split: bool = False) -> Array:
    """The gated MLP of one layer, [..., D] -> [..., D]."""
    gate = apply(h, layer.gate, layer.gate_bias, split)
    silu = config.activation == "silu"
    gate = jax.nn.silu(gate) if silu else jax.nn.gelu(gate, approximate=True)
    h = gate * apply(h, layer.up, layer.up_bias, split)
    return apply(h, layer.down, layer.down_bias, split)


def _project(h: Array, layer: Layers, config: Config, split: bool) -> tuple[Array, Array, Array]:
    """Queries [B, Hq, T, d], keys and values [B, H, T, d] of one layer, before rotation."""

    def heads(weight: Any, bias: Any, count: int) -> Array:
        x = apply(h, weight, bias, split)
        return x.reshape(*h.shape[:2], count, config.head_dim)

    q = heads(layer.q, layer.q_bias, config.heads)
    k = heads(layer.k, layer.k_bias, config.kv_heads)
    v = heads(layer.v, layer.v_bias, config.kv_heads)
    if config.qk_norm:
        q = rms_norm(q, layer.q_norm[...], config)
        k = rms_norm(k, layer.k_norm[...], config)
    return tuple(jnp.moveaxis(a, 1, 2) for a in (q, k, v))


def _logits(
    model: Model, x: Array, positions: Array, rows: Array | str, split: bool
) -> Array | None:
    if isinstance(rows, str):
        if rows == "none":
            return None
        if rows == "last":
            rows = jnp.argmax(positions, 1)[:, None]
        elif rows != "all":
            raise ValueError(f"logits={rows!r}: expected 'all', 'last', 'none' or row indices")
    if not isinstance(rows, str):
        x = jnp.take_along_axis(x, rows[..., None], 1)
    return head(model, x, split)


def head(model: Model, x: Array, split: bool = False) -> Array:
    """Logits float32 [B, T, V] of final hidden states [B, T, D]; `split`: see `linear`."""
    config = model.config
    x = rms_norm(x, model.norm[...], config)
    weight = (model.embed if model.head is None else model.head)[...]
    out = linear(x, weight, dtype=jnp.float32, split=split)
    if config.final_softcap is not None:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


# --- committing inside the layer scan -----------------------------------------------------------


def _check_fold(cache: Cache | None, fold: bool) -> None:
    if fold and (cache is None or len(cache.chains) > 1 or not cache.streaming):
        raise ValueError(
            "fold=True commits layer by layer: it needs a cache whose chain is streaming "
            "(acts on each token as it comes) and the same for all layers"
        )


def _slices(cache: Cache) -> Any:
    """The state of attention layers with its layer axis to be scanned."""
    if not cache.chains:
        return None
    layers = len(cache.groups[0])
    return jax.tree.map(
        lambda x: x[:, None] if x.ndim and x.shape[0] == layers else None, cache.state[0]
    )


def _fold(
    cache: Cache, own: Any, index: Array, k: Array, v: Array, positions: Array, phase: Phase
) -> Any:
    """Commits one layer's rows to that layer's slice of the state."""
    one = jax.tree.map(lambda whole, cut: whole if cut is None else cut, cache.state[0], own)
    layers = len(cache.groups[0])
    cut = lambda x: x[index][None] if x.shape[0] == layers else x  # noqa: E731
    small = cache.replace(
        state=(_with_layers(one, 1),),
        transforms=cache.transforms[:1],
        groups=((0,),),
        constants=jax.tree.map(cut, cache.constants),
    )
    new = New(KV(k[None], v[None], positions[None, :, None].astype(jnp.int32)))
    return _with_layers(commit(small, new, phase=phase).state[0], layers)


def _with_layers(state: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """The states of a chain's stages, as for another number of layers."""

    def one(own: Any) -> Any:
        if not hasattr(own, "spec"):
            return own
        return dataclasses.replace(own, spec=own.spec.replace(layers=layers))

    return tuple(one(own) for own in state)


def _unslice(cache: Cache, out: Any, recurrent: Any, positions: Array) -> Cache:
    """Puts the layers' slices back together."""

    def join(whole: Array, new: Array) -> Array:
        per_layer = whole.ndim and whole.shape[0] == len(cache.groups[0])
        return new[:, 0] if per_layer else new[-1]

    length = jnp.maximum(cache.length, jnp.max(positions, 1) + 1)
    states = () if out is None else (jax.tree.map(join, cache.state[0], out),)
    states += () if recurrent is None else (recurrent,)
    return cache.replace(state=states, length=length)
