"""A tiny random model and text, on disk as a user would have them; the main job run once."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import pytest
import tokenizers
from absl.testing import flagsaver
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvjax.evaluate import language_reference
from kvjax.models import Config, save_pretrained
from kvjax.models.llama import init
from kvjax.models.tokenizer import Tokenizer

CONTEXT, MORE, OFFSETS, NEEDLE = 64, 16, (10, 400, 900), 160
SMALL = (
    f"--context={CONTEXT}", f"--continuation={MORE}", f"--offsets={','.join(map(str, OFFSETS))}",
    "--needles=2", f"--needle_lengths={NEEDLE}", "--rounds=1",
)  # fmt: skip
FULL = "snapkv(keep=1.0, window=4, kernel=3)"
CODED = "rtn(bits=4)"
BROKEN = "streaming_llm(tokens=40)"
METHODS = ("dense", FULL, BROKEN, CODED)


def tiny_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE of about 300 tokens, <end> 0."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([text], trainer)
    return Tokenizer(backend, eos=(0,))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A folder with a model of two layers, its tokenizer and text.txt of some 5,000 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    text = language_reference()[:12000]
    tokenizer = tiny_tokenizer(text)
    config = Config(len(tokenizer), 32, 48, 2, 4, 2, 8, eos=(0,))
    save_pretrained(init(config, jax.random.key(0)), folder, tokenizer)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def start(*arguments: str) -> None:
    """The program as from a command line, in this process; flags as before afterwards."""
    from experiments import compress

    argv = ["compress", *arguments]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # ml_collections looks there for --config.name=value
        for flag in compress.FLAGS.get_flags_for_module(compress):
            flag.unparse()
        compress.main(compress.FLAGS(argv))


def given(tiny: pathlib.Path, out: pathlib.Path, *more: str) -> tuple[str, ...]:
    paths = (f"--model={tiny}", f"--text={tiny / 'text.txt'}", f"--out={out}")
    return (*paths, *SMALL, "--methods=dense", *more)


def results(out: pathlib.Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> pathlib.Path:
    """The folder of one whole run, in which one method failed on the way."""
    from experiments import compress
    from kvjax.compress import parse

    out = tmp_path_factory.mktemp("out")
    quality = compress.Job.quality
    broken = parse(BROKEN)[0][1]

    def failing(self, label, chain):
        if chain == broken:
            raise RuntimeError("out of tokens <here> & now")
        return quality(self, label, chain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress.Job, "quality", failing)
        start(*given(tiny, out, f"--methods={'; '.join(METHODS)}"))
    return out
