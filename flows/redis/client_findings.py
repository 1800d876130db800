"""Connections against their limits, and tables of them (§2.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from runbook import metrics
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.client_list import Client
from tasks.redis.clients import RedisClients

MANUAL_IDLE_SECONDS = 3600
MANUAL_TIMEOUT_SECONDS = 300
KEEPALIVE_SECONDS = 300
# Data that waits for one client; by default, normal clients have no limit.
BIG_OUTPUT_BYTES = 64 * 1024**2
CLOSE = Next("close-idle-redis-clients", "close idle connections", {"min_seconds": MANUAL_IDLE_SECONDS})
TIMEOUT = Next("apply-redis-settings", "set the manual's timeout", {"names": ["timeout"]})
AGES = ((60, "less than 1 min"), (300, "1 to 5 min"), (3600, "5 min to 1 h"), (86_400, "1 h to 1 day"))
COLUMNS = ("id", "address", "name", "user", "kind", "idle for", "age", "buffers", "memory", "last command")


def judge_role(report: Report, found: RedisClients, otherwise: Status) -> None:
    """The server is the master, to which the application connects."""
    report.require(
        "role",
        found.role == "master",
        "name the master or its Sentinels in [redis], then register the blocks again",
        value=found.role,
        expected="master",
        worst=otherwise,
    )


def judge_complete(report: Report, found: RedisClients) -> None:
    """Whether all connections were read; the oldest are read last."""
    if not found.complete:
        hint = "run CLIENT LIST by hand in a quiet hour: one call, which blocks the server for a moment"
        report.warn("old connections", hint, value="not measured: too many ids to query", expected="all")


def judge_places(report: Report, found: RedisClients) -> None:
    """Connections against maxclients, and rejected ones."""
    report.judge(
        metrics.CLIENTS,
        found.used_ratio,
        "close idle connections, lower the pool sizes of the clients in the tables, or raise maxclients "
        "(apply-redis-settings with override; it needs 32 more file descriptors than that)",
        of=f"{found.connected + found.replicas:,} of {found.most:,}, {found.replicas} of them replicas",
        follow=[CLOSE],
    )
    report.prefer(
        "rejected connections",
        not found.rejected,
        "find the client that opens the most (see the tables), then reset the counter: CONFIG RESETSTAT",
        value=f"{found.rejected:,} in {duration(found.uptime_seconds)}",
        expected="0",
    )


def judge_idle(report: Report, found: RedisClients) -> None:
    """Idle connections are a finding only near maxclients."""
    long = [one for one in found.clients if one.kind == "normal" and one.idle_seconds >= MANUAL_IDLE_SECONDS]
    warn_ratio = report.limit(metrics.CLIENTS)[0]
    report.prefer(
        "idle for 3600 s and more",
        not long or found.used_ratio <= warn_ratio,
        "close them, or set a timeout",
        value=len(long),
        expected=f"any number while at most {warn_ratio:.0%} of maxclients are in use",
        follow=[CLOSE, TIMEOUT],
    )
    classes = Counter(_age(one.idle_seconds) for one in found.clients)
    report.table("Idle for", ("idle for", "connections"), [(name, classes[name]) for name in _age_names()])
    long.sort(key=lambda one: -one.idle_seconds)
    _report_clients(report, "Idle for 3600 s and more", long)


def judge_buffers(report: Report, found: RedisClients) -> None:
    """The memory of connections, the biggest of them, and disconnections because of buffers."""
    most, used = found.memory_bytes, found.client_bytes
    if most:
        report.judge(
            metrics.CLIENT_MEMORY,
            used / most,
            "close the biggest of the table below (CLIENT KILL ID …), and fix its program: it must read its answers",
            of=f"{size(used)} of {size(most)}",
        )
    else:
        hint = "compare it with the host's memory"
        report.warn("memory of clients", hint, value=f"{size(used)}; total memory unknown")
    slow = sorted((one for one in found.clients if one.output_bytes), key=lambda one: -one.output_bytes)
    big = [one for one in slow if one.output_bytes > BIG_OUTPUT_BYTES]
    report.prefer(
        "output buffers",
        not big,
        f"close the biggest, which does not read its answers: CLIENT KILL ID {big[0].id} " if big else "",
        value=f"{size(slow[0].output_bytes)} wait for {slow[0].address}" if slow else "empty",
        expected=f"≤ {size(BIG_OUTPUT_BYTES)} for each client",
    )
    counts = f"{found.output_disconnections:,} output buffers, {found.query_disconnections:,} query buffers"
    report.fact("disconnected because of", f"{counts}, {found.evicted:,} maxmemory-clients")
    _report_clients(report, "Biggest in memory", sorted(found.clients, key=lambda one: -one.memory_bytes)[:10])


def judge_special(report: Report, found: RedisClients) -> None:
    """The kinds of connections. MONITOR slows every client."""
    kinds = Counter(one.kind for one in found.clients)
    report.fact("connections", ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) or "none")
    watching = [one for one in found.clients if one.kind == "MONITOR"]
    if watching:
        report.warn(
            "MONITOR",
            f"close it, unless somebody uses it now: CLIENT KILL ID {watching[0].id}. It halves the throughput",
            value=", ".join(f"{one.address} for {duration(one.age_seconds)}" for one in watching[:5]),
            expected="no client",
        )


def judge_settings(report: Report, found: RedisClients) -> None:
    """The timeout, the detection of dead peers, and the limits of output buffers."""
    timeout, keepalive = found.number("timeout"), found.number("tcp-keepalive")
    report.prefer(
        "timeout",
        0 < timeout <= MANUAL_TIMEOUT_SECONDS,
        "lower it: idle connections are closed later than in the manual"
        if timeout
        else "set it: idle connections are never closed",
        value=f"{timeout} s" if timeout else "0 (never)",
        expected=f"{MANUAL_TIMEOUT_SECONDS} s or less (replicas, pub/sub and blocked clients are exempt)",
        follow=[TIMEOUT],
    )
    report.prefer(
        "tcp-keepalive",
        0 < keepalive <= KEEPALIVE_SECONDS,
        f"CONFIG SET tcp-keepalive {KEEPALIVE_SECONDS}, then CONFIG REWRITE: dead peers' connections stay open",
        value=f"{keepalive} s",
        expected=f"1 to {KEEPALIVE_SECONDS} s",
    )
    limits = found.output_limits
    unbounded = [name for name in ("slave", "replica", "pubsub") if name in limits and not any(limits[name][:2])]
    report.prefer(
        "client-output-buffer-limit",
        not unbounded,
        f"set a limit for {', '.join(unbounded)} (CONFIG SET client-output-buffer-limit 'pubsub 32mb 8mb 60'): "
        "otherwise a client that does not read can fill the memory",
        value=found.settings["client-output-buffer-limit"],
        expected="a limit for replicas and pub/sub",
    )


def report_counts(report: Report, found: RedisClients) -> None:
    """Connections by name, address and user."""
    of: tuple[tuple[str, Callable[[Client], str]], ...] = (
        ("name", lambda one: one.name or "(no CLIENT SETNAME)"),
        ("address", lambda one: one.host or one.address),
        ("user", lambda one: one.user or "(unknown)"),
    )
    for what, key in of:
        groups: dict[str, list[Client]] = {}
        for one in found.clients:
            groups.setdefault(key(one), []).append(one)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        rows = [(name, *_summary(ones)) for name, ones in ordered]
        report.table(f"By {what}", (what, "connections", "idle at most", "memory", "databases"), rows, most=50)


def described(one: Client) -> str:
    """A connection, for people."""
    who = f"{one.name or 'no name'}, user {one.user or 'unknown'}, {one.address}, last {one.command or 'nothing'}"
    loses = ", in a MULTI that it loses" if one.in_transaction else ""
    return f"{one.id} ({who}): idle for {duration(one.idle_seconds)}{loses}"


def _summary(ones: Sequence[Client]) -> tuple[object, ...]:
    databases = ", ".join(str(number) for number in sorted({one.database for one in ones})[:5])
    idle = duration(max(one.idle_seconds for one in ones))
    return len(ones), idle, size(sum(one.memory_bytes for one in ones)), databases


def _age(seconds: int) -> str:
    return next((name for limit, name in AGES if seconds < limit), "more than 1 day")


def _age_names() -> list[str]:
    return [*(name for _, name in AGES), "more than 1 day"]


def _kind(one: Client) -> str:
    return f"{one.kind}, in a MULTI" if one.in_transaction else one.kind


def _report_clients(report: Report, name: str, clients: Sequence[Client]) -> None:
    rows = [
        (
            one.id,
            one.address,
            one.name,
            one.user,
            _kind(one),
            duration(one.idle_seconds),
            duration(one.age_seconds),
            size(one.query_bytes + one.output_bytes),
            size(one.memory_bytes),
            one.command,
        )
        for one in clients
    ]
    if rows:
        report.table(name, COLUMNS, rows, most=50)
