"""What a plan and a report promised to lose, as numbers that a ledger can be compared with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.recovery.sequences.ledger import Write
from tests.recovery.sequences.operator import Ran

REDIS, FILES = "Redis", "the files"
APART = (REDIS, FILES)
"""The parts that are no database."""
WHOLE = ("PostgreSQL", "the cluster")
"""Parts that are every database. (Of tables a ledger knows both.)"""
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_NUMBER = r"(?P<count>\d[\d,]*)"
_SINCE = re.compile(
    rf"writes(?: of (?P<part>\w+))? of the last (?P<age>\d+) (?P<unit>s|min|h|d) are lost(?: \({_NUMBER})?"
)
_COUNTED = re.compile(rf"(?:about |at most )?{_NUMBER} \w+(?: of (?P<part>\w+))?(?: written since)? (?:is|are) lost")
_GIVEN_UP = re.compile(rf"(?:^|[^\d]){_NUMBER} commits? (?:after|in [\d. a-z]+ after)")
_UNKNOWN = re.compile(
    r"the loss(?: of (?P<part>\w+))? is unknown, because (?P<why>[^;]*)|(?P<rows>an unknown number of rows)"
)
_KEPT_FILES = "files written since the restore are kept, not live"
_KEPT_ROWS = re.compile(r"rows written since (?P<since>\S+) are kept, not live")
_LEFT = re.compile(rf"at most {_NUMBER}, not restored")


@dataclass(frozen=True)
class Allowance:
    """How much one part may lose. `count` None: as much as `since` or `unknown` allows. `part` "": the databases."""

    part: str = ""
    count: int | None = 0
    since: float | None = None
    unknown: str = ""

    def refuses(self, lost: Sequence[Write]) -> str:
        """Why the lost writes are more than this; "" where they are within it."""
        if self.unknown:
            return ""
        if self.since is not None:
            older = [one for one in lost if one.answered < self.since]
            if older:
                age = self.since - older[0].answered
                return f"{len(older)} of {len(lost)} lost writes are older than it says, the first by {age:.1f} s"
            return ""
        if self.count is not None and len(lost) > self.count:
            return f"{len(lost)} acknowledged writes are lost, it says {self.count}"
        return ""


def of_plan(ran: Ran) -> list[Allowance]:
    """What the headline of a plan, or of a confirmed run, says is lost."""
    if isinstance(ran.lost, str | None):
        return list(_in_text(ran.effect, ran.started))
    return [*map(_of_loss, ran.lost)]


def of_report(ran: Ran) -> list[Allowance]:
    """Everything that the report of a confirmed run says is lost: its headline, its losses, facts and warnings."""
    found = [*of_plan(ran), *map(_of_loss, ran.losses)]
    for name, text in ran.facts.items():
        if name == "lost" or "lost" in name.split():
            part = REDIS if name.startswith(REDIS) else ""
            found += [
                Allowance(part or one.part, one.count, one.since, one.unknown) for one in _in_text(text, ran.started)
            ]
            if match := _GIVEN_UP.search(text):
                found.append(Allowance(part, _number(match["count"])))
            if "every write after" in text and part:
                found.append(Allowance(part, None, unknown=text))
    for one in ran.findings:
        if match := _LEFT.search(one["value"]):
            found.append(Allowance("", _number(match["count"])))
        if one["name"].startswith("data loss") and (match := re.match(r"([\d.]+) s$|(\d+) min (\d+) s", one["value"])):
            age = float(match[1]) if match[1] else 60 * int(match[2]) + int(match[3])
            found += [Allowance("", None, ran.started - age - 1)] * bool(age)
        if one["name"].startswith("Redis") and "lost" in one["name"] + one["value"]:
            found += [Allowance(REDIS, a.count, a.since, a.unknown) for a in _in_text(one["value"], ran.started)]
    return found


def widest(allowances: Sequence[Allowance], part: str) -> Allowance:
    """The largest loss of a part that was named."""
    of_part = [one for one in allowances if one.part == part or (one.part == "" and part not in APART)]
    unknown = next((one for one in of_part if one.unknown), None)
    if unknown:
        return unknown
    if since := [one.since for one in of_part if one.since is not None]:
        return Allowance(part, None, min(since))
    return Allowance(part, sum(sorted({one.count or 0 for one in of_part})))


def _of_loss(loss: Mapping[str, Any]) -> Allowance:
    is_whole = loss["part"] in WHOLE or loss["part"].startswith("public.")
    part = REDIS if REDIS in loss["part"] else "" if is_whole else loss["part"]
    since = datetime.fromisoformat(loss["since"]).timestamp() if loss["since"] else None
    return Allowance(part, loss["count"] if since is None else None, since, loss["unknown"])


def _in_text(text: str, at: float) -> Iterator[Allowance]:
    for match in _SINCE.finditer(text):
        unit = _UNITS[match["unit"]]
        age = int(match["age"]) * unit + unit  # rounded
        yield Allowance(match["part"] or "", None, at - age - 1)
    if _KEPT_FILES in text:
        yield Allowance(FILES, None, unknown=_KEPT_FILES)
    for match in _KEPT_ROWS.finditer(text):
        yield Allowance("", None, datetime.fromisoformat(match["since"]).timestamp() - 1)
    rest = _SINCE.sub("", text)
    for match in _COUNTED.finditer(rest):
        part = match["part"] or ""
        yield Allowance("" if part in WHOLE else part, _number(match["count"]))
    for match in re.finditer(rf"{_NUMBER} commits? after the statement", rest):
        yield Allowance("", _number(match["count"]))
    for match in _UNKNOWN.finditer(rest):
        yield Allowance(match["part"] or "", None, unknown=match["why"] or match["rows"])


def _number(text: str) -> int:
    return int(text.replace(",", ""))
