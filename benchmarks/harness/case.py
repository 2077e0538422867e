"""Benchmark cases: one implementation at one shape each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn


@dataclass(frozen=True)
class Case:
    """One implementation at one shape.

    Args:
        benchmark: Name of the benchmark; with ``shape`` it names the group whose cases are compared.
        impl: The implementation; unique in its group.
        shape: Sizes and dtypes, for the reader and as part of the key.
        fn: Runs one call. The result is dropped after the call and counts towards its peak memory.
        flops: FLOPs per call, 0 if not meaningful.
        bytes: Bytes that one call must move, 0 if not meaningful.
        measure_peak: Whether to measure its memory; on a CPU that takes two more calls in a separate process.
        repeats: Number of calls timed together. GPU calls below about 0.2 ms need several, replayed as a CUDA graph;
            otherwise their dispatch would be measured.
        facts: Returns additional fields of its row, once after the timing (for example its error relative to ours).
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


Cases = Callable[[str, bool], Iterable[Case]]  # (device, quick) -> cases, grouped


def short(error: BaseException) -> str:
    """Returns the type of an error and the start of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def _fail(error: Exception) -> NoReturn:
    raise error


def failing(benchmark: str, where: str, error: Exception) -> Case:
    """Makes a case that stands for cases whose inputs failed; drops the traceback, which would keep memory alive."""
    return Case(benchmark, "inputs", {"of": where}, partial(_fail, error.with_traceback(None)), measure_peak=False)


def each(makers: Iterable[partial[Iterator[Case]]]) -> Iterator[Case]:
    """Yields the cases of every maker in turn; if one raises (no memory for its inputs), continues with the next."""
    for maker in makers:
        try:
            yield from maker()
        except Exception as error:
            yield failing(maker.func.__name__, ", ".join(map(str, maker.args)), error)


def groups(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Yields consecutive cases of one group; if ``cases`` raises, yields the last group, then a case with the error."""
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
