"""Counting acknowledged writes: rotated and compressed logs, time zones, what is no write, and what cannot be counted."""

from __future__ import annotations

import gzip
import json
import os
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from blocks.places import Logs
from runbook.errors import OpsError
from tasks.logs.figures import requests, tokens
from tasks.logs.figures.writes import MOST_ITEMS, LoggedWrites, read_writes_since
from tasks.logs.reading.access import AccessLine, read_access
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import reading

MOMENT = datetime(2026, 11, 25, 3, 0, tzinfo=UTC)
SESSION = "/api/interview/sessions/7f3c1f0e-0000-4000-8000-00000000000a"


def line(
    seconds: float, method: str = "POST", path: str = SESSION + "/messages", status: int = 201, **more: object
) -> str:
    stamp = (MOMENT + timedelta(seconds=seconds)).isoformat(timespec="microseconds")
    entry = {
        "timestamp": stamp,
        "level": "INFO",
        "logger": "grc_backend.access",
        "message": "request",
        "module": "access",
    }
    entry |= {
        "method": method,
        "path": path,
        "status": status,
        "user_id": "1",
        "request_id": f"r{seconds}",
        "resource": "9",
    }
    return json.dumps(entry | more) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


def read(log: Path, moment: datetime = MOMENT, before: datetime | None = None, **more: Any) -> LoggedWrites:
    logs = Logs(
        app=str(log), access_logger="grc_backend.access", access_message="request", not_data=["/api/auth/"], **more
    )
    return read_writes_since(logs, moment, before)


def write(path: Path, *lines: str, changed: float = 3600) -> None:
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    stamp = (MOMENT + timedelta(seconds=changed)).timestamp()
    os.utime(path, (stamp, stamp))


def test_only_acknowledged_writes_of_data_after_the_moment_count(log: Path) -> None:
    write(
        log,
        line(-60),
        line(0),
        line(1),
        line(2, "GET", status=200),
        line(3, status=503),
        line(4, path="/api/auth/login", status=200),
        line(5, "DELETE", SESSION, 204),
        line(6, message="not a request"),
        '{"timestamp": "2026-11-25T03:00:07+00:00", "message": "the \\"request\\" was \\"method\\": \\"POST\\""}\n',
        "Traceback (most recent call last):\n",
        line(8, path="/api/interview/sessions", status=201),
    )

    found = read(log)

    assert found.complete, found.note
    assert found.count == 3
    assert dict(found.by_kind) == {
        "POST /api/interview/sessions/{id}/messages": 1,
        "DELETE /api/interview/sessions/{id}": 1,
        "POST /api/interview/sessions": 1,
    }
    assert found.first == MOMENT + timedelta(seconds=1)
    assert found.last == MOMENT + timedelta(seconds=8)
    assert found.items[0].path == SESSION + "/messages"
    assert found.items[0].resource == "9"
    assert read(log, before=MOMENT + timedelta(seconds=5)).count == 2
    assert read(log, MOMENT + timedelta(hours=1)).count == 0


def test_an_application_that_calls_its_fields_otherwise_is_read_alike(log: Path) -> None:
    """Writes, requests, users and AI calls; without the name of a logger, a line with status and duration is a request."""
    names = {"timestamp": "@timestamp", "status": "http.status", "duration_ms": "ms", "user_id": "uid", "model": "llm"}
    lines = [
        {"method": "POST", "path": "/orders/7", "status": 201, "duration_ms": 20, "user_id": "ann"},
        {"method": "POST", "path": "/login", "status": 200, "duration_ms": 40, "user_id": "ann"},
        {"method": "GET", "path": "/orders/8", "status": 500, "duration_ms": 60, "user_id": "bob"},
        {
            "message": "asked",
            "provider": "own",
            "model": "m-1",
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
        },
    ]
    stamps = [(MOMENT + timedelta(seconds=number)).isoformat() for number in range(1, 5)]
    entries = [{"timestamp": stamp, "message": "x", **entry} for stamp, entry in zip(stamps, lines, strict=True)]
    write(log, *(json.dumps({names.get(name, name): value for name, value in one.items()}) + "\n" for one in entries))
    logs = Logs(app=str(log), fields=names, not_data=["/login"], ai_message="asked")

    writes = read_writes_since(logs, MOMENT)
    assert (writes.count, dict(writes.by_kind)) == (1, {"POST /orders/{id}": 1})
    assert read_access.work(logs, MOMENT) == AccessLine(3, 1, 0.06, True)
    end = MOMENT + timedelta(hours=1)
    with reading(find_logs.work(log), ZoneInfo("UTC"), names=logs.fields) as source:
        source.pick_each(requests=requests.wanted_requests(logs, MOMENT, end).choice(requests.COLUMNS))
        use = requests.read_use(source, MOMENT, end)
        assert use
        assert (use.count, use.errors, use.longest) == (3, 1, 60.0)
        assert {user.who for user in requests.by_user(source, MOMENT)} == {"ann", "bob"}
        wanted = tokens.calls(logs.ai_message)
        source.pick(tokens.COLUMNS, wanted.sql, wanted.parameters, wanted.needles)
        (call,) = tokens.read_use(source)
        assert (call.model, call.total) == ("m-1", 7)
        nobody = tokens.calls("")
        source.pick(tokens.COLUMNS, nobody.sql, nobody.parameters, nobody.needles)
        assert tokens.read_use(source) == []
    with pytest.raises(ValidationError, match="stamp is no field"):
        Logs(fields={"stamp": "x"})
    with pytest.raises(OpsError, match=r"\[logs\] app is not configured"):
        read_writes_since(Logs(), MOMENT)


def test_rotated_and_compressed_siblings_count_once(log: Path) -> None:
    write(log.with_name("app.log.3.gz"), line(-9000), changed=-8000)
    write(log.with_name("app.log.2.gz"), line(-10), line(1), changed=10)
    write(log.with_name("app.log.1"), line(11), line(12), changed=20)
    write(log.with_name("app.log.1.gz"), line(11), line(12), changed=20)
    write(log.with_name("app.log-20261124"), line(-5000), line(13), changed=30)
    write(log.with_name("app.logger"), line(14))
    write(log.with_name("app.log.bak"), line(15))
    write(log, line(21))

    found = read(log)

    assert found.complete, found.note
    assert found.count == 5
    assert [item.time for item in found.items] == sorted(item.time for item in found.items)


def test_time_zones_are_compared_as_moments(log: Path) -> None:
    tokyo = timezone(timedelta(hours=9))
    stamps = ["2026-11-25T12:00:01+09:00", "2026-11-25T11:59:59+09:00", "2026-11-25T03:00:02Z", "2026-11-25T03:00:03"]
    yesterday = "2026-11-24T12:00:05+09:00"
    lines = [line(0, timestamp=stamp, request_id=stamp) for stamp in (*stamps, yesterday)]
    write(log, line(-1), *lines)

    assert read(log).count == 3
    assert read(log, MOMENT.astimezone(tokyo)).count == 3
    assert read(log, MOMENT.replace(tzinfo=None)).count == 3


def test_what_cannot_be_counted_is_never_zero_lost(log: Path, tmp_path: Path) -> None:
    missing = read(log)
    assert not missing.complete
    assert "is not there" in missing.note
    assert "at least 0" in missing.sentence

    assert not read(tmp_path / "nowhere" / "app.log").complete

    write(log, line(60))
    late = read(log)
    assert late.count == 1
    assert not late.complete
    assert "begins at 2026-11-25 03:01:00 UTC" in late.note

    write(log, "")
    assert not read(log).complete

    write(log, line(-1), line(1)[:-20] + "\n", line(2))
    torn = read(log)
    assert torn.count == 1
    assert "1 lines are not whole" in torn.note

    write(log, line(-1), line(2))
    packed = log.with_name("app.log.1.gz")
    write(packed, line(1))
    packed.write_bytes(packed.read_bytes()[:-12])
    cut = read(log)
    assert cut.count >= 1
    assert "app.log.1.gz" in cut.note


def test_the_list_is_capped_and_the_count_is_not(log: Path) -> None:
    write(log, line(-1), *(line(number) for number in range(1, MOST_ITEMS + 51)))
    found = read(log)
    assert found.count == MOST_ITEMS + 50
    assert len(found.items) == MOST_ITEMS
    assert found.items[0].time == MOMENT + timedelta(seconds=1)


def test_many_lines_cost_little(log: Path) -> None:
    """Measured: a million lines (309 MB) take 1.0 s of CPU; here a quarter of that, with room for a busy machine."""
    old, get, new = line(-50), line(50, "GET", status=200), line(51)
    log.write_text((old * 4 + get * 6) * 25_000 + new)
    started = time.thread_time()  # whatever else this process does
    found = read(log)
    took = time.thread_time() - started
    assert found.count == 1
    assert found.complete
    assert took < 1.5, f"{took:.1f} s of CPU"
