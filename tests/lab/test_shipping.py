"""The lab's WAL is in both archives within seconds, whoever dies."""

from __future__ import annotations

import os
import signal
from typing import get_args

import psutil
import psycopg

from blocks.environment import Environment, Stores
from lab import lifecycle
from lab.client import Lab
from lab.shipping import ARCHIVER_PROGRAM
from runbook.wait import until
from tasks.wal.archive import timeline_in
from tasks.wal.continuity import chain_from
from tasks.wal.destinations import archive_of
from tasks.wal.names import lsn_of

SHIPPED_SECONDS = 40


def commit(lab: Lab) -> int:
    """Something committed in the lab; the LSN behind it."""
    with psycopg.connect(lab.status()["postgres"]["admin_dsn"], dbname="grc_db", autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS shipped (at timestamptz DEFAULT clock_timestamp())")
        connection.execute("INSERT INTO shipped DEFAULT VALUES")
        row = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    assert row
    return lsn_of(str(row[0]))


def reached(env: Environment, which: Stores, system: int, lsn: int) -> bool:
    """Whether an archive goes on from some way before an LSN up to it."""
    archive = archive_of(env, which, system)
    listing = archive.listing()
    if not (listing.segments or listing.partials):
        return False
    return chain_from(listing, timeline_in(archive, listing), lsn).end >= lsn


def wait_shipped(lab: Lab, lsn: int) -> None:
    env, system = Environment.find(lab.name), lifecycle.existing(lab.name)[0].nodes[0].system
    for which in get_args(Stores):
        until(
            lambda which=which: reached(env, which, system, lsn),  # type: ignore[misc]
            what=f"the WAL in [{which}]",
            seconds=SHIPPED_SECONDS,
        )


def test_wal_is_in_both_archives_and_goes_on_when_the_archiver_was_killed(lab: Lab) -> None:
    before = lab.status()["services"][ARCHIVER_PROGRAM]
    assert before["running"], "the lab brings it up"
    wait_shipped(lab, commit(lab))
    os.kill(before["pid"], signal.SIGKILL)
    lsn = commit(lab)
    until(
        lambda: lab.status()["services"][ARCHIVER_PROGRAM]["pid"] not in (None, before["pid"]),
        what="its restart",
        seconds=30,
    )
    wait_shipped(lab, lsn)
    (log,) = [path for path in lab.logs() if path.stem == ARCHIVER_PROGRAM]
    assert "shipping " in log.read_text()
    assert " to backups, copies" in log.read_text()


def test_it_needs_no_prefect_server_and_its_argv_has_no_secret(lab: Lab) -> None:
    process = psutil.Process(lab.status()["services"][ARCHIVER_PROGRAM]["pid"])
    assert "PREFECT_API_URL" not in process.environ()
    secrets = [value for name, value in lab.environ().items() if name.endswith("_PASSWORD")]
    assert not [word for word in process.cmdline() if any(secret in word for secret in secrets)]
