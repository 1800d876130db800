"""What holds the space, and what to do about each: told only. Called with the open report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg

from blocks.environment import Environment
from blocks.postgres.server import first_line
from flows.database.superseded import superseded_directories
from flows.troubleshooting.disk_systems import FileSystem, paths_of
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
NEVER = "never remove a file there: what keeps them is in the rows of slots and archiver"


@dataclass(frozen=True)
class Holder:
    """`flow` with `parameters` is the runbook that decides about it, "" where there is none."""

    what: str
    bytes: int
    advice: str
    flow: str = ""
    parameters: tuple[tuple[str, object], ...] = ()


def find_holders(report: Report, env: Environment, systems: Sequence[FileSystem]) -> list[Holder]:
    """All that are known, the biggest first."""
    found: list[Holder] = []
    for what, part, ask in (
        ("the database", "postgres", _of_server),
        ("kept data", "postgres", _kept),
        ("Docker", "docker", _of_docker),
    ):
        if not env.has(part):
            continue
        try:
            found += ask(env)
        except OpsError as error:
            report.warn(f"not measured: {what}", error.hint, value=error.message)
        except psycopg.Error as error:
            report.warn(f"not measured: {what}", "give the administrator that right", value=first_line(error))
    found += _trees(env, [path for one in systems if one.is_over(report) for path in one.paths])
    return sorted(found, key=lambda one: -one.bytes)


def _of_server(env: Environment) -> Iterator[Holder]:
    """What the server itself says."""
    node = env.postgres
    greeting = read_greeting(node)
    if greeting.state != "ready":  # or every question would be asked again and again
        raise Unreachable(
            f"PostgreSQL at {node.host}:{node.port} does not answer: {greeting.detail}",
            "what it says of slots and archiver is missing here: diagnose-database",
        )
    space, replication = read_server_space(node), read_replication(node)
    for slot in replication.slots:
        if slot.held_bytes > space.segment_bytes or not slot.active:
            state = "in use" if slot.active else f"nobody reads it since {slot.inactive_since or 'its creation'}"
            advice = (
                "bring its consumer back, or it catches up"
                if slot.active
                else f"dropping it is a decision: its consumer then needs a new base backup. "
                f"SELECT pg_drop_replication_slot('{slot.name}')"
            )
            yield Holder(f"WAL kept for the slot {slot.name} ({state})", slot.held_bytes, advice, "check-replication")
    archiver = replication.archiver
    if archiver.waiting:
        state = f"failing since {archiver.last_failed}" if archiver.is_failing else "it is behind"
        advice = "mend archive_command (the server's log says why), then the server removes them itself"
        yield Holder(
            f"{archiver.waiting} files of WAL that wait for the archiver ({state})",
            archiver.waiting * space.segment_bytes,
            advice,
            "check-replication",
        )
    yield Holder("pg_wal in all, by the server", space.wal_bytes, NEVER, "check-replication")
    if space.temporary_bytes:
        yield Holder(
            "temporary files of queries",
            space.temporary_bytes,
            "they go with their query: find it, end it; temp_file_limit keeps the next one small",
            "check-connections",
        )


def _kept(env: Environment) -> Iterator[Holder]:
    """What restores replaced: gone by name only, when the restore has proven itself."""
    if read_greeting(env.postgres).state == "ready":  # its absence is told above
        for old in find_superseded(env.postgres):
            yield Holder(
                f"database {old.name}, replaced {old.since}",
                old.bytes,
                "discard it by name, once what replaced it is proven",
                "discard-superseded",
                (("names", [old.name]),),
            )
    paths = [path for aside in superseded_directories(env) for path in aside]
    for path, taken in measure_trees(paths).items():
        yield Holder(
            f"directory {path}, replaced by a restore",
            taken.bytes,
            "discard it by name, once what replaced it is proven",
            "discard-superseded",
            (("names", [str(path)]),),
        )


def _of_docker(env: Environment) -> Iterator[Holder]:
    found = read_inventory(env.docker.host)
    parts = (
        ("stopped containers", sum(one.bytes for one in found.containers if one.stopped)),
        ("images that no container uses", sum(one.bytes for one in found.dangling_images())),
        ("build cache", sum(one.bytes for one in found.cache if not one.in_use)),
    )
    for what, taken in parts:
        if taken:
            yield Holder(f"Docker: {what}", taken, "clean-docker shows what would go first", "clean-docker")


def _trees(env: Environment, over: Sequence[str]) -> Iterator[Holder]:
    """What is below each path of the environment that lies on a file system that is `over` its limit. A tree that may
    not be read in full, or not in time, is at least so big."""
    once = {path: name for name, path in reversed(list(paths_of(env))) if f"{name} {path}" in over}
    named = [(name, path) for path, name in once.items()]
    measured = measure_trees([path for _, path in named], TREE_SECONDS)
    for name, path in named:
        taken = measured[path]
        flow, advice = _ADVICE.get(name.partition(":")[0], ("", "look at its biggest files: du -xh --max-depth=2"))
        least = "" if taken.whole else " (at least: not all of it could be counted)"
        if name.endswith(": pg_wal"):
            flow, advice = "check-replication", NEVER
        if taken.bytes:
            yield Holder(f"{name}: {path}{least}", taken.bytes, advice, flow)
        wal = path / "pg_wal"
        with contextlib.suppress(PermissionError):
            if name in ("postgres", "standby") and not wal.is_symlink() and wal.is_dir():
                yield Holder(f"{name}: {wal}", measure_trees([wal], TREE_SECONDS)[wal].bytes, NEVER)


_ADVICE = {
    "reports": ("", "the chain of reports is evidence: move old ones away as a whole, or enlarge its disk"),
    "temporary files": ("", "what dead runs left is removed here; for the rest ask its owners"),
    "postgres": ("check-indexes", "never remove a file in it; bloat: check-indexes, vacuum-database"),
    "standby": ("", "never remove a file in it; a standby can be made anew (rejoin-standby)"),
    "redis": ("check-redis-persistence", "an AOF is made smaller by a rewrite: snapshot-redis"),
    "backups": ("prune-backups", "prune-backups lets go what is old and not needed; copy them elsewhere first"),
    "spool": ("", "whole backups wait there for their store: the next backup sends them"),
    "received WAL": ("", "the archiver ships it on: look why it does not"),
    "logs": ("clean-logs", "rotated ones that are old are removed here; rotate-logs where the log itself is big"),
    "application": ("", "look for uploads and core dumps; its releases are deploy-application's"),
}


def tell_holders(report: Report, env: Environment, holders: Sequence[Holder], systems: Sequence[FileSystem]) -> None:
    """The table, and the forms of those who decide."""
    rows = [(one.what, size(one.bytes), one.advice) for one in holders]
    report.table(
        "What holds the space, the biggest first (some of it is counted in two rows)",
        ("what", "bytes", "what to do"),
        rows,
    )
    forms = read_forms([env.name])
    decided: dict[tuple[str, str], Holder] = {}
    for one in holders:
        if one.flow:
            decided.setdefault((one.flow, str(one.parameters)), one)
    lines = []
    for one in decided.values():
        given = dict(one.parameters)
        otherwise = Next(one.flow, parameters=given).command(env.name)
        link = forms.link(one.flow, env.name, {"environment": env.name, **given}, otherwise)
        lines.append(f"- {escaped(one.what)}: {link}")
    if lines:
        report.attach(Evidence("Run next", text="\n".join(lines)))
