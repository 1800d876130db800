"""What the runbooks that put Redis data back have in common: judge, build, put in place. Plain functions."""

from __future__ import annotations

from collections.abc import Iterable

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.log import logger
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import Backup, instead_of
from tasks.redis.content.manifest import COLUMNS
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.fitness import RedisFitness, judge_redis_backup
from tasks.redis.restore.place import Precondition
from tasks.redis.restore.swap import SwappedRedis, start_redis, stop_redis, swap_redis, verify_live_redis
from tasks.redis.topology.isolation import attach, detach, note_swapped
from tasks.redis.topology.refusing_servers import find_unruly
from tasks.redis.topology.topology import ReplicationTopology

# Loading, reading and comparing on the scratch server, seen at 100,000 keys in 3 s on two busy cores.
KEYS_PER_SECOND = 30_000


def judge_redis(
    report: Report, env: Environment, backup: Backup, damage: list[str], around: ReplicationTopology
) -> RedisFitness | None:
    """Put everything that must hold before the restore into the report; None where the backup's files are damaged."""
    return judge_server(report, env, backup, around) if judge_files(report, backup, damage) else None


def judge_files(report: Report, backup: Backup, damage: list[str]) -> bool:
    """Whether a backup's files are what its manifest says."""
    return report.require(
        f"files of {backup.name}",
        not damage,
        f"move it out of {backup.store.where}; {instead_of(backup)}" if damage else "",
        value="; ".join(damage[:3]) or f"{len(backup.manifest.files)} files, {size(backup.manifest.bytes)}",
        expected="as in its manifest",
    )


def judge_server(report: Report, env: Environment, backup: Backup, around: ReplicationTopology) -> RedisFitness:
    """Whether this server may be replaced by a backup that is at hand."""
    fitness = judge_redis_backup(env.redis, backup, around)
    judge_preconditions(report, fitness.preconditions)
    return fitness


def judge_preconditions(report: Report, preconditions: Iterable[Precondition]) -> None:
    """Each as a finding; those that do not block are warnings."""
    for found in preconditions:
        report.require(
            f"Redis: {found.name}",
            found.ok,
            found.hint,
            value=found.value,
            expected=found.expected,
            worst=Status.CRITICAL if found.blocks else Status.WARN,
        )


def plan_redis(report: Report, env: Environment, backup: Backup, fitness: RedisFitness) -> None:
    """The lines of the plan: what is built, stopped, replaced and kept."""
    redis, keys = env.redis, int(backup.manifest.content.get("rdb_keys", 0))
    seconds = max(1.0, fitness.load_seconds + keys / KEYS_PER_SECOND)
    live = fitness.live_keys
    now = "the server is down" if live is None else f"{sum(live.values()):,} keys now"
    drop = ", ".join(redis.drop_prefixes) or "nothing"
    report.plan("build", f"{backup.name} beside {redis.data_directory}", size=fitness.copy_bytes, seconds=seconds)
    report.plan("prove", f"every key against the manifest, on a scratch server; then leave out {drop}")
    plan_detaching(report, env, fitness.around)
    report.plan("stop", f"the service {env.services.name_of('redis')} ({now})", seconds=2)
    report.plan("swap", f"{redis.data_directory}: the old data is kept beside as .superseded_…", seconds=0.1)
    report.plan("start and verify", f"{keys:,} keys loaded, AOF and RDB state", seconds=2 + fitness.load_seconds)


def plan_detaching(report: Report, env: Environment, around: ReplicationTopology) -> None:
    """What is taken off before the server stops, and put back when its data is proven; and whether that is allowed."""
    if not around.is_alone:
        unruly = find_unruly(env.redis, around)
        report.require(
            "rights to take off the other servers and the Sentinels",
            not unruly.refusing,
            "give this user what is named there, and keep it: ACL SAVE or CONFIG REWRITE",
            value="; ".join(unruly.refusing) or "all of them",
        )
        if unruly.forgetting:
            hint = "give this user that: started again, they follow whom their files say"
            report.warn("rights to keep who follows whom", hint, value="; ".join(unruly.forgetting), expected="all")
    if around.watchers:
        names = ", ".join(watcher.address for watcher in around.watchers)
        user = env.redis.username or "the default user"
        told = f"they forget {env.redis.sentinel_master}, and log in to it as {user} when they are put back"
        report.plan("take off", f"Sentinels {names}: {told}", seconds=0.1)
        if scripts := sorted({script for watcher in around.watchers for script in watcher.scripts.values()}):
            hint = "keep their configuration files: a Sentinel that denies to be told a script gets it from there only"
            report.warn("scripts of the Sentinels", hint, value=", ".join(scripts))
    for address in around.reachable:
        role = "the master now; it becomes a replica, and its data goes" if address == around.master else "a replica"
        report.plan(
            "take off", f"{address}, {role}: it takes no writes, and follows {around.own} at the end", seconds=1
        )


def build_redis(report: Report, env: Environment, permit: Permit, backup: Backup) -> RedisCopy:
    """Build and prove the copy, and tell the proof.

    Raises:
        RunbookFailed: it is not what the backup held; nothing was stopped or replaced.
    """
    copy = build_redis_copy(permit, env.redis, backup)
    tell_redis_proof(report, env, backup, copy)
    return copy


def tell_redis_proof(report: Report, env: Environment, backup: Backup, copy: RedisCopy) -> None:
    """The comparison of a copy with its manifest, as a table, findings and facts.

    Raises:
        RunbookFailed: they differ.
    """
    comparison = copy.comparison
    report.table("Redis: the copy against the backup's manifest", COLUMNS, comparison.rows())
    report.require(
        "Redis copy equal to the backup",
        comparison.is_equal,
        "" if comparison.is_equal else f"the live data is untouched; {instead_of(backup)}",
        value="; ".join(comparison.differences[:3]) or f"every key, in {len(comparison.proofs)} databases",
        expected="no difference",
    )
    report.fail_if_critical()
    dropped = ", ".join(f"{prefix} {count:,}" for prefix, count in copy.dropped.items() if count)
    report.fact("Redis keys restored", f"{sum(copy.keys.values()):,}")
    report.fact("Redis keys expired since the backup", f"{comparison.expired_since:,}")
    report.fact("Redis keys left out", dropped or "none")
    report.fact("Redis copy built and proven in", duration(copy.seconds))


def replace_redis(
    report: Report, env: Environment, permit: Permit, copy: RedisCopy, around: ReplicationTopology
) -> SwappedRedis:
    """Take off, stop, swap, start, verify, put back. Where the swap fails, what ran before runs again on the old data.

    Raises:
        OpsError: the service did not stop, or does not start on the copy (the hint says how to go back).
    """
    was_running, taken = env.services.is_running("redis"), around
    report.state_is(
        "the old data is in its place; Redis may be stopped, its replicas and Sentinels taken off",
        "launch it again, or reattach-redis and the start of the service",
    )
    try:
        taken = detach.after(copy)(permit, env.redis, around, env.reports_directory)
        stopped = stop_redis.after(taken)(env.redis, env.services)
        swapped = swap_redis.after(stopped)(permit, env.redis, copy)
    except BaseException:
        start_again(report, env, permit, taken, was_running=was_running)
        raise
    taken = note_swapped(env.reports_directory, taken)
    report.fact("Redis data kept", swapped.kept or "there was none")
    back = undo(swapped)
    report.state_is("the backup's data is in place; what it replaced is kept", back)
    try:
        started = start_redis.after(swapped)(env.redis, env.services)
        differences = verify_live_redis.after(started)(env.redis, copy)
    except OpsError as error:
        raise OpsError(f"Redis does not serve the restored data: {error.message}", error.hint or back) from None
    report.require(
        "live Redis serves the copy",
        not differences,
        back,
        value="; ".join(differences) or "as many keys loaded as were proven",
        expected="no difference",
    )
    if not differences:
        put_back(report, env, permit, taken, after=differences)
    return swapped


def start_again(
    report: Report, env: Environment, permit: Permit, taken: ReplicationTopology, *, was_running: bool
) -> bool:
    """After a swap that failed: what ran runs again on its old data, with what stood around it. Whether all of it does;
    a failure of that is told in the report, and must not hide why it is done."""
    logger().warning("the swap failed: everything is put back as it was")
    try:
        if was_running:
            start_redis(env.redis, env.services)
        if was_running or taken.master not in ("", taken.own):
            put_back(report, env, permit, taken)
    except OpsError as second:
        report.fail("Redis started again", second.hint, value=second.message)
        return False
    return True


def put_back(
    report: Report, env: Environment, permit: Permit, taken: ReplicationTopology, after: object = None
) -> None:
    """Replicas follow and Sentinels watch again; the master is this server, or the one before if nothing was swapped.

    Raises:
        Unreachable: they do not come to agree; the record of what was taken off stays.
    """
    if taken.is_alone:
        return
    before = report.state
    report.state_is("replicas and Sentinels are not all back", "launch reattach-redis when they can be reached")
    # Over the network it may be any server of the data set, else the one whose files are here, by whatever address.
    own = env.redis.at(taken.own) if env.redis.remote else env.redis
    for problem in attach.after(after)(permit, own, taken, env.reports_directory):
        report.warn("not put back", problem)
    report.state = before
    names = [*taken.reachable, *(watcher.address for watcher in taken.watchers)]
    report.fact("replicas and Sentinels put back", ", ".join(names))


def undo(swapped: SwappedRedis) -> str:
    """How to go back to the old data."""
    if swapped.kept is None:
        return "nothing to undo: there was no data before"
    return f"undo-restore-redis with kept={swapped.kept.name}"
