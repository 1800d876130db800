"""The text of an alert: what happened, since when, the report, the next step, and who was notified."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from blocks.environment import Environment
from runbook.guard.brief import asked_briefly
from runbook.language.say import label, say
from runbook.page.form import read_forms
from tasks.alerts.cause import AlertCause
from tasks.alerts.incident import Incident
from tasks.alerts.message import AlertMessage, Kind

OWNERS = {
    "SRE": "SRE",
    "DBA": "DBA",
    "DevOps": "DevOps",
    "セキュリティ": "security team",
    "QA": "QA",
    "マネージャー": "the manager",
    "開発者": "the developers",
}
"""Tags of deployments, as the manual names the owners, and what people read."""


def owner_in(tags: Collection[str]) -> str:
    """A run's owner, from the tags of its deployment."""
    return next((tag for tag in tags if tag in OWNERS), "")


def moment(env: Environment, at: datetime | None) -> str:
    """A time in the operators' zone."""
    return at.astimezone(env.zone).strftime("%Y-%m-%d %H:%M:%S %Z") if at else ""


def message(found: Incident, kind: Kind, number: str, subject: str, text: str, to: str) -> AlertMessage:
    """An incident's message."""
    severe = found.severity == "severe"
    return AlertMessage(kind, found.id, number, found.environment, severe, subject, text, to)


def text(env: Environment, found: Incident, contact: str, cause: AlertCause) -> str:
    """The text for one person."""
    person = env.alerts.contacts[contact]
    first, last = moment(env, found.since), moment(env, found.last)
    lines = {
        label("problem"): say(found.what),
        label("severity"): label("severe") if found.severity == "severe" else label("normal"),
        label("environment"): f"{env.title or env.name} ({env.name})",
        label("since"): say(f"{first} ({found.repeats} times again, last at {last})") if found.repeats else first,
        label("owner"): say(OWNERS.get(found.owner, found.owner)),
        "run": cause.address or found.run,
        label("report"): say(cause.sentence),
        label("sent to"): " ".join(filter(None, (person.role, person.name, person.phone))),
        label("notified"): notified(env, found) or say("nobody else yet"),
        **_states(env, found),
        label("next step"): f"{say('acknowledge it if you handle it')}: {how_to_acknowledge(env, found)}"
        if found.waiting
        else "",
    }
    return _lines(lines)


def notified(env: Environment, found: Incident) -> str:
    """Who was notified, by which channel, and when."""
    contacts = env.alerts.contacts
    sent = [one for one in found.told if one.outcome == "sent" and one.contact in contacts]
    return ", ".join(f"{contacts[one.contact].role} ({one.channel} {moment(env, one.at)})" for one in sent)


def how_to_acknowledge(env: Environment, found: Incident) -> str:
    """The form in the Prefect UI, filled in except for the name, and the command without Prefect."""
    given = {"environment": env.name, "incident": found.id}
    with asked_briefly():
        forms = read_forms([env.name])
    link = forms.link("acknowledge-incident", env.name, given)
    command = f"python -m flows.monitoring.acknowledgement --environment {env.name} --incident {found.id} --by NAME"
    address = link.rpartition("](")[2].removesuffix(")") if "](" in link else ""
    return f"{address} {say('or, without Prefect,')} {command}" if address else command


def ended(env: Environment, found: Incident) -> str:
    """The text after an acknowledgement or a resolution."""
    lines = {label("problem"): say(found.what), **_states(env, found), label("note"): say(found.note)}
    return _lines(lines)


def not_started(flow: str) -> str:
    """Of a flow whose run does not start."""
    return f"{flow} does not start: check the worker"


def watch_stopped(environment: str) -> str:
    """Of a watcher that sends nothing."""
    return f"the monitoring of {environment} has stopped: check flows.monitoring.serve"


def summary(env: Environment, found: Incident) -> str:
    """One line about a resolved incident, for the report."""
    took = f"acknowledged by {found.acknowledged_by}" if found.acknowledged else "acknowledged by nobody"
    over = f"resolved by {found.resolved_by} at {moment(env, found.resolved)}"
    return (
        f"{found.what} ({found.severity}), {moment(env, found.since)}, {took}, {over}; notified: {notified(env, found)}"
    )


def _states(env: Environment, found: Incident) -> dict[str, str]:
    return {
        label("declared by"): f"{found.declared_by} ({moment(env, found.declared)})" if found.declared else "",
        label("acknowledged by"): f"{found.acknowledged_by} ({moment(env, found.acknowledged)})"
        if found.acknowledged
        else "",
        label("resolved by"): f"{found.resolved_by} ({moment(env, found.resolved)})" if found.resolved else "",
    }


def _lines(lines: Mapping[str, str]) -> str:
    """Indents the lines of a value: none can be mistaken for another field."""
    values = {name: "\n  ".join(value.splitlines()) for name, value in lines.items()}
    return "\n".join(f"{name}: {value}" for name, value in values.items() if value)
