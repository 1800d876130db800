"""The writing client and its ledger, through the lab's application, on its database."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from pydantic import SecretStr

from blocks.config import toml
from blocks.places import Application
from lab import lifecycle
from lab.client import Lab
from runbook.errors import OpsError
from runbook.wait import until
from tasks.drill.ledger import WriteLedger, text_of
from tasks.drill.lost_writes import find_lost_writes
from tasks.drill.writer import Writer


@pytest.fixture
def status(lab: Lab) -> dict[str, Any]:
    return lab.status()


@pytest.fixture
def described(lab: Lab) -> Application:
    return toml.environment(lab.name).application


@pytest.fixture
def ledger(tmp_path: Path) -> WriteLedger:
    return WriteLedger(tmp_path / "ledger.jsonl")


@pytest.fixture
def writer(described: Application, ledger: WriteLedger) -> Callable[..., Writer]:
    return lambda **options: Writer(described, ledger, **options)


def wait_for(ledger: WriteLedger, count: int, *kinds: str) -> None:
    """At least one of each of the kinds among them."""

    def enough() -> bool:
        found = ledger.acknowledged()
        return len(found) >= count and {attempt.kind for attempt in found} >= set(kinds)

    until(enough, what=f"{count} acknowledged writes", seconds=120)


def refused(ledger: WriteLedger) -> bool:
    return any(attempt.outcome == "refused" for attempt in ledger.attempts())


def test_everything_that_was_acknowledged_is_in_the_database(
    writer: Callable[..., Writer], ledger: WriteLedger, described: Application, status: dict[str, Any]
) -> None:
    with writer(per_second=50, every=10):
        wait_for(ledger, 30, "session", "message")
    written = ledger.acknowledged()
    assert {attempt.kind for attempt in written} == {"session", "message"}
    found = find_lost_writes(ledger, status["postgres"]["dsn"], described)
    assert (found.acknowledged, found.lost) == (len(written), ())
    assert len({attempt.id for attempt in ledger.attempts()}) == len(ledger.attempts())


class Pauses(threading.Event):
    """Takes the place of a writer's event, and notes how long it means to wait between two writes."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.asked: list[float] = []
        writer._stop = self

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout or 0)
        return super().wait(timeout)


def test_the_rate_is_kept(writer: Callable[..., Writer], ledger: WriteLedger) -> None:
    """Of what it cannot write while the machine stands still it catches up one second at most."""
    with writer(per_second=10, every=1000) as writing:
        pauses = Pauses(writing)
        wait_for(ledger, 60)
    sent = [attempt.sent for attempt in ledger.attempts()]
    assert len(sent) - 1 <= 10 * ((sent[-1] - sent[0]).total_seconds() + 1) + 1, "no faster"
    assert max(pauses.asked) < 0.1001, "no slower"


def test_a_deleted_session_and_an_altered_message_are_lost(
    writer: Callable[..., Writer], ledger: WriteLedger, described: Application, status: dict[str, Any]
) -> None:
    with writer(per_second=50, every=5):
        wait_for(ledger, 12, "session", "message")
    written = ledger.acknowledged()
    message = next(attempt for attempt in written if attempt.kind == "message")
    session = next(attempt for attempt in reversed(written) if attempt.kind == "session")
    with psycopg.connect(status["postgres"]["dsn"]) as connection:
        # As after a restore: the sequence gave the message's id out again, to somebody else's text.
        connection.execute("UPDATE interview_messages SET content = 'another' WHERE id = %s", [message.key])
        connection.execute("DELETE FROM interview_sessions WHERE id = %s", [session.key])
    found = find_lost_writes(ledger, status["postgres"]["dsn"], described)
    assert {message.id, session.id} <= {attempt.id for attempt in found.lost}
    assert found.sentence.startswith(f"{len(found.lost)} of {len(written)} acknowledged")


def test_an_unanswered_write_is_counted_apart_and_looked_up(
    ledger: WriteLedger, described: Application, status: dict[str, Any]
) -> None:
    stored, gone = ledger.intend("session"), ledger.intend("session")
    ledger.close()
    with psycopg.connect(status["postgres"]["dsn"]) as connection:
        connection.execute(
            "INSERT INTO interview_sessions (user_id, position) SELECT min(id), %s FROM users", [text_of(stored)]
        )
    found = find_lost_writes(ledger, status["postgres"]["dsn"], described)
    assert (found.acknowledged, found.lost, found.indeterminate, found.recovered) == (0, (), 2, 1)
    assert {attempt.id for attempt in ledger.attempts()} == {stored, gone}


def test_it_goes_on_when_the_backend_was_killed(
    lab: Lab, writer: Callable[..., Writer], ledger: WriteLedger, described: Application, status: dict[str, Any]
) -> None:
    supervisor = lifecycle.existing(lab.name)[0].supervisor

    def stopped() -> bool:
        supervisor.stop("grc-backend")  # which does nothing in the moment between a death and the next start
        return supervisor.services()["grc-backend"].state == "STOPPED"

    with writer(per_second=50, every=1000):
        wait_for(ledger, 5)
        os.kill(lab.status()["services"]["grc-backend"]["pid"], signal.SIGKILL)
        try:
            until(stopped, what="its end: it stays away until the writer has noticed", seconds=120)
            until(lambda: refused(ledger), what="a write that is refused", seconds=120)
        finally:
            supervisor.start("grc-backend")
        back = datetime.now(UTC)
        until(lambda: ledger.acknowledged(after=back)[5:], what="writes after the kill", seconds=120)
    assert find_lost_writes(ledger, status["postgres"]["dsn"], described).lost == ()


def test_it_logs_in_again_when_its_session_is_gone(
    writer: Callable[..., Writer], ledger: WriteLedger, status: dict[str, Any]
) -> None:
    with writer(per_second=50, every=1000), redis.Redis.from_url(status["redis"]["url"]) as client:
        wait_for(ledger, 5)
        for key in client.scan_iter("session:*"):
            if b'"username": "monitor"' in (client.get(key) or b""):
                client.delete(key)
        until(lambda: refused(ledger), what="a write that is refused", seconds=120)
        moment = datetime.now(UTC)
        until(lambda: ledger.acknowledged(after=moment)[5:], what="writes after the loss of the session", seconds=120)


def test_a_wrong_password_is_said_at_once(described: Application, ledger: WriteLedger) -> None:
    wrong = described.model_copy(update={"password": SecretStr("wr0ng-4715")})
    with pytest.raises(OpsError, match="refuses monitor: 401") as raised, Writer(wrong, ledger):
        pass
    assert "wr0ng" not in str(raised.value)
    with pytest.raises(OpsError, match=r"\[\[application.writes.steps\]\] is not configured"):
        Writer(Application(url=described.url), ledger)
    assert ledger.attempts() == []


def test_the_intent_is_on_disk_before_the_write_and_a_torn_line_tells_nothing(ledger: WriteLedger) -> None:
    first = ledger.intend("session")
    assert json.loads(ledger.path.read_text().splitlines()[0])["id"] == first
    ledger.answer(first, "acknowledged", key="7")
    ledger.close()
    with ledger.path.open("a") as file:
        file.write('{"event": "intent", "id": "to')
    assert [(attempt.id, attempt.outcome, attempt.key) for attempt in ledger.attempts()] == [
        (first, "acknowledged", "7")
    ]
