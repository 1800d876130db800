"""What an environment is made of, by what each part says of itself now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from flows.routine.evidence import Evidence
from runbook.report import Report, Status
from tasks.postgres.server import read_server
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import read_sentinels

COLUMNS = ("part", "name", "where", "now")
STORES = ("postgres", "redis", "files", "cluster", "wal")


def tell_topology(report: Report, evidence: Evidence, env: Environment) -> int:
    """The table; returns how many nodes and services there are. What does not answer is in it, and is missing."""
    nodes = [*_databases(evidence, env), *_redis(evidence, env), *_services(evidence, env)]
    report.table("Topology", COLUMNS, [*nodes, *_users(evidence, env), *_stores(env)])
    return len(nodes)


def _databases(evidence: Evidence, env: Environment) -> Iterator[tuple[str, ...]]:
    primaries = 0
    for node in env.nodes():
        where = f"{node.host}:{node.port}"
        found = evidence.ask(f"PostgreSQL at {where}", lambda node=node: read_server(node))  # type: ignore[misc]
        role = "does not answer" if found is None else "standby" if found.in_recovery else "primary"
        primaries += role == "primary"
        yield "PostgreSQL", node.service, where, role
    if env.has("postgres"):
        hint = "two take writes: fence one of them now (docs/failover.md)" if primaries else "see what does not answer"
        evidence.report.expect("one primary", primaries == 1, hint, value=primaries, expected=1,
                               otherwise=Status.CRITICAL if primaries else Status.WARN)  # fmt: skip


def _redis(evidence: Evidence, env: Environment) -> Iterator[tuple[str, ...]]:
    if not env.has("redis"):
        return
    if not env.redis.sentinels:
        answers = evidence.ask(f"Redis at {env.redis.address}", lambda: read_memory(env.redis))
        yield "Redis", "redis", env.redis.address, "one server, no Sentinels" if answers else "does not answer"
        return
    watch = read_sentinels(env.redis)
    for view in watch.views:
        yield "Sentinel", env.redis.sentinel_master, view.address, view.told
        if not view.answers:
            evidence.lacks(f"Sentinel {view.address}", view.problem)
    if watch.master:
        yield "Redis", "master", watch.master, f"named by {len(watch.masters[watch.master])} Sentinels"
    else:
        evidence.lacks("the master of Redis", watch.told() or "no Sentinel names one")
    followers = {one.address: one for view in watch.answering for one in view.followers}
    for one in followers.values():
        yield "Redis", "replica", one.address, "follows" if one.link_up else "its link is down"


def _services(evidence: Evidence, env: Environment) -> Iterator[tuple[str, ...]]:
    for role, name in env.services.names.items():
        state = evidence.ask(f"service {role}", lambda role=role: env.services.state(role))  # type: ignore[misc]
        yield "service", role, name, state.told if state else "not known"


def _users(evidence: Evidence, env: Environment) -> Iterator[tuple[str, ...]]:
    if env.has("application"):
        yield "application", env.name, env.application.url, env.application.directory
    if not env.has("endpoint"):
        return
    try:
        sent = Path(env.endpoint.file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        evidence.lacks("where users are sent", f"{env.endpoint.file}: {type(error).__name__}")
        return
    yield "users are sent to", env.endpoint.region, sent, f"the other region: {env.endpoint.other or 'none is named'}"


def _stores(env: Environment) -> Iterator[tuple[str, ...]]:
    """Where backups go; a place without one is told by check-recovery-objectives."""
    for which in get_args(Stores):
        if env.has(which):
            for kind in STORES:
                yield "backups", f"{which}: {kind}", str(getattr(env.stores(which), kind)), ""
