"""verify_backup restores on a private server of this host: what that spares the live one, and when it does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flows.database.backup import backup_database, verify_backup
from tasks.cluster.verification_server import MARK
from tests.database.conftest import NAME, Trial, with_expectations
from tests.database.restore.test_restore import GOOD
from tests.fixtures import forked
from tests.fixtures.postgres.client_programs import leave_client_programs
from tests.fixtures.servers import PATIENT


def left(trial: Trial) -> list[Path]:
    return list(trial.server.data.parent.glob(f"*{MARK}*"))


def test_the_live_server_is_only_read(trial: Trial) -> None:
    suites = trial.reports.parent / "suites"
    suites.mkdir()
    (suites / "people.json").write_text(
        '[{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "name"}}]'
    )
    with_expectations(trial.reports.parent, suites)
    trial.sql("CREATE TABLE big AS SELECT g, repeat('x', 900) FROM generate_series(1, 20000) g")
    backup_database.fn(NAME)
    trial.server.sql("CHECKPOINT")
    before = trial.server.sql("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0]
    report = verify_backup.fn(NAME)
    written = trial.server.sql("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0] - before
    assert report.status in GOOD
    assert "a private server" in report.facts["restored on"]
    assert written < 1_000_000
    assert left(trial) == []


def test_what_a_killed_run_left_goes_with_the_next_one(trial: Trial) -> None:
    backup_database.fn(NAME)
    code = f"{PATIENT}from flows.database.backup import verify_backup; verify_backup.fn({NAME!r})"
    done = forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": "after fill_scratch"})
    assert done.returncode == -signal.SIGKILL
    [abandoned] = left(trial)
    report = verify_backup.fn(NAME)
    assert report.status in GOOD
    assert not abandoned.exists()
    assert left(trial) == []


ONLY_LIVE = """
CREATE FUNCTION only_live() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    IF current_setting('wal_level') = 'minimal' THEN RAISE 'not here'; END IF; RETURN 1; END $$;
CREATE MATERIALIZED VIEW lives AS SELECT public.only_live();
CREATE TABLE large AS SELECT g FROM generate_series(1, 5000) g;
"""


@pytest.mark.parametrize("why", ["initdb is not there", "not here"])
def test_where_this_host_cannot_it_is_restored_on_the_live_server(trial: Trial, tmp_path: Path, why: str) -> None:
    """Without the server's programs, and a backup that restores on the live server only: no false alarm. What was
    unpacked for the private server serves the live one."""
    if why == "not here":
        trial.sql(ONLY_LIVE)
    backup_database.fn(NAME)
    if why == "initdb is not there":
        leave_client_programs(tmp_path / "trial.toml", trial.server.programs, tmp_path / "bin")
    report = verify_backup.fn(NAME)
    assert report.status in GOOD
    assert why in report.facts["restored on"]
    assert trial.databases().count(trial.database) == 1
    assert not [name for name in trial.databases() if name.endswith("__verify")]
    assert left(trial) == []
