"""Filling an empty database from a dump, in sessions that are set for speed. What it is filled from may be one of our
backups or a file that somebody else's pg_dump left."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import psycopg
from psycopg import sql

from blocks.postgres import Postgres, execute, first_line
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, VerificationFailed
from runbook.progress import Done, progress
from runbook.render import size
from tasks.postgres.checks import unchecked
from tasks.postgres.dump import DUMP, carries_statistics
from tasks.postgres.plain import COMPRESSED, PLAIN, run_plain
from tasks.postgres.quiet import copy_options
from tasks.postgres.refusal import blames_server, does_not_restore
from tasks.postgres.upkeep import NO_TIMEOUTS, set_known

Form = Literal["directory", "custom", "plain"]
MOST_MAINTENANCE_MB = 512
HINT = f"nothing was replaced; {OTHER_BACKUPS}"
FOREIGN_HINT = "nothing was replaced; the dump itself is at fault: take another, or one of our backups"
# Rows that these would check or read are not in a backup of chosen tables.
NEED_OTHER_ROWS = (" FK CONSTRAINT ", " MATERIALIZED VIEW DATA ")


@dataclass(frozen=True)
class Source:
    """A dump: where, in which form, and how large its database was (0: nobody knows). `parts`: rows are missing;
    `foreign`: none of our backups; `without`: how the lines of its list end that are not restored. `remote`:
    materialised views that read foreign tables; they are filled last, and may stay empty. `unchecked`: tables
    whose CHECK constraints are not checked again. `relations`: so many tables and sequences it makes, where known."""

    path: Path
    form: Form
    database_bytes: int = 0
    parts: bool = False
    foreign: bool = False
    without: tuple[str, ...] = ()
    remote: tuple[tuple[str, str], ...] = ()
    unchecked: frozenset[tuple[str, str]] = frozenset()
    relations: int = 0

    @property
    def hint(self) -> str:
        """What to do where it does not restore."""
        return FOREIGN_HINT if self.foreign else HINT


def source_in(directory: Path, database_bytes: int, *, parts: bool) -> Source:
    """The dump in a backup's directory."""
    for name in (PLAIN, COMPRESSED):
        if (directory / name).exists():
            return Source(directory / name, "plain", database_bytes)
    return Source(directory / DUMP, "directory", database_bytes, parts)


def fill(postgres: Postgres, source: Source, database: str, oid: int, jobs: int) -> float:
    """Restore into an empty database, stopping at the first error; returns the seconds.

    Raises:
        CommandFailed, OpsError: the server, the network or this host is at fault.
        VerificationFailed: the dump is: it was cut off or altered, or the server refuses what is in it.
    """
    memory = min(MOST_MAINTENANCE_MB, psutil.virtual_memory().available // (4 * jobs) >> 20)
    settings = {
        "maintenance_work_mem": f"{max(memory, 64)}MB",
        "synchronous_commit": "off",
        "max_parallel_maintenance_workers": "0",  # the jobs fill the processors already
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "lc_messages": "C",  # `blames_server` reads them
    }

    def tell() -> Done:
        with postgres.connect() as connection:
            now = int(execute(connection, "SELECT pg_database_size(%s::oid)", oid)[0][0])
        whole = f" of about {size(source.database_bytes)}" if source.database_bytes else ""
        return Done(f"{database}: {size(now)}{whole} restored", now / max(source.database_bytes, now, 1))

    with progress(tell):
        if source.form == "plain":
            return run_plain(postgres, source.path, database, settings, source.hint, source.relations)
        return _pg_restore(postgres, source, database, jobs, settings)


def _pg_restore(postgres: Postgres, source: Source, database: str, jobs: int, settings: dict[str, str]) -> float:
    options = [copy_options(postgres), *(f"-c {name}={value}" for name, value in settings.items())]
    environment = {**postgres.environment(), "PGOPTIONS": " ".join(options)}
    argv = [
        *(postgres.program("pg_restore"), f"--format={source.form}", f"--jobs={jobs}"),
        *("--exit-on-error", "--no-password"),
        # A superuser's COPY passes row security anyway; a view of a table with forced policies fills only like this.
        *(["--statistics"] if carries_statistics(postgres) else []),
        *("--enable-row-security", "--dbname", database),
    ]
    with tempfile.NamedTemporaryFile("w", prefix="ops-restore-", suffix=".list") as chosen:
        if source.parts or source.without or source.remote:
            chosen.write("\n".join(_entries(postgres, source)) + "\n")
            chosen.flush()
            argv.append(f"--use-list={chosen.name}")

        def run(*options: str) -> float:
            return shell.run(
                [*argv, *options, str(source.path)], environment=environment, stall=postgres.stall(database),
                hint=source.hint,
            ).seconds  # fmt: skip

        try:
            if not source.unchecked:
                return run()
            seconds = run("--section=pre-data")
            with unchecked(postgres, database, source.unchecked):
                seconds += run("--section=data")
            return seconds + run("--section=post-data")
        except CommandFailed as error:
            if source.foreign:
                raise does_not_restore(source.path.name, error, source.hint) from None
            if blames_server(error):
                raise
            raise VerificationFailed(error.message, error.hint) from None


def _entries(postgres: Postgres, source: Source) -> list[str]:
    """The lines of an archive's list that are restored."""
    listed = shell.run([postgres.program("pg_restore"), "--list", source.path]).stdout.splitlines()
    kept = [line for line in listed if not (source.without and line.endswith(source.without))]
    left = [f"{NEED_OTHER_ROWS[1]}{schema} {name} " for schema, name in source.remote]
    left += NEED_OTHER_ROWS if source.parts else ()
    return [line for line in kept if not any(entry in line for entry in left)]


def fill_remote(postgres: Postgres, database: str, views: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Fill the materialised views that read foreign tables, those first that others read; returns which could not be
    filled (quoted names) and why: the foreign server may be down."""
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        set_known(connection, {**NO_TIMEOUTS, "search_path": ""})
        left, failed = list(views), list[tuple[tuple[str, str], str]]()
        while left:
            failed = []
            for view in left:
                try:
                    connection.execute(sql.SQL("REFRESH MATERIALIZED VIEW {}").format(sql.Identifier(*view)))
                except psycopg.Error as error:
                    if connection.broken:
                        raise
                    failed.append((view, first_line(error)))
            if len(failed) == len(left):
                break
            left = [view for view, _ in failed]
        quoted = "SELECT format('%%I.%%I', %s::text, %s::text)"
        return {str(execute(connection, quoted, *view)[0][0]): why for view, why in failed}
