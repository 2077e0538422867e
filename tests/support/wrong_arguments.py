"""Calls of the public functions with one wrong argument each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mtp_ext
from mtp_ext.generate import generate
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.plan import plan

B, S, D, V, N = 2, 5, 8, 17, 2
# Types that no argument takes.
NOTHING = ["x", b"x", 1j, object(), {"a": 1}, {0.5}, lambda: 1, int, torch.float32, [object()], [[1.0]], ["x"]]
NO_SCALARS = [
    *NOTHING,
    [],
    [1],
    (1.0,),
    torch.ones(2),
    torch.ones(1, 1),
    np.ones(2),
    torch.tensor(1j),
    torch.tensor(True),
]
NO_INTS = [*NO_SCALARS, True, 0.5, float("nan"), 2**70, -(2**70), torch.tensor(0.5)]
NO_NUMBERS = [*NO_SCALARS, True, float("nan"), float("inf"), -float("inf")]


@dataclass
class Kind:
    """The wrong values of an argument."""

    values: Callable[[Any], list[Any]]
    optional: bool = True

    def wrong(self, good: Any) -> list[Any]:
        return [*self.values(good), *([] if self.optional else [None])]


def fixed(*values: Any, optional: bool = True) -> Kind:
    return Kind(lambda _: list(values), optional)


def changed(x: Tensor) -> list[Any]:
    """``x`` in a wrong dtype, shape, device, layout or class."""
    other = [torch.complex64, torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn]
    other += [torch.float32] if not x.is_floating_point() else [torch.int64]
    shapes = [x[None], x[..., None], x[..., :-1], torch.cat([x, x], -1)]
    return [
        *(x.to(d) for d in other),
        *shapes,
        x.to("meta"),
        x.to_sparse(),
        x.numpy(),
        x.flatten()[0],
        *NOTHING,
        1,
        0.5,
        True,
    ]


def tensor(*, optional: bool = True) -> Kind:
    return Kind(changed, optional)


def sequences(*wrong: Any, optional: bool = True) -> Kind:
    """Wrong values of a tensor ``[B, any length]``."""
    return Kind(
        lambda x: (
            [
                y
                for y in changed(x)
                if not (
                    type(y) is Tensor and (y.dtype, y.dim(), y.device, y.layout) == (x.dtype, 2, x.device, x.layout)
                )
            ]
            + list(wrong)
        ),
        optional,
    )


INT = functools.partial(fixed, *NO_INTS)
OPTIONS = {
    "ignore_index": INT(optional=False),
    "reduction": fixed("avg", 1, True, "", *NOTHING, optional=False),
    "label_smoothing": fixed(*NO_NUMBERS, -0.1, 1.5, 2**70, optional=False),
    "z_loss": fixed(*NO_NUMBERS, -0.1, -(2**70), optional=False),
    "softcap": fixed(*NO_NUMBERS, 0, -1.0),
    "logit_scale": fixed(*NO_NUMBERS, optional=False),
    "chunk_rows": INT(0, -1),
    "workspace_bytes": INT(0, -1),
    "max_valid": fixed(*NO_INTS, -1, [], [1, 2, 3], [0.5] * N, [True] * N),
    "bias": tensor(),
    "class_weights": tensor(),
    "token_weights": tensor(),
    "grad_weight_out": tensor(),
    "grad_scale": fixed(*NO_NUMBERS, 0, -1),
    "group": fixed(*NOTHING, 1, True),
}


@dataclass
class Target:
    """A function, arguments that it takes, and the kinds of its arguments."""

    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, Kind]

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns all wrong values by argument."""
        return [(name, value) for name, kind in self.kinds.items() for value in kind.wrong(self.good.get(name))]


NEEDED = tensor(optional=False)
COUNT, SCALE = INT(0, -1, optional=False), fixed(*NO_NUMBERS, -1.0, optional=False)
NAME = fixed(*NOTHING, 1, True, "", optional=False)
OF_HEADS = {
    "document_ids": tensor(),
    "head_weights": fixed(
        *("x", b"x", 1, 0.5, True, object(), [1.0], [], ["a", "b"], [None] * N, [1j] * N, [[1.0]] * N),
        *(torch.ones(N + 1), torch.ones(N, 1), torch.ones(N, device="meta"), torch.ones(N, dtype=torch.int64)),
    ),
    "normalizer": fixed(*NO_NUMBERS, 0, -1, *(torch.tensor(x) for x in (0.0, float("nan"))), optional=False),
    "detach_weight": fixed(1, 0.5, "x", object(), (0,), (N + 1,), (True,), (0.5,), ("1",), [None], optional=False),
}
OF_STEPS = ("token_weights", "ignore_index", "chunk_rows", "workspace_bytes", "max_valid")
CONFIG = {"vocab_size": V, "d_model": D, "n_layers": 4, "n_attn_heads": 2, "n_future": N, "max_seq_len": 16}
FLAGS = ("tie_embeddings", "replicate_unembedding", "shared_final_norm")


def per_label(labels: Tensor) -> dict[str, Tensor]:
    return {"labels": labels, "document_ids": torch.zeros_like(labels), "token_weights": torch.ones(labels.shape)}


def per_class() -> dict[str, Tensor]:
    rows = {"weight": torch.randn(V, D), "grad_weight_out": torch.zeros(V, D)}
    return rows | {"bias": torch.ones(V), "class_weights": torch.ones(V)}


def one_head(labels: Tensor) -> Target:
    rows = {"hidden": torch.randn(B, S, D), "targets": labels[:, :S].clone(), "token_weights": torch.ones(B, S)}
    kinds = OPTIONS | dict.fromkeys(("hidden", "weight", "targets"), NEEDED)
    return Target(mtp_ext.linear_cross_entropy, per_class() | rows, kinds)


def n_heads(labels: Tensor) -> Target:
    good = per_class() | per_label(labels) | {"hidden": torch.randn(N, B, S, D)}
    kinds = OPTIONS | OF_HEADS | dict.fromkeys(("hidden", "weight", "labels"), NEEDED)
    return Target(mtp_ext.multi_token_cross_entropy, good, kinds)


def counting(labels: Tensor) -> Target:
    kinds = {"n_heads": COUNT, "seq_len": INT(-1, S + N + 1, optional=False), "labels": NEEDED}
    kinds |= {"document_ids": tensor(), "token_weights": tensor(), "ignore_index": INT(optional=False)}
    return Target(mtp_ext.count_targets, per_label(labels) | {"n_heads": N, "seq_len": S}, kinds)


def configuration(labels: Tensor) -> Target:
    kinds = dict.fromkeys(CONFIG, COUNT) | {"n_kv_heads": INT(0, -1), "d_ff": INT(0, -1), "variant": NAME}
    kinds |= dict.fromkeys(FLAGS, fixed(*NOTHING, 1, 0.0, optional=False))
    kinds |= dict.fromkeys(("rope_theta", "norm_eps", "unembed_init_std"), SCALE)
    kinds |= dict.fromkeys(("init_std", "embed_init_std", "residual_init_scale"), Kind(SCALE.values))
    kinds |= {"softcap": fixed(*NO_NUMBERS, 0, -1.0), "dropout": fixed(*NO_NUMBERS, -0.1, 1.0, optional=False)}
    return Target(MTPConfig, CONFIG, kinds)


def new_model() -> MTPModel:
    return MTPModel(MTPConfig(**CONFIG))  # type: ignore[arg-type]


def step(labels: Tensor) -> Target:
    wrong_labels = sequences(labels[:, : S - 1], labels[:1])
    kinds = OF_HEADS | {name: OPTIONS[name] for name in OF_STEPS}
    kinds |= {"tokens": sequences(optional=False), "labels": wrong_labels, "tokens_ahead": wrong_labels}
    kinds |= {"schedule": NAME, "options": fixed(*NOTHING, 1, 0.5, True), "detach_heads": OF_HEADS["detach_weight"]}
    good = per_label(labels) | {"tokens": labels[:, :S].clone(), "tokens_ahead": labels}
    return Target(new_model(), good, kinds)


def generation(labels: Tensor) -> Target:
    kinds = {
        "prompt": sequences([], [labels[0], 1], [labels[0], labels[0, :0]], optional=False),
        "max_new_tokens": INT(-1, 15, optional=False),
        "n_draft": INT(-1, N),
        "draft": NAME,
        "temperature": SCALE,
        "top_k": INT(0, -1),
        "top_p": fixed(*NO_NUMBERS, 0, -0.5, 1.5),
        "eos_token": INT(-1, V),
        "generator": fixed(*NOTHING, 1, True),
        "on_tokens": fixed(*(x for x in NOTHING if not callable(x)), 1, True),
    }
    return Target(
        functools.partial(generate, new_model()), {"prompt": labels[:, :3].clone(), "max_new_tokens": 2}, kinds
    )


def planning(labels: Tensor) -> Target:
    kinds = dict.fromkeys(("batch_size", "seq_len", "world_size"), COUNT)
    kinds |= dict.fromkeys(("schedule", "dtype", "optimizer"), NAME)
    kinds |= {"device": fixed(*NOTHING, True, 0.5, "xpu", "meta")}
    return Target(functools.partial(plan, MTPConfig(**CONFIG)), {"batch_size": B, "seq_len": S}, kinds)  # type: ignore[arg-type]


TARGETS: dict[str, Callable[[Tensor], Target]] = {
    "linear_cross_entropy": one_head,
    "multi_token_cross_entropy": n_heads,
    "count_targets": counting,
    "MTPConfig": configuration,
    "MTPModel": step,
    "generate": generation,
    "plan": planning,
}


@functools.cache
def target_of(function: str) -> Target:
    """Returns a public function by its name."""
    return TARGETS[function](torch.randint(V, (B, S + N)))
