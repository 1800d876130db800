"""The steps that all restores of the database share: choose, judge, build, prove. Called with the open report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from flows import store
from flows.database.free_space import WAL_RATIO, judge_room
from flows.database.gate import DatabaseGate
from runbook import metrics
from runbook.errors import OTHER_BACKUPS, OpsError, RunbookFailed, VerificationFailed
from runbook.guard.permit import Act, PlannedStep
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind
from tasks.postgres.content.comparison import ContentComparison, compare
from tasks.postgres.content.content import DatabaseContent, read_content
from tasks.postgres.content.definitions import as_once_stored
from tasks.postgres.content.equivalence import compare_definitions
from tasks.postgres.content.rowhash import FORM
from tasks.postgres.dump.accepted import table_of
from tasks.postgres.dump.compression import compression_of, knows_compression
from tasks.postgres.dump.fill import DumpSource, find_unknown
from tasks.postgres.restore.planner_statistics import PlannerStatistics, analyze
from tasks.postgres.restore.staged_copy import (
    REPLACE,
    Copy,
    content_in,
    copy_name,
    default_jobs,
    try_login,
    unpacking_of,
)
from tasks.postgres.restore.swap import SwapUnknown
from tasks.postgres.server.requirements import Requirement, read_login, read_requirements
from tasks.postgres.server.server import Obstacle, Server, judge_programs

# Measured with two workers; the plan's estimate uses it.
RESTORE_BYTES_PER_SECOND = 90e6
UNPACK_BYTES_PER_SECOND = 500e6


def replace_act(env: Environment) -> Act:
    """The act to permit: replace the live database."""
    return Act(REPLACE, env.postgres.database)


def choose_backup(
    report: Report,
    env: Environment,
    wanted: str,
    source: Stores = "backups",
    kind: Kind = "postgres",
    *,
    of: str = "",
    needed: store.Needed | None = None,
    failed_too: bool = False,
    strict: bool = False,
) -> Backup:
    """The backup that the operator named, its files compared with its manifest. `of`: another environment's backup;
    `needed` chooses the files that are read; `failed_too`: see flows/store.py; `strict`: a backup that is known to
    break expectations is refused.

    Raises:
        OpsError: there is none.
        RunbookFailed: it is damaged; the finding names the backup before it and the additional loss.
    """
    backup = store.choose_backup(report, env, kind, wanted, source, of=of, needed=needed, failed_too=failed_too)
    if not backup.verified and not backup.failed:
        report.fact("verified", f"{backup.name} was not yet; this run proves its own restore")
    judge_expectations(report, backup, strict=strict)
    hint = "choose a newer backup if there is one"
    report.judge(metrics.BACKUP_AGE, backup.age_seconds, hint, worst=Status.WARN)
    _judge_content(report, env, backup)
    report.fail_if_critical()
    return backup


def judge_expectations(report: Report, backup: Backup, *, strict: bool) -> None:
    """Judge the expectations that the backup's data broke in the last restore."""
    hint = "correct the rows after the restore. full-restore with strict=true refuses this backup"
    if strict:
        hint = "run this without strict, and correct the rows after the restore; or name another backup"
    if backup.broken:
        worst = Status.CRITICAL if strict else Status.WARN
        report.fail("expectations that the backup breaks", hint, value=backup.broken, worst=worst)


def _judge_content(report: Report, env: Environment, backup: Backup) -> None:
    try:
        content = content_in(backup)
    except ValueError as error:
        raise VerificationFailed(f"{backup.name} has no readable content manifest", OTHER_BACKUPS) from error
    report.require(
        "database in the backup",
        content.database == env.postgres.database,
        "choose a backup of this database",
        value=content.database,
        expected=env.postgres.database,
    )
    report.require(
        "form of the content manifest",
        content.form == FORM,
        "restore it with the version of this project that took it",
        value=content.form or "not stated",
        expected=FORM,
    )


def judge_server(
    report: Report,
    env: Environment,
    backup: Backup,
    server: Server,
    *,
    roles_are_made: bool = False,
    jobs: int = 0,
    on: Postgres | None = None,
) -> None:
    """Whether the backup can be restored to this server.

    `roles_are_made`: the run creates missing roles on a new server. `jobs`: of pg_restore, 0 for one per core.
    `on`: the server to query instead of the live one.
    """
    content, postgres = content_in(backup), on or env.postgres
    judge_programs(postgres, server)
    major = content.server_version // 10000
    report.require(
        "server version",
        server.major >= major,
        f"restore to PostgreSQL {major} or newer: an older server cannot read the dump of a newer one",
        value=server.text,
        expected=f"{major} or newer",
    )
    compression = compression_of(backup.manifest.readable_files)
    report.require(
        "compression",
        compression == "zstd" or knows_compression(postgres, compression),  # zstd is unpacked where it is not known
        f"set [postgres] programs to programs that support {compression}",
        value=compression,
    )
    missing = [role for role in content.roles if role not in server.roles]
    report.require(
        "roles",
        not missing or (roles_are_made and server.is_bare),
        f"create them (globals.sql in {backup.where} has them), then run this again",
        value=f"missing: {', '.join(missing)}" if missing else f"{len(content.roles)} exist",
        expected=", ".join(content.roles),
    )
    found = read_requirements(postgres, content, server, jobs or default_jobs())
    judge_requirements(report, found)


def without_accepted(report: Report, env: Environment, source: DumpSource, accept: Sequence[str]) -> DumpSource:
    """The dump without the objects that need not be restored: `accept` of this run and `[postgres] accept`.

    Each is named in the report. A name that the dump does not have is CRITICAL if it was given for this run.
    """
    given = [name.strip() for name in accept if name.strip()]
    if not (wanted := list(dict.fromkeys([*given, *env.postgres.accept]))):
        return source
    unknown = find_unknown(env.postgres, source, wanted)
    wrong = [name for name in given if name in unknown]
    report.require(
        "accept",
        not wrong,
        "; ".join(f"did you mean {unknown[name]}?" for name in wrong if unknown[name])
        or "copy the name from the report of the refused restore",
        value="; ".join(f"the backup has no {name}" for name in wrong) or f"{len(given)} in the backup",
        expected="names of objects that the backup has",
    )
    found = tuple(name for name in wanted if name not in unknown)
    if found:
        hint = "create them after the restore, when the cause is fixed; the backup has the definitions"
        report.warn("accepted as not restored", hint, value="; ".join(found), expected="nothing")
    return replace(source, accepted=found)


def judge_requirements(report: Report, found: Sequence[Requirement]) -> None:
    """One finding for each."""
    for item in found:
        report.require(item.name, item.ok, item.hint, value=item.value, expected=item.expected)


def judge_login(report: Report, env: Environment, server: Server, on: Postgres | None = None) -> None:
    """Whether the application's role can log in to the staged copy, before it exists. `on`: as in `judge_server`."""
    login = read_login(on or env.postgres, server, copy_name(env.postgres.database), created=True)
    judge_requirements(report, login)


def judge_obstacles(report: Report, obstacles: Sequence[Obstacle]) -> None:
    """Objects that belong to the live database and would not follow a swap."""
    report.require(
        "tied to the live database",
        not obstacles,
        "; ".join(obstacle.hint for obstacle in obstacles),
        value=", ".join(obstacle.what for obstacle in obstacles) or "nothing",
        expected="no prepared transactions, logical slots or subscriptions",
    )


def judge_space(
    report: Report, env: Environment, database_bytes: int, *, absent: bool = False, backup: Backup | None = None
) -> None:
    """Free disk space for the staged copy and its WAL, and for the unpacked dump of `backup`."""
    why = "a staged copy next to the old database"
    here = unpacking_of(env.postgres, backup) if backup else {}
    for place, needed in here.items():
        why = f"{why}, and {size(needed)} for the unpacked dump in {place}"
    judge_room(report, env, database_bytes, int(database_bytes * WAL_RATIO), why, absent=absent, here=here)


def filling_steps(
    env: Environment, name: str, backup: Backup | None, database_bytes: int, copy: str
) -> Sequence[PlannedStep]:
    """Return the planned steps that restore a dump into the staged copy `copy`."""
    seconds = database_bytes / RESTORE_BYTES_PER_SECOND
    unpacking = [
        PlannedStep(
            f"unpack {name}",
            f"unpacked in {place}, as pg_restore here does not support its compression; deleted after the restore",
            needed,
            needed / UNPACK_BYTES_PER_SECOND,
        )
        for place, needed in (unpacking_of(env.postgres, backup) if backup else {}).items()
    ]
    return *unpacking, PlannedStep(f"restore {name}", f"into the staged copy {copy}", database_bytes, seconds)


def proof_step(backup: Backup) -> PlannedStep:
    """Return the planned step that compares the copy with the manifest."""
    content = content_in(backup)
    detail = f"{content.rows:,} rows in {len(content.tables)} tables against the manifest"
    return PlannedStep("prove the copy", detail, seconds=proof_seconds(content.bytes))


def proof_seconds(database_bytes: int) -> float:
    """Return the estimated time of the comparison."""
    return database_bytes / RESTORE_BYTES_PER_SECOND / 5


def swap_text(env: Environment, *, kept: bool) -> str:
    """Return what a swap does. `kept`: a live database is replaced."""
    name, copy = env.postgres.database, copy_name(env.postgres.database)
    return f"{copy} becomes {name}; the old {name} is kept as {name}__old_…" if kept else rename_text(copy, name)


def rename_text(copy: str, target: str) -> str:
    """Return what a renaming does."""
    return f"{copy} becomes {target}"


@contextmanager
def swapping(report: Report) -> Iterator[None]:
    """Report an unknown result of the swap as the state of the system."""
    try:
        yield
    except SwapUnknown as error:
        report.state_is(error.message, error.hint)
        raise
    except OpsError:
        raise
    except BaseException:  # cancelled: the server commits the transaction, or rolls it back
        report.state_is(
            "the swap was interrupted: the restored database is live, or nothing was changed",
            "run undo-restore with an empty confirm: its plan names the replaced database if the swap was made",
        )
        raise


@contextmanager
def noting_failure(report: Report, backup: Backup | None) -> Iterator[None]:
    """Note that a backup does not restore: the next plan takes an older one, or restores it with exceptions
    (`accept`)."""
    try:
        yield
    except (VerificationFailed, RunbookFailed) as error:
        if backup:
            store.mark_failed(report, backup, error.message)
        raise


def prove_database(report: Report, env: Environment, backup: Backup, copy: Copy) -> DatabaseContent:
    """Compare the copy with the manifest, row by row in text form.

    Raises:
        RunbookFailed: they differ. The live database is unchanged.
    """
    expected = content_in(backup)
    found = read_content.after(copy)(env.postgres, copy.database)
    found = found.model_copy(
        update={"definitions": as_once_stored(found.definitions, expected.definitions, expected.properties.encoding)}
    )
    texts = compare_definitions.after(found)(env.postgres, copy.database, expected.definitions, found.definitions)
    comparison = compare(expected, found, texts, unfilled=copy.unfilled, accepted=copy.accepted)
    report.table(
        "Proven equal to the backup",
        ("object", "expected", "found", "equal"),
        [(what, wanted, seen, "✅" if equal else "🛑") for what, wanted, seen, equal in comparison.proven],
    )
    rows = f"{compared_rows(expected, copy):,} of {expected.rows:,} rows"
    report.require(
        "copy equal to the backup",
        not comparison.differences,
        f"check the differences in {copy.database}, then {catalogue.instead_of(backup)}"
        if comparison.differences
        else "",
        value="; ".join(comparison.differences[:4]) or f"{rows}, every definition",
        expected="every row and definition",
    )
    _report_deviations(report, expected, comparison, copy)
    if comparison.differences:
        store.mark_failed(report, backup, comparison.differences[0])
    if comparison.differences[4:]:
        report.table("All differences", ("difference",), [(text,) for text in comparison.differences])
    if expected.not_compared or comparison.not_compared:
        not_compared = (*expected.not_compared, *comparison.not_compared)
        report.table("Not compared", ("object",), [(what,) for what in not_compared])
    report.fail_if_critical()
    return found


def compared_rows(expected: DatabaseContent, copy: Copy) -> int:
    """How many of the backup's rows were compared by their content: of a table with a column that an operator accepted
    as empty, only the number of rows is compared."""
    counted = {table_of(name) for name in copy.accepted}
    return sum(table.rows for name, table in expected.tables.items() if name not in counted)


def _report_deviations(report: Report, expected: DatabaseContent, comparison: ContentComparison, copy: Copy) -> None:
    """Properties that a restore cannot preserve."""
    if comparison.versions:
        report.warn(
            "versions of extensions",
            "check their release notes for changes: a dump names no versions, so the copy has the installed ones",
            value="; ".join(comparison.versions),
            expected="as in the backup",
        )
    if fragile := expected.volatile_checks:
        named = ", ".join(f"{schema}.{table}: {name}" for schema, table, name in fragile)
        report.fact("CHECK constraints that did not check the restored rows", named)
    if computed := expected.uncomputable:
        named = ", ".join(one.name for one in computed)
        report.fact("generated columns that were restored as stored, not computed", named)
    if comparison.reordered:
        report.warn(
            "order of columns",
            "name the columns in INSERT and SELECT: a restored child table has its parent's columns first",
            value=f"changed in {', '.join(comparison.reordered)}",
            expected="as in the backup",
        )
    if copy.unfilled:
        report.warn(
            "materialised views of foreign tables",
            "REFRESH MATERIALIZED VIEW when the foreign server answers; until then their queries fail",
            value="; ".join(f"{name} is empty: {why}" for name, why in copy.unfilled.items()),
            expected="filled",
        )


def ready_database(report: Report, env: Environment, copy: Copy, jobs: int, *, after: object) -> str:
    """Analyse the copy and log in to it as the application's role, before it gets the live name."""
    analyzed = analyze.after(after)(env.postgres, copy.database, jobs)
    judge_statistics(report, analyzed)
    return try_application_login(report, env, copy, after=analyzed)


def judge_statistics(report: Report, found: PlannerStatistics) -> None:
    """Whether every table could be analysed."""
    if found.missing:
        report.warn(
            "planner statistics",
            "ANALYZE these tables when the foreign server answers; until then their queries may be slow",
            value=f"missing: {'; '.join(found.missing)}",
            expected="statistics of every table",
        )


def try_application_login(report: Report, env: Environment, copy: Copy, *, after: object) -> str:
    """Log in before the swap: pg_hba.conf may exclude the database, or a privilege may be missing."""
    user = try_login.after(after)(env.postgres, copy.database)
    report.require("log-in of the application's role to the copy", user == env.postgres.user, "", value=user)
    return user


def judge_data_loss(report: Report, env: Environment, backup: Backup, gate: DatabaseGate) -> None:
    """Report the loss that the swap's gate measured, and compare the time since a backup's snapshot with the RPO: a
    restore loses all of it."""
    lost, most = backup.age_seconds, f"at most {duration(env.rpo_seconds)}"
    report.loses(gate.measured)
    hint = "archive WAL, or take backups more often"
    report.prefer("data loss against the RPO", lost <= env.rpo_seconds, hint, value=duration(lost), expected=most)
