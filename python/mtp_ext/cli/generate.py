"""``mtp generate``: continues a text with a trained model, as it is decoded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mtp_ext.cli.draft_colours import Painter, RoundWriter, wants_colour
from mtp_ext.generate import DecodingStats, generate
from mtp_ext.generate.measure import RoundClock
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.data import Tokenizer
from mtp_ext.train.device import choose_compute
from mtp_ext.train.evaluation.decoding import NDraft
from mtp_ext.train.report.display import complain

REPLACEMENT = "�"  # decoded from bytes that are not (yet) valid UTF-8


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a text with a trained model, printed as it is generated. Without --prompt or --prompt-file, the text is
    read from standard input.

    On a terminal, the colour of a token tells which draft it was, if any (not with NO_COLOR). A last line on standard
    error counts tokens, tokens per forward, accepted drafts and tokens per second.
    """

    checkpoint: Path
    """Directory of a checkpoint, or of a run (its latest checkpoint)."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 128
    """Maximum number of tokens to add."""
    n_draft: NDraft = None
    """Tokens that heads 2 to n draft in each round, for head 1 to verify: the text is as likely as without, in fewer
    forwards. 0: one token at a time; auto: where drafts pay. Default: every head drafts."""
    tree: tuple[int, ...] | None = None
    """Draft a tree: numbers of drafts by position, such as 3 2 1."""
    temperature: float = 0.7
    """0 always takes the most likely token; higher values sample more freely."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = 0.9
    """Sample from the smallest set of most likely tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    command = tyro.cli(GenerateCommand, args=list(arguments), prog="mtp generate")
    compute = choose_compute(command.device, "float32")
    saved = load_saved_model(command.checkpoint, compute.device)
    prompt = read_prompt(command)
    # An empty prompt becomes a separator, after which a new document begins.
    ids = saved.tokenizer.encode_batch([prompt])[0].tolist() or [saved.tokenizer.separator_id]
    room = saved.model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt must be shorter than the model's longest sequence of {saved.model.config.max_seq_len} tokens, got "
            f"{len(ids)}"
        )
    max_new_tokens, eos_token = min(command.max_new_tokens, room), saved.tokenizer.separator_id
    paint = Painter(_write, coloured=wants_colour())
    stream, clock = TextStream(saved.tokenizer, paint, ids), RoundClock()

    def write_token(token: int, position: int) -> None:
        paint.position = position
        stream.add([token])

    def on_tokens(row: int, tokens: list[int]) -> None:
        clock(row, tokens)
        rounds.add(tokens)

    rounds = RoundWriter(write_token, max_new_tokens, eos_token)
    options: dict[str, Any] = {
        **{name: getattr(command, name) for name in ("n_draft", "tree", "temperature", "top_k", "top_p")},
        "eos_token": eos_token,
        "generator": torch.Generator(compute.device).manual_seed(command.seed),
        "on_tokens": on_tokens,
    }
    prompts = torch.tensor([ids], device=compute.device)
    stats = generate(saved.model, prompts, max_new_tokens, **options).stats
    rounds.close(stats)
    stream.close()
    _write("\n")
    paint.legend(len(stats.histogram) - 1)
    complain(f"mtp generate: {statistics_line(stats, sum(clock.seconds))}")
    if command.max_new_tokens > room:
        complain(f"mtp generate: stopped after {room} tokens, the model's longest sequence")
    return 0


def statistics_line(stats: DecodingStats, seconds: float) -> str:
    """Formats tokens, tokens per forward, accepted drafts and, without the prompt's forward, tokens per second."""
    parts = [f"{stats.n_tokens} token{'s' * (stats.n_tokens != 1)}"]
    if sum(stats.histogram):
        parts.append(f"{stats.tokens_per_forward:.2f} tokens per forward")
    if stats.n_drafted:
        rates = " ".join(f"{rate:.0%}" for rate in stats.acceptance_rate_per_position)
        parts.append(f"{stats.draft_acceptance_rate:.0%} of the drafts accepted (by position {rates})")
    if seconds:
        parts.append(f"{(stats.n_tokens - stats.n_first) / seconds:,.0f} tokens/s")
    return ", ".join(parts)


def read_prompt(command: GenerateCommand) -> str:
    """Reads the prompt from the option, the file or standard input.

    Raises:
        ValueError: It is given twice, missing at a terminal, or its file cannot be read.
    """
    if command.prompt is not None and command.prompt_file is not None:
        raise ValueError("prompt: give --prompt or --prompt-file, not both")
    if command.prompt is not None:
        return _decode("prompt", os.fsencode(command.prompt))
    if command.prompt_file is None:
        if sys.stdin.isatty():
            raise ValueError("prompt: give --prompt, --prompt-file, or a text on standard input")
        return _decode("prompt on standard input", sys.stdin.buffer.read())
    try:
        return _decode(f"prompt_file {command.prompt_file}", command.prompt_file.read_bytes())
    except OSError as error:
        raise ValueError(f"prompt_file: cannot read {command.prompt_file} ({error})") from None


def _decode(name: str, data: bytes) -> str:
    """Decodes a prompt; universal newlines, as text files have them."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected text in UTF-8, got the byte 0x{data[error.start]:02x} at {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class TextStream:
    """Decodes a stream of tokens and writes text as soon as no later token can change it.

    The whole sequence is decoded again with each token, because a character may span several tokens and some tokenizers
    decode a token differently at the beginning of a text (without its space).

    Args:
        tokenizer: The tokenizer to decode with.
        write: Called with each new piece of text.
        context: Tokens before the stream, whose text is not written.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None], context: Sequence[int] = ()) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens = list(context)
        self._n_written = len(tokenizer.decode(self._tokens))

    def add(self, tokens: Sequence[int]) -> None:
        """Adds the next tokens."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(REPLACEMENT):
            self._write_from(text)

    def close(self) -> None:
        """Writes the rest, including incomplete characters."""
        self._write_from(self._tokenizer.decode(self._tokens))

    def _write_from(self, text: str) -> None:
        if len(text) > self._n_written:
            self._write(text[self._n_written :])
            self._n_written = len(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
