"""The recovery board as a self-contained HTML file, and as Markdown for Prefect. Red comes first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape
from zoneinfo import ZoneInfo

from runbook import clock
from runbook.language.say import Language, label, say, use_language
from runbook.page.render import table
from runbook.units import duration
from tasks.recovery_points.standing import LastDrill, Recoverable, RecoveryStanding, State

STALE = timedelta(minutes=30)
"""check-recovery-objectives runs every five minutes: an older result is no longer valid."""
WORST: tuple[State, ...] = ("red", "yellow", "green")
MARK: dict[State, str] = {"red": "✗", "yellow": "▲", "green": "✓"}
"""Every font has these, and they differ without colours."""
ANSWER: dict[State, str] = {
    "red": "no, or not within the objectives",
    "yellow": "yes, but not proven",
    "green": "yes, proven by a restore",
}
ZONES = "Each environment's times are in its own zone."
IN_AN_INCIDENT = "In an incident: show-recovery-options lists every recovery option with its form."
_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--page:#fff;--line:#c9d1d9;--head:#f1f3f5;--red:#ffdce0;--yellow:#fff3bf;
--green:#d8f5e0;--dim:#57606a}
@media (prefers-color-scheme:dark){:root{--text:#e6edf3;--page:#0d1117;--line:#3d444d;--head:#21262d;--red:#67161f;
--yellow:#4d3b00;--green:#0f3d22;--dim:#9198a1}}
body{font-family:system-ui,"Noto Sans JP",sans-serif;color:var(--text);background:var(--page);margin:2rem auto;
max-width:120rem;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
td,th{border:1px solid var(--line);padding:.4rem .6rem;text-align:left;vertical-align:top}th{background:var(--head)}
.red{background:var(--red)}.yellow{background:var(--yellow)}.green{background:var(--green)}
td{white-space:nowrap}.said,.by{white-space:normal;min-width:10rem}small{color:var(--dim)}td small{color:inherit}
"""


def html(standings: Sequence[RecoveryStanding], now: datetime, language: Language = "en") -> str:
    """The whole page, in the language of the environment that writes it. It loads nothing from other servers, and
    escapes every value."""
    with use_language(language):
        return _html(standings, now, language)


def _html(standings: Sequence[RecoveryStanding], now: datetime, language: Language) -> str:
    bodies = "".join(_body(one, now) for one in ordered(standings, now))
    head = "".join(f"<th>{escape(column)}</th>" for column in _columns())
    title = escape(label("Recovery board"))
    footer = (say(f"Built {clock.text(now)}, by every check."), say(ZONES), say(IN_AN_INCIDENT))
    return (
        f'<!DOCTYPE html><html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{escape(_summary(standings, now))}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>{bodies}</table></div>'
        f"<p><small>{escape(' '.join(footer))}</small></p></body></html>\n"
    )


def markdown(standings: Sequence[RecoveryStanding], now: datetime, language: Language = "en") -> str:
    """For the Prefect artifact."""
    with use_language(language):
        return _markdown(standings, now)


def _markdown(standings: Sequence[RecoveryStanding], now: datetime) -> str:
    rows = [
        (
            one.environment,
            f"{_answer(one, now)}: {_why(one, now)}".rstrip(": "),
            f"{MARK[found.state]} {label(found.resource)}",
            *_cells(one, found),
            _recovery(one),
            _drill(one),
            _next(one),
        )
        for one in ordered(standings, now)
        for found in by_state(one)
    ]
    parts = (
        f"# {label('Recovery board')}",
        _summary(standings, now),
        table(_columns(), rows),
        say(f"Built {clock.text(now)}, by every check."),
    )
    return "\n\n".join(parts) + "\n"


def _columns() -> tuple[str, ...]:
    return (
        label("environment"),
        label("recoverable now?"),
        label("resource"),
        label("restored up to"),
        label("lost"),
        label("takes"),
        label("recovery option"),
        label("proven"),
        label("last recovery"),
        label("last drill"),
        label("next drill"),
    )


def ordered(standings: Sequence[RecoveryStanding], now: datetime) -> list[RecoveryStanding]:
    """Red first, then by name."""
    return sorted(standings, key=lambda one: (WORST.index(state_of(one, now)), one.environment))


def by_state(one: RecoveryStanding) -> list[Recoverable]:
    """An environment's resources, red first."""
    return sorted(one.resources, key=lambda found: WORST.index(found.state))


def state_of(one: RecoveryStanding, now: datetime) -> State:
    """The worst of its resources; red without a recent check, yellow without a successful drill."""
    if is_stale(one, now) or not one.resources:
        return "red"
    worst = min((found.state for found in one.resources), key=WORST.index)
    drilled = one.drill and one.drill.status in ("OK", "WARN")
    return worst if drilled or worst == "red" else "yellow"


def is_stale(one: RecoveryStanding, now: datetime) -> bool:
    """Whether its last check is too old."""
    return now - one.checked > STALE


def _answer(one: RecoveryStanding, now: datetime) -> str:
    state = state_of(one, now)
    return f"{MARK[state]} {say('not known' if is_stale(one, now) else ANSWER[state])}"


def _why(one: RecoveryStanding, now: datetime) -> str:
    if is_stale(one, now):
        return say(f"not checked since {moment(one, one.checked)}: run check-recovery-objectives")
    reasons = [f"{label(found.resource)}: {say(found.why)}" for found in by_state(one) if found.why]
    if not (one.drill and one.drill.status in ("OK", "WARN")):
        reasons.append(say("no drill has succeeded: run run-drill"))
    return "; ".join(reasons)


def _body(one: RecoveryStanding, now: datetime) -> str:
    state, rows = state_of(one, now), by_state(one)
    span = f' rowspan="{max(len(rows), 1)}"'
    checked = f"<small>{escape(say(f'checked {moment(one, one.checked)}'))}</small>"
    objectives = f"<small>RPO {duration(one.rpo_seconds)}, RTO {duration(one.rto_seconds)}</small>"
    name = f"<b>{escape(one.environment)}</b><br>{escape(one.title)}<br>{objectives}<br>{checked}"
    answer = f"{escape(_answer(one, now))}<br><small>{escape(_why(one, now))}</small>"
    first = f'<td{span}>{name}</td><td{span} class="{state} said">{answer}</td>'
    recovered = escape(_recovery(one))
    last = f'<td{span} class="by">{recovered}</td><td{span} class="by">{escape(_drill(one))}</td>'
    last += f"<td{span}>{escape(_next(one))}</td>"
    lines = [
        (first if number == 0 else "") + _resource(one, found) + (last if number == 0 else "")
        for number, found in enumerate(rows)
    ] or [f'{first}<td colspan="6">{escape(say("no resource is configured"))}</td>{last}']
    return "<tbody>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody>"


def _resource(one: RecoveryStanding, found: Recoverable) -> str:
    point, loss, takes, by, proven = map(escape, _cells(one, found))
    cells = f'<td>{point}</td><td class="by">{loss}</td><td>{takes}</td><td class="by">{by}</td><td>{proven}</td>'
    return f'<td class="{found.state}">{MARK[found.state]} {escape(label(found.resource))}</td>{cells}'


def _cells(one: RecoveryStanding, found: Recoverable) -> tuple[str, ...]:
    """Point, loss, duration, option, proven."""
    point = moment(one, found.at) if found.at else label("none")
    takes = duration(found.seconds) if found.seconds is not None else say("never measured")
    return (point, say(found.lost), takes, f"{say(found.option)}: {found.runbook}", _proven(one, found.proven))


def _proven(one: RecoveryStanding, text: str) -> str:
    """In the environment's zone, if it is a time."""
    try:
        return moment(one, datetime.fromisoformat(text)) if text else label("never")
    except ValueError:
        return text


def _recovery(one: RecoveryStanding) -> str:
    """`2026-11-29 01:14:51+09:00: Full restore OK; nothing is lost`."""
    last = one.recovery
    return f"{moment(one, last.at)}: {label(last.runbook)} {last.status}; {say(last.lost)}" if last else label("none")


def _drill(one: RecoveryStanding) -> str:
    return _drill_text(one, one.drill) if one.drill else label("never")


def _drill_text(one: RecoveryStanding, drill: LastDrill) -> str:
    rto = f", {say(f'users served after {duration(drill.rto_seconds)}')}" if drill.rto_seconds is not None else ""
    return f"{moment(one, drill.at)}: {drill.scenario} {drill.status}{rto}"


def _next(one: RecoveryStanding) -> str:
    return moment(one, one.next_drill) if one.next_drill else say("not scheduled, or not known")


def _summary(standings: Sequence[RecoveryStanding], now: datetime) -> str:
    states = [state_of(one, now) for one in standings]
    names: dict[State, str] = {"red": label("red"), "yellow": label("yellow"), "green": label("green")}
    return ", ".join(f"{MARK[state]} {states.count(state)} {names[state]}" for state in WORST if state in states)


def moment(one: RecoveryStanding, at: datetime) -> str:
    """In the environment's zone, with its offset."""
    return at.astimezone(ZoneInfo(one.zone)).isoformat(sep=" ", timespec="seconds")
