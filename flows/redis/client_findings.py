"""What check-redis-clients says of the connections it read, and what close-idle-redis-clients chooses (§2.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from runbook import metrics
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.client_list import Client
from tasks.redis.clients import Clients

MANUAL_IDLE_SECONDS = 3600
MANUAL_TIMEOUT_SECONDS = 300
KEEPALIVE_SECONDS = 300
# What waits for one client that does not read; a normal one has no limit by default.
BIG_OUTPUT_BYTES = 64 * 1024**2
MOST_ROWS = 50
CLOSE_FLOW, APPLY = "close-idle-redis-clients", "apply-redis-settings"
AGES = ((60, "less than 1 min"), (300, "1 to 5 min"), (3600, "5 min to 1 h"), (86_400, "1 h to 1 day"))
COLUMNS = ("id", "address", "name", "user", "what", "idle for", "age", "buffers", "memory", "last command")


def judge_role(report: Report, found: Clients, otherwise: Status) -> None:
    """The application's connections are the master's."""
    report.require(
        "role",
        found.role == "master",
        "name the master in [redis], or its Sentinels, and register the blocks again: the application is there",
        value=found.role,
        expected="master",
        worst=otherwise,
    )


def judge_complete(report: Report, found: Clients) -> None:
    """Whether all of them were looked at: the oldest are asked for last."""
    if not found.complete:
        hint = "CLIENT LIST once by hand, in a quiet hour: one call that stops the server for a moment"
        report.warn("old connections", hint, value="not measured: too many ids lie behind the newest", expected="all")


def judge_places(report: Report, found: Clients) -> None:
    """Against maxclients, and whether anybody was turned away already."""
    report.judge(
        metrics.CLIENTS,
        found.used_ratio,
        f"{CLOSE_FLOW}; lower the pools of what the tables show; or raise it: {APPLY} with "
        f"override='maxclients = …' (it needs as many file descriptors, and 32 more)",
        of=f"{found.connected + found.replicas:,} of {found.most:,}, {found.replicas} of them replicas",
    )
    report.prefer(
        "rejected connections",
        not found.rejected,
        "maxclients was reached: find who opens so many (the tables), then CONFIG RESETSTAT to count anew",
        value=f"{found.rejected:,} in {duration(found.uptime_seconds)}",
        expected="0",
    )


def judge_idle(report: Report, found: Clients) -> None:
    """Idle connections only take places: they matter while those are scarce."""
    long = [one for one in found.clients if one.kind == "normal" and one.idle_seconds >= MANUAL_IDLE_SECONDS]
    warn_ratio = report.limit(metrics.CLIENTS)[0]
    report.prefer(
        "idle for 3600 s and more",
        not long or found.used_ratio <= warn_ratio,
        f"{CLOSE_FLOW} (min_seconds={MANUAL_IDLE_SECONDS}), or a timeout: {APPLY} with names=timeout",
        value=len(long),
        expected=f"any number while at most {warn_ratio:.0%} of maxclients are in use",
    )
    classes = Counter(_age(one.idle_seconds) for one in found.clients)
    report.table("Idle for", ("idle for", "connections"), [(name, classes[name]) for name in _age_names()])
    long.sort(key=lambda one: -one.idle_seconds)
    _table(report, "Idle for 3600 s and more", long)


def judge_buffers(report: Report, found: Clients) -> None:
    """What connections take of memory; the biggest of them; who was disconnected for it."""
    most = found.memory_bytes
    taken = found.client_bytes
    if most:
        report.judge(
            metrics.CLIENT_MEMORY,
            taken / most,
            "close the biggest of the table below (CLIENT KILL ID …), and have its program read what it asks for",
            of=f"{size(taken)} of {size(most)}",
        )
    else:
        report.warn("memory of clients", "compare it with the host's memory", value=f"{size(taken)}: of an unknown all")
    slow = sorted((one for one in found.clients if one.output_bytes), key=lambda one: -one.output_bytes)
    big = [one for one in slow if one.output_bytes > BIG_OUTPUT_BYTES]
    report.prefer(
        "output buffers",
        not big,
        f"CLIENT KILL ID {big[0].id} ends the biggest: it does not read what it asked for" if big else "",
        value=f"{size(slow[0].output_bytes)} wait for {slow[0].address}" if slow else "empty",
        expected=f"≤ {size(BIG_OUTPUT_BYTES)} for each",
    )
    counts = f"{found.output_disconnections:,} did not read, {found.query_disconnections:,} sent too much"
    report.fact("disconnected for their buffers", f"{counts}, {found.evicted:,} for maxmemory-clients")
    _table(report, "Biggest in memory", sorted(found.clients, key=lambda one: -one.memory_bytes)[:10])


def judge_special(report: Report, found: Clients) -> None:
    """Replicas, subscribers, blocked ones: counted. MONITOR costs everybody."""
    kinds = Counter(one.kind for one in found.clients)
    report.fact("connections", ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()) or "none")
    watching = [one for one in found.clients if one.kind == "MONITOR"]
    if watching:
        report.warn(
            "MONITOR",
            f"CLIENT KILL ID {watching[0].id}, unless somebody is looking right now: it halves the throughput",
            value=", ".join(f"{one.address} for {duration(one.age_seconds)}" for one in watching[:5]),
            expected="nobody",
        )


def judge_settings(report: Report, found: Clients) -> None:
    """timeout against the manual's, dead peers, and the limits that keep a slow reader from filling the memory."""
    timeout, keepalive = found.number("timeout"), found.number("tcp-keepalive")
    report.prefer(
        "timeout",
        0 < timeout <= MANUAL_TIMEOUT_SECONDS,
        f"{APPLY} with names=timeout: idle connections are never closed"
        if not timeout
        else f"{APPLY} with names=timeout: they are closed later than the manual has it",
        value=f"{timeout} s" if timeout else "0 (never)",
        expected=f"{MANUAL_TIMEOUT_SECONDS} s or less (it spares replicas, pub/sub and blocked ones)",
    )
    report.prefer(
        "tcp-keepalive",
        0 < keepalive <= KEEPALIVE_SECONDS,
        f"CONFIG SET tcp-keepalive {KEEPALIVE_SECONDS}, then CONFIG REWRITE: a dead peer's place is never freed",
        value=f"{keepalive} s",
        expected=f"1 to {KEEPALIVE_SECONDS} s",
    )
    limits = found.output_limits
    unbounded = [name for name in ("slave", "replica", "pubsub") if name in limits and not any(limits[name][:2])]
    report.prefer(
        "client-output-buffer-limit",
        not unbounded,
        f"give {', '.join(unbounded)} a limit (CONFIG SET client-output-buffer-limit 'pubsub 32mb 8mb 60'): one that "
        "does not read fills the memory",
        value=found.settings["client-output-buffer-limit"],
        expected="a limit for replicas and pub/sub",
    )


def tell_counts(report: Report, found: Clients) -> None:
    """Per name, address and user."""
    of: tuple[tuple[str, Callable[[Client], str]], ...] = (
        ("name", lambda one: one.name or "(no CLIENT SETNAME)"),
        ("address", lambda one: one.host or one.address),
        ("user", lambda one: one.user or "(not told)"),
    )
    for what, key in of:
        groups: dict[str, list[Client]] = {}
        for one in found.clients:
            groups.setdefault(key(one), []).append(one)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        rows: list[tuple[object, ...]] = [(name, *_summary(ones)) for name, ones in ordered[:MOST_ROWS]]
        if len(ordered) > MOST_ROWS:
            rows.append((f"… {len(ordered) - MOST_ROWS} more", "", "", "", ""))
        report.table(f"By {what}", (what, "connections", "idle at most", "memory", "databases"), rows)


def described(one: Client) -> str:
    """For a plan and a result."""
    who = f"{one.name or 'no name'}, user {one.user or 'not told'}, {one.address}, last {one.command or 'nothing'}"
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


def _what(one: Client) -> str:
    return f"{one.kind}, in a MULTI" if one.in_transaction else one.kind


def _table(report: Report, name: str, clients: Sequence[Client]) -> None:
    rows: list[tuple[object, ...]] = [
        (
            one.id,
            one.address,
            one.name,
            one.user,
            _what(one),
            duration(one.idle_seconds),
            duration(one.age_seconds),
            size(one.query_bytes + one.output_bytes),
            size(one.memory_bytes),
            one.command,
        )
        for one in clients[:MOST_ROWS]
    ]
    if len(clients) > MOST_ROWS:
        rows.append((f"… {len(clients) - MOST_ROWS} more", *[""] * (len(COLUMNS) - 1)))
    if rows:
        report.table(name, COLUMNS, rows)
