"""The clients of a drill: one through the application, one to the database itself; their ledgers on this host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.places import Application
from runbook.errors import Unreachable
from runbook.wait import until
from tasks.drill.direct import DirectWriter, Servers
from tasks.drill.ledger import Attempt, Ledger
from tasks.drill.writer import Writer

WRITES_SECONDS = 120.0


@dataclass(frozen=True)
class Clients:
    """Their ledgers."""

    application: Ledger
    direct: Ledger

    @classmethod
    def at(cls, directory: Path, prefix: str) -> Clients:
        """Ledgers in a directory; `prefix` tells this drill's rows from those of others."""
        return cls(
            Ledger(directory / "application.jsonl", f"{prefix}a-"), Ledger(directory / "direct.jsonl", f"{prefix}d-")
        )

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """For people."""
        return {"through the application": self.application, "to the database": self.direct}

    def wait(self, more: int) -> None:
        """Until both have so many more acknowledged writes.

        Raises:
            Unreachable: they do not get them.
        """
        for name, ledger in self.ledgers.items():
            wanted = len(ledger.acknowledged()) + more
            until(
                lambda ledger=ledger, wanted=wanted: len(ledger.acknowledged()) >= wanted,  # type: ignore[misc]
                what=f"{more} acknowledged writes {name}",
                seconds=WRITES_SECONDS,
            )


def first_good(attempts: list[Attempt], after: datetime, until_at: datetime) -> datetime | None:
    """When users were served again: of the writes that were sent after a moment, the first that was acknowledged behind
    the last that was not (of those sent until `until_at`). None: not yet."""
    since = [attempt for attempt in attempts if attempt.sent > after]
    bad = [index for index, one in enumerate(since) if one.outcome != "acknowledged" and one.sent <= until_at]
    good = (one.answered for one in since[bad[-1] + 1 if bad else 0 :] if one.outcome == "acknowledged")
    return next(good, None)


@contextlib.contextmanager
def writing(
    clients: Clients, application: Application, url: str | Callable[[], str], servers: Servers, database: str
) -> Iterator[Clients]:
    """Both write while the block runs, whatever happens to what they write to.

    Raises:
        OpsError: the application lets nobody in at first.
    """
    with Writer(application, clients.application, url=url), DirectWriter(servers, database, clients.direct):
        yield clients


def served(clients: Clients, struck: datetime, recovered: datetime, seconds: float) -> datetime | None:
    """When users were served again after a fault that was recovered from; waits for it. None: not within `seconds`."""
    ledger = clients.application
    with contextlib.suppress(Unreachable):
        until(
            lambda: any(one.sent > recovered for one in ledger.acknowledged(after=recovered)),
            what="a good request",
            seconds=seconds,
        )
    return first_good(ledger.attempts(), struck, recovered)
