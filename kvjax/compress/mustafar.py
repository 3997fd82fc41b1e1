"""Mustafar: single entries of keys and values pruned by magnitude."""

from kvjax.cache import Chain, Window, chain, store
from kvjax.codecs import Codec, dense, per_kv, quantize, sparse
from kvjax.compress.common import bits_of, is_number, released


def mustafar(
    key_sparsity: float = 0.7,
    value_sparsity: float = 0.7,
    window: int = 32,
    release: int = 1,
    bits: int = 16,
    block: int = 1,
) -> Chain:
    """Of every older token the largest entries, as a bitmap and packed numbers; the newest exact.

        store(per_kv(k=sparse(key_sparsity), v=sparse(value_sparsity)),
              keys=values=Window(window, release))

    Pruned is per token and KV head, after rotary embedding, keys and values apart, when a token
    leaves the window; the prompt attends to its exact keys and values. Of D entries
    D - max(1, floor(s D)) + 1 stay, unscaled. Attention expands a block of stored tokens at a
    time, never the cache. A fixed number of entries per token stands where the released kernel
    has tiles of 64 numbers padded to multiples of 8: fewer bytes (at D = 64 and 16 bits 0.58 and
    0.39 of dense at 50 and 70 %, not 0.72 and 0.47), and a size that does not depend on the data.

    Args:
      key_sparsity, value_sparsity: share of the entries that is pruned, 0 (exact) to 1.
      window: how many of the newest tokens are exact.
      release: how many leave the window together. 1: the paper's reference path; its kernel: 256.
        Above 1 up to release - 1 more are exact, and speculation can accept several tokens.
      bits: of the entries that stay, 16 (exact) or 1 to 8: quantised per token by themselves, so
        that what is pruned stays zero.
      block: 1: every token has its own entries (the paper). More, a divisor of `release`: so many
        tokens share them (structured pruning, of whole channels, for comparison).

    Raises:
      ValueError: arguments out of range; on init_cache, a head size that is no multiple of 8.

    Source: Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference,
    arXiv 2505.22913.

    >>> mustafar().stages[0].codec.bits(64), mustafar(0.5, 0.5).stages[0].codec.bits(64)
    (6.25, 9.25)
    """
    for name, share in (("key_sparsity", key_sparsity), ("value_sparsity", value_sparsity)):
        if not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"mustafar({name}={share!r}): a share of the entries lies in [0, 1]")
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"mustafar(window={window!r}): expected an integer of at least 0")
    released("mustafar", release)
    if not isinstance(block, int) or block < 1 or release % block:
        raise ValueError(f"mustafar(block={block!r}): expected a divisor of release={release}")
    entries = None if bits_of("mustafar", bits) == 16 else quantize(bits)

    def codec(share: float) -> Codec:
        return sparse(share, entries, block) if share or entries else dense()

    newest = Window(window, release)
    pair = per_kv(k=codec(key_sparsity), v=codec(value_sparsity))
    return chain(store(pair, keys=newest, values=newest))
