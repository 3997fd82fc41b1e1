"""The tokenizer that a GGUF file carries."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kvjax.models.errors import CheckpointError
from kvjax.models.gguf_file import GGUFFile
from kvjax.models.tokenizer import Tokenizer, guarded

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizer name -> how text is cut before byte-level BPE.
_CUTS = {
    "default": None,
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",
    "qwen2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",
}
MAX_TOKEN = 512  # characters of a SentencePiece token, since every cut of it is tried
_UNKNOWN, _CONTROL, _USER = 2, 3, 4


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """Builds the tokenizer from a GGUF file's metadata.

    Known are byte-level BPE ("gpt2") with the pre-tokenizers of `_CUTS`, and SentencePiece BPE
    ("llama": Llama 2, Mistral, Gemma).

    Raises:
      CheckpointError: the file has no tokenizer, or one of another kind.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(
            f"{file.path}: {len(types)} token types for {len(tokens)} tokens, expected as many"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    if kind == "gpt2":
        build = _byte_level
    elif kind == "llama":
        build = _sentencepiece
    else:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, expected 'gpt2' or 'llama'"
        )
    backend = guarded(file.path, lambda: build(file, tokens, types))
    for special, wanted in ((True, _CONTROL), (False, _USER)):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, found in zip(tokens, types)
            if found == wanted and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)

    def id_of(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < len(tokens) else None

    bos, eos = id_of("bos"), [i for i in (id_of("eos"), id_of("eot")) if i is not None]
    _surround(file, backend, tokens, bos, eos, sentencepiece=kind == "llama")
    template = file.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos=bos,
        eos=eos,
        pad=id_of("padding"),
        template=template if isinstance(template, str) else None,
    )


def _surround(file, backend, tokens, bos, eos, *, sentencepiece: bool) -> None:
    """Adds bos and eos around every text where the file asks for them."""
    llama_bpe = file.metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    before = file.get("tokenizer.ggml.add_bos_token", bool, sentencepiece or llama_bpe)
    after = file.get("tokenizer.ggml.add_eos_token", bool, False)
    ids = [i for i, wanted in ((bos, before), (eos[0] if eos else None, after)) if wanted]
    if not ids or None in ids:
        return
    head = ["$A:0"] if not before else [f"{tokens[bos]}:0", "$A:0"]
    tail = [f"{tokens[eos[0]]}:0"] if after else []
    template = processors.TemplateProcessing(
        single=head + tail, special_tokens=[(tokens[i], i) for i in ids]
    )
    backend.post_processor = processors.Sequence(
        [p for p in (backend.post_processor, template) if p is not None]
    )


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in _CUTS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r}, expected one of {', '.join(_CUTS)}")
    cut = _CUTS[name]
    merges = []
    for index, merge in enumerate(file.get("tokenizer.ggml.merges", list)):
        left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not (left and space and right):
            raise CheckpointError(f"merge {index} is {merge!r}, expected two tokens and a space")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=name == "llama-bpe",
        )
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(cut, str))
    if isinstance(cut, str):
        cut = pre_tokenizers.Split(tokenizers.Regex(cut), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, whole]) if cut else whole
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: a pair merges where its union is a token, the best-scored union first."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{len(scores)} scores for {len(tokens)} tokens, expected as many")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise CheckpointError(f"a token is longer than {MAX_TOKEN} characters")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types):
        if kind != 1:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(score, pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])
    unknown = next((t for t, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for _, pair in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
