"""TurboQuant: a random rotation, then fixed levels."""

from kvjax.cache import Chain, chain, store
from kvjax.codecs import codebook, compose, gaussian_levels, rotate
from kvjax.compress.common import bits_of


def turboquant(bits: int = 4, seed: int = 0) -> Chain:
    """Keys and values coded token by token, at once, by levels that suit any rotated vector.

        store(compose(rotate(seed, "orthogonal"), codebook(gaussian_levels(bits))))

    Every channel of a rotated head is nearly Gaussian with the token's root mean square as its
    scale, so the levels of least squared error for a Gaussian suit all tokens. A random rotation
    keeps the mean squared error of a unit vector between 4^-b and sqrt(3) pi / 2 4^-b. Keys are
    coded after rotary rotation.

    Signs and Walsh-Hadamard, as ports use, break the upper bound for a vector of a single channel:
    all its rotated entries are of one magnitude. The variant for inner products (one bit per
    channel for the sign of the rotated error) is left out: ports that tried it lost accuracy.

    Args:
      bits: 1 to 8, or 16 for exact.
      seed: of the rotation.

    Raises:
      ValueError: bits out of range.

    Source: TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate,
    arXiv 2504.19874 (the variant of least squared error).

    >>> turboquant(bits=4).stages[0].codec.bits(64)
    4.25
    """
    if bits_of("turboquant", bits) == 16:
        return chain(store())
    return chain(store(compose(rotate(seed, "orthogonal"), codebook(gaussian_levels(bits)))))
