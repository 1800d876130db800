"""Load of this host: processors and memory, now and between two readings."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from runbook.kinds import probe

SHORT_SECONDS = 0.5


@dataclass(frozen=True)
class HostLoad:
    """`load` is the mean number of processes that wanted a processor in the last 15 minutes."""

    load: float
    processors: int
    memory_bytes: int
    available_bytes: int

    @property
    def load_ratio(self) -> float:
        """Over 1: processes wait for a processor."""
        return self.load / self.processors

    @property
    def memory_ratio(self) -> float:
        """The used share of memory. File caches count as available."""
        return 1 - self.available_bytes / self.memory_bytes


@probe
def read_load() -> HostLoad:
    """Load and memory of this host."""
    memory = psutil.virtual_memory()
    return HostLoad(psutil.getloadavg()[2], psutil.cpu_count() or 1, memory.total, memory.available)


@dataclass(frozen=True)
class Processors:
    """`used_ratio` of all processors, over `seconds` (0: unknown, since the last reading)."""

    used_ratio: float
    count: int
    counters: tuple[str, float, float]


@probe
def read_processors(before: tuple[str, float, float]) -> Processors:
    """Processor use since `before` (the counters of the last reading); over half a second if the host rebooted
    since."""
    boot = str(int(psutil.boot_time()))
    busy, total = _counters()
    count = psutil.cpu_count() or 1
    if before[0] == boot and total - before[2] >= SHORT_SECONDS * count / 2:
        return Processors(_ratio(busy - before[1], total - before[2]), count, (boot, busy, total))
    measured = psutil.cpu_percent(interval=SHORT_SECONDS) / 100
    return Processors(measured, count, (boot, busy, total))


def _ratio(busy: float, total: float) -> float:
    return min(max(busy / total, 0.0), 1.0)


def _counters() -> tuple[float, float]:
    """Seconds since the boot, of all processors together: busy, and all. A guest's are in `user` already."""
    times = psutil.cpu_times()._asdict()
    total = sum(value for name, value in times.items() if name not in ("guest", "guest_nice"))
    return total - times["idle"] - times.get("iowait", 0.0), total
