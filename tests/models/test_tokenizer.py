import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.models import CheckpointError, tokenizer
from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_tokenizer import gguf_tokenizer
from kvjax.models.tokenizer import Tokenizer, load_tokenizer
from tests.models.files import gguf_bytes, unchanged

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
text = "It's <bos>naïve: 日本語 12345 🎉<end> the\n\n  x"


def from_gguf(tmp_path, metadata, **changes):
    metadata = {k: v for k, v in (metadata | changes).items() if v is not ...}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata))
    return gguf_tokenizer(open_gguf(tmp_path / "x.gguf"))


def test_folder_and_gguf_give_the_same_tokenizer(tmp_path, tokenizer_folder, tokenizer_metadata):
    with unchanged(tmp_path):
        one = load_tokenizer(tokenizer_folder)
    two = from_gguf(tmp_path, tokenizer_metadata)
    for found in (one, two):
        assert (found.bos, found.eos, found.pad, len(found)) == (0, (1,), 2, len(one))
        ids = found.encode(text)
        assert ids == one.encode(text) and 0 in ids and 1 in ids
        assert found.decode(ids) == text.replace("<bos>", "").replace("<end>", "")
        assert found.decode(np.array(ids), special=True) == text
        assert found.encode_batch([text, ""]) == [ids, []]
        assert found.decode_batch([ids, []]) == [found.decode(ids), ""]
        messages = [{"role": "user", "content": "x"}]
        assert found.chat_text(messages) == "<|user|>x<end><|assistant|>"
        assert found.chat_text(messages, prompt=False) == "<|user|>x<end>"
        assert found.chat(messages).count(1) == 1


def test_save_and_load(tmp_path, tokenizer_metadata):
    one = from_gguf(tmp_path, tokenizer_metadata)
    one.save(tmp_path / "saved")
    two = load_tokenizer(tmp_path / "saved")
    assert two.encode(text) == one.encode(text)
    assert (two.bos, two.eos, two.pad, two.template) == (one.bos, one.eos, one.pad, one.template)


def test_eos_ids_of_all_files(tokenizer_folder):
    (tokenizer_folder / "generation_config.json").write_text('{"eos_token_id": [1, 7, 9]}')
    (tokenizer_folder / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tokenizer_folder).eos == (1, 5, 7, 9)


def test_template_of_its_own_file_and_named_templates(tokenizer_folder):
    path = tokenizer_folder / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps(facts | {"chat_template": named}))
    assert load_tokenizer(tokenizer_folder).template == "d"
    (tokenizer_folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tokenizer_folder).template == "file"


@shared
@given(ids=st.lists(st.integers(0, 300), max_size=40), special=st.booleans())
def test_stream_of_any_ids_joins_to_decode(byte_level, ids, special):
    stream = Tokenizer(byte_level).stream(special=special)
    pieces = [stream.push(i) for i in ids]
    whole = Tokenizer(byte_level).decode(ids, special=special)
    assert "".join(pieces) + stream.end() == whole
    assert stream.end() == ""


@shared
@given(st.text(max_size=40))
def test_stream_never_hands_out_part_of_a_character(byte_level, text):
    tok = Tokenizer(byte_level)
    stream, out = tok.stream(special=True), ""
    for i in tok.encode(text):
        piece = stream.push(i)
        assert "\ufffd" not in piece or "\ufffd" in text
        out += piece
        assert text.startswith(out)
    assert out + stream.end() == text == tok.decode(tok.encode(text), special=True)


def sentencepiece() -> dict:
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "▁abc", "bc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -2.0, -4.0, -5.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_merges_the_best_scored_pair_first(tmp_path):
    tok = from_gguf(tmp_path, sentencepiece())
    names = [tok.backend.id_to_token(i) for i in tok.encode("abc bc é")]
    # ab (-1) joins before ▁a (-3) and bc (-5); then ▁ab (-2), then ▁abc (-4).
    assert names == ["<s>", "▁abc", "▁", "bc", "▁", "<0xC3>", "<0xA9>"]
    ids = tok.encode("abc bc é")
    assert tok.decode(ids) == "abc bc é"
    stream = tok.stream()
    assert "".join(stream.push(i) for i in ids) == "abc bc é"
    plain = from_gguf(
        tmp_path,
        sentencepiece(),
        **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False},
    )
    names = [plain.backend.id_to_token(i) for i in plain.encode("abc abc")]
    assert names == ["ab", "c", "▁abc"]
    assert plain.decode(plain.encode(" abc")) == " abc"


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "'ll", "Ġb"]),
        ("llama-bpe", ["a", "Ġ", "123", "4", "'LL", "Ġb"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "'LL", "Ġb"]),
        ("gpt-2", ["a", "Ġ1234", "'ll", "Ġb"]),
    ],
)
def test_pretokenizers_cut_digits_each_in_its_way(tmp_path, tokenizer_metadata, pre, cut):
    tok = from_gguf(tmp_path, tokenizer_metadata, **{"tokenizer.ggml.pre": pre})
    word = "a 1234'LL b" if "'LL" in cut else "a 1234'll b"
    assert [part for part, _ in tok.backend.pre_tokenizer.pre_tokenize_str(word)] == cut


def test_bos_is_added_where_the_file_asks(tmp_path, tokenizer_metadata):
    add = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tok = from_gguf(tmp_path, tokenizer_metadata, **add)
    plain = from_gguf(tmp_path, tokenizer_metadata).encode("the x")
    assert tok.encode("the x") == [0, *plain, 1]
    assert tok.encode("the x", special=False) == plain


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("model", "wordpiece", "'wordpiece', expected 'gpt2' or 'llama'"),
        ("model", ..., "tokenizer.ggml.model' is missing"),
        ("pre", "tekken", "'tekken', expected one of default, gpt-2, smollm"),
        ("tokens", ..., "tokens' is missing"),
        ("tokens", [1, 2], "expected as many"),
        ("tokens", ["a"] * 320, "a token twice|expected as many"),
        ("token_type", [1], "1 token types for"),
        ("merges", ["ab"], "merge 0 is 'ab'"),
        ("merges", ["q zz"], "tokenizer cannot be built"),
        ("merges", [1], "merge 0 is 1"),
        ("add_bos_token", 1, "expected bool"),
    ],
)
def test_malformed_gguf_tokenizer(tmp_path, tokenizer_metadata, key, value, match):
    with pytest.raises(CheckpointError, match=match):
        from_gguf(tmp_path, tokenizer_metadata, **{f"tokenizer.ggml.{key}": value})


def test_sentencepiece_limits(tmp_path):
    metadata = sentencepiece()
    for key, value, match in (
        ("tokens", [*metadata["tokenizer.ggml.tokens"][:-1], "x" * 600], "longer than 512"),
        ("scores", [0.0], "1 scores for"),
        ("scores", ..., "scores' is missing"),
    ):
        with pytest.raises(CheckpointError, match=match):
            from_gguf(tmp_path, metadata, **{f"tokenizer.ggml.{key}": value})


def test_missing_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*tokenizer=False"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"a":' * 100_000,
        "[" * 100_000,
        '{"model": {"type": "BPE"}}',
        '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 99999999999999}, "merges": [["x", "y"]]}}',
    ],
)
def test_malformed_tokenizer_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="tokenizer cannot be built"):
        load_tokenizer(tmp_path)


def test_tokenizer_file_that_is_not_text(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="tokenizer cannot be built"):
        load_tokenizer(tmp_path)


def test_sizes_are_limited_before_reading(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_CONFIG_BYTES", 100)
    with unchanged(tokenizer_folder), pytest.raises(CheckpointError, match="at most 100"):
        load_tokenizer(tokenizer_folder)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000"):
        load_tokenizer(tokenizer_folder)


@pytest.mark.model
def test_the_real_tokenizer_agrees_with_transformers(smollm2):
    tok = gguf_tokenizer(open_gguf(smollm2))
    # Ids given by transformers 5 for the same file.
    ids = [1589, 506, 216, 33, 34, 35, 36, 37, 15486, 46494, 17097, 241, 115, 40993, 179, 120, 248]
    ids += [3642, 8866, 1792, 446, 216, 37, 10813, 232, 227, 2, 2294]
    assert tok.encode("It's 12345 naïve 日本語 tests\n\n  x = 5🎉<|im_end|> done") == ids
    assert (tok.bos, tok.eos, tok.pad, len(tok)) == (1, (2,), 2, 49152)
    chat = tok.chat_text([{"role": "user", "content": "Hi"}])
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
