"""``mtp generate``: prompts from three places, text as it comes, the same for the same seed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from mtp_ext.cli.generate import TextStream
from mtp_ext.cli.main import main
from mtp_ext.generate import generate
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.data import ByteTokenizer, HuggingFaceTokenizer
from tests.train.tiny import run, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    run(tiny_config(root, max_steps=3))
    return root / "run"


def continuation(capsys: pytest.CaptureFixture[str], trained: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(trained), "--max-new-tokens", "20", *options]) == 0
    return capsys.readouterr().out


def test_greedy_text_is_that_of_the_function(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = load_saved_model(trained, torch.device("cpu"))
    prompt = torch.tensor([list(b"def add")])
    tokens = generate(saved.model, prompt, 20, eos_token=saved.tokenizer.separator_id, n_draft=0).tokens[0]
    expected = saved.tokenizer.decode(tokens.tolist())
    for n_draft in ([], ["--n-draft", "0"], ["--n-draft", "1"]):
        assert continuation(capsys, trained, "--prompt", "def add", "--temperature", "0", *n_draft) == expected + "\n"


def test_the_prompt_comes_from_a_file_or_standard_input(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = continuation(capsys, trained, "--prompt", "def é")
    (tmp_path / "prompt.txt").write_text("def é", encoding="utf-8")
    assert continuation(capsys, trained, "--prompt-file", str(tmp_path / "prompt.txt")) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("def é".encode())))
    assert continuation(capsys, trained) == expected


def test_the_seed_decides(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [continuation(capsys, trained, "--prompt", "def", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a", "--prompt-file", "b"), "give --prompt or --prompt-file, not both"),
        (("--prompt-file", "absent"), "prompt_file: cannot read absent"),
        (("--prompt", "a" * 96), "prompt must be shorter than the model's longest sequence of 96 tokens, got 96"),
        (("--prompt", "a", "--top-p", "2"), "top_p"),
        (("--prompt", "a", "--n-draft", "9"), "n_draft must be at most"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
    ],
)
def test_errors_are_one_sentence(
    trained: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["generate", "--checkpoint", str(trained), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_empty_prompt_begins_a_document(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert continuation(capsys, trained, "--prompt", "")


def test_too_many_tokens_are_cut_with_a_word(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", str(trained), "--prompt", "a" * 90, "--max-new-tokens", "50"]) == 0
    assert "stopped after 6 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["option", "file", "standard input"])
def test_a_prompt_that_is_not_utf8_is_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    options = ["generate", "--checkpoint", str(trained)]
    if place == "option":
        options += ["--prompt", os.fsdecode(b"caf\xe9")]
    elif place == "file":
        (tmp_path / "prompt").write_bytes(b"caf\xe9")
        options += ["--prompt-file", str(tmp_path / "prompt")]
    else:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), errors="surrogateescape"))
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "expected text in UTF-8, got the byte 0xe9 at 3" in error and error.count("\n") == 1


def spaced(decoder: Any) -> HuggingFaceTokenizer:
    """Words that carry their space in front, as SentencePiece has them."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁Hello": 2, "▁big": 3, "▁world": 4, "s": 5, ".": 6, "▁": 7}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoder
    return HuggingFaceTokenizer(tokenizer.to_str())


DECODERS = {
    "metaspace": decoders.Metaspace(),
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("n_prompt", [0, 1, 3])
def test_spaces_between_tokens_are_kept(decoder: str, n_prompt: int) -> None:
    tokenizer, tokens = spaced(DECODERS[decoder]), [2, 3, 4, 5, 7, 6, 3]
    written: list[str] = []
    stream = TextStream(tokenizer, written.append, tokens[:n_prompt])
    for token in tokens[n_prompt:]:
        stream.add([token])
    stream.close()
    assert tokenizer.decode(tokens) == "Hello big worlds . big"
    assert "".join(written) == "Hello big worlds . big"[len(tokenizer.decode(tokens[:n_prompt])) :]
    assert len(written) == len(tokens) - n_prompt  # as they come


def test_characters_of_several_tokens_are_written_whole() -> None:
    written: list[str] = []
    stream = TextStream(ByteTokenizer(), written.append)
    for byte in "aé€b".encode():
        stream.add([byte])
    stream.close()
    assert written == ["a", "é", "€", "b"]


def test_a_broken_end_is_written_at_the_close() -> None:
    written: list[str] = []
    stream = TextStream(ByteTokenizer(), written.append)
    stream.add([ord("a")])
    stream.add([0xE2])
    assert written == ["a"]
    stream.close()
    assert "".join(written) == "a�"
