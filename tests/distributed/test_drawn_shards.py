"""Drawn calls with the vocabulary sharded over two processes (gloo), against the float64 reference in one."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import forked
from tests.support.accuracy import assert_accurate
from tests.support.drawn_calls import calls
from tests.support.loss_calls import OF_CLASSES, Call, Results, Shard, run

pytestmark = pytest.mark.slow
RANKS = 2
SECONDS = 60  # more than any call takes: a rank that waits for another one is a failure, not a hang


def serve(rank: int, store: str, connection: Connection) -> None:
    """Runs the calls that come until None comes; answers with results, or with the traceback of what was raised."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
    assert dist.group.WORLD is not None
    while (asked := pickle.loads(connection.recv_bytes())) is not None:
        call, classes = asked
        try:
            answer: Any = run(call, call.dtype, ours=True, shard=Shard(classes, dist.group.WORLD))
        except Exception:
            answer = traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


@dataclass
class Ranks:
    """The processes, each behind a connection."""

    connections: list[Connection]

    def run(self, call: Call, first: int) -> list[Results]:
        """The call with the first ``first`` classes on rank 0 and the others on rank 1; every rank's results."""
        for connection, classes in zip(self.connections, (slice(0, first), slice(first, None)), strict=True):
            connection.send_bytes(pickle.dumps((call, classes)))
        answers = []
        for connection in self.connections:
            assert connection.poll(2 * SECONDS), "a rank gave no answer"
            answers.append(pickle.loads(connection.recv_bytes()))
        assert not any(isinstance(x, str) for x in answers), "\n".join(map(str, answers))
        return answers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pipes = [forked.CONTEXT.Pipe() for _ in range(RANKS)]
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    processes = [forked.CONTEXT.Process(target=serve, args=(i, store, far)) for i, (_, far) in enumerate(pipes)]
    for process in processes:
        process.start()
    yield Ranks([near for near, _ in pipes])
    for near, _ in pipes:
        near.send_bytes(pickle.dumps(None))
    for process in processes:
        process.join(SECONDS)
        process.kill()


def joined(parts: list[Results]) -> Results:
    """One result of the ranks': gradients of sharded tensors side by side; all else must be equal bit by bit."""
    first = parts[0]
    grads = {}
    for name in first.grads:
        found = [part.grads[name] for part in parts]
        if name in OF_CLASSES:
            grads[name] = torch.cat(found, dim=-2 if name == "weight" else 0)
        else:
            grads[name] = found[0]
            assert all(torch.equal(x, found[0]) for x in found), f"ranks hold different gradients of {name}"
    for part in parts[1:]:
        for name, value in (first.values | first.exact).items():
            assert torch.equal((part.values | part.exact)[name], value), f"ranks hold different values of {name}"
    return Results(first.values, first.exact, grads)


@given(calls(), st.floats(0, 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sharded_call_is_accurate(ranks: Ranks, call: Call, share: float) -> None:
    vocab = call.tensors["weight"].shape[-2]
    assert_accurate(call, joined(ranks.run(call, round(share * vocab))))
