"""check_rate_limits: counters of a real Redis and refusals in a log: over, near, for ever, garbage, storms; what cannot
be looked at is told, and the rest is looked at all the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.ai_providers.limits import check_rate_limits
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tests.fixtures.logfiles import NAME, NOON, every, line
from tests.redis.servers import PASSWORD, RedisServer, running_redis

UNTIL = (NOON + timedelta(hours=1)).isoformat()
PREFIX = "rate_limit:ai:"
TOML = """
[redis]
port = {port}
password_env = "OPS_TEST_REDIS_PASSWORD"
[ai_providers]
rate_limits = {{ "rate_limit:ai:" = [100, 3600], "rate_limit:ai:azure:" = [1000, 9000] }}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as found:
        yield found


@pytest.fixture
def limiter(logs: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """An empty Redis, an environment that limits, and a log of well answered calls."""
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", PASSWORD)
    server.client().flushall()
    with (logs.parent / "trial.toml").open("a") as toml:
        toml.write(TOML.format(port=server.port))
    (logs / "app.log").write_text("".join(line("AI API Call", at, model="gpt-4o") for at in every(60, 5)))
    return server


def check() -> Report:
    try:
        return check_rate_limits.fn(NAME, until=UNTIL)
    except RunbookFailed as error:
        return error.report


def bad(report: Report) -> dict[str, tuple[Status, str]]:
    return {found.name: (found.status, found.value) for found in report.findings if found.status is not Status.OK}


def request(user: str, status: int = 429, **fields: object) -> dict[str, object]:
    return {"path": "/api/interview/sessions/1/messages", "status": status, "user_id": user, **fields}


def test_counters_and_refusals_that_are_well_are_ok(limiter: RedisServer) -> None:
    client = limiter.client()
    client.set(f"{PREFIX}7", 79, ex=3600)
    client.set(f"{PREFIX}azure:all", 700, ex=9000)
    client.set("session:x", "100")
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert report.facts["counters"].startswith("2 on ")
    assert report.facts["refusals"] == "0 of users, 0 by providers, in 5 AI calls"


def test_each_kind_of_counter_is_told_once_and_a_longer_prefix_has_its_own_limit(limiter: RedisServer) -> None:
    client = limiter.client(database=2)
    for user, count, seconds in ((b"a\xff", 120, 1800), (b"near", 80, 1800), (b"slow", 5, 9000), (b"ok", 79, 1800)):
        client.set(PREFIX.encode() + user, count, ex=seconds)
    client.set(f"{PREFIX}free", 3)
    client.set(f"{PREFIX}text", "a few", ex=1800)
    client.hset(f"{PREFIX}hash", "n", "1")
    client.expire(f"{PREFIX}hash", 1800)
    client.set(f"{PREFIX}azure:all", 850, ex=1800)
    report = check()
    found = bad(report)
    assert found == {
        f"{PREFIX} over the limit": (Status.WARN, f"1: {PREFIX}a\\xff"),
        f"{PREFIX} near the limit": (Status.WARN, f"1: {PREFIX}near"),
        f"{PREFIX} every counter expires": (Status.WARN, f"1: {PREFIX}free"),
        f"{PREFIX} every counter expires with its window": (Status.WARN, f"1: {PREFIX}slow"),
        f"{PREFIX} every counter is a number": (Status.WARN, found[f"{PREFIX} every counter is a number"][1]),
        f"{PREFIX}azure: near the limit": (Status.WARN, f"1: {PREFIX}azure:all"),
    }
    assert found[f"{PREFIX} every counter is a number"][1].startswith("2: ")
    client.persist(PREFIX.encode() + b"a\xff")
    status, value = bad(check())[f"{PREFIX} every counter expires"]
    assert (status, value) == (Status.CRITICAL, f"2: {PREFIX}a\\xff …; 1 of them locked out permanently")


def test_refusals_are_told_by_user_and_provider_and_a_storm_by_its_worst_minute(
    limiter: RedisServer, logs: Path
) -> None:
    lines = [line("request", at, **request("42")) for at in every(2, 25)]
    lines += [line("request", at, **request("7")) for at in every(30, 30)]
    lines += [
        line("request", NOON, "WARNING", **request("8", 503, error="rate limit")),
        line("rate limit is 100", NOON),
    ]
    lines += [
        line("Provider azure failed", NOON, "WARNING", provider="azure", error="HTTP Error 429: Too Many Requests")
    ]
    lines += [
        line("Rate limit hit: slow down", NOON, "WARNING"),
        line("Provider vertex failed", NOON, "WARNING", error="503"),
    ]
    (logs / "app.log").write_text("".join(lines))
    report = check()
    found = bad(report)
    assert found["users were refused (429)"] == (Status.WARN, "55 times: 7 30, 42 25")
    assert found["providers refused (429)"] == (Status.WARN, "2 times: ? 1, azure 1")
    assert found["retry storms"] == (Status.WARN, "1; the worst: 25 per minute, user 42, at 02-15 21:00:48")
    late = check_late()
    assert late["retry storms"][0] is Status.CRITICAL
    assert late["retry storms"][1].endswith("; still active")


def test_of_24_hours_across_a_change_of_the_clock_none_is_the_25th(limiter: RedisServer, logs: Path) -> None:
    toml = logs.parent / "trial.toml"
    toml.write_text(toml.read_text().replace("Asia/Tokyo", "Europe/Berlin"))
    noon = datetime(2026, 10, 25, 11, tzinfo=UTC)
    lines = [line("request", noon - timedelta(hours=hours), **request("42")) for hours in (24.5, 23.5)]
    lines += [line("request", noon, **request("7")).replace(noon.isoformat(), "0000")]
    (logs / "app.log").write_text("".join(lines))
    found = bad(check_rate_limits.fn(NAME, until="2026-10-25 12:00"))
    assert found["users were refused (429)"] == (Status.WARN, "1 times: 42 1")
    assert found["lines without a readable time"] == (Status.WARN, "1")
    (logs / "app.log").write_text(
        "".join(line("request", noon - timedelta(hours=hours), **request("42")) for hours in (10.25, 9.75))
    )
    report = check_rate_limits.fn(NAME, until="2026-10-25 12:00")
    (table,) = [item for item in report.evidence if item.name == "Refusals (429)"]
    assert table.rows[0][3:5] == ("10-25 02:45:00", "10-25 02:15:00"), "the first is the earlier one"
    (picture,) = [item.svg for item in report.evidence if item.name.startswith("Refusals by hour")]
    assert [picture.count(f"10-25 02:00 {offset}") for offset in ("+02:00", "+01:00")] == [1, 1]


def check_late() -> dict[str, tuple[Status, str]]:
    with pytest.raises(RunbookFailed) as caught:
        check_rate_limits.fn(NAME, until=(NOON + timedelta(minutes=10)).isoformat())
    return bad(caught.value.report)


def test_without_redis_the_log_is_read_and_without_a_log_the_counters(
    limiter: RedisServer, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logs / "app.log").unlink()
    limiter.client().set(f"{PREFIX}7", 100, ex=1800)
    found = bad(check())
    assert found["refusals in the log"][0] is Status.CRITICAL
    assert "there is no log" in found["refusals in the log"][1]
    assert f"{PREFIX} over the limit" in found
    (logs / "app.log").write_text(line("request", NOON, **request("7")))
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wrong")
    found = bad(check())
    assert found["the limiter's counters"][0] is Status.CRITICAL
    assert "not known: " in found["the limiter's counters"][1]
    assert "users were refused (429)" in found


def test_no_limit_and_no_section_is_told(limiter: RedisServer, logs: Path) -> None:
    toml = logs.parent / "trial.toml"
    toml.write_text(toml.read_text().partition("[ai_providers]")[0])
    assert bad(check()) == {"the limiter's counters": (Status.WARN, "not known: no limit is configured")}
