"""Attention of a few query rows over packed keys (by channel) and values (by token)."""

from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention

__all__ = ["quantized_decode_attention"]
