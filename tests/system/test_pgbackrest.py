"""Base backups and points in time by pgBackRest: Debian's package, on a real cluster of a version that it knows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.database.backup import verify_backup
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.recovery.point.restore import restore_to_point
from runbook.errors import OpsError
from runbook.report import Status
from tasks.pgbackrest.command import call
from tests.fixtures.bits import flip
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster
from tests.fixtures.reports import values as findings
from tests.matrix.versions import VARIABLE
from tests.recovery.point.test_point_in_time import bug, transaction

pytestmark = pytest.mark.system
DEBIAN = "/usr/lib/postgresql/17/bin"
STANZA = "pair"
CONFIG = """
[global]
repo1-path={root}/repository
repo1-retention-full=2
log-path={root}/pgbackrest-log
lock-path={root}/pgbackrest-lock
spool-path={root}/pgbackrest-spool
[pair]
pg1-path={data}
pg1-port={port}
pg1-user=postgres
"""
WAL = """
method = "archive_command"
tool = "pgbackrest"
stanza = "pair"
config = "{config}"
"""


@pytest.fixture(scope="module")
def cluster_template() -> Iterator[Template]:
    """Clusters of Debian's PostgreSQL: pgBackRest comes from there, and knows that one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, DEBIAN)
        template = Template.made()
        yield template
        template.remove()


@pytest.fixture
def resting(cluster_template: Template, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that archives by pgBackRest, and the environment that says so."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    settings = ["synchronous_standby_names = ''", "archive_mode = on", "archive_command = 'false'"]
    with running_cluster(cluster_template, settings=settings) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        node, config = cluster.node("postgres"), cluster.root / "pgbackrest.conf"
        for path in ("repository", "pgbackrest-log", "pgbackrest-lock", "pgbackrest-spool"):
            cluster.account.directory(cluster.root / path, 0o700)
        config.write_text(CONFIG.format(root=cluster.root, data=node.data, port=node.port))
        file = cluster.root / "pair.toml"
        file.write_text(file.read_text().replace("[wal]\n", "[wal]" + WAL.format(config=config)))
        pgbackrest(cluster, "stanza-create")
        push = f"pgbackrest --config={config} --stanza={STANZA} archive-push %p"
        cluster.sql("postgres", f"ALTER SYSTEM SET archive_command = '{push}'")
        cluster.sql("postgres", "SELECT pg_reload_conf()")
        yield cluster


def pgbackrest(cluster: Cluster, command: str, *options: str) -> None:
    """One of its commands, by hand."""
    env = cluster.environment
    call(env.wal, env.postgres, command, *options)


def filled(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
    cluster.sql("postgres", "INSERT INTO accounts SELECT g, g FROM generate_series(1, 100) g")


def segments(cluster: Cluster) -> list[Path]:
    """What pgBackRest has archived, oldest first."""
    found = (cluster.root / "repository" / "archive").rglob("*-*.gz")
    return sorted((path for path in found if len(path.name.partition("-")[0]) == 24), key=lambda path: path.name)


def test_a_bug_is_undone_from_an_incremental_backup_and_the_archive_goes_on(resting: Cluster) -> None:
    filled(resting)
    backup_cluster.fn(NAME)
    resting.sql("postgres", "INSERT INTO accounts VALUES (101, 101)")
    report = backup_cluster.fn(NAME, kind="incremental")
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert "I" in report.facts["pgBackRest"]
    proven = verify_backup.fn(NAME, kind="cluster")
    assert proven.facts["backup"].startswith(report.facts["backup"])
    before = transaction(resting, "INSERT INTO accounts VALUES (102, 102)")
    xid = bug(resting)
    done = restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    assert f"last transaction before the target ({before})" in findings(done)
    assert resting.sql("postgres", "SELECT count(*), sum(balance) FROM accounts") == [(102, 5050 + 101 + 102)]
    resting.sql("postgres", "INSERT INTO accounts VALUES (103, 103)")
    backup_cluster.fn(NAME)
    assert any(path.name.startswith("00000002") for path in segments(resting))


def test_a_damaged_segment_is_refused_with_the_point_that_can_be_reached(resting: Cluster) -> None:
    filled(resting)
    backup_cluster.fn(NAME)
    first = transaction(resting, "INSERT INTO accounts VALUES (101, 101)")
    resting.sql("postgres", "SELECT pg_switch_wal()")
    xid = bug(resting)
    damaged = resting.sql("postgres", "SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0]
    resting.sql("postgres", "SELECT pg_switch_wal()")
    pgbackrest(resting, "check")
    flip(next(path for path in segments(resting) if path.name.startswith(damaged)))
    with pytest.raises(OpsError) as caught:
        restore_to_point.fn(NAME, by="before_transaction", target=str(xid), confirm=NAME)
    assert "SHA-1" in str(caught.value)
    assert resting.sql("postgres", "SELECT sum(balance) FROM accounts") == [(0,)], f"untouched since {first}"


def test_a_damaged_backup_is_found_by_verify_and_by_a_restore(resting: Cluster) -> None:
    filled(resting)
    name = backup_cluster.fn(NAME).facts["backup"]
    files = (resting.root / "repository" / "backup").rglob("*.gz")
    flip(max((path for path in files if "pg_data/base" in str(path)), key=lambda path: path.stat().st_size))
    with pytest.raises(OpsError, match="cannot be restored"):
        verify_backup.fn(NAME, kind="cluster")
    xid = bug(resting)
    with pytest.raises(OpsError):
        restore_to_point.fn(NAME, by="before_transaction", target=str(xid), backup=name, confirm=NAME)
    assert resting.sql("postgres", "SELECT sum(balance) FROM accounts") == [(0,)]


def test_a_backup_that_pgbackrest_has_expired_is_told(resting: Cluster) -> None:
    filled(resting)
    backup_cluster.fn(NAME)
    shutil.rmtree(resting.root / "repository" / "backup" / STANZA)
    shutil.rmtree(resting.root / "repository" / "archive" / STANZA)
    pgbackrest(resting, "stanza-create")
    with pytest.raises(OpsError, match="has no backup .* any more"):
        restore_to_point.fn(NAME, by="latest", confirm=NAME)


def test_what_pgbackrest_keeps_is_not_called_replicated(resting: Cluster) -> None:
    filled(resting)
    name = backup_cluster.fn(NAME).facts["backup"]
    file = resting.root / "pair.toml"
    stores = "".join(
        f'{kind} = "{resting.root}/copies/{kind}"\n' for kind in ("postgres", "redis", "files", "cluster", "wal")
    )
    file.write_text(file.read_text() + f'[copies]\n{stores}spool = "{resting.root}/spool"\n')
    replicate_backups.fn(NAME, kind="cluster")
    assert not (resting.root / "copies" / "cluster" / name).exists()
