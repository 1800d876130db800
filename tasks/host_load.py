"""How busy this host is: processors and memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from runbook.kinds import probe


@dataclass(frozen=True)
class Load:
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
        """Of the memory, what is not to be had any more: caches of files are let go."""
        return 1 - self.available_bytes / self.memory_bytes


@probe
def read_load() -> Load:
    """Of the host that this runs on."""
    memory = psutil.virtual_memory()
    return Load(psutil.getloadavg()[2], psutil.cpu_count() or 1, memory.total, memory.available)
