"""The common steps of restores of Redis: check, build, swap, reattach."""

from __future__ import annotations

from collections.abc import Iterable

from blocks.environment import Environment
from flows.redis.restore.gate import RedisGate
from flows.store import mark_failed
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.guard.permit import CarriesOut, Permit
from runbook.log import logger
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import Backup, instead_of
from tasks.redis.content.manifest import COLUMNS
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.fitness import RedisFitness, judge_redis_backup
from tasks.redis.restore.place import Precondition, judge_stop
from tasks.redis.restore.swap import SwappedRedis, start_redis, stop_redis, swap_redis, verify_live_redis
from tasks.redis.restore.undoing import note_started
from tasks.redis.topology.isolation import attach, detach, note_swapped, wait_for_followers
from tasks.redis.topology.refusing_servers import find_refusing_servers
from tasks.redis.topology.topology import ReplicationTopology

# Loading, reading and comparing on the scratch server: 100,000 keys in 3 s on two busy processors.
KEYS_PER_SECOND = 30_000


def judge_redis(
    report: Report, env: Environment, backup: Backup, damage: list[str], around: ReplicationTopology
) -> RedisFitness | None:
    """Check the backup and the server before a restore. None: the backup's files are damaged."""
    return judge_server(report, env, backup, around) if judge_files(report, backup, damage) else None


def judge_files(report: Report, backup: Backup, damage: list[str]) -> bool:
    """A backup's files match its manifest."""
    return report.require(
        f"files of {backup.name}",
        not damage,
        f"move it out of {backup.store.where}; {instead_of(backup)}" if damage else "",
        value="; ".join(damage[:3]) or f"{len(backup.manifest.files)} files, {size(backup.manifest.bytes)}",
        expected="as in its manifest",
    )


def judge_server(report: Report, env: Environment, backup: Backup, around: ReplicationTopology) -> RedisFitness:
    """The conditions under which a fetched backup can replace this server's data."""
    fitness = judge_redis_backup(env.redis, backup, around)
    judge_preconditions(report, (*fitness.preconditions, *judge_stop(env.redis, env.services)))
    return fitness


def judge_preconditions(report: Report, preconditions: Iterable[Precondition]) -> None:
    """Report each condition; the ones that do not block are warnings."""
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
    """The steps of the plan: what is built, stopped, replaced and kept."""
    redis, keys = env.redis, int(backup.manifest.content.get("rdb_keys", 0))
    seconds = max(1.0, fitness.load_seconds + keys / KEYS_PER_SECOND)
    live = fitness.live_keys
    now = "the server is down" if live is None else f"{sum(live.values()):,} keys now"
    drop = ", ".join(redis.drop_prefixes) or "nothing"
    build: list[CarriesOut] = [build_redis_copy]
    report.plan(
        "build",
        f"{backup.name}, staged next to {redis.data_directory}",
        size=fitness.copy_bytes,
        seconds=seconds,
        by=build,
    )
    proof = f"every key against the manifest, on a scratch server; then leave out {drop}"
    report.plan("prove", proof, by=build, shared=True)
    plan_detaching(report, env, fitness.around)
    report.plan("stop", f"the service {env.services.name_of('redis')} ({now})", seconds=2, by=[stop_redis])
    swap = f"{redis.data_directory}: the old data is kept next to it as .superseded_…"
    report.plan("swap", swap, seconds=0.1, by=[swap_redis])
    report.plan(
        "start and verify",
        f"{keys:,} keys loaded, AOF and RDB state",
        seconds=2 + fitness.load_seconds,
        by=[start_redis, verify_live_redis],
    )


def plan_detaching(report: Report, env: Environment, around: ReplicationTopology) -> None:
    """Plan to detach the other servers and the Sentinels until the new data is proven, and check the rights for it."""
    if not around.is_alone:
        rights = find_refusing_servers(env.redis, around)
        report.require(
            "rights to detach the other servers and the Sentinels",
            not rights.refusing,
            "grant this user the named rights, and save them: ACL SAVE or CONFIG REWRITE",
            value="; ".join(rights.refusing) or "all of them",
        )
        if rights.forgetting:
            hint = "grant this user that right: otherwise they follow their files' master after a restart"
            report.warn("rights to save the replication", hint, value="; ".join(rights.forgetting), expected="all")
    if around.watchers:
        names = ", ".join(watcher.address for watcher in around.watchers)
        user = env.redis.username or "the default user"
        login = f"they forget {env.redis.sentinel_master}, and log in to it as {user} when they are reattached"
        report.plan("detach", f"Sentinels {names}: {login}", seconds=0.1, by=[detach])
        if scripts := sorted({script for watcher in around.watchers for script in watcher.scripts.values()}):
            hint = "keep their configuration files: with deny-scripts-reconfig only the file can set a script"
            report.warn("scripts of the Sentinels", hint, value=", ".join(scripts))
    for number, address in enumerate(around.reachable):
        role = "the current master; it becomes a replica of the new data" if address == around.master else "a replica"
        report.plan(
            "detach",
            f"{address}, {role}: it refuses writes, and follows {around.own} at the end",
            seconds=1,
            by=[detach],
            shared=number > 0 or bool(around.watchers),
        )


def build_redis(report: Report, env: Environment, permit: Permit, backup: Backup) -> RedisCopy:
    """Build and prove the staged copy, and report the proof.

    Raises:
        RunbookFailed: it differs from the backup; nothing was stopped or replaced.
    """
    copy = build_redis_copy(permit, env.redis, backup)
    report_redis_proof(report, env, backup, copy)
    return copy


def report_redis_proof(report: Report, env: Environment, backup: Backup, copy: RedisCopy) -> None:
    """Report the comparison of a staged copy with the backup's manifest.

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
    if not comparison.is_equal:
        mark_failed(report, backup, comparison.differences[0])
    report.fail_if_critical()
    dropped = ", ".join(f"{prefix} {count:,}" for prefix, count in copy.dropped.items() if count)
    report.fact("Redis keys restored", f"{sum(copy.keys.values()):,}")
    report.fact("Redis keys expired since the backup", f"{comparison.expired_since:,}")
    report.fact("Redis keys left out", dropped or "none")
    report.fact("Redis copy built and proven in", duration(copy.seconds))


def replace_redis(gate: RedisGate, copy: RedisCopy, loss: Loss, backup: Backup | None = None) -> SwappedRedis:
    """Detach, stop, pass the gate, swap, start, verify, reattach. If the swap fails, the old data is started again.
    `loss`: what the copy lacks; `backup`: the one that it is of, if that is the source.

    Raises:
        LossExceeded: the live side is another one now, or more would be lost than was confirmed. Nothing was replaced.
        OpsError: the service did not stop, or does not start with the copy (the hint names the undo).
    """
    report, env, permit = gate.report, gate.env, gate.permit
    report.state_is(
        "the old data is in place; Redis may be stopped, its replicas and Sentinels detached",
        "run it again; or start the service and run reattach-redis",
    )
    try:
        gate.fence(after=copy)
        swapped = swap_redis.after(gate.judge(loss, backup))(permit, env.redis, copy)
    except BaseException:
        start_again(report, env, permit, gate.around, was_running=gate.was_running)
        raise
    report.loses(loss)
    taken = note_swapped(env.reports_directory, gate.around)
    report.fact("Redis data kept", swapped.kept or "there was none")
    back = undo(swapped)
    report.state_is("the backup's data is in place; the replaced data is kept", back)
    try:
        started = start_redis.after(swapped)(env.redis, env.services)
        note_started(env.redis, env.reports_directory, swapped.kept)
        differences = verify_live_redis.after(started)(env.redis, copy)
    except OpsError as error:
        raise OpsError(f"Redis does not serve the restored data: {error.message}", error.hint or back) from None
    report.require(
        "live Redis serves the copy",
        not differences,
        back,
        value="; ".join(differences) or "loaded as many keys as were proven",
        expected="no difference",
    )
    if not differences:
        put_back(report, env, permit, taken, after=differences)
    return swapped


def start_again(
    report: Report, env: Environment, permit: Permit, taken: ReplicationTopology, *, was_running: bool
) -> bool:
    """After a failed swap: start the old data again, and reattach replicas and Sentinels. Returns whether all of that
    succeeded; its own failure is reported and must not hide the first error."""
    logger().warning("the swap failed: the earlier state is restored")
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
) -> tuple[str, ...]:
    """Reattach Sentinels and replicas. The master is this server, or the earlier one if nothing was swapped. Returns
    sentences about those that could not be reattached.

    Raises:
        Unreachable: the Sentinels do not agree on the master; the record of detached servers stays.
    """
    if taken.is_alone:
        return ()
    before = report.state
    report.state_is("some replicas or Sentinels are detached", "run reattach-redis when they answer")
    # Over the network it can be any server of the data set; otherwise it is the one whose files are on this host.
    own = env.redis.at(taken.own) if env.redis.remote else env.redis
    attached = attach.after(after)(permit, own, taken, env.reports_directory)
    problems = wait_for_followers.after(attached)(permit, own, attached, env.reports_directory)
    report_not_attached(report, problems)
    report.state = before
    names = [*taken.reachable, *(watcher.address for watcher in taken.watchers)]
    report.fact("replicas and Sentinels reattached", ", ".join(names))
    return problems


def report_not_attached(report: Report, problems: Iterable[str]) -> None:
    """Report the servers and Sentinels of Redis that could not be attached."""
    follow = [Next("reattach-redis", "attach what is still detached")]
    for problem in problems:
        report.warn("not reattached", problem, follow=follow if "reattach-redis" in problem else ())


def undo(swapped: SwappedRedis) -> str:
    """The run that restores the old data."""
    if swapped.kept is None:
        return "nothing to undo: there was no data before"
    return f"undo-restore-redis with kept={swapped.kept.name}"
