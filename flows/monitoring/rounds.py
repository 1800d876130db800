"""One round of the monitoring: measure, judge, record, send events. It works without Prefect."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from blocks.environment import Environment
from flows.monitoring.sources import Reading, read_host, sources
from flows.monitoring.table import Alarm, alarm_of
from runbook import clock, metrics
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.logs.figures.spending import read_spent
from tasks.monitoring import events, history, state
from tasks.monitoring.hysteresis import AlarmState, Change, Timing, step
from tasks.monitoring.parallel import query_in_parallel
from tasks.monitoring.state import MonitoringState

TIMING = Timing()
ANSWER_SECONDS = 15.0
NEXT_SECONDS = 30.0
"""Two watchers of the same environment take turns: a round this soon after the other's is skipped."""
TOKENS_EVERY = timedelta(hours=1)
REMIND_FIRST, REMIND_EVERY = timedelta(minutes=10), timedelta(hours=1)
"""An alarm that is still active is sent again: the automatic runbook did not help."""
WATCHING_EVERY = timedelta(minutes=5)
TIDY_MINUTE = 7


@dataclass(frozen=True)
class Round:
    """The metrics that `changed` in a round, the number of `unsent` events and why (`problem`). `at`: when it was
    measured; `by_another`: by another watcher."""

    at: datetime
    standings: Mapping[str, AlarmState]
    changed: Mapping[str, Change]
    unsent: int = 0
    problem: str = ""
    by_another: bool = False


@probe
def measure(env: Environment, now: datetime) -> dict[str, Reading]:
    """Query all sources in parallel, except those that need the previous round."""
    asked = sources(env, now)
    env.nodes()
    for part in env.slugs.keys() - {"postgres", "standby"}:  # loaded from Prefect here, not in threads
        getattr(env, part, None)
    answers = query_in_parallel({name: ask for name, (ask, _) in asked.items()}, ANSWER_SECONDS)
    found = dict[str, Reading]()
    for name, (_, names) in asked.items():
        answer = answers[name]
        if isinstance(answer, OpsError):
            found |= dict.fromkeys(names, Reading(None, answer.message))
        else:
            found |= answer
    return found


def take_round(env: Environment, now: datetime, timing: Timing = TIMING, *, alive: bool = True) -> Round:
    """Take a round under the monitoring's lock. A change is on disk before its event is sent. The next round sends the
    events that Prefect did not accept. Unless the watcher is `alive` in all its parts, it sends no heartbeat.

    Raises:
        OpsError: the state cannot be written.
    """
    reports = env.reports_directory
    with state.locked(reports):
        kept = state.load(reports)
        if kept.at and 0 <= (now - kept.at).total_seconds() < NEXT_SECONDS:
            problem = _send(reports, kept)
            return Round(kept.at, kept.standings, {}, len(kept.unsent), problem, by_another=True)
        readings = measure(env, now)
        readings |= _tokens(env, kept, now)
        readings[metrics.CPU.name] = _processors(kept, now)
        changed = _judge(env, kept, readings, now, timing)
        kept.at, kept.host = now, socket.gethostname()
        _keep(reports, now, readings)
        state.save(reports, kept)
        problem = _send(reports, kept)
        if alive:
            _tell_watching(env, kept, now)
        return Round(now, kept.standings, changed, len(kept.unsent), problem)


def tell_watching(env: Environment, now: datetime) -> None:
    """Send the heartbeat without a round: Prefect escalates a missing one.

    Raises:
        OpsError: the state cannot be written.
    """
    with state.locked(env.reports_directory):
        _tell_watching(env, state.load(env.reports_directory), now)


def _tell_watching(env: Environment, kept: MonitoringState, now: datetime) -> None:
    if kept.unsent or (kept.watching and timedelta() <= now - kept.watching < WATCHING_EVERY):
        return
    if not events.send([events.watching(env.name, now)]):
        kept.watching = now
        state.save(env.reports_directory, kept)


def _processors(kept: MonitoringState, now: datetime) -> Reading:
    since = f", since {clock.text(kept.at)}" if kept.at and kept.processors[0] else ""
    before = kept.processors if kept.host == socket.gethostname() else ("", 0.0, 0.0)
    reading, kept.processors = read_host(before, f" of {socket.gethostname()}{since}")
    return reading


def _tokens(env: Environment, kept: MonitoringState, now: datetime) -> dict[str, Reading]:
    """The month's cost against its budget, measured once an hour: it reads the day's log."""
    if not (env.has("ai_providers") and env.has("logs") and env.ai_providers.budget and env.ai_providers.prices):
        return {}
    ai, name = env.ai_providers, metrics.TOKENS.name
    if not kept.spent or not timedelta() <= now - kept.spent[0] < TOKENS_EVERY:
        try:
            found = read_spent.work(env.logs, env.zone, ai.prices, now, kept.logs)
        except OpsError as error:
            return {name: Reading(None, error.message)}
        missing = f"; no price: {', '.join(found.unpriced)}" if found.unpriced else ""
        missing += f"; {found.tokenless} calls are not counted: no tokens, or no time" if found.tokenless else ""
        kept.logs, kept.spent = found.files, (now, found.cost, missing)
    at, cost, missing = kept.spent
    told = f"{cost:,.2f} of {ai.budget:,.2f} {ai.currency}, as of {clock.text(at, 'minutes')}{missing}"
    return {name: Reading(cost / ai.budget, told)}


def _judge(
    env: Environment, kept: MonitoringState, readings: Mapping[str, Reading], now: datetime, timing: Timing
) -> dict[str, Change]:
    """Update every metric's state. A change is an event; so is, at intervals, an alarm that stays active."""
    kept.standings = {name: one for name, one in kept.standings.items() if name in readings}
    changed = dict[str, Change]()
    for name, reading in readings.items():
        metric, before = alarm_of(name), kept.standings.get(name, AlarmState())
        after, change = step(before, reading.value, reading.told, now, metric.bounds(env.limits), timing)
        kept.standings[name] = after
        if change:
            changed[name] = change
        last = kept.told.get(name)
        wait = REMIND_FIRST if last == after.since else REMIND_EVERY
        is_due = after.exceeded and (not last or not timedelta() <= now - last < wait)
        if change or (is_due and after.against == 0):
            kept.told[name] = now
            kept.unsent.append(events.event(change or "exceeded", payload(env, metric, after), now, again=not change))
    return changed


def payload(env: Environment, metric: Alarm, standing: AlarmState) -> dict[str, object]:
    """The payload of an event `ops.metric.*`, and its sentence."""
    limit, value = metric.limit(env.limits), standing.value
    severity = metric.blind if value is None else metric.severity
    shown = "not measured" if value is None else f"{metric.show(value)} (limit {metric.show(limit)})"
    return {
        "metric": metric.name,
        "value": value,
        "threshold": limit,
        "severity": severity,
        "hint": metric.hint,
        "environment": env.name,
        "owner": metric.owner,
        "what": f"{metric.full_title}: {shown}: {standing.told}"[:500],
        "key": f"{metric.name} {env.name}",
    }


def _keep(reports: Path, now: datetime, readings: Mapping[str, Reading]) -> None:
    """A history that cannot be written delays no alarm."""
    with contextlib.suppress(OSError):
        history.append(reports, now, {name: reading.value for name, reading in readings.items()})
        if now.minute == TIDY_MINUTE:
            history.tidy(reports, now)


def _send(reports: Path, kept: MonitoringState) -> str:
    if not kept.unsent:
        return ""
    problem = events.send(kept.unsent)
    if not problem:
        kept.unsent = []
        state.save(reports, kept)
    return problem
