"""Masked-diffusion decoding: block schedules, unmaskers and cache policies in one jitted loop."""

from kvjax.diffusion.cache import DiffusionCache, dkv_decode, no_cache
from kvjax.diffusion.choose import Choice
from kvjax.diffusion.loop import Denoised, denoise, generate, llada
from kvjax.diffusion.schedule import BlockSchedule, blocks
from kvjax.diffusion.unmask import Unmasker, at_least_one, factor, quota, ranks, threshold
from kvjax.diffusion.view import Prediction, View

__all__ = [
    "BlockSchedule",
    "Choice",
    "Denoised",
    "DiffusionCache",
    "Prediction",
    "Unmasker",
    "View",
    "at_least_one",
    "blocks",
    "denoise",
    "dkv_decode",
    "factor",
    "generate",
    "llada",
    "no_cache",
    "quota",
    "ranks",
    "threshold",
]
