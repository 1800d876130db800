"""The report of a region failover: the loss and its proof, the phases of the RTO, what protects the new region, and the
failback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blocks.environment import Environment
from blocks.postgres import nodes
from flows.recovery.restore_option import RestoreOption
from flows.store import store_for
from runbook import clock
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.kinds import probe
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration
from tasks.application.endpoint import Sent, read_endpoint
from tasks.application.health import wait_healthy
from tasks.backups.catalogue import open_all
from tasks.cluster.content import cluster_in
from tasks.postgres.replication.synchronous import Synchrony, read_synchrony

HEALTH_SECONDS = 10.0
BACKUPS = ("backup-cluster", "backup-database", "backup-redis", "backup-files")
_WHAT = {
    "decision": "checked the old region's fence, chose the recovery option, read its files",
    "build and proof": "built staged copies of database, Redis and files, and proved them",
    "bring up": "swapped, started, checked: health, expectations, log-in, session, AI answer",
    "switch": "checked the old region's fence again, then sent users here",
}


@dataclass
class RegionPhases:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Measure one phase. A second attempt adds to the first."""
        started = datetime.now(UTC)
        try:
            yield
        finally:
            passed = (datetime.now(UTC) - started).total_seconds()
            self.seconds[name] = self.seconds.get(name, 0.0) + passed

    def report_results(self, report: Report, env: Environment) -> None:
        """Report the phases and compare their sum with the RTO."""
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
            "check which phase took longest",
            value=duration(passed),
            expected=f"at most {duration(env.rto_seconds)}",
        )


def judge_users(report: Report, env: Environment, old: Environment) -> bool:
    """Whether users are sent here already: then nothing may be restored over what they write.

    Raises:
        RunbookFailed: they are, and this region is unhealthy.
    """
    sent = read_endpoint(env.endpoint)
    report.fact("users were sent to", sent or f"nowhere: {env.endpoint.file} is missing")
    here = bool(sent) and sent.rstrip("/") == env.application.url.rstrip("/")
    if here:
        try:
            report.passed(f"{env.name} serves", value=wait_healthy(env.application, seconds=HEALTH_SECONDS).answer)
        except OpsError as error:
            report.fail(
                f"{env.name} serves",
                "fix the services, or recover this region itself: users are sent here, and a failover would lose what "
                "they wrote",
                value=error.message,
                follow=[Next("full-restore", "restore this region"), Next("restore-to-point", "restore its database")],
            )
        report.fail_if_critical()
    elif sent and sent.rstrip("/") != old.application.url.rstrip("/"):
        report.warn(
            "where users are sent",
            f"find out which system serves there: it is neither {old.name} nor {env.name}",
            value=sent,
            expected=old.application.url,
        )
    return here


def report_loss(report: Report, env: Environment, old: Environment, option: RestoreOption, loss: Loss) -> None:
    """Report the loss as the gate measured it, and compare it with the RPO. Where it is a bound, nobody here knows when
    the old region failed."""
    until = report.started if loss.since else loss.last or option.newest
    lost = (until - option.newest).total_seconds()
    report.fact(
        "newest point restored",
        f"{clock.text(option.newest, 'microseconds')}, from {option.kind} ({option.backup.name})",
    )
    report.loses(loss)
    if loss.since:
        report.fact(
            "unknown",
            f"when {old.name} failed (this run found it dead at {clock.text(report.started)}), and what it "
            "acknowledged after the newest point: only its disks and its clients' records show that",
        )
    report.prefer(
        "data loss against the RPO",
        lost <= env.rpo_seconds,
        "keep the old region's disks unchanged: they have what it acknowledged until this run",
        value=f"at most {duration(lost)}",
        expected=f"at most {duration(env.rpo_seconds)}",
    )


def report_switch(report: Report, env: Environment, sent: Sent) -> None:
    """Report where users are sent."""
    report.fact("users are sent to", f"{sent.after} (before: {sent.before or 'nowhere'}), by {env.endpoint.file}")


@dataclass(frozen=True)
class Protection:
    """The standbys of the new primary; whether there is a base backup of its timeline."""

    synchrony: Synchrony
    timeline: int
    has_base: bool


@probe
def read_protection(env: Environment) -> Protection:
    """Read what protects the writes from now on.

    Raises:
        Unreachable: the database or the store does not answer.
    """
    standing = nodes.ask(env.postgres)
    system, timeline = (standing.system, standing.timeline) if standing else (0, 0)
    known = [cluster_in(one) for one in open_all(store_for(env, "cluster"), "cluster")[0] if not one.failed]
    has_base = any((one.system, one.timeline) == (system, timeline) for one in known)
    return Protection(read_synchrony.work(env.postgres), timeline, has_base)


def report_follow_up(report: Report, env: Environment, old: Environment) -> None:
    """Report what protects this region now, and what is left to do, the most urgent first. Until then it is not OK."""
    found = read_protection(env)
    waiting = found.synchrony.connected if found.synchrony.needed else ()
    commits = f"commits wait for {', '.join(waiting) or 'no standby'}"
    report.fact("protection now", commits + (", whose WAL is shipped to the store" if waiting else ""))
    if not found.has_base:
        report.warn(
            "no base backup of this region",
            "back up everything now: until then new writes have no backup",
            value=f"none of timeline {found.timeline}",
            follow=[Next(flow, "back up") for flow in BACKUPS],
        )
    if env.has("standby") and env.standby.name not in waiting:
        hint = "build one: until then there is no server to fail over to"
        report.warn("no standby", hint, value=commits, follow=[Next("rejoin-standby", "build the standby")])
    if not env.has("copies"):
        report.warn(
            "no replica store",
            f"add [copies] to {env.name}'s TOML",
            value="all backups and WAL are in this region only",
        )
    report.warn(
        f"the old region {old.name}",
        "disable its services before its hosts are switched on. Keep its disks: they have the missing "
        "writes. Failback: docs/region-failover.md",
        value="it takes writes again when its services start",
        expected="no service starts",
    )
