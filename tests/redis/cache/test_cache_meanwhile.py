"""clear-cache if the server, its data or the user's rights change meanwhile: it stops, and its counts are true."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from flows.redis.cache import clear_cache
from runbook import kinds
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.redis.cache import server as cache_server
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.keys import read_prefix
from tests.redis.servers import NAME, PASSWORD, RedisServer, running_redis, settles

Act = Callable[[], object]
RESTARTED = "was restarted after its keys were counted"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


def enter_as(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, *commands: str, keys: tuple[str, ...] = ("*",)
) -> None:
    acl = {"passwords": [f"+{PASSWORD}"], "keys": [*keys], "channels": ["*"], "commands": [*commands]}
    server.client().acl_setuser("ops", enabled=True, reset=True, **acl)
    server.register(monkeypatch, extra='username = "ops"\n')


def fill(client: redis.Redis, count: int, prefix: str = "cache:") -> None:
    with client.pipeline(transaction=False) as pipe:
        for n in range(count):
            pipe.set(f"{prefix}{n}", "v")
        pipe.execute()


def failed(confirm: str = NAME, **parameters: object) -> Report:
    with pytest.raises(RunbookFailed) as raised:
        clear_cache.fn(NAME, confirm=confirm, **parameters)
    return raised.value.report


@pytest.fixture
def lasting() -> Iterator[ThreadPoolExecutor]:
    """A server that a test starts ends with the thread that started it: this one outlives the pass."""
    with ThreadPoolExecutor(1) as found:
        yield found


@pytest.fixture
def at_page(monkeypatch: pytest.MonkeyPatch, lasting: ThreadPoolExecutor) -> Callable[[int, Act], None]:
    """Have something done after a page, counted or unlinked, from 1."""

    def set_up(number: int, act: Act) -> None:
        pages = iter(range(1, 1_000_000))
        monkeypatch.setattr(
            cache_sweep, "failpoint", lambda _: lasting.submit(act).result() if next(pages) == number else None
        )

    return set_up


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Act], None]:
    """Have something done before a step begins."""

    def set_up(name: str, act: Act) -> None:
        monkeypatch.setattr(kinds, "failpoint", lambda point: act() if point == f"before {name}" else None)

    return set_up


def restart(server: RedisServer, keys: int, prefix: str) -> Act:
    """It loses all, and others write."""

    def act() -> None:
        server.crash()
        server.start()
        fill(server.client(), keys, prefix)

    return act


def plan_of(**parameters: object) -> str:
    return str(clear_cache.fn(NAME, **parameters).pins["plan"])


def test_a_restart_while_a_plan_counts(server: RedisServer, at_page: Callable[[int, Act], None]) -> None:
    fill(server.client(), 2000)
    at_page(3, restart(server, 0, ""))
    report = failed(confirm="", prefixes=("cache:",))
    assert RESTARTED in report.sentence()
    assert "plan again" in report.sentence()


def test_a_restart_between_the_count_and_the_flush(
    server: RedisServer, before_step: Callable[[str, Act], None]
) -> None:
    """As many other keys are there by then."""
    fill(server.client(), 100)
    plan = plan_of(flush=True)
    before_step("flush_keys", restart(server, 100, "other:"))
    report = failed(flush=True, plan=plan)
    assert RESTARTED in report.sentence()
    assert f"db 0 of {server.address} (100 keys) was not flushed" in report.sentence()
    assert server.client().dbsize() == 100


@pytest.mark.parametrize("planned", [True, False])
def test_a_restart_between_the_check_and_the_clearing(
    server: RedisServer, before_step: Callable[[str, Act], None], planned: bool
) -> None:
    fill(server.client(), 1000)
    plan = plan_of(prefixes=("cache:",)) if planned else ""
    before_step("unlink_keys", restart(server, 100, "cache:new:"))
    report = failed(prefixes=("cache:",), plan=plan)
    assert f"{RESTARTED}: it may hold other keys now" in report.sentence()
    assert "0 keys were unlinked by then" in report.sentence()
    assert server.client().dbsize() == 100


def test_a_restart_between_two_databases(server: RedisServer, at_page: Callable[[int, Act], None]) -> None:
    """The first has one page: the other's connection is made anew."""
    fill(server.client(0), 1, "other:")
    fill(server.client(1), 1000)

    def act() -> None:
        server.crash()
        server.start()
        fill(server.client(1), 1000)

    at_page(1, act)
    assert RESTARTED in failed(prefixes=("cache:",), databases=(0, 1)).sentence()
    assert server.client(1).dbsize() == 1000


@pytest.mark.parametrize("recheck_seconds", [0.0, 1e6])
def test_it_becomes_a_replica_and_pages_have_nothing_to_unlink(
    server: RedisServer, at_page: Callable[[int, Act], None], monkeypatch: pytest.MonkeyPatch, recheck_seconds: float
) -> None:
    """Its master's data has no such keys, so that no page is refused (READONLY)."""
    monkeypatch.setattr(cache_server, "RECHECK_SECONDS", recheck_seconds)
    fill(server.client(), 3000)
    with running_redis() as other:
        fill(other.client(), 3000, "other:")
        at_page(2, follow(server, other))
        report = failed(prefixes=("cache:",))
        assert "is now a slave; it was a master" in report.sentence()
        assert "run it again" in report.sentence()


def follow(server: RedisServer, other: RedisServer) -> Act:
    def act() -> None:
        server.client().replicaof("127.0.0.1", str(other.port))
        settles(lambda: server.client().exists("other:1"), "the other's data")

    return act


def test_it_becomes_a_replica_while_a_plan_counts(server: RedisServer, at_page: Callable[[int, Act], None]) -> None:
    fill(server.client(), 3000)
    with running_redis() as other:
        fill(other.client(), 3000, "other:")
        at_page(2, follow(server, other))
        assert "is now a slave; it was a master" in failed(confirm="", prefixes=("cache:",)).sentence()


def test_a_writable_replica_is_not_flushed(server: RedisServer, before_step: Callable[[str, Act], None]) -> None:
    """It would not refuse by itself."""
    fill(server.client(), 100, "other:")
    plan = plan_of(flush=True)
    with running_redis() as other:
        fill(other.client(), 100, "other:")
        server.client().config_set("replica-read-only", "no")
        before_step("flush_keys", follow(server, other))
        assert "is now a slave; it was a master" in failed(flush=True, plan=plan).sentence()
        assert server.client().dbsize() == 100


def deleted(server: RedisServer, before: int) -> int:
    return before - int(server.client().execute_command("DBSIZE"))


def test_keys_unlinked_before_a_refusal_are_counted(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same page: keys of one prefix can be deleted, keys of the other only read."""
    client = server.client()
    fill(client, 3000)
    fill(client, 20, "user:")
    while (first := next(client.scan_iter())).startswith(b"user:"):  # otherwise the refusal comes first
        client.rename(first, first + b"'")
    enter_as(server, monkeypatch, "+@all", keys=("cache:*", "%R~*"))
    told = failed(prefixes=("cache:", "user:")).sentence()
    (counted,) = re.findall(r"([\d,]+) keys were unlinked by then", told)
    assert int(counted.replace(",", "")) == deleted(server, 3020) > 0, told
    assert "ACL SETUSER ops ~" in told


def test_rights_on_the_keys_that_are_shown_are_tried_in_the_plan(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server.client(), 10, "user:")
    enter_as(server, monkeypatch, "+@all", keys=("cache:*", "%R~*"))
    assert "No permissions to access a key" in failed(confirm="", prefixes=("user:",)).sentence()
    assert server.client().dbsize() == 10


@pytest.mark.parametrize(
    ("command", "parameters"), [("unlink", {"prefixes": ("cache:",)}), ("flushdb", {"flush": True})]
)
def test_a_plan_reports_a_command_that_the_user_may_not_run(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str, parameters: dict[str, object]
) -> None:
    fill(server.client(), 10)
    enter_as(server, monkeypatch, "+@all", f"-{command}")
    report = failed(confirm="", **parameters)
    assert f"forbids user ops the command {command.upper()}" in report.sentence()
    assert f"ACL SETUSER ops +{command}" in report.sentence()
    enter_as(server, monkeypatch, "+@all")
    assert clear_cache.fn(NAME, **parameters).status is Status.PLANNED
    assert server.client().dbsize() == 10


def test_an_answer_that_is_lost(
    server: RedisServer, at_page: Callable[[int, Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hangs, and does what it was sent when it goes on."""
    fill(server.client(), 3000)
    monkeypatch.setattr("blocks.redis.server.SOCKET_SECONDS", 8.0)  # for its answers before that, too
    at_page(4, server.freeze)
    told = failed(prefixes=("cache:",)).sentence()
    server.thaw()
    least, most = (
        int(number.replace(",", ""))
        for number in re.findall(r"at least ([\d,]+) and at most about ([\d,]+) keys were unlinked by then", told)[0]
    )
    settles(lambda: server.client().ping(), "its going on")
    assert 0 < least <= deleted(server, 3000) <= most < 3000


def test_a_database_that_does_not_exist(server: RedisServer) -> None:
    """Nothing is deleted from the others."""
    fill(server.client(), 10)
    for parameters in (
        {"prefixes": ("cache:",), "databases": (0, 99)},
        {"flush": True, "databases": (99,)},
        {"prefixes": ("cache:",), "databases": (16, 99)},
    ):
        told = failed(**parameters).sentence()
        assert re.search(r"has no database (16, )?99\. Next: correct databases: it has 0 to 15", told), told
    assert server.client().dbsize() == 10


def test_the_second_of_two_databases_changes(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report names the flushed database and the other."""
    fill(server.client(0), 50)
    fill(server.client(1), 50)
    plan = plan_of(flush=True, databases=(0, 1))
    steps = iter((lambda: None, lambda: fill(server.client(1), 50, "new:")))
    monkeypatch.setattr(kinds, "failpoint", lambda point: next(steps)() if point == "before flush_keys" else None)
    told = failed(flush=True, databases=(0, 1), plan=plan).sentence()
    assert "50 keys were planned, now there are 100" in told
    assert f"db 1 of {server.address} (50 keys) was not flushed; about 50 keys of other databases were" in told
    assert (server.client(0).dbsize(), server.client(1).dbsize()) == (0, 100)


def test_a_flush_without_an_answer_may_be_done(
    server: RedisServer, before_step: Callable[[str, Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze() -> None:
        monkeypatch.setattr("tasks.redis.server.GREETING_SECONDS", 0.5)
        server.freeze()

    fill(server.client(), 10)
    plan = plan_of(flush=True)
    before_step("flush_keys", freeze)
    told = failed(flush=True, plan=plan).sentence()
    server.thaw()
    assert f"db 0 of {server.address} (10 keys) may be flushed" in told


def test_prefixes_are_read_in_one_way() -> None:
    assert read_prefix(r"\xff:\x5cx") == b"\xff:\\x"
    with pytest.raises(OpsError, match="cannot be part of a key"):
        read_prefix("\ud800")
    with pytest.raises(OpsError, match="an empty prefix"):
        read_prefix("")
