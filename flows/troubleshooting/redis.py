"""Why Redis cannot be reached or does not answer as it should (appendix A)."""

from __future__ import annotations

import re

from prefect import flow

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.client_findings import judge_places
from flows.redis.master import judge_master
from flows.troubleshooting.diagnosis import Cause, Diagnosis, read_state, tell_service, worst_of
from runbook import metrics
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import size
from tasks.redis.clients import read_clients
from tasks.redis.greeting import Answer, read_answer
from tasks.redis.memory.info import Memory, read_memory
from tasks.redis.persistence.state import read_persistence
from tasks.redis.sentinels import read_sentinels


@flow(name="diagnose-redis", flow_run_name="diagnose-redis {environment}")
def diagnose_redis(environment: str) -> Report:
    """Redis接続エラーのトラブルシューティング (付録A)

    Walks the decision tree and names the likely cause first: whether the host and the port can be reached and the
    process lives, whether it takes the password and another client (maxclients), whether it is loading, whether it
    takes writes (memory full with noeviction, a save that failed, a replica), and how full memory and places are. Run
    it first when the application reports errors of Redis.

    It changes nothing: the write that it tries (SET … XX of a key that is not there) does nothing where it is taken.
    It works with Redis down. Evidence: the answers in their order, the last 100 lines of the log and the environment by
    names, masked. It ends with links to the runbooks that help, filled in, and what must be undone later.

    Departs from the manual: never FLUSHDB, which wipes sessions and queues with the cache: clear-cache by prefix. Lines
    of CLIENT LIST are not the number that counts.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Diagnose Redis", env) as report:
        found = Diagnosis(report, env)
        walk(found)
        found.close("Redis answers, takes writes, and has room")
    return report


ROLE, REMEDY_HOURS, MANUAL_BYTES = "redis", 24, 2 * 1024**3
FULL_RATIO, NEAR_RATIO = 0.99, 0.9  # the manual's alarm is 90 % (appendix B)
MEMORY = Next("check-redis-memory", "see what takes the memory")
PERSISTENCE = Next("check-redis-persistence", "see why it cannot save")
FAILOVER = Next("redis-failover", "promote a replica")
RESTORE = Next("show-recovery-options", "every way to bring the data back, with what each loses")


def walk(found: Diagnosis) -> None:
    """From what everything else depends on."""
    log = tell_service(found, ROLE)
    question = "which server is the master?"
    try:
        block = judge_master(found.report, found.env.redis, read_sentinels(found.env.redis), changes=False)
    except OpsError as error:
        found.blame(question, error.message, Cause(error.message, error.hint, (FAILOVER,)))
        return
    found.told(
        question, f"{block.address}" + (", by the Sentinels" if found.env.redis.sentinels else ", as configured")
    )
    found.report.fact("server", block.address)
    answer = read_answer(block)
    if not _judge_answer(found, block, answer, log):
        return
    _judge_writing(found, block)
    _judge_memory(found, block)
    _judge_places(found, block)
    _judge_saving(found, block)


def _judge_answer(found: Diagnosis, block: Redis, answer: Answer, log: str) -> bool:
    question = f"does {block.address} answer?"
    if answer.state in ("well", "cannot save"):
        found.well(question, answer.said)
        return True
    meaning = answer.meaning or OpsError(f"Redis at {block.address} does not answer", "start it, or look at its log")
    cause = Cause(meaning.message, meaning.hint)
    ways = (FAILOVER, RESTORE) if found.env.redis.sentinels or found.env.redis.replicas else (RESTORE,)
    match answer.state:
        case "closed":
            cause = _down(found, block, log, ways)
        case "unreachable":
            cause = Cause(
                f"the host of Redis cannot be reached: {block.address} ({answer.said})",
                "look whether the host runs, and at network and firewall between",
                ways,
            )
        case "unknown name":
            cause = Cause(
                f"the name of Redis's host is not known here: {block.host}", "correct [redis] host, or the name server"
            )
        case "hangs":
            cause = Cause(
                f"Redis at {block.address} hangs: it takes connections and does not answer",
                "a slow command or a stopped process: look at its host, and at its log",
                ways,
            )
        case "full":
            cause = _full(block)
        case "loading":
            again = Next("diagnose-redis", "look again in a minute")
            cause = Cause(f"{meaning.message} (it answers when it is done)", meaning.hint, (again,))
    found.blame(question, answer.said, cause)
    return False


def _full(block: Redis) -> Cause:
    return Cause(
        f"Redis at {block.address} has reached maxclients: it takes no more connections",
        "stop one of the application's workers so that a place is free; then close what is idle, or raise maxclients",
        (
            Next("close-idle-redis-clients", "close what is idle", {"min_seconds": 300}),
            Next("check-redis-clients", "see who has the places"),
        ),
    )


def _down(found: Diagnosis, block: Redis, log: str, ways: tuple[Next, ...]) -> Cause:
    state, told = read_state(found, ROLE)
    last = next((line.strip() for line in reversed(log.splitlines()) if _TELLING.search(line)), "")
    since = f"; its log says: {last[:200]}" if last else ""
    if state and state.pid:
        return Cause(
            f"nobody listens on {block.address}, and yet the server's process runs ({told}){since}",
            "compare port and bind with [redis]; it may be starting",
            ways,
        )
    dead = f"the server's process is dead ({told})" if state else f"nobody listens there ({told})"
    return Cause(
        f"Redis at {block.address} is down: {dead}{since}", "start it; where it ends again its log says why", ways
    )


# What a server says of its own end; other warnings are of its start, and it lived with them.
_TELLING = re.compile(
    r"FATAL CONFIG|Fatal error|Bad file format|Can't (?:open|rename|chdir|handle)|[Cc]ould not|Failed "
    r"|Address already in|No space left|Permission denied|Out Of Memory|crashed by signal|requested shutdown"
    r"|Received SIG|^'"
)


def _judge_writing(found: Diagnosis, block: Redis) -> None:
    question = "does it take writes?"
    answer = read_answer(block, writes=True)
    said = answer.said
    match answer.state:
        case "well":
            found.well(question, said)
        case "no memory":
            found.blame(question, said, _no_memory(found, block))
        case "cannot save":
            found.blame(
                question,
                said,
                Cause(
                    f"Redis at {block.address} refuses writes, since its last save failed (MISCONF)",
                    "mend what the save failed of (disk, rights), then a save that ends well lets it write again",
                    (
                        PERSISTENCE,
                        Next("snapshot-redis", "save again, once that is mended"),
                        Next("free-disk-emergency", "make room, where the disk is full"),
                    ),
                ),
            )
        case "replica":
            found.blame(
                question,
                said,
                Cause(
                    f"Redis at {block.address} is a replica: it takes no writes",
                    "name the master in [redis], or its Sentinels; promote it only where the master is lost",
                    (FAILOVER, Next("check-redis-clients", "see its role")),
                ),
            )
        case "forbidden":
            found.skip(question, said, "allow the environment's user SET on ops:diagnose:*, or write by hand")
        case _:
            meaning = answer.meaning or OpsError(f"Redis refuses a write: {said}")
            found.blame(question, said, Cause(meaning.message, meaning.hint))


def _no_memory(found: Diagnosis, block: Redis) -> Cause:
    memory = found.ask("how much memory is it allowed?", lambda: read_memory(block))
    told = f" ({size(memory.used)} of {size(memory.limit)}, {memory.policy})" if memory else ""
    return Cause(
        f"the memory of Redis is full and its policy evicts nothing: writes are refused{told}",
        "clear caches by prefix, or raise maxmemory for a time where the host has it; never FLUSHDB",
        (_clear(block), MEMORY, *_more_memory(memory)),
    )


def _clear(block: Redis) -> Next:
    prefixes = {"prefixes": block.drop_prefixes} if block.drop_prefixes else {}
    return Next("clear-cache", "make room by prefix: caches only, never sessions and queues", prefixes)


def _more_memory(memory: Memory | None) -> tuple[Next, ...]:
    """The manual's `maxmemory 2gb`, or more where it has that already; with what must be undone."""
    wanted = MANUAL_BYTES if not memory or memory.limit < MANUAL_BYTES else memory.limit * 3 // 2
    text = "2gb" if wanted == MANUAL_BYTES else str(wanted)
    parameters = {
        "override": f"maxmemory {text}",
        "override_hours": REMEDY_HOURS,
        "reason": "memory full (diagnose-redis)",
    }
    host = f"; the host has {size(memory.host)}" if memory else ""
    reminder = f"it ends after {REMEDY_HOURS} h: undo it then, when the data fits again{host}"
    return (
        Next("apply-redis-settings", "temporary remedy: more memory (付録A)", parameters, reminder),
        Next("undo-redis-settings", "afterwards: put the old limit back"),
    )


def _judge_memory(found: Diagnosis, block: Redis) -> None:
    question = "is there memory left?"
    memory = found.ask(question, lambda: read_memory(block))
    if not memory:
        return
    if not memory.limit:
        found.told(
            question, f"{size(memory.used)} used, and no maxmemory: the host's {size(memory.host)} are the limit"
        )
        return
    ratio = memory.used / memory.limit
    told = f"{size(memory.used)} of {size(memory.limit)} ({ratio:.0%}), {memory.policy}"
    found.report.fact("memory", told)
    if ratio < NEAR_RATIO:
        found.well(question, told)
    elif memory.policy == "noeviction" and not any("memory" in one.what for one in found.causes):
        what = f"the memory of Redis is nearly full, and it evicts nothing: {told}"
        follow = (_clear(block), MEMORY, *_more_memory(memory))
        found.blame(question, told, Cause(what, "make room before writes are refused", follow, Status.WARN))
    else:
        found.told(question, f"{told}, {memory.evicted:,} keys evicted")


def _judge_places(found: Diagnosis, block: Redis) -> None:
    question = "are there places left?"
    clients = found.ask(question, lambda: read_clients(block))
    if not clients:
        return
    told = f"{clients.connected + clients.replicas:,} of {clients.most:,}, {clients.rejected:,} were turned away"
    metric = metrics.CLIENTS.name
    status = worst_of(found.report, lambda: judge_places(found.report, clients), metric)
    if status is Status.OK:
        found.well(question, told)
    else:
        found.blame(
            question,
            told,
            Cause(
                f"Redis is near its maxclients: {told}",
                "close what is idle, lower the pools, or raise maxclients",
                _full(block).follow,
                status,
            ),
        )


def _judge_saving(found: Diagnosis, block: Redis) -> None:
    question = "does it save?"
    state = found.ask(question, lambda: read_persistence(block))
    if not state:
        return
    refuses = state.refuses_writes
    failed = refuses or ("" if state.state.save_ok else "its last save failed")
    if not failed:
        found.well(question, f"{len(state.rules)} rules, AOF {'on' if state.appendonly else 'off'}")
    elif not any("save failed" in one.what for one in found.causes):
        status = Status.CRITICAL if refuses else Status.WARN
        what = f"Redis at {block.address}: {failed}"
        found.blame(question, failed, Cause(what, "check-redis-persistence says why", (PERSISTENCE,), status))
    else:
        found.told(question, failed)
