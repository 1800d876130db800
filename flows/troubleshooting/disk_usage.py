"""What uses the space of a disk, and the next step for each. Nothing is deleted here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from flows.database.superseded import superseded_directories
from flows.troubleshooting.file_systems import FileSystem, paths_of
from runbook.errors import OpsError, Unreachable
from runbook.next import Next
from runbook.page.form import read_forms
from runbook.page.markdown import escaped
from runbook.report import Evidence, Report
from runbook.units import size
from tasks.docker.inventory import read_inventory
from tasks.host.space import measure_trees
from tasks.postgres.replication.status import read_replication
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.server.greeting import read_greeting
from tasks.postgres.server.space import read_server_space

TREE_SECONDS = 20.0
NEVER = "never delete files there: the rows of replication slots and archiver show what retains them"
DISCARD = "delete it by name, once the restored copy is proven"


@dataclass(frozen=True)
class Usage:
    """Something that uses space; `follow`: the runbook that decides about it, if there is one."""

    what: str
    bytes: int
    advice: str
    follow: Next | None = None


def find_usage(report: Report, env: Environment, systems: Sequence[FileSystem]) -> list[Usage]:
    """Everything that uses space, largest first."""
    found: list[Usage] = []
    for what, part, measure in (
        ("the database", "postgres", _of_server),
        ("replaced data", "postgres", _replaced),
        ("Docker", "docker", _of_docker),
    ):
        if not env.has(part):
            continue
        try:
            found += measure(env)
        except OpsError as error:
            report.warn(f"not measured: {what}", error.hint, value=error.message)
        except psycopg.Error as error:
            report.warn(f"not measured: {what}", "grant this right to the administrator", value=first_line(error))
    found += _trees(env, [path for one in systems if one.is_over(report) for path in one.paths])
    return sorted(found, key=lambda one: -one.bytes)


def _of_server(env: Environment) -> Iterator[Usage]:
    """What the server measures itself."""
    node = env.postgres
    greeting = read_greeting(node)
    if greeting.state != "ready":  # else every query would be retried
        raise Unreachable(
            f"PostgreSQL at {node.host}:{node.port} does not answer: {greeting.detail}",
            "run diagnose-database; slots and archiver are not in this report",
        )
    space, replication = read_server_space(node), read_replication(node)
    check = Next("check-replication")
    for slot in replication.slots:
        if slot.active and slot.held_bytes > space.segment_bytes:
            advice = "wait for its consumer to catch up, or fix the consumer"
            yield Usage(f"WAL retained by the slot {slot.name} (in use)", slot.held_bytes, advice, check)
        elif not slot.active:
            state = f"unused since {slot.inactive_since or 'its creation'}"
            drop = f"SELECT pg_drop_replication_slot('{slot.name}')"
            advice = f"decide whether to drop it: its consumer then needs a new base backup. {drop}"
            yield Usage(f"WAL retained by the slot {slot.name} ({state})", slot.held_bytes, advice, check)
    archiver = replication.archiver
    if archiver.waiting:
        state = f"failing since {archiver.last_failed}" if archiver.is_failing else "it is behind"
        advice = "fix archive_command (the server's log shows the error); then the server deletes the files itself"
        what = f"{archiver.waiting} WAL files that wait for the archiver ({state})"
        yield Usage(what, archiver.waiting * space.segment_bytes, advice, check)
    yield Usage("pg_wal in total, measured by the server", space.wal_bytes, NEVER, check)
    if space.temporary_bytes:
        advice = "find the query and end it: its files are deleted with it; temp_file_limit bounds the next one"
        yield Usage("temporary files of queries", space.temporary_bytes, advice, Next("check-connections"))


def _replaced(env: Environment) -> Iterator[Usage]:
    """Databases and directories that restores replaced: deleted by name only, after the restore is proven."""
    if read_greeting(env.postgres).state == "ready":  # otherwise _of_server reports it
        for old in find_superseded(env.postgres):
            follow = Next("discard-superseded", parameters={"names": [old.name]})
            yield Usage(f"database {old.name}, replaced {old.since}", old.bytes, DISCARD, follow)
    paths = [path for aside in superseded_directories(env) for path in aside]
    for path, taken in measure_trees(paths).items():
        follow = Next("discard-superseded", parameters={"names": [str(path)]})
        yield Usage(f"directory {path}, replaced by a restore", taken.bytes, DISCARD, follow)


def _of_docker(env: Environment) -> Iterator[Usage]:
    found = read_inventory(env.docker.host)
    parts = (
        ("stopped containers", sum(one.bytes for one in found.containers if one.stopped)),
        ("images that no container uses", sum(one.bytes for one in found.dangling_images())),
        ("build cache", sum(one.bytes for one in found.cache if not one.in_use)),
    )
    for what, used in parts:
        if used:
            yield Usage(f"Docker: {what}", used, "see its plan: it lists what it would delete", Next("clean-docker"))


def _trees(env: Environment, over: Sequence[str]) -> Iterator[Usage]:
    """The directories of the environment on a file system `over` its limit. A directory that cannot be read completely,
    or not in time, is at least that large."""
    once = {path: name for name, path in reversed(list(paths_of(env))) if f"{name} {path}" in over}
    named = [(name, path) for path, name in once.items()]
    measured = measure_trees([path for _, path in named], TREE_SECONDS)
    for name, path in named:
        taken = measured[path]
        flow, advice = _ADVICE.get(name.partition(":")[0], ("", "find its largest files: du -xh --max-depth=2"))
        least = "" if taken.whole else " (at least: not everything could be counted)"
        if name.endswith(": pg_wal"):
            flow, advice = "check-replication", NEVER
        if taken.bytes:
            yield Usage(f"{name}: {path}{least}", taken.bytes, advice, Next(flow) if flow else None)
        wal = path / "pg_wal"
        with contextlib.suppress(PermissionError):
            if name in ("postgres", "standby") and not wal.is_symlink() and wal.is_dir():
                yield Usage(f"{name}: {wal}", measure_trees([wal], TREE_SECONDS)[wal].bytes, NEVER)


_ADVICE = {
    "reports": ("", "move old reports to another disk as a whole, or enlarge the disk: the chain is evidence"),
    "temporary files": ("", "ask the owners of the rest; this run deletes what dead runs left"),
    "postgres": ("check-indexes", "never delete files in it; for bloat: check-indexes, vacuum-database"),
    "standby": ("rejoin-standby", "never delete files in it; a standby can be rebuilt"),
    "redis": ("snapshot-redis", "rewrite the AOF to make it smaller"),
    "backups": ("prune-backups", "copy old backups to another place first, then prune them"),
    "spool": ("", "complete backups wait there for their store: the next backup uploads them"),
    "received WAL": ("", "check why the archiver does not upload it"),
    "logs": ("clean-logs", "rotate a large live log (rotate-logs); this run deletes old rotated logs"),
    "application": ("", "search it for uploads and core dumps; deploy-application manages its releases"),
}


def attach_usage(report: Report, env: Environment, found: Sequence[Usage]) -> None:
    """The table, and the links to the runbooks that decide."""
    rows = [(one.what, size(one.bytes), one.advice) for one in found]
    report.table(
        "What uses the space, largest first (some bytes count in two rows)", ("what", "bytes", "next step"), rows
    )
    forms = read_forms([env.name])
    first = {str(one.follow): one for one in reversed(found) if one.follow}  # of equal ones the largest
    lines = [
        f"- {escaped(one.what)}: {forms.next(one.follow, env.name)}"
        for one in found
        if one.follow and first[str(one.follow)] is one
    ]
    if lines:
        report.attach(Evidence("Run next", text="\n".join(lines)))
