"""The common steps of restores of Redis: check, build, detach, reattach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import keep_live
from flows.store import mark_failed
from runbook.change import Change, State
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.backups.catalogue import Backup, instead_of
from tasks.redis.content.manifest import COLUMNS
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.final_save import has_lost_directory, judge_final_save
from tasks.redis.restore.fitness import RedisFitness, judge_redis_backup
from tasks.redis.restore.place import Precondition, judge_stop
from tasks.redis.restore.swap import SwappedRedis
from tasks.redis.topology.isolation import attach, detach, wait_for_followers
from tasks.redis.topology.refusing_servers import find_refusing_servers
from tasks.redis.topology.topology import ReplicationTopology

# Loading, reading and comparing on the scratch server: 100,000 keys in 3 s on two busy processors.
KEYS_PER_SECOND = 30_000
UNTOUCHED = State("the live data was not touched", "fix the findings above, then run it again")
DETACHED = State("some replicas or Sentinels are detached", "run reattach-redis when they answer")


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
    judge_preconditions(report, fitness.preconditions)
    judge_stoppable(report, env, is_up=fitness.live_keys is not None)
    return fitness


def judge_stoppable(report: Report, env: Environment, *, is_up: bool) -> None:
    """The service's stop ends the server, and loses nothing that the undo needs."""
    saved = judge_final_save(env.redis) if is_up else ()
    judge_preconditions(report, (*judge_stop(env.redis, env.services), *saved))


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


def living_master(env: Environment, around: ReplicationTopology) -> Redis | None:
    """The server whose data an undo would lack, so that it must be kept first: another one that is now the master and
    becomes a replica, or this one, if its directory was deleted. A killed run did that before it detached anything."""
    if around.since:
        return None
    if around.master != around.own and around.master in around.reachable:
        return env.redis.at(around.master)
    return env.redis if has_lost_directory(env.redis) else None


def keeping(report: Report, env: Environment, server: Redis) -> Change[[], str]:
    """The backup of a server whose data is in no directory that is kept; returns its name."""
    return Change(
        lambda: keep_live(report, env, server).name,
        "keep",
        f"the data of {server.address} as a backup: it is in no directory that is kept",
        begun=UNTOUCHED,
    )


def building(env: Environment, backup: Backup, fitness: RedisFitness) -> Change[[], RedisCopy]:
    """The staged copy of a backup. `report_redis_proof` judges its proof."""
    redis, keys = env.redis, int(backup.manifest.content.get("rdb_keys", 0))
    drop = ", ".join(redis.drop_prefixes) or "nothing"
    proof = f"every key against the manifest, on a scratch server; then leave out {drop}"
    return Change(
        build_redis_copy.bind(redis, backup),
        "build",
        f"{backup.name}, staged next to {redis.data_directory}",
        size=fitness.copy_bytes,
        seconds=max(1.0, fitness.load_seconds + keys / KEYS_PER_SECOND),
        more=[PlannedStep("prove", proof)],
        begun=UNTOUCHED,
    )


def plan_detaching(report: Report, env: Environment, around: ReplicationTopology) -> None:
    """Plan to detach the other servers and the Sentinels until the new data is proven, and check the rights for it."""
    judge_detaching(report, env, around)
    for number, step in enumerate(detach_steps(env, around)):
        report.plan_steps.append(replace(step, by=(detach.name,), shared=number > 0))


def judge_detaching(report: Report, env: Environment, around: ReplicationTopology) -> None:
    """This user may detach the other servers and the Sentinels, and attach them again."""
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
    if scripts := sorted({script for watcher in around.watchers for script in watcher.scripts.values()}):
        hint = "keep their configuration files: with deny-scripts-reconfig only the file can set a script"
        report.warn("scripts of the Sentinels", hint, value=", ".join(scripts))


def detach_steps(env: Environment, around: ReplicationTopology) -> list[PlannedStep]:
    """The lines of a plan that detach the Sentinels and the other servers; one call carries them out."""
    steps = []
    if around.watchers:
        names = ", ".join(watcher.address for watcher in around.watchers)
        user = env.redis.username or "the default user"
        login = f"they forget {env.redis.sentinel_master}, and log in to it as {user} when they are reattached"
        steps.append(PlannedStep("detach", f"Sentinels {names}: {login}", seconds=0.1))
    for address in around.reachable:
        role = "the current master; it becomes a replica of the new data" if address == around.master else "a replica"
        detail = f"{address}, {role}: it refuses writes, and follows {around.own} at the end"
        steps.append(PlannedStep("detach", detail, seconds=1))
    if around.others and not steps:
        names = ", ".join(around.others)
        steps.append(PlannedStep("detach", f"{names}, which do not answer: they are recorded for reattach-redis"))
    return steps


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


def attach_step(around: ReplicationTopology) -> PlannedStep:
    """The line of a plan that attaches what `detach_steps` detach."""
    addresses = [*(watcher.address for watcher in around.watchers), *around.reachable]
    names = ", ".join(addresses or around.others)
    return PlannedStep("reattach", f"{names}: they watch or follow {around.own} again", seconds=1)


def attach_all(report: Report, env: Environment, taken: ReplicationTopology) -> tuple[str, ...]:
    """Reattach Sentinels and replicas. The master is this server, or the earlier one if nothing was swapped. Returns
    sentences about those that could not be reattached.

    Raises:
        Unreachable: the Sentinels do not agree on the master; the record of detached servers stays.
    """
    # Over the network it can be any server of the data set; otherwise it is the one whose files are on this host.
    own = env.redis.at(taken.own) if env.redis.remote else env.redis
    attached = attach.bind(own, taken, env.reports_directory)()
    problems = wait_for_followers.bind(own, attached, env.reports_directory)()
    report_not_attached(report, problems)
    names = [*taken.reachable, *(watcher.address for watcher in taken.watchers)]
    report.fact("replicas and Sentinels reattached", ", ".join(names))
    return problems


def put_back(report: Report, env: Environment, taken: ReplicationTopology) -> None:
    """Reattach what a run that fails has detached. Raises as `attach_all`."""
    if taken.is_alone:
        return
    before = report.state
    report.state_is(DETACHED.what, DETACHED.hint)
    attach_all(report, env, taken)
    report.state = before


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
