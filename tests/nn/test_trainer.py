"""Models in transformers' Trainer: trained, saved and continued, with weights that are tied in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_ext.nn import ComposedModel
from mtp_ext.nn.interop.huggingface import from_huggingface
from tests.nn.conftest import VOCAB_SIZE

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
N, SEQ_LEN = 2, 8


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight random rows."""

    def __init__(self) -> None:
        self.labels = torch.randint(VOCAB_SIZE, (8, SEQ_LEN + N), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"tokens": self.labels[row, :SEQ_LEN], "labels": self.labels[row]}


def adapter(variant: str, *, tied: bool) -> ComposedModel:
    config = transformers.LlamaConfig(vocab_size=VOCAB_SIZE, tie_word_embeddings=tied, **SIZES)
    return from_huggingface(transformers.LlamaForCausalLM(config), N, variant)


def composed() -> ComposedModel:
    embed = nn.Embedding(VOCAB_SIZE, 16)
    return ComposedModel(nn.Sequential(embed, nn.Linear(16, 16)), lambda k: nn.Linear(16, 16), embed, n_future=N)


class Wrapped(nn.Module):
    """A model within a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        return self.model(tokens, labels)


def make(name: str, make_model: Callable[..., Any]) -> nn.Module:
    if name == "composed":
        return composed()
    family, variant, tied = name.split()
    if family == "adapter":
        return adapter(variant, tied=tied == "tied")
    return Wrapped(make_model(N, dtype=torch.float32, variant=variant, tie_embeddings=tied == "tied"))


@pytest.mark.parametrize(
    "name",
    [
        *("adapter parallel tied", "adapter linear tied", "adapter shared untied", "adapter shared tied", "composed"),
        *("own parallel tied", "own sequential_modules tied", "own replicated tied", "own parallel untied"),
    ],
)
def test_train_save_and_continue(name: str, tmp_path: Path, make_model: Callable[..., Any]) -> None:
    def trainer(model: nn.Module, max_steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=max_steps,
            save_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        return transformers.Trainer(model, arguments, train_dataset=Rows())

    torch.manual_seed(0)
    model = make(name, make_model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer(model, 2).train()
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    again = make(name, make_model)
    state = transformers.Trainer(again, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    state._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n
    other = make(name, make_model)
    trainer(other, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, msg=n)
