"""Old data that a drill's recoveries kept. It is deleted when the system is healthy and has a new base backup. Data
that was kept before the drill is never deleted."""

from __future__ import annotations

import json
from collections.abc import Sequence

from flows.database.superseded import SupersededData, discard_superseded, find_kept_data
from flows.recovery.drills.scenario import Drill
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Status
from runbook.units import size

TAKEN = "Backup cluster"
HINT = "check it, then run discard-superseded"
KEPT = "old data kept by the drill's recoveries"


def note(drill: Drill) -> None:
    """Record what is kept before anything is broken: it is not the drill's."""
    drill.note(aside=json.dumps([item.name for item in find_kept_data(drill.env, 0)]))


def clear(drill: Drill) -> None:
    """At the end, when the system has settled: delete what this drill kept, or report why it stays."""
    made = _made(drill)
    why = _why_it_stays(drill)
    if made and not why:
        try:
            drill.run(discard_superseded, keep=0, names=tuple(item.name for item in made), confirm=drill.env.name)
        except OpsError as error:
            why = error.message
    _report_results(drill, made, why)


def report_results(drill: Drill) -> None:
    """After a killed drill: other runs may have kept data since, so all of it stays."""
    _report_results(drill, _made(drill), "the drill was killed")


def _made(drill: Drill) -> list[SupersededData]:
    before = json.loads(drill.half_done.notes.get("aside", "[]"))
    try:
        return [item for item in find_kept_data(drill.env, 0) if item.name not in before]
    except OpsError as error:
        drill.report.warn(KEPT, HINT, value=f"not known: {error.message}")
        return []


def _why_it_stays(drill: Drill) -> str:
    if drill.report.status is Status.CRITICAL:
        return "the drill is CRITICAL"
    taken = [run for run in drill.runs if run.runbook == TAKEN and run.status in (Status.OK, Status.WARN)]
    return "" if taken else "no base backup was taken since"


def _report_results(drill: Drill, made: Sequence[SupersededData], why: str) -> None:
    if not made:
        return
    outcome = f"stays: {why}" if why else "deleted"
    rows = [(item.kind, item.name, size(item.bytes), outcome) for item in made]
    drill.report.table("Old data kept by this drill's recoveries", ("kind", "name", "size", ""), rows)
    total = f"{len(made)} ({size(sum(item.bytes for item in made))})"
    if why:
        drill.report.warn(KEPT, HINT, value=f"{total} {outcome}", follow=[Next("discard-superseded", "delete it")])
    else:
        drill.report.fact(KEPT, f"{total}, deleted at the end")
