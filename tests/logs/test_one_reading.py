"""The audit log is read once for two questions: the answers are those of reading everything for each."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from flows.logs.audit import COLUMNS
from tasks.logs.figures import logins
from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import LogChoice, LogSource, reading, utc
from tests.fixtures.logfiles import NOON

ZONE = ZoneInfo("Asia/Tokyo")
BEGIN = datetime.min.replace(tzinfo=UTC)
FIELDS = ("user_id", "action", "resource", "result", "ip_address")
EXTRACTED = {
    "time": "time",
    "here": "here",
    "line": "line",
    **{name: f"coalesce(json_extract_string(line, '$.{name}'), '')" for name in FIELDS},
}
LOGIN = "json_extract_string(line, '$.action') = 'login'"
LOGINS = {
    "time": "time",
    "here": "here",
    "who": "coalesce(nullif(json_extract_string(line, '$.user_id'), ''), json_extract_string(line, '$.resource'), '')",
    "address": "coalesce(json_extract_string(line, '$.ip_address'), '')",
    "success": "json_extract_string(line, '$.result') = 'success'",
}
BAD = (
    "no JSON, user-1 and login",
    '["login", "user-1"]',
    '{"action": "login", "user_id": "user-1"',
    "",
    "\\",
    "17",
    '{"action": "login"}}',
)
SEARCHES: Mapping[str, tuple[str, ...]] = {
    "everything": (),
    "user": ("user_id=user-1",),
    "number": ("user_id=17",),
    "action": ("action=login",),
    "failures": ("result=failure", "ip_address=10.0.0.2"),
    "resource": ("resource=面接",),
    "nobody": ("user_id=x",),
}


def escaped(text: str) -> str:
    """As JSON may write any text."""
    return "".join(f"\\u{ord(character):04x}" for character in text)


def audit_lines(seed: int, count: int = 4000) -> list[str]:
    """What may stand in an audit log: no two log-ins have one time."""
    chance = random.Random(seed)
    lines = []
    for number in range(count):
        at = NOON + timedelta(seconds=97 * number + chance.randrange(90))
        entry: dict[str, object] = {"timestamp": at.isoformat()}
        entry["user_id"] = chance.choice(
            ["user-1", "user-2", "user-12", 17, 17.0, "", None, "面接", f"u{number % 151}"]
        )
        entry["action"] = chance.choice(["login", "login", "login", "read", "relogin", True])
        entry["result"] = chance.choice(["success", "success", "failure", None])
        entry["resource"] = chance.choice(["user-1", "s 5", "面接", {"login": 1}])
        entry["ip_address"] = f"10.0.0.{chance.choice([1, 1, 1, 2, chance.randrange(40)])}"
        for name in list(entry):
            if chance.random() < 0.02:
                del entry[name]
        line = json.dumps(entry, ensure_ascii=chance.random() < 0.5)
        if chance.random() < 0.1:
            line = line.replace('"login"', f'"{escaped("login")}"').replace('"user-1"', f'"{escaped("user-1")}"')
        lines.append(chance.choice(["", "", "", "  ", "\t"]) + line)
        if chance.random() < 0.02:
            lines.append(chance.choice(BAD))
    return lines


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def conditions(texts: tuple[str, ...], known: tuple[str, ...], since: bool) -> Conditions:
    return Conditions(known).within(NOON + timedelta(days=2) if since else None, None).fields(texts)


def table(source: LogSource, name: str, columns: Mapping[str, str]) -> list[tuple[object, ...]]:
    return sorted(source.rows(f"SELECT {', '.join(columns)} FROM {name}"), key=repr)


@pytest.mark.parametrize("since", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_one_reading_answers_both_questions_as_reading_everything_twice_does(
    tmp_path: Path, name: str, since: bool
) -> None:
    lines = audit_lines(7)
    (tmp_path / "audit.log").write_text("\n".join(lines) + "\n")
    files = find_logs.work(tmp_path / "audit.log")
    wanted = conditions(SEARCHES[name], logins.FIELDS, since)
    usual = Conditions(logins.FIELDS).holds(logins.LOGIN, "login")
    with reading(files, ZONE, fields=logins.FIELDS) as source:
        bad = source.pick_each(
            picked=LogChoice(COLUMNS, wanted.sql, wanted.parameters, wanted.needles),
            logins=LogChoice(logins.COLUMNS, usual.sql, usual.parameters, usual.needles),
        )
        once = bad, table(source, "picked", COLUMNS), table(source, "logins", logins.COLUMNS)
    plain = conditions(SEARCHES[name], (), since)
    with reading(files, ZONE) as source:
        bad = source.pick(EXTRACTED, plain.sql, plain.parameters)
        twice = bad, table(source, "picked", EXTRACTED)
        source.pick(LOGINS, LOGIN, {})
        assert once == (*twice, table(source, "picked", LOGINS))
    assert bad == sum(not is_object(line) for line in lines if line.strip())
    assert bool(once[1]) is (name != "nobody")
    assert len(once[1]) == sum(map(is_object, lines)) or name != "everything" or since
    assert len(once[2]) > 1000


@pytest.mark.parametrize("since", [BEGIN, NOON + timedelta(days=2)])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_unusual_is_what_windows_over_all_log_ins_find(tmp_path: Path, seed: int, since: datetime) -> None:
    (tmp_path / "audit.log").write_text("\n".join(audit_lines(seed)) + "\n")
    with reading(find_logs.work(tmp_path / "audit.log"), ZONE, fields=logins.FIELDS) as source:
        source.pick_each(logins=LogChoice(logins.COLUMNS, logins.LOGIN))
        unusual = [(one.at, one.who, one.address, one.why) for one in logins.find_unusual(source, since, ZONE)]
        broken = [(one.at, one.who, one.address, one.why) for one in logins.find_broken_in(source, since, 3, 60)]
        odd = source.rows(
            """
            SELECT here, who, address, earlier,
                   row_number() OVER (PARTITION BY who, address ORDER BY time) = 1 AND earlier >= 3 AS elsewhere,
                   night AND nights = 0 AND earlier >= 10 AS late, time
            FROM (SELECT *, count(*) OVER before AS earlier, count(*) FILTER (night) OVER before AS nights
                  FROM (SELECT *, extract(hour FROM here) < 6 AS night FROM logins WHERE success AND time IS NOT NULL)
                  WINDOW before AS (PARTITION BY who ORDER BY time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING))
            QUALIFY time >= $since AND (elsewhere OR late) ORDER BY time LIMIT 200
            """,
            {"since": utc(since)},
        )
        behind = source.rows(
            """
            SELECT here, who, address, n FROM (
                SELECT *, count(*) FILTER (NOT success) OVER (PARTITION BY who ORDER BY time
                    RANGE BETWEEN to_minutes(60) PRECEDING AND CURRENT ROW) AS n FROM logins WHERE time IS NOT NULL)
            WHERE success AND n >= 3 AND time >= $since ORDER BY time LIMIT 200
            """,
            {"since": utc(since)},
        )
    assert [one[:3] for one in unusual] == [row[:3] for row in odd]
    assert [(one[3].startswith("from"), "at night" in one[3]) for one in unusual] == [row[4:6] for row in odd]
    assert [f"in {row[3] + 1:,} log-ins" in one[3] for one, row in zip(unusual, odd, strict=True)] == [True] * len(odd)
    assert broken == [(*row[:3], f"after {row[3]} failures within 60 min") for row in behind]
    assert unusual
    assert broken
