"""EMS: evict, then merge, by a score of all rows and of the last."""

from kvjax.cache import Chain, global_local, nearest, protect
from kvjax.compress.common import Storage, pruned, size


def ems(
    keep: float | None = None,
    tokens: int | None = None,
    window: int = 32,
    threshold: float = 0.6,
    among: float = 0.95,
    terms: str = "sum",
    merge: bool = True,
    bias: bool = False,
    storage: Storage = None,
) -> Chain:
    """Per head, the most important of a prompt stay, the next best melt into their likes.

        prune(tokens, protect(global_local(window, terms), last=window), absorb=nearest(threshold,
              "score", values=True, direction=True, among=among)) > storage
        s_j = g_j + l_j mean(g) / mean(l);  R_xc = max(cos(k_x, k_c), 0) max(cos(v_x, v_c), 0)

    A token that is not kept joins the kept one with the largest R, if that is at least `threshold`
    (the paper's zero class is the other case), and if the tokens more important than it hold less
    than `among` of the head's score. Values, and directions of keys, are averaged with the scores
    as weights; a key keeps its norm. Tokens generated later are all kept. Written from abstracts
    and reviews, as the paper has no code: the sum, the weights, the norm, window, threshold and
    `among` are our reading.

    Args:
      keep: fraction of the prompt kept per head. tokens: a number in its place, at least the window
        (default 256); a prompt of no more is kept whole.
      window: last rows that vote once more, and whose tokens always stay.
      threshold: least similarity R; above 1 nothing merges.
      among: part of the head's score from which candidates come; 0: pure eviction.
      terms: "sum", "max", or one score alone: "global", "local".
      merge: False: what is not kept is dropped.
      bias: logits of merged tokens rise by the log of their number (ours).
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes; tokens below the window; an unknown term; a part outside [0, 1]; on
        init_cache, a `keep` that leaves less of the prompt than the window.

    Source: EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on
    Global-Local Importance, arXiv 2412.08521.

    >>> from kvjax.cache import chain, prune, store
    >>> score = protect(global_local(32), last=32)
    >>> ems(keep=0.25, merge=False) == chain(prune(keep=0.25, score=score), store())
    True
    """
    score = protect(global_local(window, terms), last=window)
    tokens, keep = size("ems", keep, tokens, default=256, least=window)
    rule = nearest(threshold, "score", values=True, direction=True, among=among, bias=bias)
    return pruned(tokens, keep, score, storage, absorb=rule if merge else None)
