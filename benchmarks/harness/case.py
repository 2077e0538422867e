"""What is measured: one implementation at one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn


@dataclass(frozen=True)
class Case:
    """One implementation at one shape.

    Args:
        benchmark: What is measured; with ``shape`` it names the group whose cases are compared.
        impl: The implementation; unique in its group.
        shape: Sizes and dtypes, for the reader and as part of the key.
        fn: One call of it. What it returns is dropped after the call, and counts towards its peak memory.
        flops: Floating-point operations of one call, 0 if it has no use.
        bytes: Bytes that one call has to move, 0 if it has no use.
        measure_peak: Whether its memory is of interest; on a CPU that takes two more calls in a process of their own.
        repeats: Calls that are timed together. A GPU call below about 0.2 ms needs several, which are then replayed as
            a CUDA graph: one by one, their dispatch would be measured.
        facts: More fields of its row, asked for once after the timing (say, how far its result is from ours).
    """

    benchmark: str
    impl: str
    shape: Mapping[str, int | str]
    fn: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    measure_peak: bool = True
    repeats: int = 1
    facts: Callable[[], Mapping[str, Any]] | None = None

    @property
    def group(self) -> str:
        return " ".join([self.benchmark, *(f"{name}={value}" for name, value in self.shape.items())])

    @property
    def key(self) -> str:
        return f"{self.group} {self.impl}"


Cases = Callable[[str, bool], Iterable[Case]]  # (device, quick) -> cases, the cases of a group in a row


def short(error: BaseException) -> str:
    """The kind of an error and the start of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def _fail(error: Exception) -> NoReturn:
    raise error


def failing(benchmark: str, where: str, error: Exception) -> Case:
    """Stands for cases whose inputs could not be made; without the traceback, which would keep their memory alive."""
    return Case(benchmark, "inputs", {"of": where}, partial(_fail, error.with_traceback(None)), measure_peak=False)


def each(makers: Iterable[partial[Iterator[Case]]]) -> Iterator[Case]:
    """The cases of every maker in turn; where one raises (no memory for its inputs), the next ones still come."""
    for maker in makers:
        try:
            yield from maker()
        except Exception as error:
            yield failing(maker.func.__name__, ", ".join(map(str, maker.args)), error)


def groups(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Neighbours of one group together; if ``cases`` raises, its last group comes first, then a case that says why."""
    group: list[Case] = []
    source = iter(cases)
    while True:
        try:
            case = next(source, None)
        except Exception as error:
            case, source = failing("cases", "the rest", error), iter(())
        if group and (case is None or case.group != group[0].group):
            yield group
            group = []
        if case is None:
            return
        group.append(case)
