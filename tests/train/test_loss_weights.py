"""The heads' weights over a run: what they are, that a resumed run has the same ones, and that a zero costs nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_ext.train.checkpoint.directory import list_checkpoints, load_model_state, load_training_state
from mtp_ext.train.config import CheckpointConfig, EvaluationConfig, LossConfig
from mtp_ext.train.loss_weights import LossWeights, parse_point
from mtp_ext.train.report.record import read_metrics
from mtp_ext.train.trainer import Trainer
from tests.train.test_checkpoint import forget_hashes
from tests.train.tiny import CPU, run, tiny_config, tiny_dataset, tiny_model


def test_the_default_is_the_plain_sum() -> None:
    weights = LossWeights(4)
    assert weights.advance(0.0) == weights.advance(1.0) == (1.0, 1.0, 1.0, 1.0)


def test_weights_and_discount_multiply() -> None:
    assert LossWeights(3, head_weights=[2.0, 1.0, 4.0], discount=0.5).current == (2.0, 0.5, 1.0)


def test_points_are_joined_by_lines() -> None:
    weights = LossWeights(2, points=[(0.2, (1.0, 0.0)), (0.6, (1.0, 1.0)), (1.0, (0.0, 3.0))])
    expected = {0.0: (1, 0), 0.2: (1, 0), 0.4: (1, 0.5), 0.6: (1, 1), 0.8: (0.5, 2), 1.0: (0, 3)}
    for fraction, value in expected.items():
        assert weights.advance(fraction) == pytest.approx(value), fraction


@pytest.mark.parametrize(
    ("curriculum", "heads"), [("forward", [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]), ("reverse", [3, 3, 3, 2, 2, 2, 1, 1, 1, 1])]
)
def test_a_curriculum_changes_the_number_of_heads_after_each_nth_of_the_run(curriculum: str, heads: list[int]) -> None:
    weights = LossWeights(3, curriculum=curriculum, head_weights=[1.0, 0.5, 0.25])
    for step, expected in enumerate(heads):
        current = weights.advance(step / 9)
        assert current == tuple(w if k < expected else 0.0 for k, w in enumerate((1.0, 0.5, 0.25))), step


def test_the_fraction_never_falls_and_is_the_state() -> None:
    """A finished run that goes on with twice the steps keeps all heads of its forward curriculum."""
    weights = LossWeights(4, curriculum="forward")
    weights.advance(1.0)
    resumed = LossWeights(4, curriculum="forward")
    resumed.load_state_dict(weights.state_dict())
    assert resumed.advance(0.5) == (1.0,) * 4
    assert LossWeights(4, curriculum="forward").advance(0.5) == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_weights": [1.0]}, r"head_weights must have one weight per head \(n_future=3\), got \(1.0,\)"),
        ({"head_weights": [1.0, -1.0, 0.0]}, "head_weights must be finite and not negative"),
        ({"head_weights": [0.0, 0.0, 0.0]}, "must leave a positive weight, but all are 0 at 0 of the run"),
        ({"points": [(0.5, (0, 0, 0)), (0.8, (0, 0, 0))]}, "all are 0 at 0 of the run"),
        ({"points": [(0, (1, 1, 1)), (0.5, (0, 0, 0)), (0.8, (1, 0, 0))]}, r"all are 0 at 0\.5 of the run"),
        ({"points": [(0, (1, 0, 0))], "head_weights": [0.0, 1.0, 1.0]}, "all are 0 at 0 of the run"),
        ({"curriculum": "forward", "head_weights": [0.0, 1.0, 1.0]}, "all are 0 at 0 of the run"),
        ({"curriculum": "reverse", "head_weights": [0.0, 0.0, 1.0]}, r"all are 0 at 0\.333333 of the run"),
        ({"discount": 0.0}, "discount must be finite and positive, got 0.0"),
        ({"curriculum": "sideways"}, "curriculum must be one of none, forward, reverse, got 'sideways'"),
        ({"points": [(0.5, (1, 1))]}, "weight_points must have one weight per head"),
        ({"points": [(1.5, (1, 1, 1))]}, r"weight_points must be at fractions of the run in \[0, 1\], got 1.5"),
        ({"points": [(0.5, (1, 1, 1)), (0.5, (1, 1, 1))]}, "weight_points must be at ascending fractions"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeights(3, **arguments)


@pytest.mark.parametrize("text", ["1,1", "x:1,1", "0.5:1,x", "0.5:"])
def test_a_point_that_is_none(text: str) -> None:
    assert parse_point("0.5:1,0.25") == (0.5, (1.0, 0.25))
    with pytest.raises(ValueError, match="weight_points must be like"):
        parse_point(text)


def test_the_configuration_is_checked_at_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for loss, message in (
        (LossConfig(head_weights=(1.0,)), "loss.head_weights must have one weight per head"),
        (LossConfig(weight_points=("0:1",)), "loss.weight_points must have one weight per head"),
        (LossConfig(discount=-1.0), "loss.discount must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, loss=loss)


CURRICULUM = LossConfig(curriculum="forward", discount=0.5, weight_points=("0:1,1", "1:1,0.25"))


def test_four_and_four_steps_are_eight(tmp_path: Path) -> None:
    """A stop before the second head joins changes nothing, to the bit."""
    config = tiny_config(
        tmp_path,
        max_steps=8,
        loss=CURRICULUM,
        evaluation=EvaluationConfig(every_steps=0),
        checkpoint=CheckpointConfig(every_seconds=0, every_steps=3, keep_last=10),
    )
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    first = list_checkpoints(tmp_path / "whole" / "checkpoints")[0]
    assert first.step == 3 and load_training_state(first)["loss_weights"] == {"fraction": 2 / 8}
    run(dataclasses.replace(config, out=tmp_path / "parts"), first)
    states = [load_model_state(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts")]
    assert all((a == b).all() for a, b in zip(states[0].values(), states[1].values(), strict=True))
    records = [
        {
            r["step"]: (r["head_weights"], r["head_loss"])
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
            if r["kind"] == "train"
        }
        for name in ("whole", "parts")
    ]
    assert all(records[0][step] == value for step, value in records[1].items())
    weights = {step: value[0] for step, value in records[0].items()}
    assert [weights[step][1] > 0 for step in range(1, 9)] == [False] * 4 + [True] * 4
    assert weights[8][1] == pytest.approx(0.5 * (1 - 0.75 * 7 / 8))


def test_a_checkpoint_of_before_the_weights_changed_still_loads(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=2)
    run(config)
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = load_training_state(checkpoint)
    del state["loss_weights"]
    torch.save(state, checkpoint.path / "state.pt")
    forget_hashes(checkpoint.path)
    dataset = tiny_dataset(config)
    trainer = Trainer(config, tmp_path / "again", dataset, tiny_model(config, dataset), CPU)
    trainer.load(checkpoint)
    assert trainer.progress.step == 2 and trainer.loss_weights.current == (1.0, 1.0)


def test_a_head_of_weight_zero_does_not_run_in_training(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, loss=LossConfig(curriculum="forward"))
    dataset = tiny_dataset(config)
    model = tiny_model(config, dataset)
    ran: list[int] = []
    for k in (1, 2):
        model.heads.head(k).register_forward_hook(lambda *args, k=k: ran.append(k))
    trainer = Trainer(config, tmp_path / "run", dataset, model, CPU)
    before = {name: p.clone() for name, p in model.heads.head(2).named_parameters()}
    trainer.step()
    assert set(ran) == {1}
    assert all((p == before[name]).all() for name, p in model.heads.head(2).named_parameters())
    for _ in range(2):
        trainer.step()
    assert set(ran) == {1, 2}


def test_recomputing_is_an_option(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, loss=LossConfig(recompute=True))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, variant="causal"))
    dataset = tiny_dataset(config)
    assert Trainer(config, tmp_path / "run", dataset, tiny_model(config, dataset), CPU).model.heads.recompute
