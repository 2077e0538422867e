"""Generates a continuation of held-out text for inspection."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import torch

from mtp_ext.generate import generate
from mtp_ext.nn import MTPModel
from mtp_ext.nn.evaluation_mode import evaluation_mode
from mtp_ext.train.data import Dataset, Tokenizer

FUNCTION_LINES = range(8, 33)
PROMPT_FRACTION = 0.4
TEMPERATURE, TOP_P = 0.7, 0.9


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, split into a prompt and the rest.

    Attributes:
        name: Its source.
        prompt: Its beginning.
        rest: The text after the prompt.
    """

    name: str
    prompt: str
    rest: str


def choose_held_out(dataset: Dataset) -> HeldOut | None:
    """Chooses the first documented function of moderate length in a held-out Python file, else the first held-out text.

    Returns:
        ``None`` if nothing is held out.
    """
    if "validation" not in dataset.splits:
        return None
    split, fallback = dataset.split("validation"), None
    names = split.document_names or [f"document {i}" for i in range(split.n_documents)]
    for index, name in enumerate(names):
        text = dataset.tokenizer.decode(split.document(index).tolist())
        function = _first_function(text) if name.endswith(".py") else None
        if function is not None:
            return _cut(f"{function[0]} of {name}", function[1])
        if fallback is None and len(text.splitlines()) > 1:
            fallback = _cut(name, "\n".join(text.splitlines()[: FUNCTION_LINES.stop]))
    return fallback


def continue_text(model: MTPModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int) -> str:
    """Samples a continuation of a prompt (temperature 0.7, top-p 0.9), reproducible by seed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: Text; truncated at its beginning to fit the model's maximum sequence length.
        max_new_tokens: Maximum number of tokens to add.
        seed: Seed of the sampling.
    """
    device = next(model.parameters()).device
    new_tokens = min(max_new_tokens, model.config.max_seq_len - 1)
    ids = tokenizer.encode_batch([prompt])[0].tolist() or [tokenizer.separator_id]
    ids = ids[-(model.config.max_seq_len - new_tokens) :]
    with evaluation_mode(model):
        output = generate(
            model,
            torch.tensor([ids], device=device),
            new_tokens,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            eos_token=tokenizer.separator_id,
            generator=torch.Generator(device).manual_seed(seed),
            n_draft=0,
        )
    # With the prompt: some tokenizers decode the first token of a text without its space.
    return tokenizer.decode([*ids, *output.tokens[0].tolist()])[len(tokenizer.decode(ids)) :]


def _first_function(text: str) -> tuple[str, str] | None:
    """Returns name and source of the first documented function of moderate length."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.end_lineno is not None:
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            if len(lines) in FUNCTION_LINES:
                return node.name, "\n".join(lines)
    return None


def _cut(name: str, text: str) -> HeldOut:
    """Splits a text after ``PROMPT_FRACTION`` of its lines."""
    lines = text.splitlines(keepends=True)
    at = max(1, round(PROMPT_FRACTION * len(lines)))
    return HeldOut(name, "".join(lines[:at]), "".join(lines[at:]))
