"""pgBackRest as a second peer (§8.2): a base backup and a restore of the same cluster, which both archive.

On PostgreSQL 17 as Debian packages it, since its pgBackRest knows no newer major version. It gets as many processes as
there are cores, and zstd.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.place import Called, call, variables, wait_quiet
from lab.progress import Tell
from runbook import shell
from runbook.units import size
from tasks.pgbackrest.command import environment_of
from tests.fixtures.postgres.clusters import NAME, Cluster, running_cluster
from tests.fixtures.postgres.templates import Template

ROUNDS = 2
PROGRAMS = Path("/usr/lib/postgresql/17/bin")
BACKUP = "flows.database.base_backup:backup_cluster"
VERIFY = "flows.database.backup:verify_backup"
STANZA = "pair"
CONFIG = """
[global]
repo1-path={root}/repository
repo1-retention-full=2
log-path={root}/pgbackrest-log
lock-path={root}/pgbackrest-lock
spool-path={root}/pgbackrest-spool
compress-type=zst
process-max={processes}
[pair]
pg1-path={data}
pg1-port={port}
pg1-user=postgres
"""
FILL = """
INSERT INTO filled (a, b, c)
SELECT encode(sha384(random()::text::bytea), 'base64'), encode(sha384(random()::text::bytea), 'base64'),
       repeat('面接の記録', 8)
FROM generate_series(1, 30000)
"""


@dataclass(frozen=True)
class Pgbackrest:
    """pgBackRest on a cluster that runs, by hand as its manual has it."""

    cluster: Cluster

    def prepare(self) -> None:
        """A repository, and every segment archived into it from now on."""
        node, root, account = self.cluster.node("postgres"), self.cluster.root, self.cluster.account
        for path in ("repository", "pgbackrest-log", "pgbackrest-lock", "pgbackrest-spool"):
            account.directory(root / path, 0o700)
        text = CONFIG.format(root=root, data=node.data, port=node.port, processes=os.cpu_count() or 2)
        self.config.write_text(text, encoding="utf-8")
        self.run("stanza-create")
        push = f"pgbackrest --config={self.config} --stanza={STANZA} archive-push %p"
        self.cluster.sql("postgres", f"ALTER SYSTEM SET archive_command = '{push}'")
        self.cluster.sql("postgres", "SELECT pg_reload_conf()")

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.cluster.root / "pgbackrest.conf"

    def run(self, command: str, *options: str) -> float:
        """One of its commands as the server's user; its seconds."""
        argv = ["pgbackrest", f"--config={self.config}", f"--stanza={STANZA}", "--log-level-console=off", command]
        account = self.cluster.account.name
        login = environment_of(self.cluster.environment.postgres)
        return shell.run([*argv, *options], environment=login, user=account, directory=Path("/")).seconds

    def restore(self) -> float:
        """The newest backup into an empty directory; its seconds."""
        target = self.cluster.root / "restored"
        self.cluster.account.directory(target, 0o700)
        try:
            return self.run("restore", f"--pg1-path={target}", "--type=none", "--archive-mode=off")
        finally:
            shutil.rmtree(target)

    def bytes(self) -> int:
        """What its newest full backup takes in the repository."""
        newest = max(path for path in (self.cluster.root / "repository/backup/pair").glob("*F") if path.is_dir())
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def figures(tell: Tell, megabytes: int) -> list[Figure]:
    """Raises OpsError where a side failed."""
    if shutil.which("pgbackrest") is None or not (PROGRAMS / "postgres").exists():
        return [
            Figure(
                "÷ pgBackRest",
                0.0,
                shown="not measured: it and PostgreSQL 17 are not installed (tests/system/install does it)",
            )
        ]
    with _cluster(megabytes) as cluster:
        peer = Pgbackrest(cluster)
        peer.prepare()
        return _measured(cluster, peer, tell)


def _measured(cluster: Cluster, peer: Pgbackrest, tell: Tell) -> list[Figure]:
    backups: list[Called] = []
    restores: list[Called] = []
    theirs, proving, restoring = list[float](), list[float](), list[float]()
    for number in range(ROUNDS):
        _settle(cluster)
        backups.append(call(BACKUP, NAME, direct=True, kind="full"))
        _settle(cluster)
        theirs.append(peer.run("backup", "--type=full", "--start-fast"))
        proving.append(peer.run("verify"))
        _settle(cluster)
        restores.append(call(VERIFY, NAME, direct=True, kind="cluster"))
        _settle(cluster)
        restoring.append(peer.restore())
        tell(
            f"pgBackRest {number + 1}: backup {theirs[-1]:.1f} s (ours {backups[-1].seconds:.1f} s), "
            f"restore {restoring[-1]:.1f} s (ours {restores[-1].step('build_instance'):.1f} s)"
        )
    newest = max((cluster.root / "backups" / "cluster").iterdir())
    mine = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    both = [one + two for one, two in zip(theirs, proving, strict=True)]
    return [
        Figure.ratio(
            "full base backup, verified: backup_cluster without shipping WAL (pgBackRest's is archived all "
            "along) ÷ pgBackRest's backup and verify",
            [one.seconds - one.step("ship_now") for one in backups],
            both,
            1.0,
        ),
        Figure.ratio(
            "… copying and verifying alone: take_base ÷ the same", [one.step("take_base") for one in backups], both
        ),
        Figure("… its size ÷ pgBackRest's", mine / peer.bytes(), shown=f"{mine / peer.bytes():.2f} ({size(mine)})"),
        Figure.ratio(
            "… restored into a directory and verified: build_instance ÷ pgBackRest's restore",
            [one.step("build_instance") for one in restores],
            restoring,
            1.0,
        ),
    ]


def _settle(cluster: Cluster) -> None:
    cluster.sql("postgres", "CHECKPOINT")
    wait_quiet()


@contextmanager
def _cluster(megabytes: int) -> Iterator[Cluster]:
    """On the disk, with that much data; registered as an environment."""
    with variables(OPS_TEST_POSTGRES=str(PROGRAMS)):
        template = Template.made()
        try:
            settings = [
                "archive_mode = on",
                "archive_command = 'false'",
                "max_wal_size = 2GB",
                "shared_buffers = 128MB",
            ]
            with running_cluster(template, settings=settings, on_disk=True) as cluster, variables(**cluster.variables):
                cluster.sql("postgres", "CREATE TABLE filled (id bigserial PRIMARY KEY, a text, b text, c text)")
                while cluster.sql("postgres", "SELECT pg_database_size('grc_db')")[0][0] < megabytes << 20:
                    cluster.sql("postgres", FILL)
                yield cluster
        finally:
            template.remove()
