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
    values = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in exact.values.items()}
    grads = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in exact.grads.items()}
    sums: dict[str, list[ErrorSum]] = {"loss": [], "weight": [], "bias": []}
    for k in range(len(made["hidden"]) if call.heads else 1):
        head = HeadRows(call, made, k, incoming_gradients(call, exact.values), logits_dtype)
        errors, row_weights = head.errors, head.row_weights
        sums["loss"].append(errors.losses(row_weights * head.head_weight))
        if exact.values["loss"].dim():
            head.put(values["loss"], errors.each_loss(row_weights * head.head_weight))
        if call.heads:
            values["head_loss"][k] = errors.losses(row_weights).bound()
        if "lse" in values:
            head.put(values["lse"], errors.each_lse())
        if "hidden" in grads:
            head.put(grads["hidden"], errors.grad_hidden())
        if "head_weights" in grads:
            grads["head_weights"][k] = errors.losses(row_weights * head.loss_grad).bound()
        if "bias" in grads:
            sums["bias"].append(errors.grad_bias())
        if "weight" in grads and k + 1 not in call.options.get("detach_weight", ()):
            if made["weight"].dim() == 3:
                grads["weight"][k] = errors.grad_weight().bound()
            else:
                sums["weight"].append(errors.grad_weight())
    if not exact.values["loss"].dim():
        values["loss"] = total(sums["loss"], values["loss"])
    for name in ("weight", "bias"):
        if name in grads and sums[name]:
            grads[name] = total(sums[name], grads[name])
    for name in grads:  # rounded to 16 bits by the product, and again where the incoming gradient scales it
        grads[name] = grads[name] + 2 * unit(call.dtype) * exact.grads[name].abs()
    return Results(values, {}, grads)


class HeadRows:
    """The rows of head ``k`` (from 0) that have a target, what they weigh, and their errors.

    Args:
        call: The call.
        made: Its arguments in float64.
        k: The head.
        incoming: The gradients of its results.
        logits_dtype: What holds the logits.
    """

    def __init__(
        self, call: Call, made: dict[str, Any], k: int, incoming: dict[str, Tensor], logits_dtype: torch.dtype
    ) -> None:
        self._heads, self._k = call.heads, k
        hidden = made["hidden"][k] if call.heads else made["hidden"]
        self._rows, targets, self.row_weights = weighted_rows(call, made, k, hidden.shape[1])
        self.loss_grad = self._of_rows(incoming["loss"])
        self.head_weight = made["head_weights"][k] if "head_weights" in made else 1.0
        self.errors = HeadErrors(
            hidden.reshape(-1, hidden.shape[-1])[self._rows],
            made["weight"][k] if made["weight"].dim() == 3 else made["weight"],
            made.get("bias"),
            targets,
            self.row_weights * self.head_weight * self.loss_grad,
            self._of_rows(incoming.get("lse", torch.zeros((), dtype=torch.float64))),
            RowOptions(**{f.name: made[f.name] for f in fields(RowOptions) if f.name in made}),
            logits_dtype,
        )

    def _of_rows(self, x: Tensor) -> Tensor:
        """One value for each row: of a table of them, or one that all rows share."""
        return x.expand(len(self._rows)) if x.dim() == 0 else (x[self._k] if self._heads else x).reshape(-1)[self._rows]

    def put(self, table: Tensor, x: Tensor) -> None:
        """Writes the rows' values into a table of all rows."""
        (table[self._k] if self._heads else table).view(-1, *x.shape[1:])[self._rows] = x


def weighted_rows(call: Call, made: dict[str, Any], k: int, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """The flat indices of head ``k``'s rows with a target, their targets, and the weights of their losses."""
    ignore_index, weights = call.options.get("ignore_index", -100), made.get("token_weights")
    if call.heads:
        targets = reference.shifted_targets(made["labels"], k + 1, seq_len, made.get("document_ids"), ignore_index)
        if weights is not None:
            weights = torch.nn.functional.pad(weights, (0, k + 1))[:, k + 1 : k + 1 + seq_len]
    else:
        targets = made["targets"]
    targets = targets.reshape(-1).long()
    if weights is not None:
        weights = weights.reshape(-1)
        targets = torch.where(weights != 0, targets, ignore_index)
    denominator: Tensor | float = 1.0
    if call.options.get("reduction", "mean") == "mean":
        denominator = call.options.get("normalizer", "per_head")
        if denominator == "per_head":
            denominator = reference.mean_divisor(
                reference.target_weights(targets, made.get("class_weights"), weights, ignore_index, torch.float64)
            )
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
