"""Chelsea: clusters of neighbouring keys, each read as one with the log of its size."""

from kvjax.cache import Chain, chain, cluster
from kvjax.cache.share import share
from kvjax.compress.common import released, size


def chelsea(
    keep: float | None = None,
    tokens: int | None = None,
    chunk: int = 64,
    sinks: int = 4,
    recent: int = 32,
    release: int = 32,
    bias: bool = True,
) -> Chain:
    """Nothing is dropped: like neighbours become one slot, their mean, when the cache is full.

        cluster(n, chunk, first=sinks, recent=recent, release=release)
        k_b <- (N_b k_b + sum_a N_a k_a) / (N_b + sum_a N_a);  logit_b = q . k_b / sqrt(d) + log N_b

    Chunks are split into even and odd places; every even token names the closest odd one, and the
    closest pairs of all chunks join. One pass leaves half at least, so a fifth takes three. Written
    from the abstract and summaries, as there is no code: the cosine of cached keys, means by size,
    chunk, protected ends and `release` are our reading. The paper's later version, CentroidKV,
    keeps 0.25.

    Args:
      keep: slots per head as a fraction of the prompt, fixed when it ends (default 0.2). tokens: a
        number in its place, above sinks + recent.
      chunk: even number of neighbours that can join one another.
      sinks, recent: slots at both ends that never join.
      release: how many tokens come beyond that before they are clustered again.
      bias: False: logits without log N.

    Raises:
      ValueError: both sizes; a size out of range; on init_cache, a `keep` that leaves no slot
        beside the sinks and the recent ones.

    Source: Chelsea: Efficient Long-Context LLM Inference via KV Cache Clustering, arXiv 2506.11418.

    >>> chelsea(tokens=128) == chain(cluster(128, 64, first=4, recent=32, release=32))
    True
    """
    tokens, keep = size("chelsea", keep, tokens, default=0.2, least=max(sinks + recent, 0) + 1)
    n = share(keep) if tokens is None else tokens
    return chain(cluster(n, chunk, sinks, recent, released("chelsea", release), bias))
