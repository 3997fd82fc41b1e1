"""xKV: one basis for the keys, and one for the values, of several layers."""

from __future__ import annotations

from kvjax.cache import Chain, best_pages, chain, layer_bases
from kvjax.codecs import compose, quantize, rotate
from kvjax.compress.common import Storage, bits_of, held, is_number


def xkv(
    group: int = 4,
    key_rank: int | float = 0.125,
    value_rank: int | float = 0.1875,
    budget: int | None = None,
    chunk: int = 8,
    local: int = 4,
    outliers: int | None = None,
    bits: int = 16,
    storage: Storage = None,
) -> Chain:
    """Neighbouring layers side by side, factored by one SVD per prompt; new tokens exactly.

        layer_bases(key_rank, value_rank, group) > store()
        X = [K_1 .. K_G] = U S V^T;  K_l' = (U S)_r (V_r^T)_l, rotated at its positions when read

    A group's tokens have one row of coordinates, U S, for all its layers; each layer keeps its
    columns of V^T. Values likewise, with a rank of their own, and they are mixed in coordinates.
    With a `budget` a query rebuilds and reads the keys of few chunks only (selective
    reconstruction): those whose mean key it attends to most, by the softmax over chunks, the
    largest among the query heads of a group. The last chunks, and outlier chunks, of which some key
    points away from the mean, are also held, and read, exactly. The prompt attends to its exact
    keys and values. Layers outside of any group: `init_cache(..., exact_layers=...)`. A group's
    maps take as many numbers as group x heads x head size more tokens would: for short prompts it
    saves nothing.

    Choices where paper and released code differ: keys and values are both rebuilt, where the
    released selective form keeps exact values; U S and V^T are stored in place of U and S V^T (the
    product is the same, and no division by a singular value is needed); logits over chunks are
    scaled as the model's are, not by 1 / sqrt(128); any number of rows; the SVD is exact, not
    randomised.

    Args:
      group: layers that share a basis, in order; the last group may have fewer.
      key_rank, value_rank: of a group; a float: a share of its channels (layers x heads x head
        size). The default shares are ranks 512 and 768 for four layers of Llama-3.1-8B. More than
        the prompt's tokens are never used.
      budget: tokens per key-value head that a query reads by selection, a multiple of `chunk`;
        None: all. (2048 in the paper.)
      chunk: tokens selected together.
      local: newest whole chunks of the prompt that are also held exactly.
      outliers: outlier chunks per layer and head; None: 24 per 1,024 tokens of the budget.
      bits: of the coordinates, rotated by a Hadamard matrix, one scale per token: 1 to 8, or 16 for
        exact.
      storage: of tokens that come after the prompt; None: exactly.

    Raises:
      ValueError: arguments out of range; on init_cache, behind a stage that leaves other tokens in
        each head.

    Source: xKV: Cross-Layer SVD for KV-Cache Compression, arXiv 2503.18893 (the second version for
    selective reconstruction).

    >>> xkv().stages[0].key_rank * 4 * 1024
    Fraction(512, 1)
    >>> xkv(budget=2048).stages[0].apart
    48
    """
    bits_of("xkv", bits)
    for name, number in (("group", group), ("chunk", chunk)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"xkv({name}={number!r}): expected an integer of at least 1")
    for name, rank in (("key_rank", key_rank), ("value_rank", value_rank)):
        share = isinstance(rank, float)
        if not is_number(rank) or not (0 < rank <= 1 if share else rank >= 1):
            raise ValueError(
                f"xkv({name}={rank!r}): expected a rank of at least 1, or a share in (0, 1] of the "
                "channels of a group's layers"
            )
    if budget is None:
        if outliers is not None:
            raise ValueError(f"xkv(outliers={outliers!r}): needs a budget; without it all is read")
        reader, apart, local = None, 0, 0
    else:
        if not isinstance(budget, int) or budget < chunk or budget % chunk:
            raise ValueError(f"xkv(budget={budget!r}): expected a multiple of chunk={chunk}")
        apart = budget * 24 // 1024 if outliers is None else outliers
        for name, number in (("local", local), ("outliers", apart)):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"xkv({name}={number!r}): expected an integer of at least 0")
        reader = best_pages(budget // chunk, chunk, softmax=True)
    codec = None if bits == 16 else compose(rotate(), quantize(bits))
    based = layer_bases(
        key_rank, value_rank, group, codec=codec, reader=reader, apart=apart, newest=local
    )
    return chain(based, held(storage))
