"""clear-cache when the server, its data or this user's rights are not what they were: it stops, and counts truly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from flows.redis.cache.cache import clear_cache
from runbook import kinds
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.redis.cache import recheck
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.keys import read_prefix
from tests.redis.servers import NAME, PASSWORD, RedisServer, running_redis, settles

Act = Callable[[], object]
RESTARTED = "was restarted since its keys were looked at"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


@pytest.fixture(params=["scripts", "plain commands"])
def either(request: pytest.FixtureRequest, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """The server, entered as a user who may EVAL, and as one who may not."""
    if request.param != "scripts":
        enter_as(server, monkeypatch, "+@all", "-eval")
    return server


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


def test_a_restart_while_a_plan_counts(either: RedisServer, at_page: Callable[[int, Act], None]) -> None:
    fill(either.client(), 2000)
    at_page(3, restart(either, 0, ""))
    if either.client().acl_getuser("ops"):
        at_page(3, lambda: (restart(either, 0, "")(), add_user(either)))
    report = failed(confirm="", prefixes=("cache:",))
    assert RESTARTED in report.sentence()
    assert "plan again" in report.sentence()


def add_user(server: RedisServer) -> None:
    """As `either` has it: users are gone with a restart."""
    acl = {"passwords": [f"+{PASSWORD}"], "keys": ["*"], "channels": ["*"], "commands": ["+@all", "-eval"]}
    server.client().acl_setuser("ops", enabled=True, reset=True, **acl)


@pytest.mark.parametrize("scripted", [True, False])
def test_a_restart_between_the_count_and_the_flush(
    server: RedisServer, before_step: Callable[[str, Act], None], monkeypatch: pytest.MonkeyPatch, scripted: bool
) -> None:
    """As many other keys are there by then."""
    if not scripted:
        enter_as(server, monkeypatch, "+@all", "-eval")
    fill(server.client(), 100)
    before_step("flush_keys", lambda: (restart(server, 100, "other:")(), scripted or add_user(server)))
    report = failed(flush="database", expected_keys=100)
    assert RESTARTED in report.sentence()
    assert f"db 0 of {server.address} (100 keys) was not flushed" in report.sentence()
    assert server.client().dbsize() == 100


@pytest.mark.parametrize("broad", [True, False])
def test_a_restart_between_the_look_and_the_clearing(
    server: RedisServer, before_step: Callable[[str, Act], None], broad: bool
) -> None:
    prefix = "session:" if broad else "cache:"
    fill(server.client(), 1000, prefix)
    before_step("unlink_keys", restart(server, 100, f"{prefix}new:"))
    report = failed(prefixes=(prefix,), expected_keys=1000 if broad else 0)
    assert f"{RESTARTED}: it may hold others now: 0 keys were unlinked by then" in report.sentence()
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
    either: RedisServer, at_page: Callable[[int, Act], None], monkeypatch: pytest.MonkeyPatch, recheck_seconds: float
) -> None:
    """Its master's data has no such keys, so that no page is refused (READONLY)."""
    monkeypatch.setattr(recheck, "RECHECK_SECONDS", recheck_seconds)
    fill(either.client(), 3000)
    with running_redis() as other:
        fill(other.client(), 3000, "other:")
        at_page(2, follow(either, other))
        report = failed(prefixes=("cache:",))
        assert "is a slave now, and was a master" in report.sentence()
        assert "launch it again" in report.sentence()


def follow(server: RedisServer, other: RedisServer) -> Act:
    def act() -> None:
        server.client().replicaof("127.0.0.1", str(other.port))
        settles(lambda: server.client().exists("other:1"), "the other's data")

    return act


def test_it_becomes_a_replica_while_a_plan_counts(either: RedisServer, at_page: Callable[[int, Act], None]) -> None:
    fill(either.client(), 3000)
    with running_redis() as other:
        fill(other.client(), 3000, "other:")
        at_page(2, follow(either, other))
        assert "is a slave now, and was a master" in failed(confirm="", prefixes=("cache:",)).sentence()


def test_a_writable_replica_is_not_flushed(either: RedisServer, before_step: Callable[[str, Act], None]) -> None:
    """It would not refuse by itself."""
    fill(either.client(), 100, "other:")
    with running_redis() as other:
        fill(other.client(), 100, "other:")
        either.client().config_set("replica-read-only", "no")
        before_step("flush_keys", follow(either, other))
        assert "is a slave now, and was a master" in failed(flush="database", expected_keys=100).sentence()
        assert either.client().dbsize() == 100


def gone(server: RedisServer, before: int) -> int:
    return before - int(server.client().execute_command("DBSIZE"))


@pytest.mark.parametrize("commands", [("+@all",), ("+@all", "-eval")], ids=["scripts", "plain commands"])
def test_what_was_unlinked_before_a_refusal_is_counted(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, commands: tuple[str, ...]
) -> None:
    """In the same page: of one prefix keys may go, those of the other may be read only."""
    for parameters in ({"pattern": "*", "expected_keys": 3020}, {"prefixes": ("cache:", "user:")}):
        client = server.client()
        client.flushall()
        fill(client, 3000)
        fill(client, 20, "user:")
        while (first := next(client.scan_iter())).startswith(b"user:"):  # else nothing goes before the refusal
            client.rename(first, first + b"'")
        enter_as(server, monkeypatch, *commands, keys=("cache:*", "%R~*"))
        monkeypatch.setattr(
            "flows.redis.cache.cache.judge_rights", lambda *_: None, raising=False
        )  # as if it had not seen it
        told = failed(**parameters).sentence()
        (counted,) = re.findall(r"key: ([\d,]+) keys were unlinked by then", told)
        assert int(counted.replace(",", "")) == gone(server, 3020), told
        assert gone(server, 3020) > 0
        assert "ACL SETUSER ops ~" in told


def test_rights_on_the_keys_that_are_shown_are_tried_in_the_plan(
    either: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(either.client(), 10, "user:")
    enter_as(either, monkeypatch, "+@all", keys=("cache:*", "%R~*"))
    assert "No permissions to access a key" in failed(confirm="", prefixes=("user:",)).sentence()
    assert either.client().dbsize() == 10


@pytest.mark.parametrize(
    ("command", "parameters"),
    [
        ("unlink", {"prefixes": ("cache:",)}),
        ("flushdb", {"flush": "database"}),
        ("flushall", {"flush": "all"}),
        ("pexpire", {"prefixes": ("cache:",), "only_without_ttl": True}),
    ],
)
def test_a_command_that_this_user_may_not_give_is_told_in_the_plan(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str, parameters: dict[str, object]
) -> None:
    fill(server.client(), 10)
    enter_as(server, monkeypatch, "+@all", f"-{command}", *(["-eval"] if command == "pexpire" else []))
    report = failed(confirm="", **parameters)
    assert f"forbids user ops the command {command.upper()}" in report.sentence()
    assert f"ACL SETUSER ops +{command}" in report.sentence()
    enter_as(server, monkeypatch, "+@all")
    assert clear_cache.fn(NAME, **parameters).status is Status.PLANNED
    assert server.client().dbsize() == 10


def test_an_answer_that_is_lost(
    either: RedisServer, at_page: Callable[[int, Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hangs, and does what it was sent when it goes on."""
    fill(either.client(), 3000)
    monkeypatch.setattr("blocks.redis.server.SOCKET_SECONDS", 8.0)  # for its answers before that, too
    at_page(4, either.freeze)
    told = failed(prefixes=("cache:",)).sentence()
    either.thaw()
    least, most = (
        int(number.replace(",", ""))
        for number in re.findall(r"at least ([\d,]+) and at most about ([\d,]+) keys were unlinked by then", told)[0]
    )
    settles(lambda: either.client().ping(), "its going on")
    assert 0 < least <= gone(either, 3000) <= most < 3000


def test_a_database_that_is_not_there(either: RedisServer) -> None:
    """It is looked for before anything is touched."""
    fill(either.client(), 10)
    for parameters in (
        {"prefixes": ("cache:",), "databases": (0, 99)},
        {"flush": "database", "databases": (99,)},
        {"prefixes": ("cache:",), "databases": (16, 99)},
    ):
        told = failed(**parameters).sentence()
        assert re.search(r"has no database (16, )?99\. Next: correct databases: it has 0 to 15", told), told
    assert either.client().dbsize() == 10


def test_the_second_of_two_databases_has_changed(either: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done and what was not is told apart."""
    fill(either.client(0), 50)
    fill(either.client(1), 50)
    steps = iter((lambda: None, lambda: fill(either.client(1), 50, "new:")))
    monkeypatch.setattr(kinds, "failpoint", lambda point: next(steps)() if point == "before flush_keys" else None)
    told = failed(flush="database", databases=(0, 1), expected_keys=100).sentence()
    assert "50 keys were planned, now there are 100" in told
    assert f"db 1 of {either.address} (50 keys) was not flushed; 50 keys of other databases were" in told
    assert "nothing was flushed" not in told
    assert (either.client(0).dbsize(), either.client(1).dbsize()) == (0, 100)


def test_a_flush_whose_answer_is_lost_may_be_done(
    server: RedisServer, before_step: Callable[[str, Act], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze() -> None:
        monkeypatch.setattr("tasks.redis.server.GREETING_SECONDS", 0.5)
        server.freeze()

    fill(server.client(), 10)
    before_step("flush_keys", freeze)
    told = failed(flush="database", expected_keys=10).sentence()
    server.thaw()
    assert f"db 0 of {server.address} (10 keys) may be flushed" in told


def test_nothing_to_flush_is_told_as_that(either: RedisServer) -> None:
    assert clear_cache.fn(NAME, flush="all").outcome.startswith("there is nothing to flush: no key in any database of")
    outcome = clear_cache.fn(NAME, flush="database", databases=(3, 5)).outcome
    assert outcome == f"there is nothing to flush: no key in db 3, db 5 of {either.address}"


def test_prefixes_are_read_in_one_way() -> None:
    assert read_prefix(r"\xff:\x5cx") == b"\xff:\\x"
    with pytest.raises(OpsError, match="cannot stand in a key"):
        read_prefix("\ud800")
    with pytest.raises(OpsError, match="an empty prefix"):
        read_prefix("")
