"""show-recovery-options (§8.4): every recovery option with its loss, its duration and its form.

It also runs without a Prefect server:

    python -m flows.recovery.objectives.options --environment production
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import get_args

import psycopg

from blocks.config import toml
from blocks.environment import Environment, Stores
from flows.database.free_space import WAL_RATIO
from flows.launch import launch
from flows.recovery.listing import ListedOption, list_options, report_redis
from flows.recovery.objectives import board
from flows.recovery.objectives.points import (
    FILES,
    REDIS,
    RESOURCES,
    RecoveryPoints,
    judge_sources,
    read_recovery_points,
    resources_of,
    sets_of,
)
from runbook import clock
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.loss import Loss
from runbook.page.form import read_forms
from runbook.page.markdown import escaped
from runbook.page.render import table
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.application.staged_files import superseded_files
from tasks.cluster.kept import find_kept_clusters
from tasks.host.disk import disk_on, is_here
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.tables.kept import find_superseded_tables
from tasks.recovery_points.backups import TAKEN_BY
from tasks.recovery_points.point import Danger, Point, Resource, best_of
from tasks.redis.restore.swap import superseded_redis
from tasks.redis.server import live_directory

OPTIONS, FORMS = "Options, least loss first", "Forms, filled in"
COLUMNS = (
    *("#", "option", "helps when", "restored up to", "lost", "proven", "takes", "disk space: needed / free"),
    "fix before",
)
MODULES = {"full-restore": "flows.recovery.full_restore", "restore-to-point": "flows.recovery.point.restore"}
"""Runbooks with a command line of their own, for a host without Prefect."""
UNRECORDED = "the time of the swap was not recorded"
NEED_PRIMARY = ("restore-database", "restore-tables")


@flow(name="show-recovery-options", flow_run_name=RunName("show-recovery-options {environment}"))
def show_recovery_options(environment: str) -> Report:
    """復旧手段の一覧 (§8.4)

    Lists every recovery option that is available now: failover to the standby, a point in time, a full restore by each
    method, single tables, Redis failover and restore, another region, and the undo of an earlier restore. Each has the
    newest moment that it restores, its loss, estimated duration, disk space, what must be fixed before, and the
    filled-in form of its runbook. A second table has the sources of Redis's data, as full-restore judges them. Run it
    first in an incident (phase 2 of §8.4, choosing the recovery strategy). You decide; every form shows its plan before
    it changes anything.

    It only reads and takes no lock. It works if the database, Redis or everything is down, and without Prefect.
    Evidence: the table, sorted by loss, then by duration.

    Departs from the manual, which has one recovery option for each failure.

    Args:
        environment: Environment where the fault is
    """
    env = Environment.find(environment)
    with runbook("Show recovery options", env) as report:
        reach = read_recovery_points(env)
        board.rebuild(env, reach)
        options = find_options(env, reach)
        if last := board.last_recovery(env):
            report.fact("last recovery", f"{clock.text(last.at)}: {last.runbook} {last.status}; {last.lost}")
        report.fact("as of", f"{reach.now.astimezone(env.zone):%Y-%m-%d %H:%M:%S %Z}")
        report.fact("primary of the database", "accepts writes" if reach.written.end else reach.written.problem)
        report.table(OPTIONS, COLUMNS, [_row(number, one, env) for number, one in enumerate(options, 1)])
        report.attach(Evidence(FORMS, text=_forms(options)))
        report_redis(report, env)
        _judge(report, env, reach)
        judge_sources(report, env, reach)
        first = next((one for one in options if one.at), None)
        report.outcome = f"the least loss is by {first.what}: {first.loss.text}" if first else "no option restores data"
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.recovery.objectives.options", description="all recovery options (§8.4)"
    )
    parser.add_argument("--environment", required=True, help="the one that has failed")
    return launch(show_recovery_options, vars(parser.parse_args()), as_text)


def as_text(report: Report) -> str:
    """The options and their commands, for a terminal."""
    parts = [
        (table(one.columns, one.rows) if one.columns else one.text)
        for name in (OPTIONS, FORMS)
        for one in report.evidence
        if one.name == name
    ]
    return "\n\n".join((*parts, ""))


@dataclass(frozen=True)
class Option:
    """A runbook with its form's parameters. `at` None: it restores nothing now, `problems` explain that; other problems
    must be fixed before. `loss`: of the database, where it restores that. `seconds` NaN: never measured. `needs`,
    `free`: bytes of disk space; -1: not measured."""

    flow: str
    environment: str
    what: str
    parameters: Mapping[str, object]
    helps: tuple[str, ...]
    loss: Loss
    at: datetime | None = None
    proven: str = ""
    seconds: float = math.nan
    needs: int = 0
    free: int = -1
    problems: tuple[str, ...] = ()

    def loss_seconds(self, now: datetime) -> float:
        """The age of the newest restored write, to compare options; infinite if nothing is restored."""
        if self.loss.is_none:
            return 0.0
        return max(0.0, (now - self.at).total_seconds()) if self.at else math.inf

    def rank(self, now: datetime) -> tuple[float, float, bool]:
        """The least loss first (to the second), then the shortest duration, then the proven ones."""
        return (
            round(self.loss_seconds(now), 0) if self.at else math.inf,
            math.inf if math.isnan(self.seconds) else self.seconds,
            not self.proven,
        )

    @property
    def command(self) -> str:
        """The command line without Prefect; "" if it needs Prefect."""
        if self.flow not in MODULES:
            return ""
        given = [f"--{name.replace('_', '-')} {value}" for name, value in self.parameters.items() if value != ""]
        return " ".join((f"python -m {MODULES[self.flow]}", *given))


def find_options(env: Environment, reach: RecoveryPoints) -> list[Option]:
    """All of them, the best first."""
    full = [option for which in sets_of(env) for option in _full_restores(env, reach, which)]
    options = [*_of_points(env, reach), *full, *_regions(env, reach), *_undos(env, reach)]
    return sorted(options, key=lambda one: one.rank(reach.now))


def _row(number: int, one: Option, env: Environment) -> tuple[object, ...]:
    space = f"{size(one.needs)} / {size(one.free) if one.free >= 0 else 'not measured'}" if one.needs else ""
    return (
        number,
        one.what,
        ", ".join(one.helps),
        f"{one.at.astimezone(env.zone):%m-%d %H:%M:%S}" if one.at else "none",
        one.loss.text,
        one.proven or "never",
        "never measured" if math.isnan(one.seconds) else f"about {duration(one.seconds)}",
        space,
        "; ".join(one.problems),
    )


def _forms(options: Sequence[Option]) -> str:
    """As text: a table's cells are cut, and a form's address is long."""
    forms = read_forms(list(dict.fromkeys(one.environment for one in options)))
    return "\n".join(
        f"{number}. {escaped(one.what)}: {forms.link(one.flow, one.environment, one.parameters, one.command)}"
        for number, one in enumerate(options, 1)
    )


def _judge(report: Report, env: Environment, reach: RecoveryPoints) -> None:
    """Whether each resource can be restored at all. The choice is the operator's."""
    for resource in resources_of(env):
        points = [point for point in reach.points if point.resource == resource]
        unknown = next((point for point in points if point.unknown), None)
        found = any(point.at for point in points)
        report.require(
            f"a recovery option for the {resource}",
            found,
            unknown.hint if unknown else f"search for copies elsewhere; {TAKEN_BY[resource]} takes backups",
            value="available" if found else f"not known: {unknown.problem}" if unknown else "none",
        )


def _of_points(env: Environment, reach: RecoveryPoints) -> Iterator[Option]:
    for point in reach.points:
        source = {} if point.place == "live" else {"source": point.place}
        named, option = {"backup": point.name, **source}, partial(_of_point, env, reach, point)
        match point.resource, point.means:
            case "database", "standby":
                mode = "planned" if reach.written.end else "unplanned"
                yield option("postgres-failover", "failover to the standby", {"mode": mode, "new_primary": point.name})
            case "database", "point in time":
                yield option("restore-to-point", "the whole cluster at a point in time", {"by": "latest", **source})
                tables = {"by": "before_transaction", "mode": "tables", **source}
                yield option("restore-to-point", "single tables at a point in time", tables, ("data corrupted",))
            case "database", "backup":
                yield option("restore-database", "the database from a backup", named)
                yield option("restore-tables", "single tables from a backup", named, ("data corrupted",))
            case "redis", "replica":
                mode = "planned" if point.exact else "unplanned"
                yield option("redis-failover", "Redis: failover to a replica", {"mode": mode})
            case "redis", "backup":
                yield option("restore-redis", "Redis from a backup", named)
            case "files", "backup":
                yield option("restore-files", "application files from a backup", named)


def _of_point(
    env: Environment,
    reach: RecoveryPoints,
    point: Point,
    flow: str,
    what: str,
    parameters: Mapping[str, object],
    helps: tuple[Danger, ...] = (),
) -> Option:
    taken = reach.estimate(point)
    needs, free = _disk_space(env, point)
    problems = [f"{point.problem} — {point.hint}"] if point.problem else []
    if not reach.written.end and (flow in NEED_PRIMARY or parameters.get("mode") == "tables"):
        problems.append(
            f"it needs a server that accepts writes ({reach.written.problem}) — start it, or run full-restore or "
            "restore-to-point, which work without one"
        )
    if 0 <= free < needs:
        problems.append(f"{size(needs - free)} of disk space are missing — discard-superseded deletes old data")
    return Option(
        flow,
        env.name,
        what,
        {"environment": env.name, **parameters},
        helps or tuple(danger for danger in get_args(Danger) if point.serves(danger)),
        reach.loss_now(point),
        point.at,
        point.proven,
        taken.seconds if taken else math.nan,
        needs,
        free,
        tuple(problems),
    )


def _disk_space(env: Environment, point: Point) -> tuple[int, int]:
    """Bytes that the staged copy needs, and free bytes there; needs 0: no copy is made, free -1: not measured."""
    if not point.restored_bytes:
        return 0, -1
    match point.resource:
        case "database":
            needs = point.restored_bytes * (1 + WAL_RATIO if point.means == "backup" else 1.05)
            host, where = env.postgres.host, Path(env.postgres.data_directory).parent
        case "redis":
            needs, host, where = point.restored_bytes, env.redis.host, live_directory(env.redis).parent
        case "files":
            needs, host, where = point.restored_bytes, "", Path(env.application.directory).parent
    disk = disk_on(host, where)
    return int(needs), disk.free_bytes if disk else -1


def _full_restores(env: Environment, reach: RecoveryPoints, which: Stores) -> Iterator[Option]:
    """By each method for the database, as full-restore itself judges them."""
    of = {
        resource: [p for p in reach.points if (p.resource, p.means, p.place) == (resource, "backup", which)]
        for resource in resources_of(env)
    }
    listed = list_options(env, reach.points, which)
    for one in listed:
        of["database"] = [one.point]
        yield _full_restore(env, reach, which, of, one)
    if not listed:
        yield _full_restore(env, reach, which, of, None)


def _full_restore(
    env: Environment,
    reach: RecoveryPoints,
    which: Stores,
    of: Mapping[Resource, Sequence[Point]],
    listed: ListedOption | None,
) -> Option:
    """As old as the database's point, and with its loss."""
    best = {resource: best_of(points) for resource, points in of.items()}
    chosen = [point for point in best.values() if point]
    problems = [
        f"{points[0].resource}: {points[0].problem} — {points[0].hint}"
        for points in of.values()
        if points and not best_of(points)
    ]
    spaces = [_disk_space(env, point) for point in chosen]
    taken = reach.estimate_everything(chosen)
    database = best.get("database")
    judged = next(iter([database] if database else [*of.get("database", ()), *chosen]), None)
    how = {"method": listed.method} if listed else {}
    helps: tuple[str, ...] = ("everything lost", *(("region lost",) if which == "copies" else ()))
    if any(point.beside for point in chosen):
        helps = ("everything lost, but not this host",)
    return Option(
        "full-restore",
        env.name,
        f"everything, the database from {listed.kind if listed else 'backups'}",
        {"environment": env.name, "source": which, **how},
        helps,
        reach.loss_now(judged) if judged else Loss.everything("the data"),
        database.at if database else None,
        database.proven if database else "",
        taken.seconds if taken else math.nan,
        sum(needs for needs, _ in spaces),
        min((free for _, free in spaces if free >= 0), default=-1),
        tuple(problems),
    )


def other_regions(env: Environment) -> list[str]:
    """Environments that can take over: their backup stores are this one's replica stores."""
    if not env.has("copies"):
        return []
    own, found = env.stores("copies"), []
    for name in toml.known():
        try:
            other = toml.environment(name)
        except OpsError:  # of another site, whose secrets are not here
            continue
        if name != env.name and other.has("backups") and other.backups.postgres == own.postgres:
            found.append(name)
    return found


def _regions(env: Environment, reach: RecoveryPoints) -> Iterator[Option]:
    best, part = reach.best("database", "region lost"), reach.parts.get("database", "the data")
    backups = [best_of(p for p in reach.of(resource, "region lost") if p.means == "backup") for resource in RESOURCES]
    taken = reach.estimate_everything([point for point in backups if point])
    for name in other_regions(env):
        yield Option(
            "region-failover",
            name,
            f"failover of the region to {name}",
            {"environment": name, "source": env.name},
            ("region lost",),
            Loss.everything_since(part, best.at) if best and best.at else Loss.everything(part),
            best.at if best else None,
            best.proven if best else "",
            taken.seconds if taken else math.nan,
            problems=() if best else ("the replica store has no database — replicate-backups copies one",),
        )


def _undos(env: Environment, reach: RecoveryPoints) -> Iterator[Option]:
    """What an earlier restore replaced, and kept: as of that restore."""
    undo, database = partial(_undo, env), env.postgres.database if env.has("postgres") else ""
    here = env.has("postgres") and is_here(env.postgres.host)
    for aside in find_kept_clusters(env.postgres)[:1] if here else ():
        what = "the PostgreSQL cluster of before the restore"
        yield undo("undo-full-restore", "PostgreSQL", what, aside.name, _changed(aside))
    if reach.written.end:
        with contextlib.suppress(OpsError, psycopg.Error):
            for old in find_superseded(env.postgres)[:1]:
                yield undo("undo-restore", database, f"the database that {old.backup} replaced", old.name, old.since)
            for kept in find_superseded_tables(env.postgres)[:1]:
                what = f"the rows that {kept.backup} replaced"
                yield undo("undo-restore-tables", "the replaced tables", what, kept.stamp, kept.since)
    for aside in superseded_redis(env.redis)[-1:] if env.has("redis") and not env.redis.remote else ():
        yield undo("undo-restore-redis", REDIS, "Redis's data of before the restore", aside.name, _changed(aside))
    for aside in superseded_files(env.application)[-1:] if env.has("application") and env.application.directory else ():
        yield undo("undo-restore-files", FILES, "the files of before the restore", aside.name, _changed(aside))


def _changed(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_ctime, UTC).isoformat()


def _undo(env: Environment, flow: str, part: str, what: str, kept: str, since: str) -> Option:
    try:
        at = datetime.fromisoformat(since)
    except ValueError:
        at = None
    at = at.replace(tzinfo=UTC) if at and at.tzinfo is None else at
    return Option(
        flow,
        env.name,
        f"back to {what}",
        {"environment": env.name, "kept": kept},
        ("a restore was a mistake",),
        Loss.everything_since(part, at) if at else Loss.not_known(part, UNRECORDED),
        at,
        proven="not a copy",
        problems=() if at else (UNRECORDED,),
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
