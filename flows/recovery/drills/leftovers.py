"""What a drill's recoveries have kept aside: told with its size; what this drill itself made goes when the system is
healthy again and has a new base backup, and nothing else ever does."""

from __future__ import annotations

import json
from collections.abc import Sequence

from flows.database.superseded import KeptData, discard_superseded, find_kept_data
from flows.recovery.drills.scenario import Drill
from runbook.errors import OpsError
from runbook.report import Status
from runbook.units import size

TAKEN = "Backup cluster"
HINT = "look at it, then launch discard-superseded"


def note(drill: Drill) -> None:
    """What lies aside before anything is broken: it is not the drill's."""
    drill.note(aside=json.dumps([item.name for item in find_kept_data(drill.env, 0)]))


def clear(drill: Drill) -> None:
    """At the end, when the system has settled: remove what this drill made, or say why it stays."""
    made = _made(drill)
    why = _why_it_stays(drill)
    if made and not why:
        try:
            drill.run(discard_superseded, keep=0, names=tuple(item.name for item in made), confirm=drill.env.name)
        except OpsError as error:
            why = error.message
    _report_results(drill, made, why)


def report_results(drill: Drill) -> None:
    """Of a drill that was killed: others may have kept something aside since, so all of it stays."""
    _report_results(drill, _made(drill), "the drill was killed")


def _made(drill: Drill) -> list[KeptData]:
    before = json.loads(drill.half_done.notes.get("aside", "[]"))
    try:
        return [item for item in find_kept_data(drill.env, 0) if item.name not in before]
    except OpsError as error:
        drill.report.warn("what the drill's recoveries kept aside", HINT, value=f"not known: {error.message}")
        return []


def _why_it_stays(drill: Drill) -> str:
    if drill.report.status is Status.CRITICAL:
        return "the drill is CRITICAL"
    taken = [run for run in drill.runs if run.runbook == TAKEN and run.status in (Status.OK, Status.WARN)]
    return "" if taken else "no base backup was taken since"


def _report_results(drill: Drill, made: Sequence[KeptData], why: str) -> None:
    if not made:
        return
    told = f"stays: {why}" if why else "removed"
    rows = [(item.kind, item.name, size(item.bytes), told) for item in made]
    drill.report.table("Kept aside by this drill's recoveries", ("kind", "name", "size", ""), rows)
    all_of_it = f"{len(made)} ({size(sum(item.bytes for item in made))})"
    if why:
        drill.report.warn("what the drill's recoveries kept aside", HINT, value=f"{all_of_it} {told}")
    else:
        drill.report.fact("kept aside by its recoveries", f"{all_of_it}, removed at the end")
