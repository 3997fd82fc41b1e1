"""D2O: layers share by how even their attention is; what is evicted melts into its likes."""

from kvjax.cache import (
    Chain,
    accumulated_attention,
    chain,
    evenness,
    heavy,
    moving,
    nearest,
    protect,
)
from kvjax.cache.share import as_fraction, share
from kvjax.compress.common import part_of, size


def d2o(
    keep: float | None = None,
    tokens: int | None = None,
    recent_part: float = 0.5,
    sinks: int = 4,
    rate: float = 0.5,
    statistic: str = "variance",
    limit: float = 2.0,
    layers: bool = True,
    merge: bool = True,
) -> Chain:
    """H2O's choice, with budgets by layer, and a second chance for what is evicted.

        heavy(n, protect(accumulated_attention(), first=sinks), recent=recent_part,
              absorb=nearest(moving(rate), "similarity"), budget=evenness(statistic, limit))
        c_l = L n softmax_l(-F_l),  F_l = mean over heads of Var_j(sum_i A_ij)
        k_j <- (e k_j + sum_{i -> j} exp(u_ij) k_i) / (e + sum exp(u_ij)),  u = cos(k_i, k_j) >= t

    and the same for values. The threshold t is the mean similarity of what the prompt evicts, then
    follows that of each token evicted while decoding. Budgets are found when the prompt ends, from
    all layers, and stay. Two differences from the paper: a layer gets at most `limit` times the
    mean, for which slots are allocated, and what that cuts goes to the other layers, so that the
    total is exact; sinks do not count in the variance, which they would dominate. The released code
    also leaves layers 0, 1 and the last uncompressed: `init_cache(exact_layers=(0, 1, -1))`.

    Args:
      keep: tokens held per head as a fraction of the prompt, mean over layers (default 0.2).
        tokens: a number in its place, above the sinks.
      recent_part: the part of each layer's tokens that is its newest, in (0, 1).
      sinks: first tokens, that always stay.
      rate: weight of the newest similarity in the threshold.
      statistic: "variance", or "spread": the released code's, scaled to [0, 1] in each layer.
      limit: the most that a layer holds, in units of the mean.
      layers: False: all layers hold as many. merge: False: what is evicted is dropped.

    Raises:
      ValueError: both sizes; a size, part or rate out of range; an unknown statistic.

    Source: D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large
    Language Models, arXiv 2406.13035.

    >>> from fractions import Fraction
    >>> plain = heavy(64, protect(accumulated_attention(), first=4), recent=Fraction(1, 2))
    >>> d2o(tokens=64, layers=False, merge=False) == chain(plain)
    True
    """
    tokens, keep = size("d2o", keep, tokens, default=0.2, least=sinks + 1)
    return chain(
        heavy(
            share(keep) if tokens is None else tokens,
            protect(accumulated_attention(), first=sinks),
            recent=as_fraction(part_of("d2o", recent_part)),
            absorb=nearest(moving(rate), "similarity") if merge else None,
            budget=evenness(statistic, limit) if layers else None,
        )
    )
