"""A client's ledger: what it sent, in which order, and what the server acknowledged. It never asks the product.

Every write is one transaction: a versioned value per key, deletes too, and a row in `attempts` with the write's unique
id. The intent is noted before the write is sent, the acknowledgement after the answer. A write whose answer did not
arrive is indeterminate: it may be there or not.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

Outcome = Literal["sent", "acknowledged", "refused", "indeterminate"]
KEYS, PROBE = 60, 2_000_000
"""Those of the clients; and the key of a write that only shows that a commit returns."""
Rows = Mapping[int, int]
"""The attempt that wrote each key's value last."""


@dataclass
class Write:
    """One attempt. `value`: None deletes the key; an accident has no key and empties the table. `error`: the server's
    answer to a refused one."""

    attempt: int
    key: int | None
    deletes: bool
    sent: float = field(default_factory=time.time)
    outcome: Outcome = "sent"
    answered: float = 0.0
    error: str = ""

    @property
    def is_accident(self) -> bool:
        """Whether it emptied the whole table, without a row in `attempts`."""
        return self.key is None

    @property
    def is_acknowledged(self) -> bool:
        """Whether the client was told that it is there for good."""
        return self.outcome == "acknowledged" and not self.is_accident


@dataclass(frozen=True)
class Content:
    """What a part holds, read from outside. `attempts`: None where the part has no list of attempts (Redis)."""

    rows: Rows
    attempts: frozenset[int] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted rows."""
        return digest(self.rows)


class Store(Protocol):
    """Where a ledger's writes go."""

    name: str

    def send(self, write: Write) -> Outcome:
        """Carry out a write; what the client was told."""

    def read(self) -> Content | None:
        """Everything that is there now; None where the part is missing or does not answer."""


@dataclass
class Ledger:
    """The writes of one part, in order, on the branch of its history that is in use. `deletes`: how many of them;
    `known`: those of every branch."""

    store: Store
    writes: list[Write] = field(default_factory=list)
    known: dict[int, Write] = field(default_factory=dict)
    next_attempt: int = 1
    deletes: float = 0.15
    lock: threading.Lock = field(default_factory=threading.Lock)
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The part's name, as reports have it."""
        return self.store.name

    def note(self, key: int | None, *, deletes: bool = False) -> Write:
        """Note an intent."""
        with self.lock:
            write = Write(self.next_attempt, key, deletes)
            self.next_attempt += 1
            self.writes.append(write)
            self.known[write.attempt] = write
        return write

    def write(self, chance: random.Random) -> Outcome:
        """Send one write, and note its outcome."""
        write = self.note(chance.randrange(KEYS), deletes=chance.random() < self.deletes)
        write.outcome = self.store.send(write)
        write.answered = time.time()
        if write.outcome == "refused":
            with self.lock:
                self.writes.remove(write)
                self.refused[write.attempt] = write.error
        return write.outcome

    def copy(self) -> list[Write]:
        """The branch as it is now."""
        with self.lock:
            return [replace(write) for write in self.writes]

    def restart(self, writes: Sequence[Write]) -> None:
        """Go on from another branch: new attempts have new ids all the same."""
        with self.lock:
            self.writes = [replace(write) for write in writes]


def expected(writes: Sequence[Write], present: Collection[int]) -> dict[int, int]:
    """The rows after those of the writes that are present, in their order."""
    rows = dict[int, int]()
    for write in writes:
        if write.is_accident:
            if write.attempt in present:
                rows.clear()
        elif write.attempt in present:
            assert write.key is not None
            if write.deletes:
                rows.pop(write.key, None)
            else:
                rows[write.key] = write.attempt
    return rows


def digest(rows: Rows) -> str:
    """SHA-256 over sorted rows."""
    return hashlib.sha256(repr(sorted(rows.items())).encode()).hexdigest()
