"""Speculative decoding: drafters, trees, verification, and the loop around them."""

from kvjax.speculate.drafter import Context, Drafter, Outcome
from kvjax.speculate.loop import Speculation, speculate
from kvjax.speculate.prompt_lookup import prompt_lookup
from kvjax.speculate.token_recycling import paper_tree, small_tree, token_recycling
from kvjax.speculate.tree import Template, Tree, chain_of, chain_template, template
from kvjax.speculate.verify import Verdict, verify

DRAFTERS = {f.__name__: f for f in (prompt_lookup, token_recycling)}

__all__ = [
    "DRAFTERS",
    "Context",
    "Drafter",
    "Outcome",
    "Speculation",
    "Template",
    "Tree",
    "Verdict",
    "chain_of",
    "chain_template",
    "paper_tree",
    "prompt_lookup",
    "small_tree",
    "speculate",
    "template",
    "token_recycling",
    "verify",
]
