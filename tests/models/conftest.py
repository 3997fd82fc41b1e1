import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvjax.models.embedded import cached_smollm2

TEXT = ["It's naïve: 日本語 and 12345 are fine 🎉.", "the then there, the other\n\n  x = 5"] * 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2():
    """The path of the embedded real model; skips where it has not been fetched."""
    path = cached_smollm2()
    if path is None:
        pytest.skip("the embedded model is not cached: run `python -m kvjax.models.embedded`")
    return path


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer with special tokens <bos> 0, <end> 1, <pad> 2."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


@pytest.fixture
def tokenizer_folder(tmp_path, byte_level):
    """The files of that tokenizer in Hugging Face's form."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    byte_level.save(str(folder / "tokenizer.json"))
    facts = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<end>", "special": True},
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def tokenizer_metadata(byte_level) -> dict:
    """The same tokenizer as GGUF metadata."""
    model = json.loads(byte_level.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
