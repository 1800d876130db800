"""check-redis-clients and close-idle-redis-clients against real servers: who is counted, closed, kept, and why."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from blocks.redis.server import Redis
from flows.redis import client_findings, clients
from flows.redis.clients import check_redis_clients, close_idle_redis_clients
from runbook import kinds
from runbook.errors import NotConfirmed, OpsError, RunbookFailed, Unreachable
from runbook.report import Finding, Report, Status
from runbook.wait import until
from tasks.redis import client_list, closing
from tasks.redis import server as servers
from tasks.redis.client_list import Client, list_clients, parse
from tasks.redis.clients import read_clients
from tasks.redis.closing import close_clients, why_kept
from tasks.redis.server import call
from tests.fixtures import forked
from tests.fixtures.reports import beginning as found
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, running_redis

ROOT = Path(__file__).parents[2]
FAILPOINT = "redis clients: closed one"
held: list[redis.Redis] = []


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    for client in held:
        client.close()
    held.clear()


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with the manual's timeout, where an idle second is long."""
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    monkeypatch.setattr(clients, "RECONNECT_SECONDS", 0.0)
    with running_redis(settings=("timeout 300",)) as server:
        server.register(monkeypatch)
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is gone is asked again at once."""
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.01] * 3)


def opened(server: RedisServer, name: str = "", **options: Any) -> redis.Redis:
    """A client that is connected, and stays so to the test's end."""
    client = server.client(client_name=name or None, **options)
    client.ping()
    held.append(client)
    return client


def names(server: RedisServer) -> list[str]:
    """Of those who are connected, but for the one that asks."""
    client = server.client()
    own = client.client_id()
    return sorted(one["name"] for one in client.client_list() if int(one["id"]) != own)


def wait_idle(server: RedisServer, *told: str, seconds: int = 1) -> None:
    """Until those connections have been idle for so long."""

    def are_idle() -> bool:
        idle = {one["name"]: int(one["idle"]) for one in server.client().client_list()}
        return all(idle[name] >= seconds for name in told)

    until(are_idle, what=f"idle {told}", seconds=120)


def is_younger(server: RedisServer, name: str, seconds: int) -> bool:
    """Whether that connection has been idle for less."""
    (idle,) = (int(one["idle"]) for one in server.client().client_list() if one["name"] == name)
    return idle < seconds


def check() -> Report:
    try:
        return check_redis_clients.fn(NAME)
    except RunbookFailed as error:
        return error.report


def close(**parameters: Any) -> Report:
    return close_idle_redis_clients.fn(NAME, **{"min_seconds": 1, "confirm": NAME, **parameters})


def table(report: Report, name: str) -> tuple[tuple[str, ...], ...]:
    return next((item.rows for item in report.evidence if item.name == name), ())


def results(report: Report) -> dict[str, str]:
    """Name of a connection → what became of it."""
    return {row[0].split("(")[1].split(",")[0]: row[1] for row in table(report, "Closed")}


def bad(report: Report) -> set[str]:
    return {finding.name.split(" (")[0] for finding in report.findings if finding.status is not Status.OK}


def test_connections_are_counted_by_name_address_and_user(limited: RedisServer) -> None:
    limited.client().acl_setuser("app", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all"])
    for name in ("web", "web", "web", ""):
        opened(limited, name)
    user = redis.Redis(port=limited.port, username="app", password="x", db=3, client_name="worker")
    user.ping()
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert {row[:2] for row in table(report, "By name")} >= {("web", "3"), ("worker", "1")}
    assert {row[0]: row[4] for row in table(report, "By name")}["worker"] == "3"
    assert ("127.0.0.1", "5") in {row[:2] for row in table(report, "By address")}
    assert ("app", "1") in {row[:2] for row in table(report, "By user")}
    info = limited.client().info("clients")
    assert report.outcome == f"{int(info['connected_clients'])} of 10,000 connections are in use"
    assert report.facts["server"].startswith(f"{limited.address} (master")
    user.close()


@pytest.mark.parametrize(("more", "status"), [(0, Status.OK), (3, Status.WARN), (6, Status.CRITICAL)])
def test_places_that_are_scarce(limited: RedisServer, more: int, status: Status) -> None:
    """Of 20: 14 and the asking one, then 17 and 20 besides."""
    limited.client().config_set("maxclients", 20)
    for n in range(13 + more):
        opened(limited, f"c{n}")
    report = check()
    used = found(report, "redis.clients.used_ratio")
    assert used.status is status, used
    assert (status is Status.OK) or used.follow[0].flow == "close-idle-redis-clients"


def test_a_server_that_is_full_says_so(limited: RedisServer, quick: None) -> None:
    """It is there, and not down; and the rejected are counted when it can be asked again."""
    limited.client().config_set("maxclients", 5)
    for n in range(5):
        opened(limited, f"c{n}")
    report = check()
    assert "has reached maxclients: it takes no more connections" in report.sentence()
    assert "stop one of the application's workers" in report.sentence()
    for client in held[:3]:
        client.close()

    def told() -> Finding | None:
        return next((one for one in check().findings if one.name.startswith("rejected connections")), None)

    rejected = until(told, what="a place", seconds=120)
    assert rejected
    assert rejected.status is Status.WARN
    assert "CONFIG RESETSTAT" in rejected.hint


def test_a_server_that_hangs_is_greeted_once_a_try(
    limited: RedisServer, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """It is not asked a second time whether it is full: each question costs its whole patience."""
    monkeypatch.setattr(servers, "GREETING_SECONDS", 0.2)
    asked: list[Redis] = []
    client = Redis.client
    monkeypatch.setattr(
        Redis, "client", lambda block, *args, **more: asked.append(block) or client(block, *args, **more)
    )
    limited.freeze()
    report = check()
    assert "does not answer" in report.sentence()
    assert len(asked) == 1 + kinds.RETRIES


def test_settings_that_do_not_limit(server: RedisServer) -> None:
    for name, value in (("tcp-keepalive", "0"), ("client-output-buffer-limit", "pubsub 0 0 0")):
        server.client().config_set(name, value)
    report = check()
    assert bad(report) == {"timeout", "tcp-keepalive", "client-output-buffer-limit"}
    assert found(report, "timeout").follow[0].parameters == {"names": ["timeout"]}
    assert "0 (never)" in found(report, "timeout").value
    server.client().config_set("timeout", 301)
    assert "later than in the manual" in found(check(), "timeout").hint
    server.client().config_set("timeout", 60)
    assert found(check(), "timeout").status is Status.OK


def test_one_that_does_not_read_and_one_that_watches(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_findings, "BIG_OUTPUT_BYTES", 100_000)
    writer = limited.client()
    slow = opened(limited, "slow").pubsub()
    slow.subscribe("news")
    slow.get_message(timeout=5)
    watching = opened(limited, "watching").monitor()
    with watching:
        for _ in range(400):
            writer.publish("news", "x" * 20_000)
        report = check()
        assert {"output buffers", "MONITOR"} <= bad(report)
        hint = found(report, "output buffers").hint
        assert any(f"CLIENT KILL ID {one['id']} " in hint for one in writer.client_list())
        assert table(report, "Biggest in memory")[0][4] in ("pub/sub", "MONITOR")
        assert "1 pub/sub" in report.facts["connections"]
        writer.config_set("maxmemory", "4mb")
        assert "redis.clients.memory_ratio" in bad(check())
    slow.close()


def test_idle_ones_matter_while_places_are_scarce(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_findings, "MANUAL_IDLE_SECONDS", 1)
    told = [f"c{n}" for n in range(17)]
    for name in told:
        opened(limited, name)
    wait_idle(limited, *told)
    assert bad(check()) == set()
    limited.client().config_set("maxclients", 20)
    assert "idle for 3600 s and more" in bad(check())
    assert len(table(check(), "Idle for 3600 s and more")) == 17


def test_a_plan_closes_nothing_then_only_the_idle_are_closed(limited: RedisServer) -> None:
    busy = [opened(limited, name) for name in ("idle", "kept", "busy")][-1]
    user = redis.Redis(port=limited.port, password=PASSWORD, client_name="by-address")
    user.ping()
    kept_port = user.connection_pool.get_connection()._sock.getsockname()[1]  # type: ignore[union-attr]
    wait_idle(limited, "idle", "kept", "by-address")
    limited.client().acl_setuser("app", enabled=True, nopass=True, keys=["*"], commands=["+@all"])

    def plan() -> Report | None:
        """Of a moment in which the busy one has worked less than a second ago, by the server's own clock."""
        busy.ping()
        planned = close(confirm="", keep_names=("kept",), keep_addresses=(f"127.0.0.1:{kept_port}",))
        return planned if is_younger(limited, "busy", 1) else None

    planned = until(plan, what="a plan while one is busy", seconds=300)
    assert planned
    assert planned.status is Status.PLANNED
    assert [step.detail.split("(")[1].split(",")[0] for step in planned.plan_steps] == ["idle"]
    assert {row[1] for row in table(planned, "Kept")} == {"name kept", f"address 127.0.0.1:{kept_port}"}
    assert {"idle", "kept", "busy"} <= set(names(limited))
    with pytest.raises(NotConfirmed):
        close(confirm="yes")
    busy.ping()
    report = close(keep_names=("kept",), keep_addresses=("127.0.0.1",))
    assert report.outcome == "there is nothing to close", "every address was excluded"
    busy.ping()
    report = close(keep_names=("kept",), keep_addresses=(f"127.0.0.1:{kept_port}",))
    assert results(report)["idle"] == "closed"
    assert "idle" not in names(limited)
    assert {"kept", "by-address"} <= set(names(limited))
    assert close(min_seconds=3600).outcome == "there is nothing to close"


def test_a_user_is_kept(limited: RedisServer) -> None:
    limited.client().acl_setuser("app", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all"])
    users = redis.Redis(port=limited.port, username="app", password="x", client_name="theirs")
    users.ping()
    mine = opened(limited, "mine")
    wait_idle(limited, "theirs", "mine")
    report = close(keep_users=("app",))
    assert results(report) == {"mine": "closed"}
    assert "theirs" in names(limited)
    assert mine.ping(), "it connects again"


def test_idle_times_are_numbers() -> None:
    """The manual's pattern misses 10,000 s and more, and takes 3000 to 3599."""
    line = b"id=%d addr=[::1]:5%d laddr=x fd=8 name=n age=99999 idle=%d flags=N db=0 cmd=NULL user=default\n"
    told = parse(b"".join(line % (n, n, idle) for n, idle in enumerate((3000, 3599, 3600, 9999, 10_000, 123_456))))
    assert [one.idle_seconds for one in told if one.idle_seconds >= 3600] == [3600, 9999, 10_000, 123_456]
    assert (told[0].host, told[0].kind, told[0].memory_bytes) == ("[::1]", "normal", 0)
    assert why_kept(told[0], (), (), ("::1",)) == "address [::1]:50"


def test_its_title_is_the_manual_s() -> None:
    assert (close_idle_redis_clients.description or "").startswith("接続数管理: アイドル接続の切断 (§2.4)")


def test_an_address_is_closed_idle_or_not(limited: RedisServer) -> None:
    opened(limited, "one")
    target = next(one["addr"] for one in limited.client().client_list() if one["name"] == "one")
    assert results(close(address=target, min_seconds=3600)) == {"one": "closed"}
    with pytest.raises(RunbookFailed, match="no client of .* has the address"):
        close(address=target)
    with pytest.raises(RunbookFailed, match="is no client's address"):
        close(address="127.0.0.1")
    with pytest.raises(RunbookFailed, match="choose 1 or more"):
        close(min_seconds=0)


class Guest:
    """A connection from an address that is nobody else's: nobody takes its port while it is free."""

    def __init__(self, server: RedisServer, name: str, port: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # ends by RST: no TIME_WAIT
        self.socket.bind(("127.0.0.77", port))
        self.socket.connect(("127.0.0.1", server.port))
        self.send(f'AUTH "{PASSWORD}"', f"CLIENT SETNAME {name}")
        self.port = self.socket.getsockname()[1]
        until(lambda: name in names(server), what=f"the guest {name}", seconds=120)

    @property
    def address(self) -> str:
        return f"127.0.0.77:{self.port}"

    def send(self, *lines: str) -> None:
        self.socket.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def close(self) -> None:
        self.socket.close()


def test_an_address_that_is_another_s_since_the_plan(limited: RedisServer) -> None:
    """The plan's form names the connection by its id too: nobody else is closed in its place."""
    hangs = Guest(limited, "batch-that-hangs")
    planned = close(address=hangs.address, confirm="")
    (one,) = (one for one in limited.client().client_list() if one["name"] == "batch-that-hangs")
    assert planned.pins["client_id"] == int(one["id"])
    assert f"client_id={one['id']}" in planned.form
    hangs.close()
    until(lambda: "batch-that-hangs" not in names(limited), what="its end", seconds=120)
    with pytest.raises(RunbookFailed, match=f"no client of .* has the address {hangs.address}"):
        close(address=hangs.address, **planned.pins)
    worker = Guest(limited, "payment-worker", hangs.port)
    with pytest.raises(RunbookFailed, match=f"client {one['id']} has disconnected; {hangs.address} now belongs to"):
        close(address=hangs.address, **planned.pins)
    assert "payment-worker" in names(limited)
    with pytest.raises(RunbookFailed, match="but address is empty"):
        close(**planned.pins)
    assert results(close(address=hangs.address)) == {"payment-worker": "closed"}
    worker.close()


def test_an_address_that_several_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a Unix socket: one is chosen by its id."""
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    monkeypatch.setattr(clients, "RECONNECT_SECONDS", 0.0)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        Path(place).chmod(0o777)
        path = f"{place}/redis.sock"
        with running_redis(settings=("timeout 300", f"unixsocket {path}", "unixsocketperm 777")) as server:
            server.register(monkeypatch)
            for name in ("a", "b"):
                client = redis.Redis(unix_socket_path=path, password=PASSWORD, client_name=name)
                client.ping()
                held.append(client)
            there = {one["name"]: one for one in server.client().client_list()}
            address = there["a"]["addr"]
            with pytest.raises(RunbookFailed, match=r"2 clients have the address .* choose one by client_id: \d+, \d+"):
                close(address=address)
            assert results(close(address=address, client_id=int(there["b"]["id"]))) == {"b": "closed"}
            assert names(server) == ["a"]


def test_what_a_transaction_would_lose_is_shown(limited: RedisServer) -> None:
    guest = Guest(limited, "buyer")
    guest.send("MULTI", "SET basket 1")
    until(lambda: any(one["multi"] == "1" for one in limited.client().client_list()), what="a MULTI", seconds=120)
    (step,) = close(address=guest.address, confirm="").plan_steps
    assert "in a MULTI that it loses" in step.detail
    assert {row[2]: row[4] for row in table(check(), "Biggest in memory")}["buyer"] == "normal, in a MULTI"
    guest.close()


def test_an_address_that_is_not_to_be_closed_says_how(limited: RedisServer) -> None:
    subscriber = opened(limited, "listener").pubsub()
    subscriber.subscribe("news")
    until(lambda: any(one["sub"] == "1" for one in limited.client().client_list()), what="it", seconds=120)
    one = next(one for one in limited.client().client_list() if one["sub"] == "1")
    report = close(address=one["addr"])
    assert report.outcome == "there is nothing to close"
    assert f"CLIENT KILL ID {one['id']}" in found(report, "kept").hint
    assert subscriber.ping() is None


def test_who_is_never_chosen(group: Group) -> None:
    """The master's replicas and Sentinels, and every client that waits for something."""
    master = group.master
    listener = opened(master, "listener").pubsub()
    listener.subscribe("news")
    tracking = opened(master, "tracking")
    call(tracking, "CLIENT", "TRACKING", "ON")
    raw = socket.create_connection(("127.0.0.1", master.port))
    raw.sendall(f"AUTH {'x'}\r\n".encode())
    blocked = opened(master, "blocked").connection_pool.get_connection()
    blocked.send_command("BLPOP", "nothing", "0")
    plain = opened(master, "plain")
    watching = opened(master, "watching").monitor()
    with watching:
        clients_now = {one.name or one.kind: one for one in read_clients(master.block()).clients}
        told = {name: why_kept(one, (), (), ()) for name, one in clients_now.items()}
        sentinels = [one for one in clients_now.values() if one.kind == "Sentinel"]
    assert len(sentinels) == 6, "a command and a pub/sub link of each of three"
    assert told["replica"] == "replica"
    assert (told["blocked"], told["watching"], told["plain"]) == ("blocked", "MONITOR", "")
    assert told["tracking"] == "it uses client tracking"
    assert {told[one.name] for one in sentinels} == {"a Sentinel's"}
    assert "pub/sub" in told.values()
    links = {one.kind for one in read_clients(group.replicas[0].block()).clients}
    assert "master" in links
    assert plain.ping()
    raw.close()


def test_these_runbooks_own_are_kept(limited: RedisServer) -> None:
    own = limited.block().client()
    own.ping()
    wait_idle(limited, "interview-ops")
    report = close()
    assert "interview-ops" in names(limited)
    assert "these runbooks' own" in str(table(report, "Kept"))


def after_the_first(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Do this once, when one connection has been closed."""
    todo = [work]
    monkeypatch.setattr(closing, "failpoint", lambda _: todo.pop()() if todo else None)


def test_each_is_looked_at_again(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One works again, one is gone, and its address is another's by then."""
    first = opened(limited, "first")
    wait_idle(limited, "first")
    again, gone = opened(limited, "again"), Guest(limited, "gone")
    wait_idle(limited, "again", "gone", seconds=10)
    others = []

    def meanwhile() -> None:
        gone.close()
        until(lambda: "gone" not in names(limited), what="its end", seconds=120)
        others.append(Guest(limited, "other", gone.port))
        again.ping()  # the last: it is looked at next

    after_the_first(monkeypatch, meanwhile)
    report = close(min_seconds=10)
    assert results(report) == {"first": "closed", "again": "kept: active again", "gone": "disconnected by itself"}
    assert {"again", "other"} <= set(names(limited))
    assert first.ping()
    others[0].close()


def test_an_id_that_is_another_s_after_a_restart() -> None:
    client = parse(b"id=7 addr=1.2.3.4:5 name= age=50 idle=40 flags=N db=0 cmd=get user=default\n")[0]
    assert replace(client, age_seconds=51, idle_seconds=0).is_same(client)
    assert not replace(client, age_seconds=3).is_same(client)
    assert not replace(client, address="1.2.3.4:6").is_same(client)


def test_those_that_come_back_are_counted(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pool", "pool", "batch"):
        opened(limited, name)
    wait_idle(limited, "pool", "batch")
    after_the_first(monkeypatch, lambda: [opened(limited, "pool"), opened(limited, "stranger")])
    report = close()
    assert report.outcome == "3 of 3 connections closed, 1 of them reconnected"


def test_a_server_killed_in_the_middle(limited: RedisServer, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    first, _ = opened(limited, "c"), opened(limited, "d")
    wait_idle(limited, "c", "d")
    with monkeypatch.context() as patched:
        after_the_first(patched, limited.crash)
        with pytest.raises(
            RunbookFailed, match=r"while clients were closed: .* does not answer.*; 1 of 2 are closed"
        ) as failed:
            close()
    assert sorted(results(failed.value.report).values()) == ["closed", "unknown: the connection to the server broke"]
    limited.start()
    first.ping()
    wait_idle(limited, "c")
    assert results(close()) == {"c": "closed"}


def test_a_server_restarted_in_the_middle(limited: RedisServer, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Its ids begin anew: nobody of the new ones is closed."""
    both = [opened(limited, name) for name in ("a", "b")]
    wait_idle(limited, "a", "b")

    def restart() -> None:
        limited.crash()
        limited.start()
        for client in both:
            client.ping()

    after_the_first(monkeypatch, restart)
    with pytest.raises(RunbookFailed, match="was restarted meanwhile; 1 of 2 are closed") as failed:
        close()
    assert list(results(failed.value.report).values()) == ["closed"]
    assert {"a", "b"} <= set(names(limited))


def test_a_run_killed_in_the_middle(limited: RedisServer) -> None:
    for name in ("a", "b"):
        opened(limited, name)
    wait_idle(limited, "a", "b")
    code = (
        "from flows.redis import clients; clients.LEAST_SECONDS = 1; "
        f"clients.close_idle_redis_clients.fn({NAME!r}, 1, confirm={NAME!r})"
    )
    ended = forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": FAILPOINT})
    assert ended.returncode == -signal.SIGKILL
    assert len({"a", "b"} & set(names(limited))) == 1
    close()
    assert {"a", "b"} & set(names(limited)) == set()


def test_a_master_that_becomes_a_replica_in_the_middle(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    monkeypatch.setattr(clients, "RECONNECT_SECONDS", 0.0)
    master, replica = group.master, group.replicas[0]
    for name in ("a", "b", "c"):
        opened(master, name)
    wait_idle(master, "a", "b", "c")
    after_the_first(monkeypatch, lambda: master.client().replicaof("127.0.0.1", str(replica.port)))
    report = close()
    assert report.status is Status.WARN
    assert sorted(results(report).values()) == ["closed", *["kept: the server is a slave now"] * 2]
    assert "it finds the new master" in found(report, "the master changed").hint


def test_the_master_is_found_after_a_failover(group: Group) -> None:
    new = group.lose_master()
    assert check().facts["server"].startswith(f"{new.address} (master")


def test_a_replica_where_no_sentinel_is_named(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a former master: it is looked at, and nothing of it is closed."""
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    replica = group.replicas[0]
    replica.register(monkeypatch)
    assert found(check(), "role").status is Status.WARN
    opened(replica, "reader")
    wait_idle(replica, "reader")
    for confirm in ("", NAME):
        with pytest.raises(RunbookFailed, match="role: slave.*name the master"):
            close(confirm=confirm)
    assert "reader" in names(replica)


def test_a_master_whom_too_few_sentinels_name(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    monkeypatch.setattr(clients, "RECONNECT_SECONDS", 0.0)
    for sentinel in group.sentinels[1:]:
        sentinel.crash()
    opened(group.master, "idle")
    wait_idle(group.master, "idle")
    assert found(check(), "the Sentinels vouch").status is Status.WARN
    with pytest.raises(RunbookFailed, match="the Sentinels vouch for the master"):
        close()
    assert "idle" in names(group.master)
    assert results(close(master=group.master.address))["idle"] == "closed"


def test_many_are_asked_for_in_pieces(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old ones behind a gap of ids too; those too far behind are said to be missing."""
    monkeypatch.setattr(client_list, "PAGE_CLIENTS", 5)
    old = opened(limited, "old")
    for _ in range(30):
        opened(limited, "short").close()
    for n in range(12):
        opened(limited, f"c{n}")
    told = read_clients(limited.block())
    assert sorted(one.name for one in told.clients if one.name) == sorted(["old", *(f"c{n}" for n in range(12))])
    assert told.complete
    client = limited.client()
    own = client.client_id()
    whole, complete = list_clients(client, own, 10_000)
    assert {one.id for one in whole} == {int(one["id"]) for one in client.client_list()}
    assert complete
    monkeypatch.setattr(client_list, "MOST_IDS", 20)
    assert "old connections" in bad(check())
    monkeypatch.setattr(clients, "LEAST_SECONDS", 1)
    wait_idle(limited, "old")
    report = close()
    assert found(report, "old connections").status is Status.WARN, "the oldest were not looked at"
    assert old.ping()


def test_the_action_asks_for_its_permit(limited: RedisServer) -> None:
    one_client = opened(limited, "one")
    told = read_clients(limited.block())
    (one,) = (one for one in told.clients if one.name == "one")
    with pytest.raises(NotConfirmed):
        close_clients.bind(limited.block(), told, (one,), 0)()
    assert "one" in names(limited)
    assert one_client.ping()


def test_wrong_password(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wr0ng")
    assert "refuses the password" in check().sentence()


def test_a_user_without_the_commands(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which, one after the other."""
    limited.register(monkeypatch, extra='username = "ops"\n')
    opened(limited, "idle")
    wait_idle(limited, "idle")
    allowed = ["+ping", "+client|setname", "+client|setinfo", "+multi"]
    for missing in ("INFO", "CONFIG|GET", "CLIENT|ID", "CLIENT|LIST", "CLIENT|KILL"):
        limited.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=allowed, reset=True)
        for confirm in ("", NAME):
            with pytest.raises(RunbookFailed, match=f"forbids user ops the command {missing.replace('|', '.')}"):
                close(confirm=confirm)
        allowed.append(f"+{missing.lower()}")
    limited.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=allowed, reset=True)
    assert results(close())["idle"] == "closed"


def test_a_user_whose_rights_cannot_be_asked_for(limited: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MULTI a right that is missing is told when it is used."""
    limited.register(monkeypatch, extra='username = "ops"\n')
    opened(limited, "idle")
    wait_idle(limited, "idle")
    commands = ["+@all", "-multi", "-client|kill"]
    limited.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=commands, reset=True)
    assert close(confirm="").status is Status.PLANNED
    with pytest.raises(RunbookFailed, match="forbids user ops the command CLIENT.KILL"):
        close()


def test_a_server_whose_config_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_redis(settings=('rename-command CONFIG ""',)) as server:
        server.register(monkeypatch)
        assert "does not know the command CONFIG" in check().sentence()


def test_a_server_that_is_down(limited: RedisServer, quick: None) -> None:
    limited.crash()
    assert "does not answer" in check().sentence()
    with pytest.raises((OpsError, Unreachable)):
        read_clients(limited.block())


def test_a_line_that_an_older_version_writes() -> None:
    (one,) = parse(b"id=3 addr=127.0.0.1:4 fd=8 name=old-one age=5 idle=2 flags=x db=1 sub=0 psub=0 multi=2 cmd=get\n")
    assert one == Client(3, "127.0.0.1:4", "old-one", "", 5, 2, "x", 1, 0, True, 0, 0, 0, "get")
