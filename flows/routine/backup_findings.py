"""What the daily check says of backups: how old, whether something newer is at hand, and when one was proven (§7.2)."""

from __future__ import annotations

from datetime import datetime, timedelta

from flows.recovery.objectives import tell_points
from flows.recovery.points import Reach, read_reach, resources_of
from flows.routine.past import AHEAD, is_ahead
from flows.routine.steps import Page
from runbook import clock
from runbook.errors import OpsError
from runbook.render import duration
from runbook.report import Status
from tasks.catalogue import Backup
from tasks.recovery_points.backups import LOOKED_AT, TAKEN_BY
from tasks.recovery_points.point import Resource
from tasks.retention import Stored, read_stores
from tasks.stores.store import store_of

# A week, and a day of grace: verify-backup and backup-cluster run weekly.
WEEKLY = LOOKED_AT + timedelta(days=1)
PATIENCE_SECONDS = 5.0


def judge_backups(page: Page) -> None:
    """Of the database, Redis and the files."""
    if page.names("backups"):
        page.part("backups", lambda: _judge(page))


def _judge(page: Page) -> None:
    resources = resources_of(page.env)
    if not resources:
        page.not_measured("backups", "the environment names nothing that could be lost", "add [postgres], [redis] …")
        return
    reach = read_reach(page.env)
    for resource in resources:
        _judge_resource(page, reach, resource)
    if "database" in resources:
        page.part("base backups", lambda: _judge_bases(page))
    tell_points(page.report, reach)


def _judge_resource(page: Page, reach: Reach, resource: Resource) -> None:
    stored, name = reach.stored["backups", resource], f"newest backup of {resource}"
    take = page.launch(TAKEN_BY[resource])
    if isinstance(stored, OpsError):
        page.report.expect(name, False, stored.hint, value=f"not measured: {stored.message}")
        return
    for bad in stored.unreadable:
        page.report.warn(f"{bad} in the store", "look at it: its manifest cannot be read", value="not known")
    if ahead := stored.from_the_future():
        page.report.warn(f"clock, by the backups of {resource}", "correct the clock of who took them",
                         value=f"of the future: {', '.join(ahead[:3])}")  # fmt: skip
    there = [one for one in stored.backups if one.age_seconds >= 0]
    if not there:
        page.report.expect(name, False, f"{take} takes one now", value="there is none")
        return
    _judge_age(page, reach, resource, there[-1], take)
    _judge_proof(page, resource, there)


def _judge_age(page: Page, reach: Reach, resource: Resource, newest: Backup, take: str) -> None:
    """Against the RPO: itself, or what recovers to a later moment (point in time), where that is proven to be there."""
    env, age = page.env, newest.age_seconds
    told = f"{newest.name} is {duration(age)} old"
    page.report.fact(f"backup of {resource}", told)
    best, rpo = reach.best(resource, "data corrupted"), f"at most {duration(env.rpo_seconds)} (RPO)"
    loss = best.loss_seconds(reach.now) if best else None
    if newest.failed:
        page.report.expect(f"newest backup of {resource}", False, f"{take} takes another; its report says why",
                           value=f"{newest.name} did not stand its proof ({newest.failed})")  # fmt: skip
    if age > env.rpo_seconds and best and loss is not None and best.means != "backup" and loss <= env.rpo_seconds:
        page.report.expect(f"newest backup of {resource}", age <= WEEKLY.total_seconds(), f"{take} takes one now",
                           value=f"{told}; {best.told} loses {duration(loss)}", expected=rpo,
                           otherwise=Status.WARN)  # fmt: skip
        return
    hint = f"{take} takes one now; a daily one cannot hold {duration(env.rpo_seconds)}: archive WAL, or take it oftener"
    page.judge("backup.age_seconds", age, hint, of=f"{resource}: {told}, RPO {duration(env.rpo_seconds)}")


def _judge_proof(page: Page, resource: Resource, there: list[Backup]) -> None:
    """When a restore of one was last proven."""
    proven = max((one.verified for one in there if one.verified), default="")
    page.report.fact(f"last proven backup of {resource}", proven or "never")
    at = datetime.fromisoformat(proven) if proven else None
    well = at is not None and not is_ahead(at) and clock.now() - at <= WEEKLY
    page.report.expect(f"a backup of {resource} was proven by a restore", well,
                       f"{page.launch('verify-backup', kind=_KIND[resource])} restores one beside, and compares it",
                       value=f"last at {proven}" if proven else "never", expected=f"within {WEEKLY.days} days",
                       otherwise=Status.WARN)  # fmt: skip


_KIND: dict[Resource, str] = {"database": "postgres", "redis": "redis", "files": "files"}


def _judge_bases(page: Page) -> None:
    """Base backups are what a recovery to a point in time begins with: where WAL is kept, they are needed."""
    env = page.env
    (stored,) = read_stores([(store_of(env, "cluster", patience_seconds=PATIENCE_SECONDS), ("cluster",))], env.name)
    found = stored.backups if isinstance(stored, Stored) else ()
    if isinstance(stored, OpsError) and env.has("wal"):
        page.not_measured("newest base backup", stored.message, stored.hint)
        return
    if not found and not env.has("wal"):
        page.report.fact("base backups", "none; the environment keeps no WAL")
        return
    newest = found[-1] if found else None
    if newest and is_ahead(newest.manifest.taken):
        page.report.warn("newest base backup", AHEAD, value=f"{newest.name} is of the future")
        return
    well = newest is not None and newest.age_seconds <= WEEKLY.total_seconds() and not newest.failed
    value = f"{newest.name} is {duration(newest.age_seconds)} old" if newest else "there is none"
    failed = f"; it did not stand its proof ({newest.failed})" if newest and newest.failed else ""
    page.report.expect("newest base backup", well, f"{page.launch('backup-cluster')} takes one", value=value + failed,
                       expected=f"within {WEEKLY.days} days",
                       otherwise=Status.WARN if newest else Status.CRITICAL)  # fmt: skip
