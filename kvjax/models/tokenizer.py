"""Text to token ids and back, whole or as a stream, with the model's own chat template."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from kvjax.models.chat import render
from kvjax.models.errors import CheckpointError
from kvjax.models.json_file import read_json

MAX_TOKENIZER_BYTES = 2**26
MAX_CONFIG_BYTES = 2**22


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few facts about a model that go with it.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      bos, pad: token ids, or None.
      eos: ids that end a text or a turn; may be empty.
      template: the chat template (Jinja), or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: int | None = None,
        eos: Sequence[int] = (),
        pad: int | None = None,
        template: str | None = None,
    ):
        self.backend = backend
        self.bos = bos
        self.eos = tuple(dict.fromkeys(eos))
        self.pad = pad
        self.template = template

    def __len__(self) -> int:
        """How many token ids there are, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model puts around every text (bos)."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel. Rows keep their own lengths."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless `special`.

        Negative ids (padding past the end of a generation) are no tokens.
        """
        kept = [i for i in map(int, ids) if i >= 0]
        return self.backend.decode(kept, skip_special_tokens=not special)

    def decode_batch(self, rows: Iterable[Iterable[int]], *, special: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, special=special) for row in rows]

    def stream(self, *, special: bool = False) -> TextStream:
        """Decodes ids one at a time: see `TextStream`."""
        return TextStream(self, special)

    def chat(
        self, messages: Sequence[Mapping[str, object]], *, prompt: bool = True, **variables
    ) -> list[int]:
        """Token ids of a conversation in the model's format.

        Args:
          messages: {"role": ..., "content": ...} in order.
          prompt: end with the opening of the assistant's turn.
          **variables: what else the template reads (tools, enable_thinking, ...).

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        return self.encode(self.chat_text(messages, prompt=prompt, **variables), special=False)

    def chat_text(
        self, messages: Sequence[Mapping[str, object]], *, prompt: bool = True, **variables
    ) -> str:
        """The text that `chat` encodes."""
        if self.template is None:
            raise ValueError(
                "this model's tokenizer has no chat template; format the text yourself"
            )
        named = {"bos_token": self.bos, "eos_token": self.eos[0] if self.eos else None}
        named = {k: "" if i is None else self.backend.id_to_token(i) for k, i in named.items()}
        return render(
            self.template,
            messages=[dict(message) for message in messages],
            add_generation_prompt=prompt,
            **{**named, **variables},
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json in Hugging Face's form."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        facts = {"bos_token": self.bos, "eos_token": self.eos[0] if self.eos else None}
        facts["pad_token"] = self.pad
        facts = {k: self.backend.id_to_token(i) for k, i in facts.items() if i is not None}
        facts["tokenizer_class"] = "PreTrainedTokenizerFast"
        facts["clean_up_tokenization_spaces"] = False
        if self.template is not None:
            facts["chat_template"] = self.template
        (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))


class TextStream:
    """Text of a growing sequence of ids: what is handed out never ends inside a character.

    The pieces joined equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool):
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []  # context that has been handed out, then what has not
        self._done = 0  # how many of `_ids` have been handed out

    def push(self, token: int) -> str:
        """Adds a token id; returns the text that is now certain, often one word, maybe ""."""
        self._ids.append(int(token))
        before, text = self._decode(self._ids[: self._done]), self._decode(self._ids)
        if text.endswith("\ufffd"):  # bytes of a character are still to come
            return ""
        new = self._ids[self._done :]
        if self._decode(new):  # enough context for what follows
            self._ids = new
        self._done = len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What was held back, an unfinished character included (as U+FFFD)."""
        before, text = self._decode(self._ids[: self._done]), self._decode(self._ids)
        self._done = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, special=self._special)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (tokenizer.json and the small files beside it).

    Raises:
      CheckpointError: tokenizer.json is missing, too large or malformed.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: tokenizer.json is missing, so there is no tokenizer to load; "
            "pass tokenizer=False to load the model alone"
        )
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, expected at most {MAX_TOKENIZER_BYTES}")
    backend = guarded(str(path), lambda: tokenizers.Tokenizer.from_str(path.read_text("utf-8")))

    def optional(name: str) -> dict:
        found = folder / name
        return read_json(found, MAX_CONFIG_BYTES) if found.is_file() else {}

    facts = {**optional("special_tokens_map.json"), **optional("tokenizer_config.json")}

    def id_of(name: str) -> int | None:
        token = facts.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return backend.token_to_id(token) if isinstance(token, str) else None

    eos = [id_of("eos_token")]
    for name in ("config.json", "generation_config.json"):
        ids = optional(name).get("eos_token_id")
        eos += ids if isinstance(ids, list) else [ids]
    return Tokenizer(
        backend,
        bos=id_of("bos_token"),
        eos=[i for i in eos if type(i) is int],
        pad=id_of("pad_token"),
        template=_template(folder, facts),
    )


def _template(folder: pathlib.Path, facts: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        return path.read_text("utf-8")
    found = facts.get("chat_template")
    if isinstance(found, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def guarded(source: str, build):
    """Runs `build()`; whatever `tokenizers` raises, panics included, becomes CheckpointError."""
    try:
        return build()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, CheckpointError) and str(error).startswith(source):
            raise
        raise CheckpointError(f"{source}: tokenizer cannot be built: {error}") from None
