"""From an alert to the person who handles it: the procedures of 付録C, for flows, drills, and without Prefect.

incident = open_incident(report, env, what="…", severity="severe", owner="DBA")   # notifies the first level
incident = go_on(report, env, incident)                                           # notifies every level that is due
incident = acknowledge(report, env, incident.id, by="山田")                        # stops the escalation
incident = declare(report, env, incident.id, by="山田")
notify_stakeholders(report, env, incident)
incident = resolve(report, env, incident.id, by="山田")
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

from blocks.environment import Environment
from blocks.people.alerts import Alerts
from flows.monitoring import wording
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.language.say import say
from runbook.masking import without_logins
from runbook.report import Report
from tasks.alerts.cause import AlertCause, read_cause
from tasks.alerts.channels import masked, send_message
from tasks.alerts.incident import Incident, Incidents, Severity, Told, incident
from tasks.alerts.message import AlertMessage, Kind, shown

STAKEHOLDERS, MOST_LETTERS = -1, 500


def incidents(env: Environment) -> Incidents:
    """The incidents of an environment, in its report folder."""
    return Incidents(env.reports_directory / "incidents", env.name)


def required(env: Environment) -> Alerts:
    """The environment's [alerts].

    Raises:
        OpsError: its TOML has none.
    """
    if not env.has("alerts"):
        raise OpsError(
            f"environment {env.name} has no [alerts]: nobody can be notified",
            "add [alerts] to its TOML (docs/escalation.md) and register it; until then, phone the on-call engineer",
        )
    return env.alerts


def open_incident(
    report: Report,
    env: Environment,
    *,
    what: str = "",
    severity: Severity = "normal",
    owner: str = "",
    run: str = "",
    key: str = "",
) -> Incident:
    """Open an incident, or join the open one of the same key, and notify the first level."""
    alerts = required(env)
    cause = read_cause(run)
    told = what or f"{cause.name or 'run ' + run}: {cause.state} {cause.message}".strip()
    told = shown(masked(without_logins(told), alerts)[:MOST_LETTERS])  # it is sent to outside services
    new = incident(env.name, told, severity, owner or wording.owner_in(cause.tags), run, key)
    try:
        found, before = incidents(env).open_or_join(new, alerts.reopen_hours * 3600)
    except OpsError as error:  # a full disk may be the incident: the on-call engineer is notified all the same
        report.fail(
            "the incident is on disk",
            f"{error.hint}. Phone the next levels: this incident cannot escalate further",
            value=error.message,
        )
        found, before = new, None
    report.fact("incident", f"{found.id}: {found.what}")
    if before and before.id == found.id:
        report.fact("happened again", f"{found.repeats} times since {wording.moment(env, found.since)}")
    found = go_on(report, env, found, cause)
    if before and before.id != found.id:
        report.fact("replaces", f"{before.id}: {before.resolved_by.partition(': ')[2]}")
        _tell_all(report, env, before, "resolve", say(f"continued as {found.id}: {before.what}"))
    return found


def go_on(report: Report, env: Environment, found: Incident, cause: AlertCause | None = None) -> Incident:
    """Notify everybody who is due and was not notified yet, until somebody acknowledges."""
    alerts, kept = required(env), incidents(env)
    known = cause or (read_cause(found.run) if found.waiting else AlertCause())
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OpsError):
            stack.enter_context(kept.stepping(found))
            if _now(kept, found).since > datetime.now(UTC):
                found = kept.begin_now(found)
        for number in range(len(alerts.path)):
            for contact in alerts.at(number, found.owner):
                found = _now(kept, found)
                if not found.waiting or not _due(alerts, found, number):
                    return found
                if not found.reached(number, contact):
                    found = _report_results(report, env, found, number, contact, known)
    return found


def due_next(env: Environment, found: Incident) -> datetime | None:
    """When the next level is due; None: all were notified, or nobody needs to be."""
    alerts, now = required(env), datetime.now(UTC)
    if not found.waiting:
        return None
    moments = [_moment(alerts, found, number) for number in range(len(alerts.path)) if _is_for(alerts, found, number)]
    return next((moment for moment in moments if moment > now), None)


def is_overdue(env: Environment, found: Incident, grace: timedelta) -> bool:
    """Whether a level was due longer than `grace` ago and somebody of it was not notified."""
    alerts, now = required(env), datetime.now(UTC)
    levels = (
        n for n in range(len(alerts.path)) if _is_for(alerts, found, n) and now >= _moment(alerts, found, n) + grace
    )
    return found.waiting and any(
        not found.reached(level, contact) for level in levels for contact in alerts.at(level, found.owner)
    )


def _is_for(alerts: Alerts, found: Incident, number: int) -> bool:
    return found.severity == "severe" or not alerts.path[number].severe_only


def _moment(alerts: Alerts, found: Incident, number: int) -> datetime:
    return found.since + timedelta(minutes=alerts.path[number].minutes)


def _due(alerts: Alerts, found: Incident, number: int) -> bool:
    """Its minutes have passed, or no earlier level could be reached."""
    if not _is_for(alerts, found, number):
        return False
    return datetime.now(UTC) >= _moment(alerts, found, number) or not any(one.outcome == "sent" for one in found.told)


def _now(kept: Incidents, found: Incident) -> Incident:
    """The incident on disk: somebody may have acknowledged it meanwhile."""
    with contextlib.suppress(OpsError):
        return kept.get(found.id)
    return found


def _note(kept: Incidents, found: Incident, told: Told) -> Incident:
    with contextlib.suppress(OpsError):
        return kept.tell(found, told)
    return found.with_told(told)


def _report_results(
    report: Report, env: Environment, found: Incident, number: int, contact: str, cause: AlertCause
) -> Incident:
    """Notify one person, by the first channel that accepts the message."""
    alerts, kept = env.alerts, incidents(env)
    person, text = alerts.contacts[contact], wording.text(env, found, contact, cause)
    kind: Kind = "declare" if number == STAKEHOLDERS else "trigger"
    subject = say(f"incident declared: {found.what}" if kind == "declare" else found.what)
    for channel in alerts.channels_of(contact):
        message = wording.message(found, kind, f"{found.id}-{number}-{contact}", subject, text, person.role)
        began = datetime.now(UTC)
        found = _note(kept, found, Told(number, contact, channel, began, "begun"))
        reason = _failure(report, alerts, channel, contact, message)
        found = _note(kept, found, Told(number, contact, channel, began, "failed" if reason else "sent", reason))
        if not reason:
            report.passed(f"{person.role} was notified of {found.id}", value=channel)
            failpoint(f"notified {contact}")
            return found
    report.fail(
        f"{person.role} was notified of {found.id}",
        f"phone {person.name or person.role}: {person.phone or 'no number in [alerts]'}. "
        "Then repair the channels of [alerts]",
        value="no channel accepted the message",
    )
    return found


def _failure(report: Report, alerts: Alerts, channel: str, contact: str, message: AlertMessage) -> str:
    """Send a message. Returns why the channel failed, which is also a finding; "": it succeeded."""
    try:
        send_message(alerts, channel, contact, message)  # type: ignore[arg-type]
    except OpsError as error:
        report.warn(
            f"channel {channel} for {alerts.contacts[contact].role}",
            f"check [alerts] in the TOML and the {channel} service; the next channel was tried",
            value=error.message,
        )
        return error.message
    return ""


def acknowledge(report: Report, env: Environment, name: str, by: str, note: str = "") -> Incident:
    """Acknowledge an incident: this stops the escalation, and everybody who was notified learns of it.

    Raises:
        OpsError: there is no such incident, or `by` is empty.
    """
    found, is_new = incidents(env).acknowledge(name, _named(by), note)
    report.fact("acknowledged", f"by {found.acknowledged_by} at {wording.moment(env, found.acknowledged)}")
    if not found.open:
        report.fact("resolved", f"by {found.resolved_by} at {wording.moment(env, found.resolved)}")
    if is_new:
        _tell_all(report, env, found, "acknowledge", say(f"{found.acknowledged_by} handles it: {found.what}"))
    return found


def resolve(report: Report, env: Environment, name: str, by: str, note: str = "") -> Incident:
    """Close an incident: the same key opens a new one from now on.

    Raises:
        OpsError: there is no such incident, or `by` is empty.
    """
    found, is_new = incidents(env).resolve(name, _named(by), note)
    report.fact("resolved", f"by {found.resolved_by} at {wording.moment(env, found.resolved)}")
    if is_new:
        _tell_all(report, env, found, "resolve", say(f"resolved: {found.what}"))
    return found


def declare(report: Report, env: Environment, name: str, by: str) -> Incident:
    """インシデント宣言 (§8.4): stakeholders can be notified from now on (`notify_stakeholders`)."""
    found = incidents(env).declare(name, _named(by))
    report.fact("declared", f"by {found.declared_by} at {wording.moment(env, found.declared)}")
    return found


def notify_stakeholders(report: Report, env: Environment, found: Incident) -> Incident:
    """ステークホルダー通知 (§8.4). CRITICAL, with the number to phone, if a person could not be notified."""
    for contact in required(env).stakeholders:
        if not found.reached(STAKEHOLDERS, contact):
            found = _report_results(report, env, found, STAKEHOLDERS, contact, read_cause(found.run))
    report.require("stakeholders are named", bool(env.alerts.stakeholders), "add stakeholders to [alerts]")
    return found


def _named(by: str) -> str:
    if not by.strip():
        raise OpsError("by is empty: nobody is named", "fill in your name: the others read it")
    return by.strip()


def _tell_all(report: Report, env: Environment, found: Incident, kind: Kind, subject: str) -> None:
    """Notify everybody who was notified before, once, by the channel that worked."""
    alerts = required(env)
    sent = {
        (one.contact, one.channel) for one in found.told if one.outcome == "sent" and one.contact in alerts.contacts
    }
    for contact, channel in sorted(sent):
        number = f"{found.id}-{kind}-{contact}"
        text = wording.ended(env, found)
        message = wording.message(found, kind, number, subject, text, alerts.contacts[contact].role)
        _failure(report, alerts, channel, contact, message)


def prune(report: Report, env: Environment) -> None:
    """Delete incidents that were resolved long ago; the report keeps a line for each."""
    days, deleted = required(env).keep_days, list[Incident]()
    try:
        deleted = incidents(env).prune(timedelta(days=days))
    except OpsError as error:
        report.warn("deletion of old incidents", error.hint, value=error.message)
    for one in deleted:
        report.passed(f"{one.id} was resolved over {days:g} days ago", value=wording.summary(env, one))
