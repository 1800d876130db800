"""The identity of a process, by which another process can judge safely whether it is dead.

A host name and a process id are not enough: a container on the host's network and a cloned machine share both with
other processes, and a start time in seconds moves when the clock is set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNKNOWN = "unknown"
_TEXT = re.compile(r"([0-9a-f]{16}|unknown)-(\d+)-(\d+)-([0-9a-f]{16})")
ABANDONED_SECONDS = 2 * 86400.0


@dataclass(frozen=True)
class Process:
    """`place` is a hash of the boot id and of the namespaces that process ids and start times belong to; `ticks` is the
    start time in clock ticks since boot (field 22 of /proc/PID/stat), which no change of the clock moves; `token` is
    random. Source: proc_pid_stat(5), pid_namespaces(7), time_namespaces(7)."""

    place: str
    pid: int
    ticks: int
    token: str

    @property
    def text(self) -> str:
        """One word, also for file names; `parse` reads it."""
        return f"{self.place}-{self.pid}-{self.ticks}-{self.token}"

    @property
    def is_judgeable(self) -> bool:
        """Whether this process sees the other one under the same process id and measures time in the same way."""
        return self.place == _place() != _UNKNOWN

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that runs this code."""
        return self == this_process()

    def is_dead(self) -> bool:
        """True only where that is certain; False also where it cannot be judged. A zombie is dead."""
        if not self.is_judgeable or self.is_this_process:
            return False
        try:
            os.kill(self.pid, 0)  # /proc alone is not enough: hidepid= hides other users' processes there
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        found = _state_and_ticks(self.pid)
        return found is not None and (found[0] in "ZX" or found[1] != self.ticks)

    def send(self, number: signal.Signals) -> None:
        """Signal exactly this process, never another one that has got its process id since.

        Raises:
            ProcessLookupError: it is dead, or cannot be judged.
            PermissionError: it belongs to another user.
        """
        descriptor = os.pidfd_open(self.pid)
        try:
            found = _state_and_ticks(self.pid)
            if not self.is_judgeable or found is None or found[1] != self.ticks:
                raise ProcessLookupError(self.text)
            signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def parse(text: str) -> Process | None:
    """What `Process.text` wrote; None where it is something else."""
    found = _TEXT.fullmatch(text)
    return Process(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def this_process() -> Process:
    """The process that runs this code; a forked child is another."""
    return _identity(os.getpid())


@functools.cache
def _identity(pid: int) -> Process:
    found = _state_and_ticks(pid) if _place() != _UNKNOWN else None
    return Process(_place(), pid, found[1] if found else 0, secrets.token_hex(8))


def _place() -> str:
    """Where process ids and start times mean the same; `unknown` where /proc shows another namespace's processes."""
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return _UNKNOWN
        parts = [_BOOT_ID.read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return _UNKNOWN
    with contextlib.suppress(OSError):  # older kernels have no time namespaces
        parts.append(str(Path("/proc/self/ns/time").readlink()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _state_and_ticks(pid: int) -> tuple[str, int] | None:
    """Fields 3 and 22; None where they cannot be read. The name before them may have spaces and parentheses."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def is_abandoned(owner: str, path: Path) -> bool:
    """Whether what a process left may be removed: the owner (`Process.text`) is dead. Where that cannot be judged
    (another host, a container, the boot before this one), nothing in `path` changed for two days.

    Raises:
        OSError: it cannot be read.
    """
    process = parse(owner)
    if process and process.is_judgeable:
        return process.is_dead()
    newest: float = max(one.lstat().st_mtime for one in (path, *(path.rglob("*") if path.is_dir() else ())))
    return time.time() - newest > ABANDONED_SECONDS
