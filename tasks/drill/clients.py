"""A drill's two clients: one writes through the application, one to the database. Their ledgers are on this host."""

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
from tasks.drill.ledger import WriteAttempt, WriteLedger
from tasks.drill.writer import Writer

WRITES_SECONDS = 120.0


@dataclass(frozen=True)
class DrillClients:
    """Their ledgers."""

    application: WriteLedger
    direct: WriteLedger

    @classmethod
    def at(cls, directory: Path, prefix: str) -> DrillClients:
        """Ledgers in a directory; `prefix` marks this drill's rows."""
        return cls(
            WriteLedger(directory / "application.jsonl", f"{prefix}a-"),
            WriteLedger(directory / "direct.jsonl", f"{prefix}d-"),
        )

    @property
    def ledgers(self) -> dict[str, WriteLedger]:
        """By their names in the report."""
        return {"through the application": self.application, "to the database": self.direct}

    def wait(self, more: int) -> None:
        """Wait for so many more acknowledged writes of each client.

        Raises:
            Unreachable: a client did not get them in time.
        """
        for name, ledger in self.ledgers.items():
            wanted = len(ledger.acknowledged()) + more
            until(
                lambda ledger=ledger, wanted=wanted: len(ledger.acknowledged()) >= wanted,  # type: ignore[misc]
                what=f"{more} acknowledged writes {name}",
                seconds=WRITES_SECONDS,
            )


def first_success(attempts: list[WriteAttempt], after: datetime, until_at: datetime) -> datetime | None:
    """When users were served again: the first acknowledged write after the last failed one. Only writes sent after
    `after` count, failed ones only until `until_at`. None: not yet."""
    since = [attempt for attempt in attempts if attempt.sent > after]
    failed = [index for index, one in enumerate(since) if one.outcome != "acknowledged" and one.sent <= until_at]
    succeeded = (one.answered for one in since[failed[-1] + 1 if failed else 0 :] if one.outcome == "acknowledged")
    return next(succeeded, None)


@contextlib.contextmanager
def writing(
    clients: DrillClients, application: Application, url: str | Callable[[], str], servers: Servers, database: str
) -> Iterator[DrillClients]:
    """Both clients write while the block runs, also while the system is down.

    Raises:
        OpsError: the application refuses the first log-in.
    """
    with Writer(application, clients.application, url=url), DirectWriter(servers, database, clients.direct):
        yield clients


def served(clients: DrillClients, struck: datetime, recovered: datetime, seconds: float) -> datetime | None:
    """Wait until users are served again after the recovery; returns when that was. None: not within `seconds`."""
    ledger = clients.application
    with contextlib.suppress(Unreachable):
        until(
            lambda: any(one.sent > recovered for one in ledger.acknowledged(after=recovered)),
            what="a successful request",
            seconds=seconds,
        )
    return first_success(ledger.attempts(), struck, recovered)
