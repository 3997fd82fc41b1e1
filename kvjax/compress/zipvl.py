"""ZipVL: important tokens by layer, in a number that the attention says; the others at few bits."""

from __future__ import annotations

from kvjax.cache import (
    Chain,
    Store,
    attending,
    chain,
    chosen,
    covering,
    later,
    marked,
    newest_attention,
    recent,
    share,
    sift,
    store,
)
from kvjax.codecs import per_kv
from kvjax.compress.common import bits_of, grouped


def zipvl(
    tau: float = 0.975,
    bits: int = 4,
    low_bits: int = 2,
    evict: bool = False,
    probes: int = 64,
    drawn: int = 64,
    interval: int = 100,
    group: int = 32,
    limit: float = 1.0,
    ratio: float | None = None,
    last: int = 1,
    seed: int = 0,
    sizes: int = 3,
    all_ask: bool = False,
) -> Chain:
    """In each layer of a prompt only important tokens attend; they are stored at more bits.

        attending(covering(tau, recent=probes, drawn=drawn)) > later(recent(0, release=interval)) >
        sift(important, store(bits), later=newest_attention(), cover=tau) > store(low_bits)
        p = min{k : sum of the k largest a >= tau sum a},  important: the p largest of a normalised

    with a_j the attention that token j gets from a few probe rows. The others attend to nothing in
    that layer (their attention output is zero, the MLP runs on all), and the next layer chooses
    anew. What is generated waits exactly; every `interval` tokens it is split in the same way, by
    the attention row of the newest of them. Keys are coded per channel in groups of tokens, values
    per token in groups of channels; keys that fill no group wait exactly, on both sides. What the
    paper codes in which groups, and how it treats rows that are left out (here: zero), is not known
    for certain.

    With `evict=True`, the second version of the paper, only important tokens are held, exactly, and
    all that come later:

        attending(covering(tau)) > chosen(share(limit), important) > later(store())

    A prompt is computed at once (no chunks), a later turn as ever. p is data: smaller programs of
    attention (`sizes`) save time where one of them is enough for every row of the batch.

    Args:
      tau: the share of attention that important tokens hold, in (0, 1]; 1: all are important.
      bits, low_bits: of important and of other tokens, 1 to 8, or 16 for exact.
      evict: whether the others are forgotten in place of coded.
      probes, drawn: how many of the newest rows ask, and how many others at random.
      interval: generated tokens that are split and coded together, at least 2.
      group: tokens of a key's channel, and channels of a value, that share a scale.
      limit: for which part of all tokens there is room among the important ones; the best stay if
        there are more. Below 1 less is allocated.
      ratio: a fixed part of all tokens in each layer in place of tau, for comparison; tau still
        splits what is generated.
      last: the newest tokens of a prompt that are always important.
      seed: of the draw.
      sizes: how many smaller programs of attention are compiled (3: for three, two and one quarter
        of the rows, at least 128); 0: none, the other rows are only masked.
      all_ask: whether the other tokens attend too, to the important ones, for comparison.

    Raises:
      ValueError: shares, bits or sizes out of range; on `prefill`, chunks.

    Source: ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV
    Cache Compression, arXiv 2410.08584 (first version; `evict`: second version).

    >>> zipvl().stages[3].codec.bits(64), zipvl().stages[2].inner.codec.bits(64)
    (3.0, 5.0)
    """
    for name, part in (("tau", tau), ("limit", limit), ("ratio", ratio)):
        if part is not None and not 0 < part <= 1:
            raise ValueError(f"zipvl({name}={part!r}): a share lies in (0, 1]")
    for name, number, least in (
        ("probes", probes, 1), ("drawn", drawn, 0), ("interval", interval, 2), ("group", group, 1),
        ("last", last, 1), ("sizes", sizes, 0),
    ):  # fmt: skip
        if not isinstance(number, int) or number < least:
            raise ValueError(f"zipvl({name}={number!r}): expected an integer of at least {least}")
    rule = covering(tau, ratio, probes, drawn, last, seed, sizes, all_ask)
    if evict:
        kept = chosen(share(limit), marked(rule.mark, refuses=True))
        return chain(attending(rule), kept, later(store()))
    high, low = (_coded(b, group, n) for b, n in ((bits, "bits"), (low_bits, "low_bits")))
    split = sift(rule.mark, high, newest_attention(), tau, limit)
    return chain(attending(rule), later(recent(0, release=interval)), split, low)


def _coded(bits: int, group: int, name: str) -> Store:
    bits_of("zipvl", bits, name)
    return store(per_kv(k=grouped(bits, "channel", group), v=grouped(bits, "token", group)))
