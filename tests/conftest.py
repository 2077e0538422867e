"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)  # one fixed set of examples: CI must not be a lottery
settings.register_profile("fuzz", deadline=None, max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def missing_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run here; None when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    from mtp_ext import _C

    return None if _C.build_info()["cuda"] else "the extension was built without CUDA; build with MTP_EXT_CUDA=1"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # under xdist the processes are the parallelism
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start: threads that wait for a core spin
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compilers, which would import torch again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if marked and (reason := missing_gpu()) is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in any order and any process."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Results do not depend on the machine's number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Both devices; the CUDA half is skipped with the reason where it cannot run."""
    return torch.device(request.param)
