"""Facts for the yearly architecture review (§7.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.infrastructure.images.bases import judge_release
from flows.routine.sources.evidence import EvidenceSource
from runbook import clock
from runbook.flow import flow
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.application.versions import read_versions
from tasks.docker.bases import support_of
from tasks.host.disk import Disk, disk_on
from tasks.postgres.server.server import read_database_bytes, read_server
from tasks.redis.memory.info import read_memory
from tasks.redis.sentinels import read_sentinels
from tasks.reports.capacity import Growth, read_growth
from tasks.reports.past import FiledReport, filed


@flow(name="collect-architecture-facts", flow_run_name=RunName("collect-architecture-facts {environment} {days}d"))
def collect_architecture_facts(
    environment: str,
    days: Annotated[int, Field(ge=31, le=3660)] = 365,
    full_months: Annotated[int, Field(ge=1, le=120)] = 12,
) -> Report:
    """アーキテクチャレビュー: 構成・バージョン・容量・障害の事実 (§7.1)

    Collects the facts for the architecture review on one page: topology and current roles, versions and the end of
    their support, the growth of capacity, a year of incidents.

    Topology: every node with its current role, Sentinels, services, stores, and the environment that serves users.
    Versions: servers, languages and the host, with the end of support from tasks/docker/releases.toml. An ended support
    is CRITICAL; six months before its end it is WARN. Capacity: current sizes, their growth in the reports of the last
    `days`, and disks that are full within `full_months` at that rate. Incidents: CRITICAL reports by runbook, and
    runbooks whose last report is CRITICAL. Run it yearly, before the checklist architecture_review.

    It changes nothing. A part that does not answer, or has no entry, is "not measured". Evidence: the tables.

    Args:
        environment: Environment (lab, staging, production …)
        days: Days of faults and capacity history to include
        full_months: Warn if the disk will be full within this many months
    """
    env = Environment.find(environment)
    with runbook("Collect architecture facts", env) as report:
        evidence, since = EvidenceSource(report), report.started - timedelta(days=days)
        nodes = show_topology(report, evidence, env)
        ended = judge_versions(report, evidence, env)
        judge_capacity(report, evidence, env, since, full_months)
        incidents = judge_incidents(report, env, since)
        evidence.report_missing()
        report.outcome = f"{nodes} nodes and services, {ended} without support, {incidents} incidents in {days} days"
    return report


HINT = "plan the upgrade: deploy it to the disposable environment first, and rehearse the change there"
UNKNOWN = "add its end of support with source and date to tasks/docker/releases.toml"
SHOWN = 30


def judge_versions(report: Report, evidence: EvidenceSource, env: Environment) -> int:
    """Versions and the end of their support; returns the number without support."""
    versions, ended = read_versions(env), 0
    today, rows = report.started.date(), []
    for one in versions:
        found = support_of(one.product, one.version) if one.version else None
        ends = ""
        if not one.version:
            evidence.lacks(f"version of {one.product} ({one.where})", one.problem)
        elif found:
            judge_release(report, f"support of {one.product} {one.version} ({one.where})", found, today, HINT)
            ended += bool(found.ends and found.ends < today)
            ends = str(found.ends or ("no end announced" if found.known else "not known"))
        elif one.product not in ("prefect", "interview-ops"):
            evidence.lacks(f"end of life of {one.product} {one.version}", UNKNOWN)
        rows.append((one.product, one.version or "not measured", one.where, ends, found.source if found else ""))
    report.table("Versions and end of life", ("product", "version", "where", "supported until", "by"), rows)
    return ended


def judge_capacity(
    report: Report, evidence: EvidenceSource, env: Environment, since: datetime, full_months: int
) -> None:
    """Current sizes, their growth, and disks that will be full."""
    rows = []
    if env.has("postgres"):
        node = env.postgres
        now = evidence.ask("size of the database", lambda: read_database_bytes(node, node.database))
        rows.append(("database", node.database, size(now) if now is not None else "not measured"))
    if env.has("redis"):
        memory = evidence.ask("memory of Redis", lambda: read_memory(env.redis))
        rows.append(("Redis", env.redis.address, size(memory.used) if memory else "not measured"))
    disks = _disks(evidence, env)
    rows += [
        ("disk, free", path, f"{size(disk.free_bytes)} of {size(disk.total_bytes)}") for path, disk in disks.items()
    ]
    report.table("Capacity now", ("of", "where", "bytes"), rows)
    grown = evidence.ask("growth", lambda: read_growth(env.reports_directory, env.name, since)) or ()
    _tell_growth(report, evidence, grown)
    monthly = sum(max(one.monthly_bytes, 0) for one in grown if one.known)
    for path, disk in disks.items() if monthly else ():
        months = disk.free_bytes / monthly
        report.prefer(
            f"disk of {path}",
            months >= full_months,
            "enlarge the disk, or keep fewer backups (prune-backups)",
            value=f"full in {months:.0f} months at {size(int(monthly))} a month",
            expected=f"not within {full_months} months",
        )


def _tell_growth(report: Report, evidence: EvidenceSource, grown: tuple[Growth, ...]) -> None:
    """Sizes by month, from verified backups."""
    months = sorted({month for one in grown for month in one.by_month()})
    report.table(
        "Capacity trend (size of backups)",
        ("of", *months, "a month"),
        [
            (
                one.of,
                *(size(one.by_month()[month]) if month in one.by_month() else "" for month in months),
                size(int(one.monthly_bytes)) if one.known else "not known",
            )
            for one in grown
        ],
    )
    if not any(one.known for one in grown):
        evidence.lacks("capacity trend", "no two reports of verify-backup are a month apart")


def _disks(evidence: EvidenceSource, env: Environment) -> dict[str, Disk]:
    """Every disk once, if it is on this host."""
    wanted = [(node.host, Path(node.data_directory)) for node in env.nodes()]
    wanted += [("", env.reports_directory)]
    if env.has("backups"):
        wanted += [("", Path(env.backups.postgres))] if "://" not in env.backups.postgres else []
    found = dict[str, Disk]()
    for host, path in wanted:
        disk = disk_on(host, path)
        if disk is None:
            evidence.lacks(f"disk of {path}", f"it is not on this host{f' ({host})' if host else ''}")
        elif disk.device not in {one.device for one in found.values()}:
            found[str(path)] = disk
    return found


def judge_incidents(report: Report, env: Environment, since: datetime) -> int:
    """CRITICAL reports by runbook, and runbooks whose last report is CRITICAL; returns the number of reports."""
    all_, by_runbook = 0, defaultdict[str, list[FiledReport]](list)
    for one in filed(env.reports_directory, env.name, since=since):
        by_runbook[one.runbook].append(one)
    rows, still = [], []
    for name, runs in by_runbook.items():  # the newest first
        bad = [one for one in runs if one.status == Status.CRITICAL]
        all_ += len(bad)
        if bad:
            rows.append((len(bad), len(runs), name, clock.text(bad[0].started, "minutes"), _why(bad[0])))
            still += [name] * (runs[0] is bad[0])
    report.table(
        "Incidents: CRITICAL reports by runbook",
        ("times", "of reports", "runbook", "last", "why"),
        sorted(rows, reverse=True)[:SHOWN],
    )
    report.prefer(
        "no runbook's last report is CRITICAL",
        not still,
        "launch each of them again, and fix its findings",
        value=", ".join(still[:10]) or "none",
    )
    return all_


def _why(one: FiledReport) -> str:
    return "; ".join(found["name"] for found in one.findings if found["status"] == Status.CRITICAL)[:160]


COLUMNS = ("part", "name", "where", "now")
STORES = ("postgres", "redis", "files", "cluster", "wal")


def show_topology(report: Report, evidence: EvidenceSource, env: Environment) -> int:
    """The table of nodes and services; returns their number. A node that does not answer is in it, and is not
    measured."""
    nodes = [*_databases(evidence, env), *_redis(evidence, env), *_services(evidence, env)]
    report.table("Topology", COLUMNS, [*nodes, *_users(evidence, env), *_stores(env)])
    return len(nodes)


def _databases(evidence: EvidenceSource, env: Environment) -> Iterator[tuple[str, ...]]:
    primaries = 0
    for node in env.nodes():
        where = f"{node.host}:{node.port}"
        found = evidence.ask(f"PostgreSQL at {where}", lambda node=node: read_server(node))  # type: ignore[misc]
        role = "does not answer" if found is None else "standby" if found.in_recovery else "primary"
        primaries += role == "primary"
        yield "PostgreSQL", node.service, where, role
    if env.has("postgres"):
        hint = (
            "fence one of the two primaries now (docs/failover.md)" if primaries else "fix the nodes that do not answer"
        )
        evidence.report.require(
            "one primary",
            primaries == 1,
            hint,
            value=primaries,
            expected=1,
            worst=Status.CRITICAL if primaries else Status.WARN,
        )


def _redis(evidence: EvidenceSource, env: Environment) -> Iterator[tuple[str, ...]]:
    if not env.has("redis"):
        return
    if not env.redis.sentinels:
        answers = evidence.ask(f"Redis at {env.redis.address}", lambda: read_memory(env.redis))
        yield "Redis", "redis", env.redis.address, "one server, no Sentinels" if answers else "does not answer"
        return
    watch = read_sentinels(env.redis)
    for view in watch.views:
        yield "Sentinel", env.redis.sentinel_master, view.address, view.statement
        if not view.answers:
            evidence.lacks(f"Sentinel {view.address}", view.problem)
    if watch.master:
        yield "Redis", "master", watch.master, f"named by {len(watch.masters[watch.master])} Sentinels"
    else:
        evidence.lacks("the master of Redis", watch.describe() or "no Sentinel names one")
    followers = {one.address: one for view in watch.answering for one in view.followers}
    for one in followers.values():
        yield "Redis", "replica", one.address, "follows" if one.link_up else "link down"


def _services(evidence: EvidenceSource, env: Environment) -> Iterator[tuple[str, ...]]:
    for role, name in env.services.names.items():
        state = evidence.ask(f"service {role}", lambda role=role: env.services.state(role))  # type: ignore[misc]
        yield "service", role, name, state.told if state else "not known"


def _users(evidence: EvidenceSource, env: Environment) -> Iterator[tuple[str, ...]]:
    if env.has("application"):
        yield "application", env.name, env.application.url, env.application.directory
    if not env.has("endpoint"):
        return
    try:
        sent = Path(env.endpoint.file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        evidence.lacks("address that users are sent to", f"{env.endpoint.file}: {type(error).__name__}")
        return
    yield "users are sent to", env.endpoint.region, sent, f"the other region: {env.endpoint.other or 'none is named'}"


def _stores(env: Environment) -> Iterator[tuple[str, ...]]:
    """The backup stores; check-recovery-objectives reports a store without backups."""
    for which in get_args(Stores):
        if env.has(which):
            for kind in STORES:
                yield "backups", f"{which}: {kind}", str(getattr(env.stores(which), kind)), ""
