"""Whether the machine is quiet: its load, and a loop of fixed work, on one core and on all, before and after the
measurements. A ratio from a busy machine says little; the table states which one it was."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

BLOCK = bytes(8 << 20)
BLOCKS = 24
ROUNDS = 3
LOAD, SPREAD, SLOWER = 0.5, 0.1, 1.25


@dataclass(frozen=True)
class Calibration:
    """The load of the minute before (None: not judged), and seconds of the same work: alone, three times, and on each
    core at once."""

    load: float | None
    alone: tuple[float, ...]
    together: float

    @property
    def disturbances(self) -> list[str]:
        """What shows that something else runs here."""
        found = []
        if self.load is not None and self.load > LOAD:
            found.append(f"the load of the minute before is {self.load:.1f}")
        if max(self.alone) > (1 + SPREAD) * min(self.alone):
            found.append(f"the same work takes {min(self.alone):.2f} to {max(self.alone):.2f} s")
        if self.together > SLOWER * statistics.median(self.alone):
            found.append(f"on {os.cpu_count()} cores at once it takes {self.together:.2f} s")
        return found

    def __str__(self) -> str:
        found = self.disturbances
        work = f"calibration loop {statistics.median(self.alone):.2f} s, on all cores at once {self.together:.2f} s"
        load = "" if self.load is None else f"load {self.load:.1f}, "
        return f"{os.cpu_count()} cores, {load}{work}: " + (f"NOT QUIET ({'; '.join(found)})" if found else "quiet")


def calibrate(*, judges_load: bool = True) -> Calibration:
    """Measure now; it takes about a second. Hashing releases the interpreter's lock, so threads use all cores. The load
    after the measurements is their own: then it is not judged."""
    load, cores = os.getloadavg()[0] if judges_load else None, os.cpu_count() or 1
    alone = tuple(_work() for _ in range(ROUNDS))
    with ThreadPoolExecutor(cores) as pool:
        together = max(pool.map(lambda _: _work(), range(cores)))
    return Calibration(load, alone, together)


def _work() -> float:
    started, digest = time.monotonic(), hashlib.sha256()
    for _ in range(BLOCKS):
        digest.update(BLOCK)
    return time.monotonic() - started
