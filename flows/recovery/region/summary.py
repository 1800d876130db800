"""What a failover of the region tells: what is lost and how that is known, what protects the new region, the phases of
the RTO, and the way back. Called with the open report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blocks.environment import Environment
from blocks.postgres import nodes
from flows.recovery.region.options import Way
from flows.store import mark_verified, store_for
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.report import Report
from runbook.units import duration
from tasks.application.endpoint import Sent, read_endpoint
from tasks.application.health import wait_healthy
from tasks.backups.catalogue import open_all
from tasks.cluster.content import cluster_in
from tasks.postgres.replication.synchronous import Synchrony, read_synchrony

HEALTH_SECONDS = 10.0
_WHAT = {
    "decision": "the old region's fence, the ways back, the files of the best one read",
    "build and proof": "database, Redis and files beside, proven",
    "bring up": "swapped in, started, checked: health, expectations, log-in, session, AI answer",
    "switch": "the old region looked at once more, then users sent here",
}


@dataclass
class Phases:
    """Seconds of each phase, apart."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """One phase; what was tried twice is counted together."""
        started = datetime.now(UTC)
        try:
            yield
        finally:
            passed = (datetime.now(UTC) - started).total_seconds()
            self.seconds[name] = self.seconds.get(name, 0.0) + passed

    def report_results(self, report: Report, env: Environment) -> None:
        """As a table and as facts, against the RTO."""
        report.table(
            "Phases",
            ("phase", "seconds", "what"),
            [(name, f"{self.seconds[name]:.1f}", what) for name, what in _WHAT.items()],
        )
        for name in _WHAT:
            report.fact(name, f"{self.seconds[name]:.1f} s")
        passed = report.seconds
        report.fact("RTO", f"{duration(passed)} of {duration(env.rto_seconds)}, counted from this run's start")
        report.prefer(
            "recovery time against the RTO",
            passed <= env.rto_seconds,
            "see which phase took long",
            value=duration(passed),
            expected=f"at most {duration(env.rto_seconds)}",
        )


def judge_users(report: Report, env: Environment, old: Environment) -> bool:
    """Whether users are sent here already: then nothing may be put back over what they write.

    Raises:
        RunbookFailed: they are, and this region does not serve them.
    """
    sent = read_endpoint(env.endpoint)
    report.fact("users were sent to", sent or f"nowhere: {env.endpoint.file} is not there")
    here = bool(sent) and sent.rstrip("/") == env.application.url.rstrip("/")
    if here:
        try:
            told = wait_healthy(env.application, seconds=HEALTH_SECONDS).answer
            healthy = True
        except OpsError as error:
            told, healthy = error.message, False
        report.require(
            f"{env.name} serves",
            healthy,
            f"users are sent here, and may have written: a failover would take that away. Look at the services, or "
            f"recover {env.name} in its own place: restore-to-point, full-restore",
            value=told,
        )
        report.fail_if_critical()
    elif sent and sent.rstrip("/") != old.application.url.rstrip("/"):
        report.warn(
            "where users are sent",
            f"find out who serves there: neither {old.name} nor {env.name} does",
            value=sent,
            expected=old.application.url,
        )
    return here


def tell_loss(report: Report, env: Environment, old: Environment, way: Way) -> None:
    """The newest point that is there against the time of the failure, which nobody here knows: between the two is what
    may be lost."""
    lost = (report.started - way.newest).total_seconds()
    report.fact("newest point restored", f"{way.newest:%Y-%m-%d %H:%M:%S.%f UTC}, by {way.kind} ({way.backup.name})")
    report.fact(
        "lost",
        f"nothing that was committed up to then; at most what was acknowledged in the {duration(lost)} "
        f"from then until this run found {old.name} dead ({report.started:%Y-%m-%d %H:%M:%S UTC})",
    )
    report.fact(
        "not known here",
        f"when {old.name} failed, and what it acknowledged after the newest point: that is "
        "on its disks and in its clients' records only",
    )
    report.prefer(
        "data loss against the RPO",
        lost <= env.rpo_seconds,
        "that much may be lost, if the old region went on until this run; keep its disks as they are",
        value=f"at most {duration(lost)}",
        expected=f"at most {duration(env.rpo_seconds)}",
    )


def tell_switch(report: Report, env: Environment, sent: Sent) -> None:
    """Where users are sent."""
    report.fact("users are sent to", f"{sent.after} (before: {sent.before or 'nowhere'}), by {env.endpoint.file}")


@dataclass(frozen=True)
class Protection:
    """Who follows the new primary and for whom commits wait; whether there is a base backup of the timeline that it
    writes."""

    synchrony: Synchrony
    timeline: int
    has_base: bool


@probe
def read_protection(env: Environment) -> Protection:
    """What would be left of what is written from now on.

    Raises:
        Unreachable: the database or the store does not answer.
    """
    standing = nodes.ask(env.postgres)
    system, timeline = (standing.system, standing.timeline) if standing else (0, 0)
    known = [cluster_in(one) for one in open_all(store_for(env, "cluster"), "cluster")[0] if not one.failed]
    has_base = any((one.system, one.timeline) == (system, timeline) for one in known)
    return Protection(read_synchrony.work(env.postgres), timeline, has_base)


def tell_after(report: Report, env: Environment, old: Environment) -> None:
    """What protects this region now, and what is to be done, the most urgent first. Until then it is not OK."""
    found = read_protection(env)
    waiting = found.synchrony.connected if found.synchrony.needed else ()
    commits = f"commits wait for {', '.join(waiting) or 'nobody'}"
    report.fact("protection now", commits + (", whose WAL is shipped to the store" if waiting else ""))
    if not found.has_base:
        report.warn(
            "no base backup of this region",
            f"launch backup-cluster on {env.name} now, then backup-database, "
            "backup-redis and backup-files: until then what is written from now on has no backup",
            value=f"none of timeline {found.timeline}",
        )
    if env.has("standby") and env.standby.name not in waiting:
        hint = f"build one with rejoin-standby on {env.name}; until then there is nothing to fail over to"
        report.warn("no standby", hint, value=commits)
    if not env.has("copies"):
        report.warn(
            "no second place",
            f"add [copies] to {env.name}'s TOML: all that it has is in this region",
            value="backups and WAL stay here",
        )
    report.warn(
        f"the old region {old.name}",
        "before its hosts are switched on: nothing of it may start by itself. "
        "Keep its disks: they have what is lost here. The way back: docs/region-failover.md",
        value="it takes writes again when its services start",
        expected="nothing of it starts",
    )


def tell_proof(report: Report, way: Way) -> None:
    """That what was restored was good is noted beside it."""
    mark_verified(report, way.backup)
