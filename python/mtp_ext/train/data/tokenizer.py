"""Tokenizers: bytes, any Hugging Face ``tokenizer.json``, or a byte-level BPE learnt from the corpus in seconds.

Every tokenizer has a separator: the token that ends a document, and that ends a generated one (``eos_token``). Texts
that spell it are encoded as ordinary text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BYTES = "bytes"
HUGGING_FACE = "huggingface"
TOKENIZER_FILE = "tokenizer.json"
DESCRIPTION_FILE = "mtp_tokenizer.json"

# Pre-tokenisation pattern of the BPE. Unlike in GPT-2's, a line end and the following indentation are one piece, also
# after punctuation ("):\n        "), and a word takes one leading non-digit character (".append", "_id", " self"). On
# Python source with 4,096 tokens it gives 3.6 bytes per held-out token, GPT-2's pattern 3.4.
BPE_PIECES = r"\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s+"
N_BYTES = 256
# Longer texts are encoded in pieces cut after a line, which bounds memory and lets one huge file use all cores.
MAX_ENCODE_CHARACTERS = 1 << 20
SEPARATOR_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Converts text to token ids in ``[0, vocab_size)`` and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the separator."""

    @property
    def separator_id(self) -> int:
        """The id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids; unchanged by ``save`` and ``load_tokenizer``."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Returns the ids of each text, without separators."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids``, without separators; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: An id is outside ``[0, vocab_size)``.
        """

    def save(self, directory: Path) -> None:
        """Writes the files that ``load_tokenizer`` reads into an existing directory."""


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, and the separator 256."""

    vocab_size = N_BYTES + 1
    separator_id = N_BYTES
    fingerprint = BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked_ids(ids, self)).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        _write_description(directory, kind=BYTES)


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library, given as the text of its ``tokenizer.json``.

    Args:
        serialized: Text of the file.
        separator_id: Id that ends a document. None takes the tokenizer's end-of-text token, or else adds an id after
            its vocabulary.
    Raises:
        ValueError: ``serialized`` is not a tokenizer, or ``separator_id`` is out of range.
    """

    def __init__(self, serialized: str, separator_id: int | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"expected the text of a tokenizer.json of the tokenizers library ({error})") from None
        self._serialized = serialized
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens spelt out in a text are plain text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        n_ids = max(vocabulary.values(), default=-1) + 1
        if separator_id is None:
            separator_id = next((vocabulary[name] for name in SEPARATOR_NAMES if name in vocabulary), n_ids)
        if not 0 <= separator_id <= n_ids:
            raise ValueError(f"separator_id must be in [0, {n_ids}], got {separator_id}")
        self.separator_id = separator_id
        self.vocab_size = max(n_ids, separator_id + 1)
        # The mark tells what was encoded before such texts were kept apart from separators.
        mark = "" if self._protect_separator() else "protected:"
        self.fingerprint = hashlib.sha256(f"{mark}{separator_id}:{serialized}".encode()).hexdigest()

    def _protect_separator(self) -> bool:
        """Makes the separator a special token if it is an ordinary added one; returns True if none was needed."""
        added = self._tokenizer.get_added_tokens_decoder().get(self.separator_id)
        if added is not None and not added.special:
            self._tokenizer.add_special_tokens([added])
        token = self._tokenizer.id_to_token(self.separator_id)
        return token is None or (added is not None and added.special)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for text_pieces in pieces for piece in text_pieces]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        result = []
        for text_pieces in pieces:
            arrays = [
                np.array(self._without_separator(piece, next(encoded).ids), dtype=np.int64) for piece in text_pieces
            ]
            result.append(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        return result

    def _without_separator(self, text: str, ids: list[int]) -> list[int]:
        """Returns ``ids`` unless the model itself makes separators of ``text``, which is then encoded in parts.

        Raises:
            ValueError: A single character becomes the separator.
        """
        if self.separator_id not in ids:
            return ids
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = [span for span, token in zip(encoding.offsets, encoding.ids, strict=True) if token == self.separator_id]
        for start, end in spans:
            if end - start < 2:
                raise ValueError(
                    f"tokenizer: {text[start:end]!r} in a text is encoded as the separator {self.separator_id}, which "
                    "ends documents; the tokenizer must have another token for it"
                )
        cuts = [0, *((start + end) // 2 for start, end in spans), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return [i for part, e in zip(parts, encodings, strict=True) for i in self._without_separator(part, e.ids)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(_checked_ids(ids, self), skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        (directory / TOKENIZER_FILE).write_text(self._serialized, encoding="utf-8", newline="")
        _write_description(directory, kind=HUGGING_FACE, separator_id=self.separator_id)


def learn_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Learns a byte-level BPE, deterministically; every text can be encoded and is decoded exactly.

    Args:
        texts: The sample to learn from.
        vocab_size: Maximum number of ids, including the 256 bytes and the separator (a small sample may give fewer).
    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and the separator.
    """
    if vocab_size <= N_BYTES:
        raise ValueError(f"tokenizer: a BPE needs a vocabulary of at least {N_BYTES + 1} tokens, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(BPE_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the separator is our own id after the vocabulary, so that no text spells it
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer=trainer)
    return HuggingFaceTokenizer(tokenizer.to_str(), tokenizer.get_vocab_size())


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer from a directory written by ``save`` (in a checkpoint), or from a ``tokenizer.json``.

    Raises:
        ValueError: There is no tokenizer at ``path``, or one of its files is damaged.
    """
    description: dict[str, Any] = {"kind": HUGGING_FACE}
    if path.is_dir():
        if (path / DESCRIPTION_FILE).is_file():
            description = _read_description(path / DESCRIPTION_FILE)
        if description["kind"] == BYTES:
            return ByteTokenizer()
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"tokenizer {str(path)!r} does not exist: expected a tokenizer.json or a directory that holds one"
        )
    try:
        return HuggingFaceTokenizer(path.read_bytes().decode("utf-8"), description.get("separator_id"))
    except ValueError as error:
        raise ValueError(f"tokenizer {str(path)!r}: {error}") from None


def _pieces(text: str) -> Iterator[str]:
    """Splits ``text`` into pieces of at most ``MAX_ENCODE_CHARACTERS``, cut after a line if possible."""
    start = 0
    while len(text) - start > MAX_ENCODE_CHARACTERS:
        limit = start + MAX_ENCODE_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _checked_ids(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Checks ``ids`` and returns them without separators."""
    checked = [int(token) for token in ids]
    for token in checked:
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"ids must be in [0, {tokenizer.vocab_size}), got {token}")
    return [token for token in checked if token != tokenizer.separator_id]


def _write_description(directory: Path, **description: Any) -> None:
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer {str(path)!r} is damaged ({error})") from None
    if not isinstance(description, dict) or description.get("kind") not in (BYTES, HUGGING_FACE):
        raise ValueError(
            f"tokenizer {str(path)!r}: expected a kind of {BYTES!r} or {HUGGING_FACE!r}, got {description!r}"
        )
    return description
