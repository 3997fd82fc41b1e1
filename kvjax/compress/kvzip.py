"""KVzip: what the model needs to repeat its context stays, whatever will be asked."""

from kvjax.cache import Chain, overall, replayed_attention
from kvjax.compress.common import Storage, pruned, size


def kvzip(
    keep: float | None = None,
    tokens: int | None = None,
    chunk: int = 2000,
    hint: int = 8,
    sinks: int = 4,
    uniform: bool = False,
    storage: Storage = None,
) -> Chain:
    """Keeps of a prompt what received most attention while the model repeated it, part by part.

        prune(keep, replayed_attention(chunk, hint, sinks), budget=overall()) > storage
        s_j = max_{i, g} softmax(q_gi . [sinks, chunk of j, rows of the replay up to i])_j

    The replay runs over the whole cache and leaves it unchanged; it costs about another prefill.
    All heads of all layers share one budget, in one pool: what is allocated is what is kept.

    Args:
      keep: fraction of the prompt kept, mean over layers and heads (default 0.3). tokens: a number
        in its place, at least the sinks.
      chunk: tokens that are repeated at a time.
      hint: tokens before a chunk that the model is shown as its beginning.
      sinks: first tokens, that always stay.
      uniform: every head keeps the same number.
      storage: what holds the survivors: any chain that codes heads one by one, without constants
        or readers, since heads hold unlike numbers of tokens; None: exactly.

    Raises:
      ValueError: both sizes; a size out of range; on init_cache, less kept than the sinks; on
        `finish`, a prompt that was not replayed (`kvjax.decode.prefill` does it; its argument
        `words` takes the words that ask for it, `repeat_words(tokenizer)`).

    Source: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction,
    arXiv 2505.23416.

    >>> from kvjax.cache import chain, prune, store
    >>> score = replayed_attention(2000, 8, 4)
    >>> kvzip(keep=0.25) == chain(prune(keep=0.25, score=score, budget=overall()), store())
    True
    """
    score = replayed_attention(chunk, hint, sinks)
    tokens, keep = size("kvzip", keep, tokens, default=0.3, least=max(sinks, 1))
    return pruned(tokens, keep, score, storage, None if uniform else overall())
