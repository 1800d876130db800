"""Second and third phase of a full restore: the swap of all three, the start, and the checks on what is live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blocks.environment import START_ORDER, STOP_ORDER, Environment
from blocks.postgres import Connection
from flows.database import steps as database
from flows.recovery import check
from flows.recovery.build import Copies
from flows.recovery.choose import Chosen
from flows.recovery.revive import Found
from runbook.errors import OpsError
from runbook.permit import Permit
from runbook.render import duration
from runbook.report import Report
from tasks import catalogue
from tasks.application import smoke_check, wait_healthy
from tasks.files import swap_files
from tasks.logs import read_writes_since
from tasks.postgres.content import read_counts
from tasks.postgres.server import Identity
from tasks.postgres.swap import swap_databases
from tasks.redis.empty import prepare_empty
from tasks.redis.swap import start_redis, stop_redis, swap_redis, verify_live_redis
from tasks.services import start_services, stop_services

HEALTH_SECONDS = 120


@dataclass
class Held:
    """The services of one run: which were stopped, and how far the swap has come."""

    env: Environment
    running: list[str]
    stopped_at: datetime | None = None
    swapped: list[str] = field(default_factory=list)

    def stop(self) -> None:
        """In the manual's order, each proven stopped."""
        if not self.stopped_at:
            self.stopped_at = datetime.now(UTC)
            stop_services(self.env.services, [role for role in self.env.services_in(STOP_ORDER) if role != "redis"])
            if self.env.has("redis"):
                stop_redis(self.env.redis, self.env.services)


@contextlib.contextmanager
def services_held(report: Report, env: Environment, found: Found, when: str) -> Iterator[Held]:
    """Stopped first, or at the swap. Where the run fails before anything was swapped, they are as they were found."""
    running = [role for role in STOP_ORDER if found.services.running.get(role)]
    held = Held(env, running)
    try:
        if when == "first":
            held.stop()
        yield held
    except BaseException:
        if held.swapped:
            left = ", ".join(part for part in ("database", "Redis", "files") if part not in held.swapped)
            report.expect(
                "state of the system",
                False,
                f"launch full-restore again with confirm={env.name}: it begins anew and ends well",
                value=f"swapped: {', '.join(held.swapped)}; not swapped: {left or 'nothing'}; services are stopped",
            )
        elif held.stopped_at:
            start_services(env.services, [role for role in START_ORDER if role in running])
        raise


def swap(
    report: Report,
    permit: Permit,
    env: Environment,
    guard: Connection,
    held: Held,
    copies: Copies,
    live: Identity,
    chosen: Chosen,
) -> None:
    """All three, one after the other: each by rename, each checked to be what was judged."""
    held.stop()
    done = swap_databases(permit, env.postgres, guard, copies.database, live.oid, chosen.database.name)
    held.swapped.append("database")
    kept = [done.kept] if done.kept else []
    if copies.redis:
        kept.append(str(swap_redis(permit, env.redis, copies.redis).kept or ""))
        held.swapped.append("Redis")
    if copies.files:
        kept.append(str(swap_files(permit, env.application, copies.files).kept or ""))
        held.swapped.append("files")
    report.fact("database swapped in", f"{done.outage_seconds:.2f} s")
    report.fact("kept aside", ", ".join(name for name in kept if name) or "nothing: there was nothing left")


def start(report: Report, env: Environment, copies: Copies, held: Held) -> None:
    """Start in order of dependency, then check what is live: health, Redis, row counts, expectations, the application.

    Raises:
        OpsError: the backend does not become healthy.
    """
    if copies.redis is None and env.has("redis") and (done := prepare_empty(env.redis)):
        report.warn("Redis data directory", "look at what is in it; take backups of Redis too", value=done)
    checking = check.start(report, env, env.postgres.database)
    counting = read_counts.submit(env.postgres, env.postgres.database)
    start_services(env.services, ["postgres"])
    if env.has("redis"):
        start_redis(env.redis, env.services)
    start_services(env.services, env.services_in(("backend", "frontend")))
    health = wait_healthy(env.application, seconds=HEALTH_SECONDS)
    report.expect("health", True, "", value=health.answer)
    if held.stopped_at:
        outage = (datetime.now(UTC) - held.stopped_at).total_seconds()
        report.fact("services out of order for", f"{duration(outage)}, from their stop until healthy")
    if copies.redis:
        problems = verify_live_redis(env.redis, copies.redis)
        report.expect("Redis live", not problems, "look at its log; what it replaced is kept aside",
                      value="; ".join(problems[:3]) or "every key without TTL is there")  # fmt: skip
    _tell_counts(report, dict(counting.result().rows), copies)
    check.tell(report, checking, "on the live database", migrated=True)
    _smoke(report, env)


def _tell_counts(report: Report, live: dict[str, int], copies: Copies) -> None:
    """Clients write again, so counts may have grown."""
    fewer = [
        f"{name}: {live.get(name, 0):,} of {rows:,}" for name, rows in copies.rows.items() if live.get(name, 0) < rows
    ]
    report.expect("rows live", not fewer, "find out who deletes: the copy had them all when it took the live name",
                  value="; ".join(fewer[:3]) or f"{sum(live.values()):,} in {len(live)} tables")  # fmt: skip


def _smoke(report: Report, env: Environment) -> None:
    result = smoke_check(env.application)
    report.table("Application", ("check", "works", "seconds", "detail"), result.rows)
    report.expect("application works", result.ok, "look at the backend's log", value=result.detail)


def tell(report: Report, env: Environment, chosen: Chosen) -> None:
    """RTO, RPO, and the writes that are lost, named."""
    report.fail_if_critical()
    report.expect("recovery time against the RTO", report.seconds <= env.rto_seconds, "see which step took long",
                  value=duration(report.seconds), expected=f"at most {duration(env.rto_seconds)}")  # fmt: skip
    report.fact("RTO", f"{duration(report.seconds)} of {duration(env.rto_seconds)}")
    database.tell_window(report, env, chosen.database)
    tell_lost(report, env, chosen)
    for backup in (chosen.database, chosen.redis, chosen.files):
        if backup:
            catalogue.mark_verified(backup.path.parent, backup.name, {"by": report.runbook, "at": report.started_at})
    report.outcome = "everything is back and proven"


def tell_lost(report: Report, env: Environment, chosen: Chosen) -> None:
    """Writes that the application acknowledged after the snapshot and before this run, from its log."""
    try:
        writes = read_writes_since(env.logs, chosen.database.manifest.taken, before=report.started)
    except OpsError as error:
        report.warn("writes lost", "ask the application's clients", value=f"not measured: {error.message}")
        return
    if not writes.complete:
        report.warn("writes lost", writes.note, value="not measured")
    report.fact("writes lost", f"{writes.count:,} acknowledged after the backup")
    report.table("Writes lost, by kind", ("request", "acknowledged after the backup"), writes.by_kind)
    report.table("Writes lost, one by one", ("time", "method", "path", "resource"), writes.items)
