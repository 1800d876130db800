"""What is committed in a lab, and until it is in its archives: the archiver ships it within seconds."""

from __future__ import annotations

from typing import get_args

import psycopg

from blocks.environment import Environment, Stores
from lab import lifecycle
from lab.client import Lab
from runbook.wait import until
from tasks.wal.archive import timeline_in
from tasks.wal.continuity import chain_from
from tasks.wal.destinations import archive_of
from tasks.wal.names import lsn_of

SECONDS = 600  # the archiver is nice


def commit(lab: Lab, *texts: str) -> int:
    """Rows committed in the lab's table `shipped`; the LSN behind them."""
    with psycopg.connect(lab.status()["postgres"]["admin_dsn"], dbname="grc_db", autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS shipped (what text, at timestamptz DEFAULT clock_timestamp())")
        for text in texts:
            connection.execute("INSERT INTO shipped VALUES (%s)", [text])
        row = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    assert row
    return lsn_of(str(row[0]))


def forget(lab: Lab) -> None:
    """The table goes."""
    with psycopg.connect(lab.status()["postgres"]["admin_dsn"], dbname="grc_db", autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS shipped")


def wait_shipped(lab: Lab, lsn: int) -> None:
    """Until both archives of the lab go on up to an LSN."""
    env, system = Environment.find(lab.name), lifecycle.existing(lab.name)[0].nodes[0].system
    for which in get_args(Stores):
        until(
            lambda which=which: _reached(env, which, system, lsn),  # type: ignore[misc]
            what=f"the WAL in [{which}]",
            seconds=SECONDS,
        )


def _reached(env: Environment, which: Stores, system: int, lsn: int) -> bool:
    archive = archive_of(env, which, system)
    listing = archive.listing()
    if not (listing.segments or listing.partials):
        return False
    return chain_from(listing, timeline_in(archive, listing), lsn).end >= lsn
