"""Kernels: one folder each with the plain-JAX reference, the TPU and the GPU form, and the public
function that picks one by `implementation=`. Each returns a `kvjax.cache.Partial`."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.quantized_decode_attention import quantized_decode_attention

__all__ = ["decode_attention", "quantized_decode_attention"]
