"""PrefixKV: every layer keeps what holds one common share of its attention."""

from __future__ import annotations

from kvjax.cache import Chain, accumulated_attention, coverage, given, protect
from kvjax.compress.common import Storage, pruned, size


def prefixkv(
    keep: float | None = None,
    tokens: int | None = None,
    sinks: int = 1,
    last: int = 1,
    parts: tuple[float, ...] | None = None,
    storage: Storage = None,
) -> Chain:
    """The prefix of each layer's ranking that holds a share p of its attention, p for all layers.

        prune(keep, protect(accumulated_attention(whole_layer=True), sinks, last),
              budget=coverage()) > storage
        o_l = min{o : sum of the o largest s_l >= p sum of all},  sum_l o_l = L keep T

    One index set for all heads of a layer. p is found exactly by one sort, in place of the paper's
    search, so the total is exact too. Without `parts` the search is online: of each prompt, from
    all its layers, in one pool. With `parts` it is offline: each layer's part of a prompt, as the
    online form kept of other prompts (`tests/compress/test_merging.py` shows it), so that sizes are
    known before compilation. Protected tokens do not count in the shares, which the first would
    dominate. Tokens generated later are all kept (the paper drops old ones at the same ratio).

    Args:
      keep: fraction of the prompt kept, mean over layers (default 0.2). tokens: a number in its
        place, at least the protected ones.
      sinks, last: first and last tokens of a prompt, that always stay.
      parts: of each layer, relative to one another, e.g. (0.3, 0.2, 0.1); None: online.
      storage: what holds the survivors: any chain that codes heads one by one, without constants
        or readers, since heads hold unlike numbers of tokens; None: exactly.

    Raises:
      ValueError: both sizes; a size out of range; parts that are not positive; on init_cache, parts
        of another number of layers.

    Source: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
    Efficient Generation, arXiv 2412.03409.

    >>> from kvjax.cache import chain, prune, store
    >>> score = protect(accumulated_attention(whole_layer=True), 1, 1)
    >>> prefixkv(keep=0.25) == chain(prune(keep=0.25, score=score, budget=coverage()), store())
    True
    """
    score = protect(accumulated_attention(whole_layer=True), sinks, last)
    tokens, keep = size("prefixkv", keep, tokens, default=0.2, least=max(sinks + last, 1))
    budget = coverage() if parts is None else given(parts, always=sinks + last)
    return pruned(tokens, keep, score, storage, budget)
