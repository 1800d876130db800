"""Lines are looked through for texts before they are read as JSON: none that holds the condition is missed."""

from __future__ import annotations

from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import reading

LINES = (
    '{"timestamp": "2026-02-15T12:00:00Z", "message": "AI API Call", "user_id": "user-1", "level": "ERROR"}',
    r'{"timestamp": "2026-02-15T12:00:00Z", "message": "\u0041I API Call", "user_id": "user\u002d1", "level": "ERR\u004fR"}',
    r'{"message": "\u9762\u63a5", "user_id": "\u9762\u63a5"}',
    '{"message": "面接", "user_id": "面接"}',
    r'{"message": "a", "path": "\/api\/x"}',
    '{"message": "a", "path": "/api/x"}',
    '{"message": "a", "status": 5e2, "user_id": 100.0}',
    '{"message": "a", "status": 500, "user_id": 100}',
    '{"message": "a", "status": "500"}',
    '{"message": "a", "extra": {"a": 1}, "ok": true}',
    r'{"message": "say \"no\"", "user_id": "x"}',
    '["AI API Call"]',
    "AI API Call, no JSON",
    '  {"message": "AI API Call", "user_id": "user-2"}',
)
WANTED = {
    "message": Conditions().holds("message = 'AI API Call'", "AI API Call"),
    "user": Conditions().equals("user_id", ["user-1"]),
    "one of two": Conditions().equals("user_id", ["user-1", "user-2"]),
    "level": Conditions().equals("level", ["ERROR", "CRITICAL"]),
    "japanese": Conditions().equals("user_id", ["面接"]),
    "slash": Conditions().fields(["path=/api/x"]),
    "number": Conditions().fields(["status=500"]),
    "number in a text's field": Conditions().equals("user_id", ["100.0"]),
    "object": Conditions().fields(['extra={"a":1}']),
    "bool": Conditions().fields(["ok=true"]),
    "quotes": Conditions().fields(['message=say "no"']),
    "unequal": Conditions().fields(["user_id!=user-1"]),
    "two": Conditions().equals("level", ["ERROR"]).equals("user_id", ["user-1"]),
}
FOUND = {
    "message": 3,
    "user": 2,
    "one of two": 3,
    "level": 2,
    "japanese": 2,
    "slash": 2,
    "number": 3,
    "object": 1,
    "number in a text's field": 1,
    "bool": 1,
    "quotes": 1,
    "unequal": 6,
    "two": 2,
}


@pytest.mark.parametrize("name", WANTED)
def test_what_is_looked_for_is_found_however_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "app.log").write_text("\n".join(LINES) + "\n")
    wanted, found = WANTED[name], []
    for needles in (wanted.needles, ()):
        with reading(find_logs.work(tmp_path / "app.log"), ZoneInfo("UTC")) as source:
            bad = source.pick({"line": "line"}, wanted.sql, wanted.parameters, needles)
            found.append((bad, sorted(source.rows("SELECT line FROM picked"))))
    assert found[0] == found[1]
    assert (found[0][0], len(found[0][1])) == (2, FOUND[name])


def test_a_text_that_is_nowhere_is_looked_for_before_json_is_read() -> None:
    assert Conditions().equals("user_id", ["user-1"]).fields(["a=b"]).needles == [["user-1"], ["b"]]
    for text in ("1", "-1.5", "1e3", "NaN", "inf", "[1]", '{"a": 1}', ".5"):
        assert Conditions().fields([f"a={text}"]).needles == [], "it may be written in many ways"
