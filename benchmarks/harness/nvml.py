"""Reads clocks, power, throttling and memory of the current CUDA device through NVML (nvidia-ml-py)."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch

INTERVAL_SECONDS = 0.05
Reading = dict[str, Any]

# nvmlClocksEventReasons in nvml.h.
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class UnavailableError(Exception):
    """NVML is not available; the message says why."""


class Device:
    """The NVML handle of the current CUDA device.

    Raises:
        UnavailableError: The module is missing, or the driver does not find the device by its UUID.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise UnavailableError("nvidia-ml-py is not installed") from None
        self._nvml = pynvml
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            self.driver: str = pynvml.nvmlSystemGetDriverVersion()
        except pynvml.NVMLError as error:
            raise UnavailableError(f"NVML: {error}") from None

    def read(self) -> Reading:
        """Reads the current values; unavailable ones are None."""
        nvml, handle = self._nvml, self._handle
        return {
            "sm_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "power_w": self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "throttle_bits": self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            "device_bytes": self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            "process_bytes": self._ask(self._process_bytes),
        }

    def _process_bytes(self) -> int | None:
        """This process's memory; None if the driver sees other process ids, as in a container."""
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError:
            return None


def reasons(bits: int | None) -> list[str] | None:
    """Returns the names of throttle bits; None (unknown) stays None."""
    if bits is None:
        return None
    unknown = bits & ~sum(THROTTLE_REASONS)
    return [name for bit, name in THROTTLE_REASONS.items() if bits & bit] + [hex(unknown)] * bool(unknown)


def summary(readings: list[Reading]) -> dict[str, Any]:
    """Returns extremes and medians of the readings; None for a field without values."""

    def over(key: str, reduce: Callable[[Any], Any]) -> Any:
        values = [reading[key] for reading in readings if reading[key] is not None]
        return reduce(values) if values else None

    def together(bits: list[int]) -> int:
        result = 0
        for value in bits:
            result |= value
        return result

    return {
        "samples": len(readings),
        "sm_mhz_min": over("sm_mhz", min),
        "sm_mhz_median": over("sm_mhz", statistics.median),
        "memory_mhz_min": over("memory_mhz", min),
        "power_w_median": over("power_w", statistics.median),
        "throttle_reasons": reasons(over("throttle_bits", together)),
        "device_bytes_max": over("device_bytes", max),
        "process_bytes_max": over("process_bytes", max),
    }


class Sampler:
    """Samples the device in a background thread from :meth:`start` to :meth:`stop`, which each add one reading."""

    def __init__(self, interval: float = INTERVAL_SECONDS) -> None:
        self._interval, self._done = interval, threading.Event()
        self._readings: list[Reading] = []
        self._device: Device | None = None
        self._thread: threading.Thread | None = None
        self._note = "no timed round"

    def start(self) -> None:
        try:
            self._device = Device()
        except UnavailableError as reason:
            self._note = str(reason)
            return
        self._readings.append(self._device.read())
        self._thread = threading.Thread(target=self._run, args=(self._device,), daemon=True)
        self._thread.start()

    def _run(self, device: Device) -> None:
        while not self._done.wait(self._interval):
            self._readings.append(device.read())

    def stop(self) -> dict[str, Any]:
        """Returns :func:`summary`, with a ``note`` that says why if there are no readings."""
        self._done.set()
        if self._thread is None or self._device is None:
            return summary([]) | {"note": self._note}
        self._thread.join()
        self._readings.append(self._device.read())
        return summary(self._readings)
