"""Text in and out: streams, stop strings and chats, against decoding whole rows of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import chain, store
from kvjax.decode import Sampler, complete, generate, prefill, stream
from kvjax.decode.text import pad
from kvjax.models import Config
from kvjax.models.llama import init
from tests.experiments.conftest import tiny_tokenizer

WORDS = "the cache keeps what the query reads, and the query reads what the cache keeps. " * 40
TOKENIZER = tiny_tokenizer(WORDS)
MODEL = init(Config(len(TOKENIZER), 32, 48, 2, 4, 2, 8, eos=(0,)), jax.random.key(3))
PROMPTS = ["the cache keeps what", "and the query"]
NEW = 20


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """Both completions, from tokens decoded all at once."""
    rows = [TOKENIZER.encode(p) for p in PROMPTS]
    tokens, lengths = pad(rows)
    logits, cache = prefill(
        MODEL, tokens, chain(store()), lengths=jnp.asarray(lengths), new_tokens=NEW
    )
    shown = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)
    out = generate(MODEL, cache, logits, NEW, prompt=shown)
    return [TOKENIZER.decode([int(i) for i in row if i > 0]) for row in np.asarray(out.tokens)]


def test_stream_is_the_text_of_the_tokens(plain):
    """In pieces of any size, the callback given what is yielded, and each prompt alone."""
    seen: list[list[str]] = []
    pieces = list(
        stream(MODEL, TOKENIZER, PROMPTS, new_tokens=NEW, segment=7, callback=seen.append)
    )
    assert pieces == seen and len(pieces) == 3
    assert ["".join(row) for row in zip(*pieces)] == plain
    assert complete(MODEL, TOKENIZER, PROMPTS, new_tokens=NEW) == plain
    assert complete(MODEL, TOKENIZER, PROMPTS[1:], new_tokens=NEW) == plain[1:]


@pytest.mark.parametrize("segment", [1, 5, 16])
def test_a_stop_string_is_never_shown(plain, segment):
    """Wherever it lies, over the end of a segment too; what precedes it is shown, nothing after."""
    text = plain[0]
    for start in range(1, len(text) - 4, 5):
        stop = text[start : start + 4]
        cut = text.index(stop)
        shown = ""
        for pieces in stream(
            MODEL, TOKENIZER, PROMPTS[:1], new_tokens=NEW, segment=segment, stop=[stop, "never"]
        ):
            shown += pieces[0]
            assert text[:cut].startswith(shown), (stop, shown)
        assert shown == text[:cut]


def test_rows_stop_apart(plain):
    stop = plain[0][6:10]
    found = complete(MODEL, TOKENIZER, PROMPTS, new_tokens=NEW, stop=[stop])
    assert found == [p.split(stop)[0] for p in plain]


def test_the_same_seed_gives_the_same_text():
    ask = lambda seed: complete(  # noqa: E731
        MODEL, TOKENIZER, PROMPTS, new_tokens=NEW, sampler=Sampler(temperature=1.5), seed=seed
    )
    assert ask(1) == ask(1) != ask(2)


@pytest.mark.parametrize("stop", ["END", [""], [3]])
def test_stop_is_a_list_of_strings(stop):
    with pytest.raises(ValueError, match=r"stop=.*expected a list of strings that are not empty"):
        next(stream(MODEL, TOKENIZER, PROMPTS, stop=stop))


def test_no_prompt():
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        complete(MODEL, TOKENIZER, [""])
