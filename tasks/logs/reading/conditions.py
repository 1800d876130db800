"""Conditions of a search as SQL with parameters: no text of a form becomes part of the statement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from zoneinfo import ZoneInfo

from runbook.errors import OpsError
from tasks.logs.reading.source import LogChoice, utc

_FIELD = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(>=|<=|!=|=|>|<|~)\s*(.*)", re.DOTALL)
# Values with several spellings: numbers, and the JSON of objects and lists.
_MANY_WAYS = re.compile(r"\s*([-+.\d{\[]|inf|nan)", re.IGNORECASE)
_NUMBERS = count()  # parameters of several conditions may stand in one statement
# A level, and its names in other loggers (log4j, syslog, zap …), in any case.
LEVELS = {
    "DEBUG": ("DEBUG", "TRACE", "VERBOSE"),
    "INFO": ("INFO", "INFORMATION", "NOTICE"),
    "WARNING": ("WARNING", "WARN"),
    "ERROR": ("ERROR", "ERR", "SEVERE"),
    "CRITICAL": ("CRITICAL", "CRIT", "FATAL", "ALERT", "EMERG", "EMERGENCY", "PANIC"),
}
_EXAMPLE = "write it like status>=500, model=gpt-4o, path~^/items/ or http.code!=200"


@dataclass
class Conditions:
    """Joined by AND; `sql` is true where there is none. `known`: fields that the source takes out of each line;
    `needles`: what `Source.pick` takes."""

    known: Sequence[str] = ()
    parts: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    parameters: dict[str, object] = field(default_factory=dict)
    needles: list[Sequence[str]] = field(default_factory=list)

    @property
    def sql(self) -> str:
        """The whole condition."""
        return " AND ".join((*self.parts, *self.times)) or "true"

    def choice(self, columns: Mapping[str, str]) -> LogChoice:
        """The argument of `Source.pick_each`."""
        return LogChoice(columns, self.sql, self.parameters, self.needles)

    def undated(self) -> LogChoice:
        """Lines without a readable time that fulfil all other conditions: they may belong to the span."""
        return LogChoice({"line": "line"}, " AND ".join((*self.parts, "time IS NULL")), self.parameters, self.needles)

    def holds(self, expression: str, *needles: str) -> Conditions:
        """An expression of this project. A line without one of the texts cannot fulfil it."""
        self.parts.append(expression)
        self._need(needles)
        return self

    def within(self, since: datetime | None, until: datetime | None) -> Conditions:
        """Lines from a moment on, and before another one."""
        if since:
            self.times.append(f"time >= {self._bind(utc(since))}")
        if until:
            self.times.append(f"time < {self._bind(utc(until))}")
        return self

    def levels(self, names: Sequence[str]) -> Conditions:
        """Lines of these LEVELS, in any spelling; none: any level."""
        if names:
            written = [word for name in names for word in LEVELS[name]]
            self._add("list_contains({}, upper(trim(level)))", written)
            self._need([form for word in written for form in (word, word.lower(), word.title())])
        return self

    def equals(self, name: str, values: Sequence[str]) -> Conditions:
        """A field of `source.FIELDS` has one of these values; none: any value."""
        if values:
            self._add(f"list_contains({{}}, {name})", list(values))
            self._need(values)
        return self

    def contains(self, text: str) -> Conditions:
        """A text anywhere in the message, in any case."""
        if text:
            self._add("contains(lower(message), lower({}))", text)
        return self

    def matches(self, pattern: str) -> Conditions:
        """A regular expression (RE2) anywhere in the whole line."""
        if pattern:
            self._add("regexp_matches(line, {})", pattern)
        return self

    def fields(self, texts: Sequence[str]) -> Conditions:
        """`status>=500`: any field, also a nested one; numbers where both sides are.

        Raises:
            OpsError: it is no condition.
        """
        for text in texts:
            if not (match := _FIELD.fullmatch(text)):
                raise OpsError(f"“{text[:60]}” is not a condition on a field", _EXAMPLE)
            self._field(*match.groups())
        return self

    def _field(self, name: str, operator: str, wanted: str) -> None:
        path = "$." + ".".join(f'"{part}"' for part in name.split("."))
        found = name if name in self.known else f"json_extract_string(line, {self._bind(path)})"
        value = self._bind(wanted.strip())
        if operator == "~":
            self.parts.append(f"regexp_matches({found}, {value})")
            return
        if operator == "=":
            self._need([wanted.strip()])
        number = f"try_cast({value} AS DOUBLE)"
        self.parts.append(
            f"CASE WHEN {number} IS NOT NULL AND try_cast({found} AS DOUBLE) IS NOT NULL "
            f"THEN try_cast({found} AS DOUBLE) {operator} {number} ELSE {found} {operator} {value} END"
        )

    def _need(self, texts: Sequence[str]) -> None:
        """Texts that a line must contain; none if a value has other spellings."""
        if texts and not any(_MANY_WAYS.match(text) for text in texts):
            self.needles.append(texts)

    def _add(self, template: str, value: object) -> None:
        self.parts.append(template.format(self._bind(value)))

    def _bind(self, value: object) -> str:
        name = f"p{next(_NUMBERS)}"
        self.parameters[name] = value
        return f"${name}"


def parse_moment(text: str, zone: ZoneInfo, what: str) -> datetime | None:
    """A form's field: a day or a time; without a zone it is the operators' own. None where it is empty. In UTC: Python
    subtracts hours from a moment of a zone by the clock on its wall, which a change of daylight saving time moves.

    Raises:
        OpsError: it is no time.
    """
    if not text.strip():
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise OpsError(
            f"{what} “{text[:40]}” is no time",
            "write it like 2026-02-15, 2026-02-15 03:00 or 2026-02-15T03:00:00+09:00",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)
