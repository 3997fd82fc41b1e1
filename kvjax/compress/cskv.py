"""CSKV: fewer channels for old tokens, by a factorisation learnt layer by layer."""

from kvjax.cache import Chain, Window, chain, store
from kvjax.codecs import Codec, compose, per_kv, project_heads, quantize
from kvjax.compress.common import bits_of, is_number

FACTORS = ("svd", "asvd", "pca", "trained")


def names(factors: str) -> tuple[str, str]:
    """What the constants of keys and values are called: other factors, another cache."""
    return f"cskv_{factors}_key", f"cskv_{factors}_value"


def cskv(
    key_density: float = 0.5,
    value_density: float = 0.5,
    window: int = 32,
    sliding: bool = True,
    bits: int = 16,
    factors: str = "svd",
) -> Chain:
    """The newest tokens exactly, of all older ones a part of the channels.

        store(per_kv(k=project_heads(key_density), v=project_heads(value_density)),
              keys=Window(window), values=Window(window), rope="before")

    Keys before rotary embedding and values are stored as c = (x - o) E, of floor(density D)
    channels per head but one factorisation for all heads, and read as c B + o, o the bias of the
    projection (zero in most models). Coded: `compose(project_heads(..), quantize(bits))`, c of keys
    per channel over `window` tokens, c of values per token and head. The prompt attends to its
    exact keys and values; keys are expanded and rotated again at every step, of values only what
    was mixed is expanded.

    The paper writes c = h A from the layer's input h, A of the width of the model. Here A = W E
    with W the projection, so that c = h A = k E is a code of the key: it can stand wherever a codec
    can, and needs no input of the layer. Nothing is lost by it: SVD and ASVD of W have this form,
    and so has the least of the training loss, since what h A holds beyond its best linear guess
    from k is noise to k, which B could only add. Where paper and released code differ further: a
    group's minimum is stored as it is (a zero point rounded and clipped to the range of codes
    breaks groups of one sign); values at the ends of their group keep their gradient.

    Args:
      key_density, value_density: part of the channels that is stored, in (0, 1].
      window: exact tokens; 0: none but those being computed.
      sliding: True (the paper): the newest `window` tokens are exact at any time; in coded form
        keys leave `window` at a time, so up to 2 window - 1 are. False (the released code): the
        tokens since the last multiple of `window`, at times none.
      bits: of a code, 1 to 8, or 16: c is stored as it is.
      factors: where E and B come from. "svd": of the projections, from the weights alone; "asvd":
        weighted by the root of the mean magnitude of each input; "pca": of keys and values, the
        least squared error on the calibration text; "trained": to give back keys and values, as
        coded. "asvd" and "pca" need python -m experiments.calibrate, "trained" needs
        python -m experiments.train_cskv.

    Raises:
      ValueError: arguments out of range; on init_cache, constants that are missing, or channels
        that do not pack.

    Source: CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios,
    arXiv 2409.10593.

    >>> cskv(value_density=0.75).stages[0].codec.bits(64)  # of 16
    10.0
    >>> cskv(bits=4).stages[0].codec.bits(64)  # half of 4 + 32 / 32
    2.5
    """
    bits_of("cskv", bits)
    for name, part in (("key_density", key_density), ("value_density", value_density)):
        if not (is_number(part) and 0 < part <= 1):
            raise ValueError(f"cskv({name}={part!r}): a part of the channels lies in (0, 1]")
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ValueError(f"cskv(window={window!r}): expected an integer of at least 0")
    if not isinstance(sliding, bool):
        raise ValueError(f"cskv(sliding={sliding!r}): expected True or False")
    if factors not in FACTORS:
        raise ValueError(f"cskv(factors={factors!r}): expected one of {', '.join(FACTORS)}")
    axis = "channel" if window else "token"
    coded: list[tuple[Codec, ...]] = [(), ()]
    if bits != 16:
        coded = [(quantize(bits, axis, window or None),), (quantize(bits),)]
    keys, values = names(factors)
    pair = per_kv(
        k=compose(project_heads(key_density, keys), *coded[0]),
        v=compose(project_heads(value_density, values), *coded[1]),
    )
    held = Window(0)
    if window:
        held = Window(window, pair.k.block) if sliding else Window(0, window)
    return chain(store(pair, keys=held, values=held, rope="before"))
