"""For the first minutes of an incident: every way there is, with what it loses, how long it takes, and its form (§8.4).

It also runs without a Prefect server, which may have died with the rest:

    python -m flows.recovery.objectives.options --environment production
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import psycopg
from prefect import flow

from blocks.config import toml
from blocks.environment import Environment, Stores
from flows.database.free_space import WAL_RATIO
from flows.launch import launch
from flows.recovery.objectives import board
from flows.recovery.objectives.points import RESOURCES, Reach, judge_sources, read_reach, resources_of, sets_of
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.page.form import Forms, read_forms
from runbook.page.markdown import escaped
from runbook.page.render import table
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.units import duration, size
from tasks.application.staged_files import superseded_files
from tasks.host.disk import disk_on
from tasks.postgres.restore.superseded import find_superseded
from tasks.postgres.tables.kept import find_superseded_tables
from tasks.recovery_points.backups import TAKEN_BY
from tasks.recovery_points.point import Danger, Point, best_of
from tasks.redis.restore.swap import superseded_redis
from tasks.redis.server import live_directory

WAYS, FORMS = "Ways, least loss first", "Forms, filled in"


@flow(name="show-recovery-options", flow_run_name="show-recovery-options {environment}")
def show_recovery_options(environment: str) -> Report:
    """復旧手段の一覧 (§8.4)

    Shows every way to bring something back, as of now: failover to the standby, a point in time, a full restore from
    backups or their copies, single tables, Redis's failover and restore, another region, and the undo of a restore
    before. Each with the newest moment that it brings back, what is lost, the estimated time, the room that it takes,
    what must be put right before, and the form of its runbook, filled in. Run it first in an incident (phase 2 of §8.4,
    復旧戦略の決定): it decides nothing, and every form shows its own plan before it changes anything.

    It only reads, takes no lock, and works with the database, Redis or the whole system down, and without Prefect.
    Evidence: the table, sorted by loss, then by time.

    Departs from the manual, which knows one way for each failure.

    Args:
        environment: 対象の環境 (障害が起きている側)
    """
    env = Environment.find(environment)
    with runbook("Show recovery options", env) as report:
        reach = read_reach(env)
        board.rebuild(env, reach)
        ways = find_ways(env, reach)
        report.fact("as of", f"{reach.now.astimezone(env.zone):%Y-%m-%d %H:%M:%S %Z}")
        report.fact("primary of the database", "takes writes" if reach.written.end else reach.written.problem)
        report.table(WAYS, _COLUMNS, [_row(number, way, env, reach.now) for number, way in enumerate(ways, 1)])
        report.attach(Evidence(FORMS, text=_forms(ways, read_forms(names_of(ways)))))
        _judge(report, env, reach)
        judge_sources(report, env, reach)
        first = next((way for way in ways if way.at), None)
        report.outcome = f"least lost: {first.what} ({told_loss(first, reach.now)})" if first else "nothing is left"
    return report


_COLUMNS = ("#", "way", "helps when", "newest moment", "lost", "proven", "takes", "room: needed / free", "before that")


def _row(number: int, way: Way, env: Environment, now: datetime) -> tuple[object, ...]:
    room = f"{size(way.needs)} / {size(way.free) if way.free >= 0 else 'not measured'}" if way.needs else ""
    return (
        number,
        way.what,
        ", ".join(way.helps),
        f"{way.at.astimezone(env.zone):%m-%d %H:%M:%S}" if way.at else "none",
        told_loss(way, now),
        way.proven or "never",
        "never measured" if math.isnan(way.seconds) else f"about {duration(way.seconds)}",
        room,
        "; ".join(way.problems),
    )


def told_loss(way: Way, now: datetime) -> str:
    """For people."""
    loss = way.loss_seconds(now)
    if math.isinf(loss):
        return "everything, or not known"
    return "nothing" if way.exact and loss < 1 else ("" if way.exact else "at most ") + duration(loss)


def _forms(ways: Sequence[Way], forms: Forms) -> str:
    """Not in the table: its cells are cut, and a form's address is long."""
    return "\n".join(
        f"{number}. {escaped(way.what)}: {forms.link(way.flow, way.environment, way.parameters, way.command)}"
        for number, way in enumerate(ways, 1)
    )


def _judge(report: Report, env: Environment, reach: Reach) -> None:
    """That there is a way at all: what is left to decide is people's."""
    for resource in resources_of(env):
        points = [point for point in reach.points if point.resource == resource]
        unknown = next((point for point in points if point.unknown), None)
        found = any(point.at for point in points)
        report.require(
            f"a way for the {resource}",
            found,
            unknown.hint if unknown else f"look for copies elsewhere; {TAKEN_BY[resource]} takes backups",
            value="there is one" if found else f"not known: {unknown.problem}" if unknown else "none",
        )


def as_text(report: Report) -> str:
    """The ways and their commands, for a terminal."""
    parts = [
        (table(one.columns, one.rows) if one.columns else one.text)
        for name in (WAYS, FORMS)
        for one in report.evidence
        if one.name == name
    ]
    return "\n\n".join((*parts, ""))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.recovery.objectives.options", description="復旧手段の一覧 (§8.4)"
    )
    parser.add_argument("--environment", required=True, help="the one that has failed")
    return launch(show_recovery_options, vars(parser.parse_args()), as_text)


MODULES = {"full-restore": "flows.recovery.full_restore", "restore-to-point": "flows.recovery.point.restore"}
"""Those that can be launched without Prefect."""


LIVE = ("restore-database", "restore-tables")
"""Those that restore into a server that lives."""


@dataclass(frozen=True)
class Way:
    """A runbook of an environment, with the form's parameters. `at` None: it brings nothing back now, `problems` say
    why; others of them must be put right before. `seconds` NaN: never measured. `free` -1: nobody here can see."""

    flow: str
    environment: str
    what: str
    parameters: Mapping[str, object]
    helps: tuple[str, ...]
    at: datetime | None = None
    exact: bool = True
    proven: str = ""
    seconds: float = math.nan
    needs: int = 0
    free: int = -1
    problems: tuple[str, ...] = field(default=())

    def loss_seconds(self, now: datetime) -> float:
        """What would be lost; without end where nothing is brought back."""
        return max(0.0, (now - self.at).total_seconds()) if self.at else math.inf

    def rank(self, now: datetime) -> tuple[float, float, bool]:
        """The least loss first (to the second), then the quickest, then what is proven."""
        return (
            round(self.loss_seconds(now), 0) if self.at else math.inf,
            math.inf if math.isnan(self.seconds) else self.seconds,
            not self.proven,
        )

    @property
    def command(self) -> str:
        """Without Prefect; "" where it needs it."""
        if self.flow not in MODULES:
            return ""
        given = [f"--{name.replace('_', '-')} {value}" for name, value in self.parameters.items() if value != ""]
        return " ".join((f"python -m {MODULES[self.flow]}", *given))


def find_ways(env: Environment, reach: Reach) -> list[Way]:
    """All of them, the best first."""
    ways = [*_of_points(env, reach), *_everything(env, reach), *_regions(env, reach), *_undos(env, reach)]
    return sorted(ways, key=lambda way: way.rank(reach.now))


def _of_points(env: Environment, reach: Reach) -> Iterator[Way]:
    for point in reach.points:
        source = {} if point.place == "live" else {"source": point.place}
        match point.resource, point.means:
            case "database", "standby":
                mode = "planned" if reach.written.end else "unplanned"
                yield _way(
                    env,
                    reach,
                    point,
                    "postgres-failover",
                    "failover to the standby",
                    {"mode": mode, "new_primary": point.name},
                )
            case "database", "point in time":
                yield _way(
                    env,
                    reach,
                    point,
                    "restore-to-point",
                    "the whole cluster at a point in time",
                    {"by": "latest", **source},
                )
                yield _way(
                    env,
                    reach,
                    point,
                    "restore-to-point",
                    "single tables as they were at a point in time",
                    {"by": "before_transaction", "mode": "tables", **source},
                    ("data corrupted",),
                )
            case "database", "backup":
                named = {"backup": point.name, **source}
                yield _way(env, reach, point, "restore-database", "the database from a backup", named)
                yield _way(
                    env, reach, point, "restore-tables", "single tables from a backup", named, ("data corrupted",)
                )
            case "redis", "replica":
                mode = "planned" if point.exact else "unplanned"
                yield _way(env, reach, point, "redis-failover", "Redis: failover to a replica", {"mode": mode})
            case "redis", "backup":
                yield _way(env, reach, point, "restore-redis", "Redis from a backup", {"backup": point.name, **source})
            case "files", "backup":
                yield _way(
                    env,
                    reach,
                    point,
                    "restore-files",
                    "application files from a backup",
                    {"backup": point.name, **source},
                )


def _way(
    env: Environment,
    reach: Reach,
    point: Point,
    flow: str,
    what: str,
    parameters: Mapping[str, object],
    helps: tuple[Danger, ...] = (),
) -> Way:
    taken = reach.estimate(point)
    needs, free = _room(env, point)
    problems = [f"{point.problem} — {point.hint}"] if point.problem else []
    if not reach.written.end and (flow in LIVE or parameters.get("mode") == "tables"):
        problems.append(
            f"it needs a server that takes writes ({reach.written.problem}) — start it, or launch "
            "full-restore or restore-to-point, which do not need one"
        )
    if 0 <= free < needs:
        problems.append(f"{size(needs - free)} too little room: discard-superseded removes old data")
    return Way(
        flow,
        env.name,
        what,
        {"environment": env.name, **parameters},
        helps or tuple(danger for danger in get_args(Danger) if point.serves(danger)),
        point.at,
        point.exact,
        point.proven,
        taken.seconds if taken else math.nan,
        needs,
        free,
        tuple(problems),
    )


def _room(env: Environment, point: Point) -> tuple[int, int]:
    """What the copy beside takes, and what is free there; 0 where it takes nothing, -1 where nobody here can see."""
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


def _everything(env: Environment, reach: Reach) -> Iterator[Way]:
    """A full restore: as old as the database's backup."""
    for which in sets_of(env):
        yield _full(env, reach, which)


def _full(env: Environment, reach: Reach, which: Stores) -> Way:
    of = {
        resource: [p for p in reach.points if (p.resource, p.means, p.place) == (resource, "backup", which)]
        for resource in resources_of(env)
    }
    best = {resource: best_of(points) for resource, points in of.items()}
    chosen = [point for point in best.values() if point]
    problems = [
        f"{points[0].resource}: {points[0].problem} — {points[0].hint}"
        for points in of.values()
        if points and not best_of(points)
    ]
    rooms = [_room(env, point) for point in chosen]
    taken = reach.estimate_everything(chosen)
    database = best.get("database")
    helps: tuple[str, ...] = ("everything lost", *(("region lost",) if which == "copies" else ()))
    if any(point.beside for point in chosen):
        helps = ("everything lost, and this host not",)
    return Way(
        "full-restore",
        env.name,
        "everything: database, Redis and files from backups",
        {"environment": env.name, "source": which, **({"backup": database.name} if database else {})},
        helps,
        database.at if database else None,
        True,
        database.proven if database else "",
        taken.seconds if taken else math.nan,
        sum(needs for needs, _ in rooms),
        min((free for _, free in rooms if free >= 0), default=-1),
        tuple(problems),
    )


def other_regions(env: Environment) -> list[str]:
    """Environments whose first stores are this one's second: those that can take over for it."""
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


def _regions(env: Environment, reach: Reach) -> Iterator[Way]:
    best = reach.best("database", "region lost")
    backups = [best_of(p for p in reach.of(resource, "region lost") if p.means == "backup") for resource in RESOURCES]
    taken = reach.estimate_everything([point for point in backups if point])
    for name in other_regions(env):
        problem = "" if best else "nothing of the database is in the copies — replicate-backups brings it there"
        yield Way(
            "region-failover",
            name,
            f"failover of the region to {name}",
            {"environment": name, "source": env.name},
            ("region lost",),
            best.at if best else None,
            best.exact if best else True,
            best.proven if best else "",
            taken.seconds if taken else math.nan,
            problems=(problem,) if problem else (),
        )


def _undos(env: Environment, reach: Reach) -> Iterator[Way]:
    """What a restore before replaced is still there: of the moment of that restore."""
    if reach.written.end:
        with contextlib.suppress(OpsError, psycopg.Error):
            for old in find_superseded(env.postgres)[:1]:
                what = f"back to the database that {old.backup} replaced"
                yield _undo(env, "undo-restore", what, old.name, old.since)
            for table in find_superseded_tables(env.postgres)[:1]:
                what = f"back to the rows that {table.backup} replaced"
                yield _undo(env, "undo-restore-tables", what, table.stamp, table.since)
    for aside in superseded_redis(env.redis)[-1:] if env.has("redis") and not env.redis.remote else ():
        moment = datetime.fromtimestamp(aside.stat().st_ctime, UTC).isoformat()
        yield _undo(env, "undo-restore-redis", "back to Redis's data before the restore", aside.name, moment)
    for aside in superseded_files(env.application)[-1:] if env.has("application") and env.application.directory else ():
        moment = datetime.fromtimestamp(aside.stat().st_ctime, UTC).isoformat()
        yield _undo(env, "undo-restore-files", "back to the files before the restore", aside.name, moment)


def _undo(env: Environment, flow: str, what: str, kept: str, since: str) -> Way:
    try:
        at = datetime.fromisoformat(since)
    except ValueError:
        at = None
    at = at.replace(tzinfo=UTC) if at and at.tzinfo is None else at
    return Way(
        flow,
        env.name,
        what,
        {"environment": env.name, "kept": kept},
        ("a restore that was a mistake",),
        at,
        proven="kept as it was",
        problems=() if at else ("nobody noted when it was replaced",),
    )


def names_of(ways: Sequence[Way]) -> list[str]:
    """The environments whose deployments they are."""
    return list(dict.fromkeys(way.environment for way in ways))


if __name__ == "__main__":
    sys.exit(exit_code(main))
