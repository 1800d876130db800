"""Phases 1 and 2 of §8.4: on-call is paged and acknowledges, the incident is declared, stakeholders are informed.

This is the real escalation of appendix C. With `page`, the channels of `[alerts]` page the on-call person, and the
drill waits for the acknowledgement. Otherwise a file in the drill's directory is the test channel: no phone rings, the
drill's incidents are separate from the environment's, and the drill acknowledges at once. The measured time is then
the time until somebody could acknowledge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from blocks.environment import Environment
from blocks.people.alerts import Alerts
from flows.monitoring import incident
from flows.monitoring.table import ALARMS
from flows.recovery.drills.scenario import NOBODY, Drill, Symptom
from runbook import metrics
from runbook.errors import OpsError, Unreachable
from runbook.units import duration
from runbook.wait import until
from tasks.alerts.incident import Incident

METRIC_OF = {
    "application": metrics.API_ERRORS.name,
    "database": metrics.CONNECTIONS.name,
    "replication": metrics.STREAMS_MISSING.name,
}
"""The metric of each sensor that has one."""
ARRIVES_SECONDS = 30.0
ANSWER_SECONDS = 15 * 60.0
HINT = "check [alerts] in the environment's TOML; the drill continued without it"


def answer_alarm(drill: Drill, symptom: Symptom) -> Incident | None:
    """On-call is paged and acknowledges; a second alarm, which nobody acknowledges, reaches every level. None without
    [alerts]: those boxes of the checklist stay open."""
    if not drill.env.has("alerts"):
        drill.report.warn(
            "escalation", "add [alerts] to the environment's TOML", value="not rehearsed: no contact is configured"
        )
        return None
    try:
        taken = _taken(drill, symptom)
        _rehearse_levels(drill)
    except OpsError as error:
        drill.report.fail("escalation", error.hint or HINT, value=error.message)
        return None
    return taken


def declare(drill: Drill, taken: Incident | None) -> None:
    """The start of phase 2."""
    if taken is None:
        return
    env = drill.env if drill.page else drilled(drill, "alerts.jsonl")
    try:
        found = incident.declare(drill.report, env, taken.id, _by(drill))
        found = incident.notify_stakeholders(drill.report, env, found)
    except OpsError as error:
        drill.report.fail("incident declared", error.hint or HINT, value=error.message)
        return
    informed = [one for one in env.alerts.stakeholders if found.reached(incident.STAKEHOLDERS, one)]
    drill.done["declared"] = f"{found.id}, by {found.declared_by}"
    if informed and len(informed) == len(env.alerts.stakeholders):
        drill.done["stakeholders"] = f"{', '.join(informed)}, through the test channel"


def drilled(drill: Drill, channel: str, *, at_once: bool = False) -> Environment:
    """The environment with a file of the drill as its only channel; `at_once`: without minutes between the levels."""
    alerts = drill.env.alerts
    contacts = {name: one.model_copy(update={"channels": []}) for name, one in alerts.contacts.items()}
    path = [level.model_copy(update={"minutes": 0.0} if at_once else {}) for level in alerts.path]
    update = {"channels": ["file"], "file": str(drill.directory / channel), "contacts": contacts, "path": path}
    drill.directory.mkdir(parents=True, exist_ok=True)
    reports = drill.directory / Path(channel).stem
    return drill.env.derived({"alerts": alerts.model_copy(update=update)}, reports=reports)


def _taken(drill: Drill, symptom: Symptom) -> Incident:
    env = drill.env if drill.page else drilled(drill, "alerts.jsonl")
    metric = ALARMS.get(METRIC_OF.get(symptom.sensor, ""))
    what = f"this is a drill: {metric.title if metric else symptom.sensor}: {symptom.text}"
    key = f"drill {metric.name if metric else symptom.sensor}"
    owner = metric.owner if metric else "SRE"
    opened = incident.open_incident(drill.report, env, what=what, severity="severe", owner=owner, key=key)
    if drill.page:
        drill.note(paged=opened.id)
        taken = _answered(drill, opened)
    else:
        until(lambda: _arrived(env.alerts, opened), what="the message on the test channel", seconds=ARRIVES_SECONDS)
        taken = incident.acknowledge(drill.report, env, opened.id, _by(drill), "this is a drill")
    took = taken.acknowledged_seconds or 0.0
    assert drill.fault
    assert taken.acknowledged
    since = (taken.acknowledged - drill.fault.began).total_seconds()
    drill.report.fact("alarm answered", f"{duration(since)} after the fault, {duration(took)} after the escalation")
    drill.done["on-call"] = f"paged; acknowledged by {taken.acknowledged_by} after {duration(took)}"
    return taken


def _answered(drill: Drill, opened: Incident) -> Incident:
    """Wait for acknowledge-incident; the next levels are paged after their minutes.

    Raises:
        OpsError: nobody acknowledged in time.
    """
    env = drill.env
    kept = incident.incidents(env)
    drill.report.fact("paged", f"{opened.id}: {', '.join(f'{one.contact} by {one.channel}' for one in opened.told)}")

    def acknowledged() -> Incident | None:
        found = kept.get(opened.id)
        if found.acknowledged:
            return found
        incident.go_on(drill.report, env, found)
        return None

    try:
        found = until(acknowledged, what="the acknowledgement", seconds=ANSWER_SECONDS, every_seconds=1.0)
    except Unreachable:
        hint = "check the on-call rota, the phone and the channels of [alerts]; the drill continued"
        raise OpsError(f"nobody acknowledged {opened.id} within {duration(ANSWER_SECONDS)}", hint) from None
    assert found
    return found


def close(drill: Drill) -> None:
    """Resolve the incident that paged people, and inform them, however the drill ended."""
    name = drill.half_done.notes.get("paged")
    if not name:
        return
    try:
        incident.resolve(drill.report, drill.env, name, _by(drill), "the drill is over")
    except OpsError as error:
        drill.report.warn(
            f"incident {name} of the drill",
            error.hint or "run acknowledge-incident with action=resolve",
            value=error.message,
        )


def _rehearse_levels(drill: Drill) -> None:
    """Nobody acknowledges: every level must be paged, in the order of the path."""
    env = drilled(drill, "escalation.jsonl", at_once=True)
    opened = incident.open_incident(
        drill.report, env, what="this is a drill: nobody answers", severity="severe", key="drill levels"
    )
    wanted = list(dict.fromkeys(name for level in env.alerts.path for name in level.contacts))
    reached = list(dict.fromkeys(one.contact for one in opened.told if one.outcome == "sent"))
    missing = [name for name in wanted if name not in reached or name not in _arrived(env.alerts, opened)]
    in_order = [name for name in reached if name in wanted] == wanted
    levels = ", ".join(f"{level.minutes:g} min {' and '.join(level.contacts)}" for level in drill.env.alerts.path)
    ok = drill.report.require(
        "every level is paged",
        not missing and in_order,
        HINT,
        expected=levels,
        value=f"missing: {', '.join(missing)}" if missing else ", ".join(reached),
    )
    if ok:
        drill.done["escalation"] = f"nobody acknowledged: paged in this order: {', '.join(reached)}"


def _arrived(alerts: Alerts, found: Incident) -> Mapping[str, str]:
    """The messages of an incident on the test channel: contact → title."""
    if not Path(alerts.file).exists():
        return {}
    lines = [json.loads(line) for line in Path(alerts.file).read_text(encoding="utf-8").splitlines()]
    return {
        line["number"].removeprefix(f"{found.id}-").partition("-")[2]: line["title"]
        for line in lines
        if line["incident"] == found.id
    }


def _by(drill: Drill) -> str:
    """The first participant, or the drill itself."""
    named = drill.report.facts.get("participants", "")
    return "run-drill" if named in ("", NOBODY) else f"{named.split(',')[0]} (run-drill)"
