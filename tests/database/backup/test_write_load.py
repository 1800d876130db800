"""False alarms count too: backups taken while clients write, each restored and found equal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from flows.database.backup import backup_database
from flows.database.restore import restore_database
from flows.database.superseded import discard_superseded
from runbook.report import Status
from runbook.wait import until
from tasks.postgres.restore.staged_copy import content_in
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial

WRITES = (
    "INSERT INTO people (name, mood, share, tags) VALUES ('負荷', 'ok', random() * 99, ARRAY[random()::text])",
    "UPDATE people SET mood = (ARRAY['sad', 'ok', 'happy'])[1 + floor(random() * 3)::int]::mood, half = random()"
    " WHERE id = (SELECT id FROM people ORDER BY random() LIMIT 1)",
    "INSERT INTO by_mood SELECT (ARRAY['sad', 'ok', 'happy'])[1 + floor(random() * 3)::int]::mood, 1",
    "INSERT INTO answers SELECT id, now() - random() * interval '300 days', 'x' FROM people LIMIT 1",
    "DELETE FROM by_mood WHERE ctid = (SELECT min(ctid) FROM by_mood_0)",
    "SELECT nextval('\"Ticket Numbers\"')",
    'INSERT INTO "Über tisch; DROP" ("SELECT") VALUES (repeat(\'長\', 3000))',
)
RARE = ("TRUNCATE by_mood", "REFRESH MATERIALIZED VIEW moods", "VACUUM people", "TRUNCATE answers_rest")


@pytest.fixture
def load(trial: Trial) -> Iterator[list[int]]:
    """Three clients that write all the time and reconnect when a swap ends their sessions; counts their writes.

    Who truncates a table waits for a dump that has begun, or that tries to: it leaves the next one twice that time.
    """
    stop, done = threading.Event(), [0]

    def write(statements: tuple[str, ...], pause: float, patience: float) -> None:
        took = 0.0
        while not stop.is_set():
            try:
                with psycopg.connect(
                    host="127.0.0.1",
                    port=trial.server.port,
                    dbname=trial.database,
                    user="grc_user",
                    password=os.environ["TRIAL_PASSWORD"],
                    autocommit=True,
                ) as connection:
                    while not stop.wait(max(pause, patience * took)):
                        began = time.monotonic()
                        for statement in statements:
                            connection.execute(statement.encode())
                            done[0] += 1
                        took = time.monotonic() - began
            except psycopg.OperationalError:
                stop.wait(0.02)

    trial.sql("ALTER TABLE people FORCE ROW LEVEL SECURITY; CREATE POLICY all_of_them ON people USING (true)")
    threads = [
        threading.Thread(target=write, args=arguments, daemon=True)
        for arguments in ((WRITES, 0.002, 0.0), (WRITES, 0.002, 0.0), (RARE, 0.5, 2.0))
    ]
    for thread in threads:
        thread.start()
    until(lambda: done[0] > 50, what="clients at work", seconds=120)
    yield done
    stop.set()
    for thread in threads:
        thread.join(120)


def rounds(trial: Trial, load: list[int], number: int) -> None:
    for _ in range(number):
        before = load[0]
        backup_database.fn(NAME)
        assert load[0] > before, "nobody wrote during the backup"
        report = restore_database.fn(NAME, confirm=NAME)  # raises RunbookFailed where the copy is found to differ
        assert report.status in (Status.OK, Status.WARN)
        assert content_in(newest(trial)).tables["public.people"].rows >= 2000
    discard_superseded.fn(NAME, keep=0, confirm=NAME)


def test_no_false_alarm_under_write_load(trial: Trial, load: list[int]) -> None:
    rounds(trial, load, 4)


@pytest.mark.soak
def test_no_false_alarm_in_twenty_rounds(trial: Trial, load: list[int]) -> None:
    rounds(trial, load, 20)
