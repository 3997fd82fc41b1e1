"""Expected Attention: what future queries will attend to."""

from kvjax import cache
from kvjax.cache import Chain
from kvjax.compress.common import Storage, pruned, size


def expected_attention(
    keep: float | None = None,
    tokens: int | None = None,
    future: int = 512,
    sinks: int = 4,
    epsilon: float = 0.0,
    covariance: bool = True,
    value_norm: bool = True,
    storage: Storage = None,
) -> Chain:
    """Keeps of a prompt what a Gaussian of future queries is expected to attend to, per head.

        prune(keep, expected_attention(future, sinks)) > storage
        z_j = k_j . R mu + k_j' R S R' k_j / 2;  s_j = (mean_g softmax(z)_j + epsilon) |v_j|

    mu and S are the mean and covariance of the prompt's scaled queries before rotation, without
    the first `sinks`; R is the mean rotation over the next `future` positions.

    Args:
      keep: fraction of the prompt kept per head, sinks included (default 0.5). tokens: a number in
        its place, at least the sinks.
      future: positions averaged over.
      sinks: first tokens that always stay.
      epsilon: added to the attention before it meets the value norm.
      covariance, value_norm: whether these take part.
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes; a size out of range; on init_cache, less kept than the sinks.

    Source: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution, arXiv 2510.00636.

    >>> from kvjax import cache
    >>> from kvjax.cache import chain, prune, store
    >>> score = cache.expected_attention(512, 4)
    >>> expected_attention(keep=0.5) == chain(prune(keep=0.5, score=score), store())
    True
    """
    score = cache.expected_attention(future, sinks, epsilon, covariance, value_norm)
    least = max(sinks, 1)
    tokens, keep = size("expected_attention", keep, tokens, default=0.5, least=least)
    return pruned(tokens, keep, score, storage)
