"""Fill an empty database from a dump (a backup, or a foreign pg_dump file), with settings for speed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import psycopg
from psycopg import sql

from blocks.postgres.server import Postgres, execute, first_line
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, NotRestorable, VerificationFailed
from runbook.kinds import probe
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.postgres.content.definitions import dumped_definitions
from tasks.postgres.content.quiet import copy_options, quiet
from tasks.postgres.dump import accepted
from tasks.postgres.dump.checks import unchecked
from tasks.postgres.dump.compression import readable
from tasks.postgres.dump.dump import DUMP, carries_statistics
from tasks.postgres.dump.generated import Uncomputable, emptied, find_generated, load_rows, may_set_flags
from tasks.postgres.dump.plain import COMPRESSED, PLAIN, entry_names, run_plain
from tasks.postgres.dump.refusal import blames_server, does_not_restore
from tasks.postgres.upkeep.session import set_known

Form = Literal["directory", "custom", "plain"]
MOST_MAINTENANCE_MB = 512
HINT = f"{OTHER_BACKUPS}. Nothing was replaced"
FOREIGN_HINT = "choose another dump, or a backup: this dump is damaged or incomplete. Nothing was replaced"
# These need rows that are not in a backup of chosen tables.
NEED_OTHER_ROWS = (" FK CONSTRAINT ", " MATERIALIZED VIEW DATA ")


@dataclass(frozen=True)
class DumpSource:
    """A dump: its path, its form, and its database's size (0: unknown).

    `parts`: some rows are missing. `foreign`: it is not a backup. `without`: endings of list lines that are not
    restored. `remote`: materialised views of foreign tables, filled last, possibly left empty. `unchecked`: tables
    whose CHECK constraints are not checked. `relations`: number of its tables and sequences, if known. `stored`:
    generated columns whose tables are filled from the backup's own files. `accepted`: objects that an operator leaves
    out. `unpacking`: where the dump is unpacked for programs that cannot read its compression; None: nowhere.
    `text_bytes`: of its rows before compression; 0: unknown. `unpacked`: that form, or the dump itself, if it is ready.
    """

    path: Path
    form: Form
    database_bytes: int = 0
    parts: bool = False
    foreign: bool = False
    without: tuple[str, ...] = ()
    remote: tuple[tuple[str, str], ...] = ()
    unchecked: frozenset[tuple[str, str]] = frozenset()
    relations: int = 0
    stored: tuple[Uncomputable, ...] = ()
    accepted: tuple[str, ...] = ()
    unpacking: Path | None = None
    text_bytes: int = 0
    unpacked: Path | None = None

    @property
    def hint(self) -> str:
        """The next step if it does not restore."""
        return FOREIGN_HINT if self.foreign else HINT


def source_in(directory: Path, database_bytes: int, *, parts: bool) -> DumpSource:
    """The dump in a backup's directory."""
    for name in (PLAIN, COMPRESSED):
        if (directory / name).exists():
            return DumpSource(directory / name, "plain", database_bytes)
    return DumpSource(directory / DUMP, "directory", database_bytes, parts)


def fill(postgres: Postgres, source: DumpSource, database: str, oid: int, jobs: int) -> float:
    """Restore into an empty database, stopping at the first error; returns the seconds.

    Raises:
        CommandFailed, OpsError: the server, the network or this host is at fault.
        VerificationFailed: the dump is truncated or altered, or the server refuses its content.
    """
    memory = min(MOST_MAINTENANCE_MB, psutil.virtual_memory().available // (4 * jobs) >> 20)
    settings = {
        "maintenance_work_mem": f"{max(memory, 64)}MB",
        "synchronous_commit": "off",
        "max_parallel_maintenance_workers": "0",  # the jobs already use all processors
        "lc_messages": "C",  # `blames_server` reads them
    }

    def restored() -> WorkDone:
        with postgres.connect() as connection:
            now = int(execute(connection, "SELECT pg_database_size(%s::oid)", oid)[0][0])
        whole = f" of about {size(source.database_bytes)}" if source.database_bytes else ""
        return WorkDone(f"{database}: {size(now)}{whole} restored", now / max(source.database_bytes, now, 1))

    with progress(restored):
        if source.form == "plain":
            return run_plain(postgres, source.path, database, settings, source.hint, source.relations, source.accepted)
        form = readable(postgres, source.path, source.unpacking, jobs, source.text_bytes)
        with nullcontext(source.unpacked) if source.unpacked else form as dump:
            return _pg_restore(postgres, source, dump, database, jobs, settings)


def _pg_restore(
    postgres: Postgres, source: DumpSource, dump: Path, database: str, jobs: int, settings: dict[str, str]
) -> float:
    """`dump`: the form of the source that pg_restore can read."""
    options = [copy_options(postgres), *(f"-c {name}={value}" for name, value in settings.items())]
    environment = postgres.environment(options=" ".join(options))
    argv = [
        *(postgres.program("pg_restore"), f"--format={source.form}", f"--jobs={jobs}"),
        *("--exit-on-error", "--no-password"),
        # A superuser's COPY bypasses row security; a view of a table with forced policies needs this option.
        *(["--statistics"] if carries_statistics(postgres) else []),
        *("--enable-row-security", "--dbname", database),
    ]
    lines = accepted.entries(postgres, source.path)
    if source.stored and not may_set_flags(postgres):
        source = replace(source, stored=())
    chosen, late = _chosen(lines, source)

    def run(listed: Sequence[str], *options: str) -> float:
        with tempfile.NamedTemporaryFile("w", prefix="ops-restore-", suffix=".list") as file:
            file.write("\n".join(listed) + "\n")
            file.flush()
            return shell.run(
                [*argv, f"--use-list={file.name}", *options, str(dump)],
                environment=environment,
                stall=postgres.stall(database),
                hint=source.hint,
            ).seconds

    try:
        if source.unchecked or source.stored or source.accepted:
            seconds = run(chosen, "--section=pre-data")
            with unchecked(postgres, database, source.unchecked), emptied(postgres, database, source.accepted):
                seconds += run(chosen, "--section=data")
                load_rows(postgres, source.path.parent, database, source.stored)
            seconds += run(chosen, "--section=post-data")
        else:
            seconds = run(chosen)
        return seconds + (run(late) if late else 0)
    except CommandFailed as error:
        if blames_server(error) and not source.foreign:
            raise
        found = does_not_restore(source.path.name, error, source.hint) if source.foreign else error
        accept = _accept_hint(postgres, source, database, error)
        refused = NotRestorable if accept else VerificationFailed
        raise (type(found) if source.foreign else refused)(found.message, accept + found.hint) from None


def _chosen(lines: Sequence[str], source: DumpSource) -> tuple[list[str], list[str]]:
    """The lines of an archive's list to restore, and those of event triggers, which are restored last.

    Before 17 an ENABLE ALWAYS trigger fires in every session, and pg_restore creates it before it fills some views.
    """
    kept = [line for line in lines if not (source.without and line.endswith(source.without))]
    left = [f"{NEED_OTHER_ROWS[1]}{schema} {name} " for schema, name in source.remote]
    left += [f" {one.oid} TABLE DATA " for one in source.stored]
    left += NEED_OTHER_ROWS if source.parts else ()
    kept = accepted.without([line for line in kept if not any(entry in line for entry in left)], source.accepted)
    late = [line for line in kept if _EVENT_TRIGGER.match(line)]
    return [line for line in kept if line not in late], late


_EVENT_TRIGGER = re.compile(r"\d+; \d+ \d+ (?:EVENT TRIGGER|COMMENT - EVENT TRIGGER|SECURITY LABEL - EVENT TRIGGER) ")


def _accept_hint(postgres: Postgres, source: DumpSource, database: str, error: CommandFailed) -> str:
    """The hint to leave out the object that does not restore; empty if that is not possible."""
    if table := accepted.refused_rows(error):
        names = find_generated(postgres, database, table)
    else:
        name = accepted.refused_by(error, dumped_definitions(postgres, source.path))
        names = [name] if name else []
    return accepted.restore_without(source.accepted, names) if names else ""


@probe
def find_unknown(postgres: Postgres, source: DumpSource, wanted: Sequence[str]) -> dict[str, str]:
    """Which of the accepted names the dump does not have, each with the nearest one that it has."""
    if source.form == "plain":
        names = [name for name in entry_names(source.path) if name.startswith(tuple(f"{k} " for k in accepted.KINDS))]
        return accepted.unknown_in(names, (), wanted)
    lines = accepted.entries(postgres, source.path)
    tables = {accepted.name_of(line, ("TABLE DATA",)).removeprefix("TABLE DATA ") for line in lines} - {""}
    return accepted.unknown_in([*filter(None, map(accepted.name_of, lines))], tables, wanted)


def fill_remote(postgres: Postgres, database: str, views: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Fill the materialised views of foreign tables, dependencies first.

    Returns those that could not be filled (quoted names) with the reason, for example that the foreign server is down.
    """
    with quiet(postgres, database) as connection:
        set_known(connection, {"search_path": ""})
        left, failed = list(views), list[tuple[tuple[str, str], str]]()
        while left:
            failed = []
            for view in left:
                try:
                    with connection.transaction():
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
