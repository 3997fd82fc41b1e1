"""Attention of a few query rows over a buffer of exact keys and values."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
