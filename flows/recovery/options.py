"""For the first minutes of an incident: every way there is, with what it loses, how long it takes, and its form (§8.4).

It also runs without a Prefect server, which may have died with the rest:

    python -m flows.recovery.options --environment production
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import datetime

from prefect import flow

from blocks.environment import Environment
from flows.launch import launch
from flows.recovery import board
from flows.recovery.points import Reach, judge_sources, read_reach, resources_of
from flows.recovery.ways import Way, find_ways, names_of
from runbook.drivers import exit_code
from runbook.form import Forms, read_forms
from runbook.markdown import escaped
from runbook.render import duration, size, table
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from tasks.recovery_points.backups import TAKEN_BY

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
        number, way.what, ", ".join(way.helps),
        f"{way.at.astimezone(env.zone):%m-%d %H:%M:%S}" if way.at else "none", told_loss(way, now),
        way.proven or "never", "never measured" if math.isnan(way.seconds) else f"about {duration(way.seconds)}",
        room, "; ".join(way.problems),
    )  # fmt: skip


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
        report.expect(f"a way for the {resource}", found,
                      unknown.hint if unknown else f"look for copies elsewhere; {TAKEN_BY[resource]} takes backups",
                      value="there is one" if found else f"not known: {unknown.problem}" if unknown else "none",
                      otherwise=Status.CRITICAL)  # fmt: skip


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
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.options", description="復旧手段の一覧 (§8.4)")
    parser.add_argument("--environment", required=True, help="the one that has failed")
    return launch(show_recovery_options, vars(parser.parse_args()), as_text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
