"""The write ledger of a failover: acknowledged writes, their time and server, and which of them are lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LedgerEntry:
    """One acknowledged write: its number, its time (monotonic seconds), and the server that acknowledged it."""

    number: int
    at: float
    server: str


@dataclass(frozen=True)
class AcknowledgedWrites:
    """All acknowledged writes, and the numbers of those that the live server does not have."""

    entries: tuple[LedgerEntry, ...]
    missing: frozenset[int]

    def on(self, server: str) -> list[LedgerEntry]:
        """The writes that one server acknowledged."""
        return [entry for entry in self.entries if entry.server == server]
