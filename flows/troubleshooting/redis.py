"""Why Redis cannot be reached or does not answer as it should (appendix A)."""

from __future__ import annotations

import re
from dataclasses import replace

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.client_findings import judge_places
from flows.redis.master import judge_master
from flows.troubleshooting.diagnosis import (
    Cause,
    Diagnosis,
    Impact,
    attach_service,
    read_state,
    start_hint,
    status_of,
    stopped_process,
)
from flows.troubleshooting.restarts import WINDOW_MINUTES, Window, judge_restart, long_log, previous_end
from runbook import metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.host.restarts import LastEnd, redis_end
from tasks.redis.clients import read_clients
from tasks.redis.greeting import RedisGreeting, is_master, read_answer, read_uptime
from tasks.redis.memory.info import Memory, read_memory
from tasks.redis.persistence.state import read_persistence
from tasks.redis.sentinels import Watch, read_sentinels


@flow(name="diagnose-redis", flow_run_name=RunName("diagnose-redis {environment}"))
def diagnose_redis(environment: str, window_minutes: Window = WINDOW_MINUTES) -> Report:
    """Redis接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first:

    - Do host, port and process answer?
    - Does Redis accept the password and another client (maxclients)? Is it loading its data?
    - Does it accept writes (memory full with noeviction, a failed save, a replica)?
    - How much memory and how many connections are left? Do the replicas answer?
    - Have the servers been running for longer than `window_minutes`, or did one restart after it was killed?

    Run it first when the application reports Redis errors. It also works while Redis is down. It changes nothing: its
    trial write (SET … XX on a key that does not exist) stores nothing.

    Evidence: every answer, the last 100 lines of the log, and the names of the service's variables; secrets are
    masked. Each cause links the runbooks that help, with their forms filled in.

    Departs from the manual: never FLUSHDB, which deletes sessions and queues with the cache: use clear-cache by
    prefix. The number of lines in CLIENT LIST is not the number that maxclients counts.

    Args:
        environment: Environment (lab, staging, production …)
        window_minutes: Unplanned restarts within this many minutes are possible causes
    """
    env = Environment.find(environment)
    with runbook("Diagnose Redis", env) as report:
        found = Diagnosis(report, env)
        walk(found, window_minutes)
        found.close("Redis answers, accepts writes, and has free memory")
    return report


ROLE, REMEDY_HOURS, MANUAL_BYTES = "redis", 24, 2 * 1024**3
NO_MEMORY, NO_SAVE, REPLICAS, NO_REPLICAS, SPLIT = "memory", "save", "replicas", "too few replicas", "two masters"
MEMORY = Next("check-redis-memory", "see what uses the memory")
PERSISTENCE = Next("check-redis-persistence", "see why the save fails")
PERSISTENCE_LOSS = Next("check-redis-persistence", "see how many writes a kill loses")
FAILOVER = Next("redis-failover", "promote a replica")
RESTORE = Next("show-recovery-options", "compare the recovery options and their data loss")
CLIENTS = (
    Next("close-idle-redis-clients", "close idle connections", {"min_seconds": 300}),
    Next("check-redis-clients", "see which clients use the connections"),
)


def walk(found: Diagnosis, minutes: int) -> None:
    """Ask every question, beginning with what the others depend on."""
    log = attach_service(found, ROLE)
    question = "which server is the master?"
    try:
        watch = read_sentinels(found.env.redis)
        block = judge_master(found.report, found.env.redis, watch, changes=False)
    except OpsError as error:
        found.record(question, error.message, Cause(error.message, error.hint, (FAILOVER,), impact=Impact.HIDES))
        return
    source = "according to the Sentinels" if found.env.redis.sentinels else "as configured"
    found.note(question, f"{block.address}, {source}")
    found.report.fact("server", block.address)
    replicas = _judge_replicas(found, block, watch)
    if _judge_answer(found, block, read_answer(block), log):
        _judge_writing(found, block)
        _judge_memory(found, block)
        _judge_connections(found, block)
        _judge_saving(found, block)
        _judge_restart(found, block, minutes, is_replica=False)
    for server in replicas:
        _judge_restart(found, server, minutes, is_replica=True)


def _judge_replicas(found: Diagnosis, block: Redis, watch: Watch) -> list[Redis]:
    """The replicas that answer. One that is dead leaves no server to promote, and can be why writes are refused."""
    known = {one.address for view in watch.answering for one in view.followers} | {*found.env.redis.replicas}
    if found.env.redis.address != block.address:
        known.add(found.env.redis.address)  # the former master
    answering = list[Redis]()
    for server in (found.env.redis.at(address) for address in sorted(known - {block.address})):
        answer, cause = read_answer(server), None
        if answer.state not in ("closed", "unreachable", "unknown name", "hangs"):
            answering.append(server)
            cause = _second_master(found, block, server) if answer.state == "well" else None
        else:
            role = ROLE if server.address == found.env.redis.address else ""
            hint = start_hint(found, role) if role and answer.state == "closed" else f"start it ({server.address})"
            cause = Cause(
                f"the replica at {server.address} does not answer ({answer.state}: {answer.said})",
                f"{hint}; until then it cannot be promoted, and it has no copy of new writes",
                (RESTORE,),
                Status.WARN,
                REPLICAS,
                Impact.THREATENS,
                explains=(NO_REPLICAS,),
            )
        found.record(f"does the replica at {server.address} answer?", answer.said, cause)
    return answering


def _second_master(found: Diagnosis, block: Redis, server: Redis) -> Cause | None:
    """Whether a server that must be a replica takes writes too: those are on no other server."""
    question = f"does {server.address} follow a master?"
    if not found.ask(question, lambda: is_master(server)):
        return None
    login = f"redis-cli -h {server.host} -p {server.port}"
    return Cause(
        f"Redis at {server.address} takes writes, but it must be a replica of {block.address}",
        f"find out which one the application writes to. Save the other's data ({login} --rdb {server.port}.rdb), then "
        f"make it a replica ({login} REPLICAOF {block.host} {block.port}): its own writes are lost then",
        (Next("check-redis-clients", "see the clients of the master"), RESTORE),
        kind=SPLIT,
        explains=(NO_REPLICAS,),
    )


def _judge_restart(found: Diagnosis, block: Redis, minutes: int, *, is_replica: bool) -> None:
    """A server that was killed is up again in a second: only its uptime shows why clients had errors."""
    name = f"Redis at {block.address}"
    uptime = found.ask(f"since when has {name} been running?", lambda: read_uptime(block))
    if not uptime:
        return
    end = LastEnd("unknown")
    if block.address == found.env.redis.address:
        end = previous_end(found, ROLE, redis_end(long_log(found, ROLE)))
    elif is_replica:  # the environment names no log of another server
        found.note(f"since when has {name} been running?", duration(uptime.seconds))
        return
    kept = f"it loaded {uptime.loaded_keys:,} keys" if uptime.loaded_keys > 0 else "it loaded no key"
    consequence = f"Clients lost their connections; {kept}" if uptime.loaded_keys >= 0 else ""
    follow = (PERSISTENCE_LOSS, *((RESTORE,) if not uptime.loaded_keys else ()))
    judge_restart(found, name, uptime.seconds, end, minutes=minutes, consequence=consequence, follow=follow)


def _judge_answer(found: Diagnosis, block: Redis, answer: RedisGreeting, log: str) -> bool:
    question = f"does {block.address} answer?"
    if answer.state in ("well", "cannot save"):
        found.record(question, answer.said)
        return True
    meaning = answer.meaning or OpsError(f"Redis at {block.address} does not answer", "start it, or check its log")
    cause = Cause(meaning.message, meaning.hint)
    options = _options(found)
    match answer.state:
        case "closed":
            cause = _down(found, block, log, options)
        case "unreachable":
            what = f"the host of Redis cannot be reached: {block.address} ({answer.said})"
            cause = Cause(what, "check that the host is up, then the network and the firewall", options)
        case "unknown name":
            what = f"this host cannot resolve the name of Redis's host: {block.host}"
            cause = Cause(what, "correct [redis] host, or fix name resolution (DNS)")
        case "hangs":
            what = f"Redis at {block.address} hangs: it accepts connections and does not answer"
            seen, hint = stopped_process(found, ROLE) if block.address == found.env.redis.address else ("", "")
            what += f"; {seen}" if seen else ""
            cause = Cause(what, hint or "check its host and its log for a slow command or a stopped process", options)
        case "full":
            what = f"Redis at {block.address} has reached maxclients: it refuses new connections"
            hint = (
                "stop one of the application's workers to free a connection; then close idle ones, or raise maxclients"
            )
            cause = Cause(what, hint, CLIENTS)
        case "loading":
            again = Next("diagnose-redis", "check again in a minute")
            cause = Cause(f"{meaning.message} {_loading(found, block, log)}", meaning.hint, (again,))
    found.record(question, answer.said, replace(cause, impact=Impact.HIDES))
    return False


def _options(found: Diagnosis) -> tuple[Next, ...]:
    """The recoveries of a server that does not answer. A replica that does not answer either cannot be promoted."""
    has_replicas = found.env.redis.sentinels or found.env.redis.replicas
    is_dead = any(one.kind in (REPLICAS, SPLIT) for one in found.causes)
    return (FAILOVER, RESTORE) if has_replicas and not is_dead else (RESTORE,)


def _loading(found: Diagnosis, block: Redis, log: str) -> str:
    """Since when it has been running, how long it needs yet, and why it restarted."""
    uptime = found.ask("since when has it been loading?", lambda: read_uptime(block))
    if not uptime:
        return "(it answers when this is done)"
    needs = f", about {duration(uptime.loading_seconds)} to go" if uptime.loading_seconds else ""
    end = previous_end(found, ROLE, redis_end(log)) if block.address == found.env.redis.address else LastEnd("unknown")
    why = f"; the process before it ended without a shutdown ({end.line})" if end.how == "unexpected" else ""
    return f"(it answers when this is done{needs}; running for {duration(uptime.seconds)}{why})"


def _down(found: Diagnosis, block: Redis, log: str, options: tuple[Next, ...]) -> Cause:
    state, described = read_state(found, ROLE)
    last = next((line.strip() for line in reversed(log.splitlines()) if _END.search(line)), "")
    since = f"; its log reports: {last[:200]}" if last else ""
    if state and state.pid:
        what = f"nobody listens on {block.address}, but the server's process runs ({described}){since}"
        return Cause(what, "compare port and bind with [redis]; the server may still be starting", options)
    dead = f"the server's process is dead ({described})" if state else f"nobody listens there ({described})"
    what = f"Redis at {block.address} is down: {dead}{since}"
    hint = start_hint(found, ROLE) if block.address == found.env.redis.address else "start it"
    return Cause(what, f"{hint}; if it stops again, its log shows why", options)


# Lines about the server's own end. Other warnings are from its start, which succeeded.
_END = re.compile(
    r"FATAL CONFIG|Fatal error|Bad file format|Can't (?:open|rename|chdir|handle)|[Cc]ould not|Failed "
    r"|Address already in|No space left|Permission denied|Out Of Memory|crashed by signal|requested shutdown"
    r"|Received SIG|^'"
)


def _judge_writing(found: Diagnosis, block: Redis) -> None:
    question = "does it accept writes?"
    answer = read_answer(block, writes=True)
    match answer.state:
        case "well":
            found.record(question, answer.said)
            return
        case "forbidden":
            hint = "allow the environment's user SET on ops:diagnose:*, or try a write by hand"
            found.skip(question, answer.said, hint)
            return
        case "no memory":
            cause = _no_memory(found, block)
        case "cannot save":
            cause = Cause(
                f"Redis at {block.address} refuses writes, since its last save failed (MISCONF)",
                "fix the cause of the failed save (disk, permissions); writes resume after a successful save",
                (
                    PERSISTENCE,
                    Next("free-disk-emergency", "free disk space, if the disk is full"),
                    Next("snapshot-redis", "save again afterwards"),
                ),
                kind=NO_SAVE,
            )
        case "replica":
            what = f"Redis at {block.address} is a replica: it rejects writes"
            hint = "set [redis] to the master or to its Sentinels; promote this one only if the master is lost"
            cause = Cause(what, hint, (Next("check-redis-clients", "see its role"), FAILOVER))
        case "no replicas":
            meaning = answer.meaning or OpsError("too few replicas are in sync")
            cause = Cause(meaning.message, meaning.hint, (Next("check-redis-clients"),), kind=NO_REPLICAS)
        case _:
            meaning = answer.meaning or OpsError(f"Redis refuses a write: {answer.said}")
            cause = Cause(meaning.message, meaning.hint)
    found.record(question, answer.said, cause)


def _no_memory(found: Diagnosis, block: Redis) -> Cause:
    memory = found.ask("how much memory may it use?", lambda: read_memory(block))
    used = f" ({size(memory.used)} of {size(memory.limit)}, {memory.policy})" if memory else ""
    return Cause(
        f"the memory of Redis is full and its policy evicts nothing: writes are refused{used}",
        "clear caches by prefix, or raise maxmemory for a time if the host has the memory; never FLUSHDB",
        (_clear(block), MEMORY, *_more_memory(memory)),
        kind=NO_MEMORY,
    )


def _clear(block: Redis) -> Next:
    prefixes = {"prefixes": block.drop_prefixes} if block.drop_prefixes else {}
    return Next("clear-cache", "free memory by prefix: caches only, never sessions and queues", prefixes)


def _more_memory(memory: Memory | None) -> tuple[Next, ...]:
    """The manual's `maxmemory 2gb`, or half as much again where the limit is that high already; and its undo."""
    wanted = MANUAL_BYTES if not memory or memory.limit < MANUAL_BYTES else memory.limit * 3 // 2
    text = "2gb" if wanted == MANUAL_BYTES else str(wanted)
    parameters = {
        "override": f"maxmemory {text}",
        "override_hours": REMEDY_HOURS,
        "reason": "memory full (diagnose-redis)",
    }
    host = f"; the host has {size(memory.host)}" if memory else ""
    reminder = f"expires after {REMEDY_HOURS} h: undo it then, when the data fits again{host}"
    return (
        Next("apply-redis-settings", "temporary remedy: raise maxmemory (appendix A)", parameters, reminder),
        Next("undo-redis-settings", "afterwards: restore the old limit"),
    )


def _judge_memory(found: Diagnosis, block: Redis) -> None:
    question = "is memory left?"
    memory = found.ask(question, lambda: read_memory(block))
    if not memory:
        return
    if not memory.limit:
        found.note(question, f"{size(memory.used)} used, no maxmemory: the host has {size(memory.host)}")
        return
    ratio = memory.used / memory.limit
    used = f"{size(memory.used)} of {size(memory.limit)} ({ratio:.0%}), {memory.policy}"
    found.report.fact("memory", used)
    if ratio < found.report.limit(metrics.REDIS_MEMORY)[1]:
        found.record(question, used)
    elif memory.policy == "noeviction" and not any(one.kind == NO_MEMORY for one in found.causes):
        what = f"the memory of Redis is nearly full, and it evicts nothing: {used}"
        follow = (_clear(block), MEMORY, *_more_memory(memory))
        found.record(question, used, _near(what, "free memory before Redis refuses writes", follow))
    else:
        found.note(question, f"{used}, {memory.evicted:,} keys evicted")


def _near(what: str, hint: str, follow: tuple[Next, ...], status: Status = Status.WARN) -> Cause:
    return Cause(what, hint, follow, status, impact=Impact.THREATENS)


def _judge_connections(found: Diagnosis, block: Redis) -> None:
    question = "are connections left?"
    clients = found.ask(question, lambda: read_clients(block))
    if not clients:
        return
    used = f"{clients.connected + clients.replicas:,} of {clients.most:,}, {clients.rejected:,} rejected"
    status = status_of(found.report, lambda: judge_places(found.report, clients), metrics.CLIENTS)
    cause = None
    if status is not Status.OK:
        hint = "close idle connections, lower the pools, or raise maxclients"
        cause = _near(f"Redis is near its maxclients: {used}", hint, CLIENTS, status)
    found.record(question, used, cause)


def _judge_saving(found: Diagnosis, block: Redis) -> None:
    question = "do its saves succeed?"
    state = found.ask(question, lambda: read_persistence(block))
    if not state:
        return
    refuses = state.refuses_writes
    failed = refuses or ("" if state.state.save_ok else "its last save failed")
    if not failed:
        found.record(question, f"{len(state.rules)} rules, AOF {'on' if state.appendonly else 'off'}")
    elif not any(one.kind == NO_SAVE for one in found.causes):
        status = Status.CRITICAL if refuses else Status.WARN
        hint = "fix the cause of the failed save: the disk, or the permissions of its directory"
        impact = Impact.HURTS if refuses else Impact.THREATENS
        what = f"Redis at {block.address}: {failed}"
        found.record(question, failed, Cause(what, hint, (PERSISTENCE,), status, NO_SAVE, impact))
    else:
        found.note(question, failed)
