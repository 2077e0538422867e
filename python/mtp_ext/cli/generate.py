"""``mtp generate``: continues a text with a trained model, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mtp_ext.generate import generate
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.data import Tokenizer
from mtp_ext.train.device import choose_compute

REPLACEMENT = "�"  # what decoding shows for bytes that are not (yet) UTF-8


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a text with a trained model. Prints the continuation as it comes; the prompt is read from standard input
    if it is not given."""

    checkpoint: Path
    """Directory of a checkpoint, or of a run (its latest checkpoint)."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.7
    """0 takes the most likely token every time; higher values draw more freely."""
    top_k: int | None = None
    """Draw from the k most likely tokens only."""
    top_p: float | None = 0.9
    """Draw from the fewest most likely tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    command = tyro.cli(GenerateCommand, args=list(arguments), prog="mtp generate")
    compute = choose_compute(command.device, "float32")
    saved = load_saved_model(command.checkpoint, compute.device)
    prompt = read_prompt(command)
    # Without a prompt, the end of a document stands before the beginning of one.
    ids = saved.tokenizer.encode_batch([prompt])[0].tolist() or [saved.tokenizer.separator_id]
    room = saved.model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt must be shorter than the model's longest sequence of {saved.model.config.max_seq_len} tokens, got "
            f"{len(ids)}"
        )
    stream = TextStream(saved.tokenizer, _write)
    generate(
        saved.model,
        torch.tensor([ids], device=compute.device),
        min(command.max_new_tokens, room),
        n_draft=0,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        eos_token=saved.tokenizer.separator_id,
        generator=torch.Generator(compute.device).manual_seed(command.seed),
        on_tokens=lambda row, tokens: stream.add(tokens),
    )
    stream.close()
    _write("\n")
    if command.max_new_tokens > room:
        print(f"mtp generate: stopped after {room} tokens, the model's longest sequence", file=sys.stderr)
    return 0


def read_prompt(command: GenerateCommand) -> str:
    """The prompt from the one place that it is given in.

    Raises:
        ValueError: It is given twice, or not at all at a terminal, or its file cannot be read.
    """
    if command.prompt is not None and command.prompt_file is not None:
        raise ValueError("prompt: give --prompt or --prompt-file, not both")
    if command.prompt is not None:
        return command.prompt
    if command.prompt_file is None:
        if sys.stdin.isatty():
            raise ValueError("prompt: give --prompt, --prompt-file, or a text on standard input")
        return sys.stdin.read()
    try:
        return command.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file: cannot read {command.prompt_file} ({error})") from None


class TextStream:
    """Text of tokens that come one by one: writes what no later token can change.

    A character may be spread over several tokens. So the text of all tokens since the last whole character is decoded
    again with each new one, and written once it ends whole.

    Args:
        tokenizer: What decodes.
        write: Takes each new piece of text.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._pending: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens."""
        self._pending += tokens
        text = self._tokenizer.decode(self._pending)
        if not text.endswith(REPLACEMENT):
            self._write(text)
            self._pending = []

    def close(self) -> None:
        """Writes what is left, broken characters included."""
        if self._pending:
            self._write(self._tokenizer.decode(self._pending))
            self._pending = []


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
