"""Tokenizers: lossless, reproducible, saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from mtp_ext.train.data import tokenizer as tokenizer_module
from mtp_ext.train.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    learn_bpe,
    load_tokenizer,
)

CODE = (
    "class Box:\n    def __init__(self, value):\n        self.value = value\n\n"
    "    def get(self):\n        return self.value\n"
) * 20
BPE = learn_bpe([CODE], 400)
ALL: list[Tokenizer] = [ByteTokenizer(), BPE]
any_text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\r\n\x0b\x0c\u00a0\u2028\ufeff"))


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.int64
    assert not ids.size or (0 <= ids.min() and ids.max() < tokenizer.vocab_size)
    assert tokenizer.separator_id not in ids
    return tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("tokenizer", ALL, ids=["bytes", "bpe"])
@given(text=any_text)
@example(text="")
@example(text="\n \n\t\t x\r\n\r\r  \n")
@example(text="naïve 😀👩‍👩‍👧 e\u0301 ﷽ \x00 ١٢٣ ²")
@example(text="<|endoftext|></s>[SEP]<s>")
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert round_trip(tokenizer, text) == text


def test_byte_ids_are_the_bytes() -> None:
    (ids,) = ByteTokenizer().encode_batch(["aé"])
    assert ids.tolist() == [0x61, 0xC3, 0xA9]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().separator_id) == (257, 256)


@pytest.mark.parametrize("tokenizer", ALL, ids=["bytes", "bpe"])
def test_decoding_leaves_out_separators_and_rejects_foreign_ids(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["ab"])
    separator = tokenizer.separator_id
    assert tokenizer.decode([separator, *ids.tolist(), separator]) == "ab"
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    for foreign in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {tokenizer.vocab_size}\), got {foreign}"):
            tokenizer.decode([foreign])


@pytest.mark.parametrize("tokenizer", ALL, ids=["bytes", "bpe"])
def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    for name in ("fingerprint", "vocab_size", "separator_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode_batch([CODE])[0].tolist() == tokenizer.encode_batch([CODE])[0].tolist()


def test_a_learnt_tokenizer_merges_a_line_end_with_its_indentation() -> None:
    (ids,) = BPE.encode_batch(["(self):\n        return self.value\n"])
    assert [BPE.decode([token]) for token in ids] == ["(self", "):\n        ", "return", " self", ".value", "\n"]


@pytest.mark.slow
def test_learning_is_reproducible_in_another_process() -> None:
    program = (
        "import sys; from mtp_ext.train.data.tokenizer import learn_bpe; "
        "print(learn_bpe([sys.stdin.read()], 400).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", program], input=CODE, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == BPE.fingerprint == learn_bpe([CODE], 400).fingerprint


def test_the_vocabulary_has_the_bytes_the_merges_and_the_separator() -> None:
    assert learn_bpe([CODE], 290).vocab_size == 290
    assert learn_bpe(["ab"], 300).vocab_size == 258  # one merge
    assert learn_bpe([CODE], 257).vocab_size == 257  # none
    assert learn_bpe([CODE], 290).fingerprint != learn_bpe([CODE], 291).fingerprint
    with pytest.raises(ValueError, match="at least 257 tokens, got 256"):
        learn_bpe([CODE], 256)


@settings(max_examples=25)
@given(st.text(st.sampled_from("ab \n"), max_size=200))
def test_long_texts_are_encoded_in_pieces_without_loss(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_ENCODE_CHARACTERS", 7)
        pieces = list(tokenizer_module._pieces(text))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= 7 for piece in pieces) or not text
        assert round_trip(BPE, text) == text
        assert list(tokenizer_module._pieces("ab\nc\nddd")) == ["ab\nc\n", "ddd"]  # cut after a line where there is one
        first, second = BPE.encode_batch([text, "a\nb\n" * 5])
        assert (BPE.decode(first), BPE.decode(second)) == (text, "a\nb\n" * 5)


def word_level(special: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer.json as other projects make them: words, truncation, padding, special tokens."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    return tokenizer


def test_a_tokenizer_json_is_used_whole(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    word_level(["<|endoftext|>", "<begin>"]).save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.separator_id) == (5, 3)
    ids = [array.tolist() for array in tokenizer.encode_batch(["a b a", "<|endoftext|> b", ""])]
    assert ids == [[1, 2, 1], [0, 2], []]  # neither cut nor padded, and the text forges no separator
    assert tokenizer.decode([1, 4, 3]) == "a <begin>"  # other special tokens show
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "mtp_tokenizer.json").unlink()  # a directory of another project
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_json_without_an_end_of_text_gets_a_separator(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    word_level([]).save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.separator_id) == (4, 3)
    with pytest.raises(ValueError, match=r"separator_id must be in \[0, 3\], got 4"):
        HuggingFaceTokenizer(path.read_text(), 4)


def test_damaged_and_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer .*nothing.* does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"tokenizer\.json' does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json': expected the text of a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "mtp_tokenizer.json").write_text(json.dumps({"kind": "words"}))
    with pytest.raises(ValueError, match="expected a kind of 'bytes' or 'huggingface'"):
        load_tokenizer(tmp_path)
    (tmp_path / "mtp_tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"mtp_tokenizer\.json' is damaged"):
        load_tokenizer(tmp_path)


def added_token(token: tokenizers.AddedToken) -> HuggingFaceTokenizer:
    """Words and characters, with an end-of-text string that is an added token but not a special one."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([token])
    return HuggingFaceTokenizer(tokenizer.to_str())


def model_token(model: Any) -> HuggingFaceTokenizer:
    """A model that spells its end-of-text string itself."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HuggingFaceTokenizer(tokenizer.to_str())


FORGEABLE = {
    "added": added_token(tokenizers.AddedToken("</s>", special=False)),
    "single word": added_token(tokenizers.AddedToken("</s>", special=False, single_word=True)),
    "stripping": added_token(tokenizers.AddedToken("</s>", special=False, lstrip=True, rstrip=True, normalized=False)),
    "word": model_token(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]")),
    "merges": model_token(
        models.BPE(
            {"a": 0, "b": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</": 6, "s>": 7, "</s>": 8},
            [("<", "/"), ("s", ">"), ("</", "s>")],
        )
    ),
    "unigram": model_token(models.Unigram([("<unk>", -9.0), ("a", -1.0), ("b", -1.0), ("</s>", 0.0)], 0, False)),
}


@pytest.mark.parametrize("kind", FORGEABLE)
@pytest.mark.parametrize("text", ["a </s> b", "</s>", "</s></s> </s>", "a</s>b", "</s> " * 300])
def test_no_text_forges_a_separator(kind: str, text: str) -> None:
    tokenizer = FORGEABLE[kind]
    (ids,) = tokenizer.encode_batch([text])
    assert ids.size and tokenizer.separator_id not in ids
    assert tokenizer.decode([1, tokenizer.separator_id]) == tokenizer.decode([1])
    plain, forged = tokenizer.encode_batch(["a b", text])
    assert forged.tolist() == ids.tolist() and plain.tolist() == tokenizer.encode_batch(["a b"])[0].tolist()


def test_a_protected_separator_survives_saving(tmp_path: Path) -> None:
    tokenizer = FORGEABLE["added"]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.separator_id) == (tokenizer.fingerprint, tokenizer.separator_id)
    assert loaded.separator_id not in loaded.encode_batch(["</s>"])[0]


def test_an_unknown_token_that_is_the_separator_is_an_error() -> None:
    tokenizer = model_token(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    assert tokenizer.encode_batch(["a"])[0].tolist() == [0]
    with pytest.raises(ValueError, match=r"tokenizer: '.' in a text is encoded as the separator 1"):
        tokenizer.encode_batch(["a xy"])
