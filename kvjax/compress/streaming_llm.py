"""StreamingLLM: attention sinks and a recent window."""

from kvjax.cache import Chain, chain, first, recent, share
from kvjax.compress.common import Storage, per_token, size


def streaming_llm(
    keep: float | None = None,
    tokens: int | None = None,
    sinks: int = 4,
    positions: str = "slot",
    storage: Storage = None,
) -> Chain:
    """The first few tokens and the newest; nothing in between.

        first(sinks, positions="slot") > recent(tokens - sinks)

    Positions count held tokens only: a sink is read as if it stood right before the window, so
    that distances stay within `tokens` however long the stream.

    Args:
      keep: tokens held as a fraction of the prompt, sinks included. tokens: a number in its place,
        at least sinks + 1 (default 1024).
      sinks: first tokens that always stay; 0: a sliding window.
      positions: "slot" as in the paper, or "true": sinks are read where they stood.
      storage: how slots are coded: None (exactly), rtn(...) or a codec of single tokens.

    Raises:
      ValueError: both sizes; a size too small; storage that codes tokens together.

    Source: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.

    >>> from kvjax.cache import chain, first, recent
    >>> streaming_llm(tokens=1024) == chain(first(4, positions="slot"), recent(1020))
    True
    """
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"streaming_llm(sinks={sinks!r}): expected an integer of at least 0")
    tokens, keep = size("streaming_llm", keep, tokens, default=1024, least=sinks + 1)
    codec = per_token("streaming_llm", storage)
    newest = share(keep, less=sinks) if tokens is None else tokens - sinks
    window = recent(newest, codec=codec)
    return chain(first(sinks, positions, codec), window) if sinks else chain(window)
