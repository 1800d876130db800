"""The source of Redis's data in a restore: a backup, a surviving replica, the dead master's own files, or the master
that still serves its data (§2.3, §8.2).

The source that loses least is chosen, if its loss is known. A master that serves its data, complete, is left as it is:
neither stopped nor restored. The data of any other copy is captured as a proven backup after the services
are stopped, and restored like any other backup. So nothing is replaced before its replacement is proven.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from blocks.environment import Environment
from flows import store as stores
from runbook import clock
from runbook.change import Check
from runbook.files import record
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from tasks.backups.catalogue import Backup, find_nearest
from tasks.redis.restore.serving import find_change, find_lost_keys
from tasks.redis.restore.survivors import (
    IS_EMPTY,
    IS_LOADING,
    LEAST_RATIO,
    NOTHING,
    PART,
    SurvivingCopy,
    Survivors,
    deleted_keys,
    expected_keys,
    find_survivors,
    lacks,
)
from tasks.redis.topology.topology import ReplicationTopology, read_topology

RedisSource = Literal["auto", "backup", "live", "replica", "files"]
COLUMNS = ("source", "keys", "lost", "verdict")
RECORD = "redis-source.json"
REMEMBERED = timedelta(days=1)


@dataclass(frozen=True)
class Decision:
    """The source of a run that was killed, and when that run stopped the services."""

    source: RedisSource
    since: datetime


def find(report: Report, env: Environment, around: ReplicationTopology) -> Survivors:
    """Every surviving copy of Redis's data."""
    return find_survivors(env.redis, around, stores.store_for(env, "redis").spool, env.reports_directory)


def loss_of(source: SurvivingCopy | Backup | None) -> Loss:
    """What Redis loses with this source of its data. None: nothing of Redis is replaced."""
    if isinstance(source, Backup):
        return Loss.everything_since(PART, source.manifest.taken)
    return source.loss if source else NOTHING


def choose(
    report: Report,
    env: Environment,
    found: Survivors,
    around: ReplicationTopology,
    backup: Backup | None,
    wanted: RedisSource,
    *,
    latest: bool,
    damaged: bool = False,
) -> SurvivingCopy | None:
    """The surviving copy to restore from, or to leave as it is (`live`); None: the backup. `latest`: no point in time
    was asked for. `damaged`: the backup's files are, so nothing can be compared with it.

    Raises:
        RunbookFailed: the wanted source does not exist, or is incomplete.
    """
    proven = None if damaged else backup
    found = found.measured(proven)
    emptied = _emptied(found, proven)
    if wanted == "auto" and latest and (kept := found.serving) and not emptied[kept.name]:
        damage = f"the backup to compare it with, {backup.name}, is damaged" if backup and damaged else ""
        emptied[kept.name] = damage or (find_lost_keys(env.redis, kept, backup) if backup else "")
        if emptied[kept.name] and not damage:
            hint = "nothing to do: this run restores what is missing. redis_source=live keeps Redis's data instead"
            value, keys = emptied[kept.name], "the backup's keys"
            report.warn("Redis serves incomplete data", hint, value=value, expected=keys, alternative=True)
        _mark_followers(found, kept, emptied)
    backup = proven
    chosen, why = _choose(report, env, found, backup, emptied, wanted, latest=latest)
    _report_sources(report, found, backup, emptied, chosen)
    for copy in found.copies:
        if emptied[copy.name] and copy.problem in ("", IS_EMPTY):
            _report_deletion(report, copy, emptied[copy.name], chosen, is_served=found.serving is not None)
    name = chosen.name if chosen else f"backup {backup.name}" if backup else "none"
    report.fact("redis source", f"{name}: {why}")
    if chosen:
        _report_promotion(report, chosen, around)
    return chosen


def compare(report: Report, env: Environment, wanted: RedisSource) -> tuple[SurvivingCopy | None, ReplicationTopology]:
    """The source that a restore takes now, beside the newest backup; and the servers of the data set.

    Raises:
        OpsError: the store or the server refuses.
        RunbookFailed: the wanted source does not exist, or is incomplete.
    """
    around = read_topology(env.redis, env.reports_directory)
    backup = find_nearest(stores.store_for(env, "redis"), "redis", datetime.now(UTC), env.name)
    damaged = bool(backup and stores.read_files(report, backup))
    found = find(report, env, around)
    return choose(report, env, found, around, backup, wanted, latest=True, damaged=damaged), around


def find_better(report: Report, env: Environment, found: Survivors, backup: Backup) -> SurvivingCopy | None:
    """The surviving copy that loses less than the backup, or perhaps less, for advice only."""
    found = found.measured(backup)
    emptied = _emptied(found, backup)
    _report_sources(report, found, backup, emptied, None)
    if (kept := found.serving) and not emptied[kept.name]:
        return None
    best, _ = _best(found, backup, emptied)
    return best or next(iter(_undecided(found, backup, emptied)), None)


def _emptied(found: Survivors, backup: Backup | None) -> dict[str, str]:
    expected = expected_keys(backup) if backup else {}
    return {copy.name: deleted_keys(copy, expected) for copy in _all(found)}


def _mark_followers(found: Survivors, kept: SurvivingCopy, emptied: dict[str, str]) -> None:
    """Its own files, and what has everything that it has written, are as incomplete as a master."""
    for copy in found.copies:
        if copy.moment and kept.moment and copy.moment >= kept.moment:
            emptied[copy.name] = emptied[copy.name] or emptied[kept.name]


def _all(found: Survivors) -> list[SurvivingCopy]:
    return [*([found.serving] if found.serving else []), *found.copies]


def _report_sources(
    report: Report,
    found: Survivors,
    backup: Backup | None,
    emptied: dict[str, str],
    chosen: SurvivingCopy | None,
) -> None:
    rows = [
        (copy.name, f"{copy.all_keys:,}", copy.loss.text, _verdict(copy, emptied[copy.name], chosen))
        for copy in _all(found)
    ]
    if backup:
        keys = f"{sum(expected_keys(backup).values()):,}"
        rows.append((f"backup {backup.name}", keys, loss_of(backup).text, "" if chosen else "chosen"))
    report.table("Redis: sources of its data", COLUMNS, rows)


def _choose(
    report: Report,
    env: Environment,
    found: Survivors,
    backup: Backup | None,
    emptied: dict[str, str],
    wanted: RedisSource,
    *,
    latest: bool,
) -> tuple[SurvivingCopy | None, str]:
    # A run that leaves the master as it is stops nothing: what is found now decides.
    if wanted == "auto" and (earlier := _remembered(env)) and earlier.source != "live":
        wanted = earlier.source
        report.fact("decision of a killed run", f"redis_source={wanted}, at {clock.text(earlier.since)}")
    if wanted in ("live", "replica", "files"):
        return _named(report, env, found, wanted), f"redis_source={wanted}"
    if wanted == "backup":
        return None, "redis_source=backup"
    if not latest:
        return None, "a backup was named: Redis is restored to that time"
    _require_loaded(report, found)
    kept = found.serving
    if kept and not emptied[kept.name]:
        expected = (
            f"; of the backup's keys {sum(expected_keys(backup).values()):,} should still exist" if backup else ""
        )
        return kept, f"it serves {kept.all_keys:,} keys{expected}: it is kept as it serves"
    best, why = _best(found, backup, emptied)
    if best is None or not best.serves:
        _require_named(report, backup, best, _undecided(found, backup, emptied))
    if kept:
        why = f"{kept.where} serves {kept.all_keys:,} keys, but {emptied[kept.name]}; redis_source=live keeps them"
    return best, why


def _named(report: Report, env: Environment, found: Survivors, wanted: RedisSource) -> SurvivingCopy:
    fitting = [copy for copy in _able(found) if copy.kind == wanted]
    problems = "; ".join(f"{copy.name}: {copy.problem}" for copy in found.copies if copy.kind == wanted)
    if wanted == "live":
        problems = f"{env.redis.address} is no master that serves and saves data, with its replicas attached"
    hint = "choose redis_source=backup, or leave it at auto"
    value = wanted if fitting else problems or f"no {wanted}"
    report.require("redis_source", bool(fitting), hint, value=value, expected=f"a complete {wanted}")
    report.fail_if_critical()
    return fitting[0]


def _require_loaded(report: Report, found: Survivors) -> None:
    loading = [copy.where for copy in found.copies if copy.problem == IS_LOADING]
    report.require(
        "Redis has loaded its data",
        not loading,
        "wait until it serves, and run this again: it may have the newest data. redis_source=backup does not wait",
        value=f"loading: {', '.join(loading)}" if loading else "yes, or it is stopped",
    )
    report.fail_if_critical()


def _require_named(
    report: Report, backup: Backup | None, best: SurvivingCopy | None, undecided: Sequence[SurvivingCopy]
) -> None:
    """A copy that may have more than the chosen source is given up only by its name: afterwards it no longer exists."""
    other = f"redis_source={best.kind}" if best else "redis_source=backup" if backup else "without=redis"
    for copy in undecided:
        report.fail(
            "source of Redis's data",
            f"run this with redis_source={copy.kind} to restore from it, or with {other} to give it up",
            value=f"{copy.name} has {copy.all_keys:,} keys; {copy.loss.text}",
            expected="a known loss, or a source that is named",
        )
    report.fail_if_critical()


def _able(found: Survivors) -> list[SurvivingCopy]:
    return sorted((copy for copy in _all(found) if not copy.problem), key=_order, reverse=True)


def _best(found: Survivors, backup: Backup | None, emptied: dict[str, str]) -> tuple[SurvivingCopy | None, str]:
    """The complete copy that loses least by what is known; None: the backup loses less, or no loss is known."""
    provable = [copy for copy in _able(found) if copy.kind != "live" and copy.moment and not emptied[copy.name]]
    if not provable:
        return None, "no complete copy of known loss survives"
    best = provable[0]
    if backup and not best.serves and best.moment and best.moment < backup.manifest.taken:
        return None, f"it is newer than {best.name}"
    return best, "it loses least"


def _undecided(found: Survivors, backup: Backup | None, emptied: dict[str, str]) -> list[SurvivingCopy]:
    """Complete copies of which nothing shows that they have less than the backup, nor how much they lack."""
    return [
        copy
        for copy in _able(found)
        if copy.kind != "live" and not (copy.moment or emptied[copy.name]) and not (backup and lacks(copy, backup))
    ]


def _order(copy: SurvivingCopy) -> tuple[bool, datetime]:
    return copy.serves, copy.moment or datetime.min.replace(tzinfo=UTC)


def _verdict(copy: SurvivingCopy, emptied: str, chosen: SurvivingCopy | None) -> str:
    if copy is chosen:
        return "chosen"
    if copy.problem:
        return f"no source: {copy.problem}"
    if emptied:
        return f"incomplete: {emptied}"
    return "" if copy.moment or copy.kind == "live" else f"only redis_source={copy.kind} takes it"


def _report_deletion(
    report: Report, copy: SurvivingCopy, emptied: str, chosen: SurvivingCopy | None, *, is_served: bool
) -> None:
    """Replicas and AOF follow a deletion, so their data is as incomplete as the master's."""
    taken, asked = copy is chosen, f"redis_source={'live' if is_served else copy.kind}"
    report.warn(
        f"Redis data was deleted: {copy.name}",
        f"it is taken, because of {asked}; redis_source=backup restores the deleted keys"
        if taken
        else f"if the deletion was intended, run this with {'without=redis' if copy.problem else asked}",
        value=emptied,
        expected=f"in each database at least {LEAST_RATIO:.0%} of the backup's keys that have not expired",
    )


def _report_promotion(report: Report, chosen: SurvivingCopy, around: ReplicationTopology) -> None:
    if chosen.kind == "replica" and chosen.serves:
        report.warn(
            "Redis master",
            f"for Redis alone, redis-failover with mode=unplanned is the right runbook. This run makes {around.own} "
            f"the master again, with the data of {chosen.where}",
            value=f"{chosen.where} was promoted, and serves the data",
            expected=around.own,
            alternative=True,
        )


def report_newer(report: Report, copy: SurvivingCopy, moment: datetime) -> None:
    """Report that the kept Redis is newer than the database, which is restored to `moment`."""
    report.warn(
        "Redis is newer than the database",
        "delete its cached keys (clear-cache), or restore Redis to the same time (redis_source=backup): its keys may "
        "refer to rows that no longer exist",
        value=f"Redis at {copy.where} keeps all writes, the database those up to {clock.text(moment)}",
        expected="both of the same time",
        follow=[Next("clear-cache", "clear the cache")],
    )


def plan_kept(report: Report, env: Environment, copy: SurvivingCopy) -> Check[[object], None]:
    """Plan that the master stays as it is, and the proof of that after the application's start."""
    return Check(
        lambda started: judge_kept_master(report, env, copy, after=started),
        "keep Redis as it serves",
        f"{copy.where}, {copy.all_keys:,} keys: it is neither stopped nor restored",
    )


def judge_kept_master(report: Report, env: Environment, copy: SurvivingCopy, after: object) -> None:
    """Check, after the application's start, that the master that was kept has served all the time."""
    change = find_change.after(after)(env.redis, copy)
    report.prefer(
        "Redis kept as it serves",
        not change,
        "check its keys; if they are missing, run this again with redis_source=backup",
        value=change or f"{copy.where}, not restarted",
        expected=f"the server of {copy.where}, not restarted",
    )


def _remembered(env: Environment) -> Decision | None:
    """The decision of a killed run: its stop of the master must not look like the master's death."""
    found = record.read(env.reports_directory / RECORD, Decision, "delete it, and set redis_source")
    return found if found and datetime.now(UTC) - found.since < REMEMBERED else None


@contextlib.contextmanager
def remembered(env: Environment, copy: SurvivingCopy | None, swapped: Sequence[str]) -> Iterator[None]:
    """Keep the decision while the services are stopped, for a run after a killed one, or after one that failed between
    two swaps (`swapped`: the parts so far)."""
    path = env.reports_directory / RECORD
    if env.has("redis"):
        record.write(path, Decision(copy.kind if copy else "backup", datetime.now(UTC)))
    try:
        yield
    except BaseException:
        if not swapped:
            path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)
