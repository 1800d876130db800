"""Versions, capacity and incidents, judged with the open report."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from pathlib import Path

from blocks.environment import Environment
from flows.infrastructure.base_findings import judge_release
from flows.routine.evidence import Evidence
from runbook.render import size
from runbook.report import Report, Status
from tasks.capacity import Growth, read_growth
from tasks.docker.bases import support_of
from tasks.host import Disk, disk_on
from tasks.postgres.server import read_database_bytes
from tasks.redis.memory.info import read_memory
from tasks.reports import Filed, filed
from tasks.versions import read_versions

HINT = "plan its successor: deploy it to the disposable environment first, then rehearse the change there"
UNKNOWN = "look it up, and add it with source and day to tasks/docker/releases.toml"
SHOWN = 30


def tell_versions(report: Report, evidence: Evidence, env: Environment) -> int:
    """What runs, and until when it is supported; returns how many are without support."""
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


def tell_capacity(report: Report, evidence: Evidence, env: Environment, since: datetime, full_months: int) -> None:
    """What is there now, how it grew, and what that comes to."""
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
        report.expect(f"disk of {path}", months >= full_months, "add disk, or keep fewer backups (prune-backups)",
                      value=f"full in {months:.0f} months at {size(int(monthly))} a month",
                      expected=f"not within {full_months} months", otherwise=Status.WARN)  # fmt: skip


def _tell_growth(report: Report, evidence: Evidence, grown: tuple[Growth, ...]) -> None:
    """By month, as the backups that were verified had it."""
    months = sorted({month for one in grown for month in one.by_month()})
    report.table("Capacity trend (size of backups)", ("of", *months, "a month"),
                 [(one.of, *(size(one.by_month()[month]) if month in one.by_month() else "" for month in months),
                   size(int(one.monthly_bytes)) if one.known else "not known") for one in grown])  # fmt: skip
    if not any(one.known for one in grown):
        evidence.lacks("capacity trend", "no two reports of verify-backup are a month apart")


def _disks(evidence: Evidence, env: Environment) -> dict[str, Disk]:
    """Each once, where this host can see it."""
    wanted = [(node.host, Path(node.data_directory)) for node in env.nodes()]
    wanted += [("", env.reports_directory)]
    if env.has("backups"):
        wanted += [("", Path(env.backups.postgres))] if "://" not in env.backups.postgres else []
    found = dict[str, Disk]()
    for host, path in wanted:
        disk = disk_on(host, path)
        if disk is None:
            evidence.lacks(f"disk of {path}", f"this host cannot see it{f' ({host})' if host else ''}")
        elif disk.device not in {one.device for one in found.values()}:
            found[str(path)] = disk
    return found


def tell_incidents(report: Report, env: Environment, since: datetime) -> int:
    """CRITICAL reports by runbook; returns how many. What is CRITICAL still is somebody's work."""
    all_, by_runbook = 0, defaultdict[str, list[Filed]](list)
    for one in filed(env.reports_directory, env.name, since=since):
        by_runbook[one.runbook].append(one)
    rows, still = [], []
    for name, runs in by_runbook.items():  # the newest first
        bad = [one for one in runs if one.status == Status.CRITICAL]
        all_ += len(bad)
        if bad:
            rows.append((len(bad), len(runs), name, f"{bad[0].started:%Y-%m-%d %H:%M}", _why(bad[0])))
            still += [name] * (runs[0] is bad[0])
    report.table("Incidents: CRITICAL reports by runbook", ("times", "of reports", "runbook", "last (UTC)", "why"),
                 sorted(rows, reverse=True)[:SHOWN])  # fmt: skip
    report.expect("no runbook's last report is CRITICAL", not still, "launch each of them again, and do what it says",
                  value=", ".join(still[:10]) or "none", otherwise=Status.WARN)  # fmt: skip
    return all_


def _why(one: Filed) -> str:
    return "; ".join(found["name"] for found in one.findings if found["status"] == Status.CRITICAL)[:160]
