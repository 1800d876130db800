"""Choose, judge, build, prove: what every restore of the database does, called with the open report."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from flows import store
from flows.database.free_space import WAL_RATIO, judge_room
from runbook import metrics
from runbook.errors import OTHER_BACKUPS, VerificationFailed
from runbook.guard.permit import Act, Permit
from runbook.report import Report, Status
from runbook.units import duration
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind
from tasks.postgres.content.comparison import Comparison, compare
from tasks.postgres.content.content import DatabaseContent, read_content
from tasks.postgres.content.definitions import as_once_stored
from tasks.postgres.content.equivalence import compare_definitions
from tasks.postgres.content.rowhash import FORM
from tasks.postgres.content.sequences import advance_sequences, find_rewound
from tasks.postgres.dump.dump import compression_of, knows_compression
from tasks.postgres.dump.fill import Source, find_unknown
from tasks.postgres.restore.planner_statistics import Statistics, analyze
from tasks.postgres.restore.staged_copy import (
    REPLACE,
    Copy,
    content_in,
    copy_name,
    create_copy,
    default_jobs,
    fill_copy,
    try_login,
)
from tasks.postgres.restore.swap import SwapUnknown
from tasks.postgres.server.properties import Properties
from tasks.postgres.server.requirements import Requirement, read_login, read_requirements
from tasks.postgres.server.server import Obstacle, Server, judge_programs, read_identity

# Measured for an estimate in the plan: restored bytes of a database per second with two workers.
RESTORE_BYTES_PER_SECOND = 90e6


def replace_act(env: Environment) -> Act:
    """The deed that a restore of the database needs a permit for."""
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
) -> Backup:
    """The backup that was asked for, its files read and compared with its manifest. `of`: another environment's;
    `needed` chooses the files that are read.

    Raises:
        OpsError: there is none.
        RunbookFailed: it is damaged; the one before is named, and what it loses.
    """
    backup = store.choose_backup(report, env, kind, wanted, source, of=of, needed=needed)
    if not backup.verified:
        report.warn(f"{backup.name} was never verified by a restore", "nothing to do: this run proves what it restores")
    if backup.broken:
        hint = "it can be restored: full-restore goes live with it and ends CRITICAL; with strict=true it refuses it"
        report.warn("expectations that the backup breaks", hint, value=backup.broken)
    hint = "what was written after it is lost; look for a newer one"
    report.judge(metrics.BACKUP_AGE, backup.age_seconds, hint, worst=Status.WARN)
    _judge_content(report, env, backup)
    report.fail_if_critical()
    return backup


def _judge_content(report: Report, env: Environment, backup: Backup) -> None:
    try:
        content = content_in(backup)
    except ValueError as error:
        raise VerificationFailed(f"{backup.name} has no readable content manifest", OTHER_BACKUPS) from error
    report.require(
        "database in the backup",
        content.database == env.postgres.database,
        "choose a backup of this database: this one was taken of another",
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
    unknown: Collection[str] = (),
) -> None:
    """Whether this server can hold what is in the backup; a run may make the roles itself on a new server. `jobs`: of
    pg_restore, 0 for one per core. `on`: where to query it, if that is not the live server; `unknown`: requirements
    that cannot be judged there."""
    content, postgres = content_in(backup), on or env.postgres
    judge_programs(postgres, server)
    major = content.server_version // 10000
    report.require(
        "server version",
        server.major >= major,
        f"restore to PostgreSQL {major} or newer: a dump of a newer server does not restore into an older one",
        value=server.text,
        expected=f"{major} or newer",
    )
    compression = compression_of(backup.manifest.readable_files)
    report.require(
        "compression",
        knows_compression(postgres, compression),
        f"correct [postgres] programs: these were built without {compression}",
        value=compression,
    )
    missing = [role for role in content.roles if role not in server.roles]
    report.require(
        "roles",
        not missing or (roles_are_made and server.is_bare),
        f"create them first (globals.sql in {backup.where} has them), then launch this again",
        value=f"missing: {', '.join(missing)}" if missing else f"{len(content.roles)} there",
        expected=", ".join(content.roles),
    )

    found = read_requirements(postgres, content, server, jobs or default_jobs())
    judge_requirements(report, [item for item in found if item.name not in unknown])


def without_accepted(report: Report, env: Environment, source: Source, accept: Sequence[str]) -> Source:
    """The dump without what a person accepts as not restored: in this run, or for all in `[postgres] accept`. Each is
    named in the report; a name that the dump does not have is critical if it was given for this run."""
    given = [name.strip() for name in accept if name.strip()]
    if not (wanted := list(dict.fromkeys([*given, *env.postgres.accept]))):
        return source
    unknown = find_unknown(env.postgres, source, wanted)
    wrong = [name for name in given if name in unknown]
    report.require(
        "accept",
        not wrong,
        "; ".join(f"did you mean {unknown[name]}?" for name in wrong if unknown[name])
        or "copy the name from the report of the restore that was refused",
        value="; ".join(f"the backup has no {name}" for name in wrong) or f"{len(given)} in the backup",
        expected="names of objects that the backup has",
    )
    found = tuple(name for name in wanted if name not in unknown)
    if found:
        hint = "create them when the restore is done and their cause is fixed; the definitions are in the backup"
        report.warn("accepted as not restored", hint, value="; ".join(found), expected="nothing")
    return replace(source, accepted=found)


def judge_requirements(report: Report, found: Sequence[Requirement]) -> None:
    """Each as a finding."""
    for item in found:
        report.require(item.name, item.ok, item.hint, value=item.value, expected=item.expected)


def judge_login(report: Report, env: Environment, server: Server, on: Postgres | None = None) -> None:
    """Whether the application's role may log in to the staged copy, before there is one. `on`: as `judge_server`."""
    judge_requirements(report, read_login(on or env.postgres, server))


def judge_obstacles(report: Report, obstacles: Sequence[Obstacle]) -> None:
    """What is tied to the live database and would be torn off by a swap."""
    report.require(
        "tied to the live database",
        not obstacles,
        "; ".join(obstacle.hint for obstacle in obstacles),
        value=", ".join(obstacle.what for obstacle in obstacles) or "nothing",
        expected="no prepared transactions, logical slots or subscriptions",
    )


def judge_space(report: Report, env: Environment, database_bytes: int, *, absent: bool = False) -> None:
    """The copy stands beside the old database, and its WAL beside both."""
    why = "the copy stands beside the old database"
    judge_room(report, env, database_bytes, int(database_bytes * WAL_RATIO), why, absent=absent)


def plan_database(report: Report, env: Environment, backup: Backup) -> None:
    """The plan's lines for the database."""
    content = content_in(backup)
    seconds = content.bytes / RESTORE_BYTES_PER_SECOND
    name, copy = env.postgres.database, copy_name(env.postgres.database)
    report.plan(f"restore {backup.name} beside", f"into {copy}", size=content.bytes, seconds=seconds)
    report.plan(
        "prove the copy",
        f"{content.rows:,} rows in {len(content.tables)} tables against the manifest",
        seconds=seconds / 5,
    )
    report.plan("swap", f"{copy} becomes {name}; the old {name} is kept as {name}__old_…", seconds=0.2)


@contextmanager
def swapping(report: Report) -> Iterator[None]:
    """A swap of which nobody knows whether it happened is the state of the system then."""
    try:
        yield
    except SwapUnknown as error:
        report.state_is(error.message, error.hint)
        raise


def build_database(
    permit: Permit, env: Environment, source: Source, properties: Properties, jobs: int, into: str = ""
) -> Copy:
    """The filled copy, beside the live database or beside the name that it will get."""
    empty = create_copy(permit, env.postgres, properties, into)
    return fill_copy(permit, env.postgres, source, properties, empty, jobs, into)


def prove_database(report: Report, env: Environment, backup: Backup, copy: Copy) -> DatabaseContent:
    """Compare the copy with the manifest, row by row in text form.

    Raises:
        RunbookFailed: they differ. The live database was not touched.
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
        ("what", "expected", "found", "equal"),
        [(what, wanted, seen, "✅" if equal else "🛑") for what, wanted, seen, equal in comparison.proven],
    )
    report.require(
        "copy equal to the backup",
        not comparison.differences,
        f"the copy is {copy.database}: see the differences, then {catalogue.instead_of(backup)}"
        if comparison.differences
        else "",
        value="; ".join(comparison.differences[:4]) or f"{expected.rows:,} rows, every definition",
        expected="every row and definition",
    )
    _tell_unlike(report, expected, comparison, copy)
    if comparison.differences:
        store.mark_failed(report, backup, comparison.differences[0])
    if comparison.differences[4:]:
        report.table("All differences", ("difference",), [(text,) for text in comparison.differences])
    if expected.not_compared or comparison.not_compared:
        not_compared = (*expected.not_compared, *comparison.not_compared)
        report.table("Not compared", ("what",), [(what,) for what in not_compared])
    report.fail_if_critical()
    return found


def _tell_unlike(report: Report, expected: DatabaseContent, comparison: Comparison, copy: Copy) -> None:
    """What a restore cannot keep."""
    if comparison.versions:
        report.warn(
            "versions of extensions",
            "a dump names none: the copy has those that are installed now; see in their release notes what changed",
            value="; ".join(comparison.versions),
            expected="as in the backup",
        )
    if fragile := expected.volatile_checks:
        named = ", ".join(f"{schema}.{table}: {name}" for schema, table, name in fragile)
        report.fact("CHECK constraints that restored rows were not checked against", named)
    if computed := expected.uncomputable:
        named = ", ".join(one.name for one in computed)
        report.fact("generated columns that were restored as stored, not computed", named)
    if comparison.reordered:
        report.warn(
            "order of columns",
            "a restored child has its parent's columns first: name the columns in INSERT and SELECT",
            value=f"changed in {', '.join(comparison.reordered)}",
            expected="as in the backup",
        )
    if copy.unfilled:
        report.warn(
            "materialised views of foreign tables",
            "queries of these views fail: REFRESH MATERIALIZED VIEW when the foreign server answers",
            value="; ".join(f"{name} is empty: {why}" for name, why in copy.unfilled.items()),
            expected="filled",
        )


def ready_database(report: Report, env: Environment, copy: Copy, jobs: int, *, after: object) -> str:
    """Statistics, and a log-in as the application's role, before the copy takes the live name."""
    analyzed = analyze.after(after)(env.postgres, copy.database, jobs)
    tell_statistics(report, analyzed)
    return try_application_login(report, env, copy, after=analyzed)


def tell_statistics(report: Report, found: Statistics) -> None:
    """Tables that could not be analysed."""
    if found.missing:
        report.warn(
            "planner statistics",
            "queries of these tables may be slow: ANALYZE them when the foreign server answers",
            value=f"missing: {'; '.join(found.missing)}",
            expected="of every table",
        )


def try_application_login(report: Report, env: Environment, copy: Copy, *, after: object) -> str:
    """pg_hba may name the database, and a privilege may be missing: better seen before the swap."""
    user = try_login.after(after)(env.postgres, copy.database)
    report.require("log-in of the application's role to the copy", user == env.postgres.user, "", value=user)
    return user


def advance(report: Report, permit: Permit, env: Environment, kept: str, *, wanted: bool) -> None:
    """Sequences that stand lower than in the database that was replaced; set to where those stand, if that is wanted.

    After the swap, since clients of the old one took numbers until then.
    """
    live = read_identity(env.postgres, env.postgres.database)
    rewound = find_rewound(env.postgres, kept, live.database) if kept else ()
    if not rewound:
        return
    if wanted:
        advance_sequences(permit, env.postgres, live.database, rewound)
    else:
        report.fact(
            "numbers that will be given out twice",
            f"by {len(rewound)} sequences; harmless inside the database. Other systems know them? advance=true",
        )
    report.table(
        "Sequences behind the replaced database" + (" (advanced to it)" if wanted else ""),
        ("sequence", "replaced database", "backup"),
        [(item.sequence, item.live, item.copy) for item in rewound],
    )


def tell_window(report: Report, env: Environment, backup: Backup) -> None:
    """What is lost by going back to a snapshot, as time."""
    lost = backup.age_seconds
    report.fact("lost", f"every write after {backup.manifest.taken:%Y-%m-%d %H:%M:%S UTC}, {duration(lost)} before now")
    report.prefer(
        "data loss against the RPO",
        lost <= env.rpo_seconds,
        "WAL archiving or more frequent backups shorten it",
        value=duration(lost),
        expected=f"at most {duration(env.rpo_seconds)}",
    )
