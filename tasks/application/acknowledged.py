"""Writes of our own through a failover that a server has acknowledged: which, when, by whom, and which are gone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One acknowledged write: its number, when (monotonic seconds), and the server that acknowledged it."""

    number: int
    at: float
    server: str


@dataclass(frozen=True)
class Account:
    """All acknowledged writes of a ledger, and those of them that are not on the server that is live now."""

    entries: tuple[Entry, ...]
    missing: frozenset[int]

    def on(self, server: str) -> list[Entry]:
        """Those that one server acknowledged."""
        return [entry for entry in self.entries if entry.server == server]
