"""Decoding: prefill, generate, score, and the text-level loop."""

from kvjax.decode.lists import token_lists
from kvjax.decode.loop import Generation, extend, generate, positions_of, prefill, score
from kvjax.decode.process import Processor, host_mask, processors, repetition_penalty
from kvjax.decode.replay import Words, repeat_words, replay
from kvjax.decode.sample import Sampler, greedy
from kvjax.decode.share import share
from kvjax.decode.text import complete, stream

__all__ = [
    "Generation",
    "Processor",
    "Sampler",
    "Words",
    "complete",
    "extend",
    "generate",
    "greedy",
    "host_mask",
    "positions_of",
    "prefill",
    "processors",
    "repeat_words",
    "repetition_penalty",
    "replay",
    "score",
    "share",
    "stream",
    "token_lists",
]
