"""How close to float64 a call of the fused losses has to be; docs/internals/numerics.md states and derives it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import reference
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.loss.options import RowOptions
from tests.support.loss_calls import CPU, Call, Results, arguments, incoming_gradients, run
from tests.support.rounding import ErrorSum, HeadErrors, total, unit

# Of a float32 sum over rows, relative to the largest result; a GPU's exponentials are short ones.
ACCUMULATION_ERROR = {"cpu": 2e-6, "cuda": 2e-5}


def assert_accurate(
    call: Call,
    ours: Results | None = None,
    *,
    device: torch.device = CPU,
    logits_dtype: torch.dtype | None = None,
) -> None:
    """Every value and gradient is as close to float64 as docs/internals/numerics.md promises.

    In 32 and 64 bits: at most twice as far as eager torch in the same dtype, plus a floor. In 16 bits: within the
    a-priori bound of :mod:`tests.support.rounding`, element by element, because the errors of two roundings of one
    number say nothing about each other.

    Args:
        call: The call.
        ours: Its results, where they were not computed here.
        device: Where eager torch runs, and ours unless given.
        logits_dtype: What a 16-bit call held its logits in; default: what the device's backend chooses.
    """
    exact = run(call, torch.float64, ours=False)
    ours = ours or run(call, call.dtype, ours=True, device=device)
    assert {k: v.tolist() for k, v in ours.exact.items()} == {k: v.tolist() for k, v in exact.exact.items()}
    assert ours.grads.keys() == exact.grads.keys()
    if call.dtype.itemsize == 2:
        held = logits_dtype or backend_of(device).logits_dtype(call.dtype)
        bounds = rounding_bounds(call, exact, held)
    else:
        bounds = eager_bounds(exact, run(call, call.dtype, ours=False, device=device))
    for kind in ("values", "grads"):
        for name, expected in getattr(exact, kind).items():
            got, expected = getattr(ours, kind)[name].detach(), expected.detach()
            assert got.shape == expected.shape, name
            assert bool(torch.isfinite(got).all()), f"{name} is not finite"
            error, bound = (got.double() - expected).abs(), getattr(bounds, kind)[name]
            bound = bound + floor(got.dtype, expected.abs(), device)
            excess = largest(error - bound)
            assert excess <= 0, f"{name}: error {largest(error):.3g}, {excess:.3g} above its bound"


def eager_bounds(exact: Results, eager: Results) -> Results:
    """Twice the largest error of each of eager's results."""

    def of(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, Tensor]:
        errors = {name: (found[name].detach().double() - x.detach()).abs() for name, x in oracle.items()}
        return {name: torch.full_like(error, 2 * largest(error)) for name, error in errors.items()}

    return Results(of(eager.values, exact.values), {}, of(eager.grads, exact.grads))


def rounding_bounds(call: Call, exact: Results, logits_dtype: torch.dtype) -> Results:
    """The a-priori bound of each result of a call whose logits are held in ``logits_dtype``."""
    made = {
        name: x.detach() if isinstance(x, Tensor) else x
        for name, x in arguments(call, torch.float64, ours=False).items()
    }
    hidden, labels = made["hidden"], made["labels" if call.heads else "targets"]
    if not call.heads:
        hidden = hidden[None]
    options = RowOptions(**{f.name: made[f.name] for f in fields(RowOptions) if f.name in made})
    incoming = incoming_gradients(call, exact.values)
    values = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in exact.values.items()}
    grads = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in exact.grads.items()}
    found = Results(values, {}, grads)
    sums: dict[str, list[ErrorSum]] = {"loss": [], "weight": [], "bias": []}
    for k, h in enumerate(hidden):
        rows, targets, row_weights = weighted_rows(call, made, labels, k, h.shape[1] if call.heads else 0)
        weight = made["weight"][k] if made["weight"].dim() == 3 else made["weight"]
        head_weight = made["head_weights"][k] if "head_weights" in made else torch.ones((), dtype=torch.float64)

        def of_rows(x: Tensor, k: int = k, rows: Tensor = rows) -> Tensor:
            """One value for each row, of one that every row shares or of a table of them."""
            return x.expand(len(rows)) if x.dim() == 0 else (x[k] if call.heads else x).reshape(-1)[rows]

        loss_grad, lse_grad = of_rows(incoming["loss"]), torch.zeros(len(rows), dtype=torch.float64)
        if "lse" in incoming:
            lse_grad = of_rows(incoming["lse"])
        errors = HeadErrors(
            h.reshape(-1, h.shape[-1])[rows],
            weight,
            made.get("bias"),
            targets,
            row_weights * head_weight * loss_grad,
            lse_grad,
            options,
            logits_dtype,
        )

        def put(table: Tensor, x: Tensor, k: int = k, rows: Tensor = rows) -> None:
            (table[k] if call.heads else table).view(-1, *x.shape[1:])[rows] = x

        if exact.values["loss"].dim():
            put(values["loss"], errors.each_loss(row_weights * head_weight))
        sums["loss"].append(errors.losses(row_weights * head_weight))
        if call.heads:
            values["head_loss"][k] = errors.losses(row_weights).bound()
        if "lse" in values:
            put(values["lse"], errors.each_lse())
        if "hidden" in grads:
            put(grads["hidden"], errors.grad_hidden())
        if "head_weights" in grads:
            grads["head_weights"][k] = errors.losses(row_weights * loss_grad).bound()
        if "weight" in grads and k + 1 not in call.options.get("detach_weight", ()):
            sums["weight"].append(errors.grad_weight())
            if made["weight"].dim() == 3:
                grads["weight"][k] = sums["weight"].pop().bound()
        if "bias" in grads:
            sums["bias"].append(errors.grad_bias())
    if not exact.values["loss"].dim():
        values["loss"] = total(sums["loss"], values["loss"])
    for name in ("weight", "bias"):
        if name in grads and sums[name]:
            grads[name] = total(sums[name], grads[name])
    for name in grads:  # rounded to 16 bits by the product, and again where the incoming gradient scales it
        grads[name] = grads[name] + 2 * unit(call.dtype) * exact.grads[name].abs()
    return found


def weighted_rows(
    call: Call, made: dict[str, Any], labels: Tensor, k: int, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The flat indices of head ``k``'s rows with a target, their targets, and the weights of their losses."""
    ignore_index, weights = call.options.get("ignore_index", -100), made.get("token_weights")
    if call.heads:
        targets = reference.shifted_targets(labels, k + 1, seq_len, made.get("document_ids"), ignore_index)
        if weights is not None:
            weights = torch.nn.functional.pad(weights, (0, k + 1))[:, k + 1 : k + 1 + seq_len]
    else:
        targets = labels
    targets = targets.reshape(-1).long()
    if weights is not None:
        weights = weights.reshape(-1)
        targets = torch.where(weights != 0, targets, ignore_index)
    denominator: Tensor | float = 1.0
    if call.options.get("reduction", "mean") == "mean":
        denominator = call.options.get("normalizer", "per_head")
        if denominator == "per_head":
            counted = reference.target_weights(
                targets, made.get("class_weights"), weights, ignore_index, torch.float64
            ).sum()
            denominator = torch.where(counted != 0, counted, 1)
    rows = (targets != ignore_index).nonzero().flatten()
    row_weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights[rows].double()
    return rows, targets[rows], row_weights / denominator


def largest(x: Tensor) -> float:
    return float(x.amax()) if x.numel() else 0.0


def floor(dtype: torch.dtype, expected: Tensor, device: torch.device) -> Tensor | float:
    """One rounding to the result's dtype, and the summation order of float32 (float64)."""
    accumulate, scale = ACCUMULATION_ERROR[device.type], largest(expected)
    if dtype == torch.float64:
        accumulate = 1e-12
    rounding = torch.finfo(dtype).eps / 2 * (expected if dtype.itemsize == 2 else scale)
    return rounding + accumulate * scale + accumulate
