"""Hydragen: a prefix that rows share is held once, and read once for all of them."""

from kvjax.cache import Chain, chain, prefix
from kvjax.cache.stages.prefix import level
from kvjax.compress.common import Storage, held


def hydragen(levels: int = 1, storage: Storage = None) -> Chain:
    """Attention to shared prefixes and to each row's own tokens apart, merged by max and sum.

        prefix() > prefix("prefix_1") > .. > storage
        out = sum_i w_i out_i / sum_i w_i,  w_i = sum_i exp(max_i - max)

    Exact: softmax attention splits over disjoint sets of keys. The queries of all rows that share a
    prefix meet its keys in one matrix product per head, and its bytes do not grow with the batch.
    What is shared is run once by `kvjax.decode.share` and given as `constants`; a row's own tokens
    then begin where its prefix ends. Levels that are not given are left out, so that without any
    this is `dense`:

        shared = share(model, system_tokens)
        logits, cache = prefill(model, questions, hydragen(), new_tokens=64, constants=shared)

    Args:
      levels: of the tree: 1, or more where prefixes have prefixes (`share(..., under=...)`).
      storage: of each row's own tokens; None: exactly.

    Raises:
      ValueError: arguments out of range; on init_cache, a batch that its prefixes do not divide, or
        prefixes of more levels than there are here.

    Source: Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv 2402.05099.

    >>> [stage.name for stage in hydragen(levels=2).stages[:-1]]
    ['prefix', 'prefix_1']
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise ValueError(f"hydragen(levels={levels!r}): expected an integer of at least 1")
    return chain(*(prefix(level(i)) for i in range(levels)), held(storage))
