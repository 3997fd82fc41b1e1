"""What the methods share: how budgets and storage are given, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.cache import (
    Absorb,
    Budget,
    Chain,
    Chosen,
    Score,
    Share,
    Stage,
    Store,
    Window,
    chain,
    prune,
    store,
)
from kvjax.cache.share import as_fraction, share
from kvjax.codecs import Codec, PerKV, apart, as_pair, dense, quantize

Storage = Chain | Stage | Codec | PerKV | None


def size(
    method: str, keep: float | None, tokens: int | None, *, default: float | int, least: int = 1
) -> tuple[int | None, float | None]:
    """(tokens, keep), exactly one of them not None.

    Args:
      method: for messages.
      keep: fraction of the prompt in (0, 1]. tokens: a number, in its place.
      default: where neither is given; an int is a number of tokens, a float a fraction.
      least: the fewest tokens that the method can work with.
    """
    if keep is not None and tokens is not None:
        raise ValueError(
            f"{method}(keep={keep}, tokens={tokens}): give one of them, the fraction of the "
            "prompt or the number of tokens"
        )
    if keep is None and tokens is None:
        keep, tokens = (default, None) if isinstance(default, float) else (None, default)
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):
        raise ValueError(f"{method}(keep={keep!r}): a fraction of the prompt lies in (0, 1]")
    if tokens is not None and not (isinstance(tokens, int) and tokens >= least):
        raise ValueError(f"{method}(tokens={tokens!r}): expected an integer of at least {least}")
    return tokens, keep


def split(
    method: str, keep: float | None, tokens: int | None, recent: float, default: float
) -> tuple[int | Share, int | Share]:
    """A budget as (recent, heavy): `recent` is the part of it that goes to the newest tokens."""
    tokens, keep = size(method, keep, tokens, default=default, least=2)
    part = as_fraction(part_of(method, recent))
    if keep is not None:
        whole = as_fraction(keep)
        return share(whole * part), share(whole * (1 - part))
    newest = min(max(int(tokens * part), 1), tokens - 1)
    return newest, tokens - newest


def part_of(method: str, recent: float) -> float:
    """Checks the part of a budget that goes to the newest tokens."""
    if not (is_number(recent) and 0 < recent < 1):
        raise ValueError(f"{method}(recent_part={recent!r}): a part of the budget lies in (0, 1)")
    return recent


def pruned(
    n: int | None,
    keep: float | None,
    score: Score,
    storage: Storage,
    budget: Budget | None = None,
    absorb: Absorb | None = None,
) -> Chain:
    """The best of a prompt by `score`, then `storage` (None: exactly), each head by itself."""
    ragged = budget is not None and budget.ragged
    best = prune(n, score, keep=keep, budget=budget, absorb=absorb)
    return chain(best, each_head(held(storage), ragged))


def each_head(storage: Chain, ragged: bool) -> Chain:
    """The storage for heads that hold different tokens.

    What codes several heads together (`across_heads`) codes each by itself. Where heads hold
    unlike numbers too, a stage that takes all of a prompt in another form (`chosen` without a
    score) is left out: the store behind it takes those tokens as it takes later ones.
    """
    stages = []
    for stage in storage.stages:
        if isinstance(stage, Chosen):
            if ragged and stage.score is None:
                continue
            stage = dataclasses.replace(stage, inner=_each_head(stage.inner))
        stages.append(_each_head(stage) if isinstance(stage, Store) else stage)
    return chain(*stages)


def _each_head(stage: Store) -> Store:
    return dataclasses.replace(stage, codec=apart(stage.codec))


def held(storage: Storage) -> Chain:
    """Storage as a chain: None is exact; a stage or a codec is put into one."""
    if storage is None:
        return chain(store())
    if isinstance(storage, Codec | PerKV):
        return chain(store(storage))
    if not isinstance(storage, Chain | Stage):
        raise ValueError(
            f"storage={storage!r}: expected a chain such as kivi(bits=4), a stage or a codec"
        )
    return chain(storage)


def per_token(method: str, storage: Storage) -> Codec | PerKV | None:
    """The codec of each slot, for methods that replace slots one by one.

    Args:
      storage: a codec of single tokens, or a chain that is nothing but a store of one.
    """
    allowed = (
        "slots are replaced one by one, so each token must be coded by itself: use rtn(bits=4), "
        "dense(), or a codec of single tokens such as quantize(4)"
    )
    if storage is None or isinstance(storage, Codec | PerKV):
        codec = storage
    else:
        stages = storage.stages if isinstance(storage, Chain) else (storage,)
        plain = len(stages) == 1 and isinstance(stages[0], Store)
        codec = stages[0].codec if plain else None
        if not plain or stages[0] != store(codec) or stages[0].keys != Window(0):
            raise ValueError(f"{method}(storage={storage}): {allowed}")
    if codec is None:
        return None
    pair = as_pair(codec)
    if pair.k.block != 1 or pair.v.block != 1 or pair.k.constants_spec(8):
        raise ValueError(f"{method}(storage={storage}): {allowed}")
    if pair.k != pair.v:
        return pair
    return None if pair.k == dense() else pair.k


def bits_of(method: str, bits: int, name: str = "bits", least: int = 1) -> int:
    """Checks a width of codes: `least` to 8, or 16 for exact."""
    if not isinstance(bits, int) or not (least <= bits <= 8 or bits == 16):
        raise ValueError(
            f"{method}({name}={bits!r}): expected an integer from {least} to 8, or 16 for exact"
        )
    return bits


def released(method: str, release: int) -> int:
    """Checks how many tokens leave together: at least 1."""
    if not isinstance(release, int) or isinstance(release, bool) or release < 1:
        raise ValueError(f"{method}(release={release!r}): expected an integer of at least 1")
    return release


def grouped(bits: int, axis: str = "token", group: int | None = None, parts: int = 1) -> Codec:
    """`quantize`, or `dense` at 16 bits."""
    return dense() if bits == 16 else quantize(bits, axis, group, parts=parts)


def is_number(x: Any) -> bool:
    """Whether x is an int or a float."""
    return isinstance(x, int | float) and not isinstance(x, bool)
