"""A database that subscribes to another: its copies must not touch the publisher."""

from __future__ import annotations

from psycopg.conninfo import make_conninfo
from psycopg.sql import Literal

from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from runbook.report import Status
from tests.database.conftest import NAME, Trial
from tests.fixtures.servers import ADMIN_PASSWORD

STATE = "SELECT subenabled, subslotname FROM pg_subscription s JOIN pg_database d ON d.oid = subdbid WHERE datname = %s"


def test_copies_of_a_subscriber_own_no_slot_are_disabled_and_can_be_dropped(trial: Trial) -> None:
    server, publisher, into = trial.server, f"{trial.database}_pub", f"{trial.database}_x"
    slot = f"s_{trial.database}"
    server.create_database(publisher)
    server.sql("CREATE TABLE t (x int); CREATE PUBLICATION p FOR TABLE t", database=publisher)
    server.sql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')", database=publisher)
    login = make_conninfo(
        host="127.0.0.1", port=server.port, user="postgres", dbname=publisher, password=ADMIN_PASSWORD
    )
    trial.sql("CREATE TABLE t (x int)")
    trial.sql(
        f"CREATE SUBSCRIPTION s CONNECTION {Literal(login).as_string()} PUBLICATION p "
        f"WITH (create_slot = false, enabled = false, slot_name = '{slot}')"
    )
    trial.sql("CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'none'; END $$")
    trial.sql("CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()")
    try:
        backup_database.fn(NAME)
        for _ in range(2):
            assert verify_backup.fn(NAME).status is not Status.CRITICAL
        assert not [name for name in trial.databases() if name.endswith("__verify")]
        restore_database.fn(NAME, into=into, confirm=NAME)
        assert trial.sql(STATE, into) == [(False, None)]
        assert trial.sql(STATE, trial.database) == [(False, slot)], "the live one is as it was"
        trial.sql("DROP EVENT TRIGGER refuse", database=into)
        trial.sql("DROP SUBSCRIPTION s", database=into)
        assert server.sql("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", slot) == [(1,)]
    finally:
        trial.sql("DROP EVENT TRIGGER refuse")
        trial.sql("ALTER SUBSCRIPTION s SET (slot_name = NONE)")
        trial.sql("DROP SUBSCRIPTION s")
        server.sql("SELECT pg_drop_replication_slot(%s)", slot)
