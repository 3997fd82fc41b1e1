"""TOVA: token omission via attention."""

from kvjax.cache import Chain, chain, heavy, newest_attention, share
from kvjax.compress.common import Storage, per_token, size


def tova(keep: float | None = None, tokens: int | None = None, storage: Storage = None) -> Chain:
    """Drops at each step the token that the newest row attends to least, over all heads of a layer.

        heavy(tokens, newest_attention())
        s_j = mean over the layer's query heads of softmax(q_newest . k)_j

    No window, no sinks: even the newest token may go. Of rows that come together (a prompt, a
    verified block) only the last decides.

    Args:
      keep: tokens held per layer as a fraction of the prompt. tokens: a number in its place
        (default 512).
      storage: how slots are coded: None (exactly), rtn(...) or a codec of single tokens.

    Raises:
      ValueError: both sizes, or a size out of range; storage that codes tokens together.

    Source: Transformers are Multi-State RNNs, arXiv 2401.06104.

    >>> from kvjax.cache import chain, heavy, newest_attention
    >>> tova() == chain(heavy(512, newest_attention()))
    True
    """
    tokens, keep = size("tova", keep, tokens, default=512)
    codec = per_token("tova", storage)
    return chain(heavy(tokens or share(keep), newest_attention(), codec=codec))
