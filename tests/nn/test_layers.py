from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.nn import MTPConfig
from mtp_ext.nn.transformer import attention
from mtp_ext.nn.transformer.attention import AttentionContext, document_lengths
from mtp_ext.nn.transformer.layers import RMSNorm, rms_norm
from mtp_ext.nn.transformer.rotary import rotate, rotation

CONFIG = MTPConfig(vocab_size=10, d_model=32, n_layers=4, n_attn_heads=4, n_kv_heads=2)


def test_rms_norm_is_torchs() -> None:
    x, weight = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    x[1, 2] = 0
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (7,), weight, 1e-5), rtol=1e-14, atol=1e-14)


def test_rms_norm_gradient() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_error_is_at_most_twice_torchs(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 64, 200).to(dtype), torch.randn(2, 64, 200).to(dtype)
    weight = torch.randn(200).to(dtype)

    def run(norm: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        y = norm(*leaves)  # type: ignore[operator]
        return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, grad.to(dtype)))]

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (200,), weight, 1e-5)

    exact = run(eager, torch.float64)
    for ours, theirs, truth in zip(
        run(lambda x, w: rms_norm(x, w, 1e-5), dtype), run(eager, dtype), exact, strict=True
    ):
        assert (ours - truth).abs().amax() <= 2 * (theirs - truth).abs().amax() + 1e-6


def test_rms_norm_takes_zero_rows() -> None:
    norm = RMSNorm(8, 1e-5)
    x = torch.zeros(2, 0, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (2, 0, 8)
    assert norm.weight.grad is not None and not norm.weight.grad.any()


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    y = rotate(x, rotation(torch.tensor([0, 1, 7]), 4, 100.0, torch.float64))
    for s, position in enumerate([0, 1, 7]):
        for j, frequency in enumerate([1.0, 0.1]):
            c, d = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[0, s, 0, 2 * j], x[0, s, 0, 2 * j + 1]
            torch.testing.assert_close(y[0, s, 0, 2 * j : 2 * j + 2], torch.stack([a * c - b * d, a * d + b * c]))


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(p: int, r: int) -> Tensor:
        at = [rotation(torch.tensor([x]), 8, 10_000.0, torch.float64) for x in (p, r)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(product(9, 4), product(1009, 1004), rtol=1e-10, atol=1e-12)
    assert not torch.isclose(product(9, 4), product(9, 5))


def test_16_bit_activations_are_turned_in_float32() -> None:
    x = torch.randn(1, 4096, 1, 64).bfloat16()
    turns = rotation(torch.arange(4096), 64, 10_000.0, torch.bfloat16)
    exact = rotate(x.double(), rotation(torch.arange(4096), 64, 10_000.0, torch.float64))
    y = rotate(x, turns)
    assert y.dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa, and float32 turns.
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


def naive_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    """One query, one head at a time."""
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            seen = [t for t in range(s + 1) if document_ids is None or document_ids[b, t] == document_ids[b, s]]
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                weights = (k[b, seen, g] @ q[b, s, h] / math.sqrt(q.shape[3])).softmax(0)
                y[b, s, h] = weights @ v[b, seen, g]
    return y


@pytest.mark.parametrize("min_mean_segment", [1, 10**9], ids=["calls", "mask"])
@pytest.mark.parametrize(
    "document_ids",
    [
        None,
        [[5] * 7, [2] * 7],
        [[0, 0, 1, 1, 1, 2, 2], [9, 9, 9, 9, 3, 3, 3]],
        [[0, 0, 1, 0, 0, 1, 1], [4, 4, 4, 4, 4, 4, 4]],  # ids that come back
        [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]],
    ],
    ids=["none", "one", "packed", "recurring", "single tokens"],
)
def test_attention_by_definition(
    document_ids: list[list[int]] | None, min_mean_segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MIN_MEAN_SEGMENT", min_mean_segment)
    q = torch.randn(2, 7, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 7, 2, 8, dtype=torch.float64)
    ids = None if document_ids is None else torch.tensor(document_ids)
    context = AttentionContext.of_sequences(CONFIG, 7, ids, q.device, q.dtype)
    torch.testing.assert_close(context.attend(q, k, v), naive_attention(q, k, v, ids), rtol=1e-12, atol=1e-12)


def test_documents_in_bfloat16() -> None:
    """Each is padded to whole blocks of queries; neither its values nor its gradients see the padding."""
    ids = torch.tensor([[0] * 70 + [1] * 90, [2] * 1 + [3] * 159])
    q, k, v = (torch.randn(2, 160, heads, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    context = AttentionContext.of_sequences(CONFIG, 160, ids, q.device, q.dtype)
    assert context.segments == [70, 90, 1, 159]
    found, expected = context.attend(q, k, v), naive_attention(*exact, ids)
    incoming = torch.randn_like(found)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for x, y in zip(
        torch.autograd.grad(found, (q, k, v), incoming),
        torch.autograd.grad(expected, exact, incoming.double()),
        strict=True,
    ):
        assert (x.double() - y).norm() <= 0.01 * y.norm()


def test_one_document_a_row_needs_no_mask_and_no_split() -> None:
    ids = torch.tensor([[3] * 100, [8] * 100])
    context = AttentionContext.of_sequences(CONFIG, 100, ids, torch.device("cpu"), torch.float32)
    assert context.mask is None and context.segments is None


def test_long_documents_are_split_and_short_ones_are_masked() -> None:
    long, short = torch.arange(512)[None] // 128, torch.arange(512)[None] // 8
    of = lambda ids: AttentionContext.of_sequences(CONFIG, 512, ids, torch.device("cpu"), torch.float32)  # noqa: E731
    assert of(long).segments == [128] * 4 and of(long).mask is None
    assert of(short).segments is None and of(short).mask is not None


def test_document_lengths() -> None:
    assert document_lengths(torch.tensor([[1, 1, 2], [2, 2, 2]])) == [2, 1, 3]
    assert document_lengths(torch.tensor([[1, 2, 1], [2, 2, 2]])) is None
