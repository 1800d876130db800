"""Delete cached keys of Redis (§2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows import store as stores
from flows.pinned import pin_keys, pin_redis
from flows.redis.master import judge_master
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError, Unreachable
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, duration, size
from tasks.backups.retention import read_store
from tasks.redis.cache.clearing import ClearingOrder, find_keys, read_freed, unlink_keys
from tasks.redis.cache.flushing import Flush, flush_keys
from tasks.redis.cache.selection import KeySelection, by_prefixes, every_key
from tasks.redis.cache.server import CacheServer, find_refusals, read_cache_server, require_databases
from tasks.redis.cache.sweep import MOST_STEP, Sweep
from tasks.redis.content.reading import shown
from tasks.redis.keys import bytes_of
from tasks.redis.sentinels import read_sentinels

# Measured on a server with one of two busy processors.
UNLINKED_PER_SECOND = 300_000
PLAN_AGAIN = "plan again with an empty confirm, and check the new plan"
RUN_AGAIN = "run it again: it deletes the remaining keys"
BACKUP = Next("backup-redis", "back up Redis")


@flow(name="clear-cache", flow_run_name=RunName("clear-cache {environment} {prefixes}"))
def clear_cache(
    environment: str,
    prefixes: tuple[str, ...] = (),
    databases: tuple[Annotated[int, Field(ge=0)], ...] = (0,),
    only_without_ttl: bool = False,
    flush: bool = False,
    master: str = "",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """キャッシュクリア手順 (§2.2)

    Deletes the keys that begin with some prefixes, or every key of some databases (`flush`). Run it when a cache
    returns stale values or uses too much memory. With an empty confirm it counts keys and bytes by prefix, lists the
    first 20 keys and changes nothing. Above 20,000 keys, bytes are extrapolated from a sample.

    What it changes: the keys are deleted, also on the replicas; large values are freed in the background. Keys under
    protected_prefixes are kept and counted, unless `prefixes` names them. A flush is refused while such keys exist. A
    flush, only_without_ttl and protected keys need the plan's form: the plan pins the number of keys. If that number
    differs by more than 10 %, nothing is deleted; a clearing also stops there.

    It starts only if a majority of the Sentinels names the server. It stops if the server is restarted, demoted or
    replaced. If the run is killed, run it again: it deletes the remaining keys. Its reads count in the server's
    statistics (keyspace_hits). The user needs +eval and +evalsha.

    Undo: none; the application creates a cache again. If keys without a TTL can be deleted, the report names the newest
    backup. Evidence: keys and bytes by prefix, memory before and after, and keys that were added meanwhile.

    Departs from the manual: literal prefixes instead of globs, one call a page instead of one process a key, UNLINK
    instead of DEL, FLUSHDB ASYNC of named databases instead of FLUSHALL. TTL -1 means that a key never expires: the
    manual's “expired keys” are keys that were meant to stay. They are deleted only under named prefixes, and checked in
    the call that unlinks them.

    Args:
        environment: Environment (lab, staging, production …)
        prefixes: Prefixes of the keys to delete (literally; bytes as \\xNN; e.g. cache:). Either this or flush is
            required
        databases: Database numbers
        only_without_ttl: Delete only keys without a TTL
        flush: Instead of prefixes: delete all keys of the databases (FLUSHDB ASYNC). Refused while protected keys are
            left
        master: Only if no quorum of Sentinels names the master: host:port of the server that you verified as master.
            Usually empty
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Required for flush, only_without_ttl
            and protected keys
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Clear cache", env, confirm, plan, changes=True) as report:
        wanted = Wanted(tuple(env.redis.protected_prefixes), prefixes, databases, only_without_ttl, flush)
        wanted.require_sense()
        server = find_server(report, env, master)
        require_databases(env.redis.at(server.address), wanted.databases)
        judge_plan(report, wanted, plan)
        # Without a plan to compare with, the pages count what they unlink.
        found = count(report, env, wanted, server) if plan or not confirm else None
        order = ClearingOrder(wanted.selection(), wanted.numbers, server, found.keys if found else -1, bool(master))
        flushes = wanted.flushes(server, waived=bool(master))
        if not (flushes if flush else order.planned):
            report.outcome = f"there is nothing to delete: no {order.selection.text} in {order.where}"
            return report
        if found:
            judge_rights(report, env, order, found, flushes)
        describe_undo(report, env, wanted, server)
        if flush:
            flush_databases(report, env, order, flushes)
        else:
            unlink(report, env, order, wanted, found)
    return report


@dataclass(frozen=True)
class Wanted:
    """A run's parameters. `protected`: the environment's protected prefixes."""

    protected: tuple[str, ...]
    prefixes: tuple[str, ...]
    databases: tuple[int, ...]
    only_without_ttl: bool
    flush: bool

    def require_sense(self) -> None:
        """Raises OpsError if the parameters contradict each other, or if one is missing."""
        refusals = {
            "name prefixes or choose flush, one of them": bool(self.prefixes) == self.flush,
            "an empty prefix means every key: choose flush": "" in self.prefixes,
            "only_without_ttl needs prefixes: it deletes keys that were meant to stay": (
                self.only_without_ttl and self.flush
            ),
            "name the databases": not self.databases,
        }
        for reason, holds in refusals.items():
            if holds:
                raise OpsError(reason, "correct the parameters; nothing was read or changed")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The databases, each once."""
        return tuple(sorted(set(self.databases)))

    @property
    def is_broad(self) -> bool:
        """Whether it can delete more than a cache: then the plan must be confirmed, not only the environment."""
        heads = [bytes_of(prefix) for prefix in self.prefixes]
        named = any(head.startswith(bytes_of(name)) for head in heads for name in self.protected)
        return self.flush or self.only_without_ttl or named

    def selection(self) -> KeySelection:
        """The keys to delete; of a flush all but the protected ones, which are counted."""
        protected = [bytes_of(name) for name in self.protected]
        if self.flush:
            return every_key(protected)
        text = f"key under {', '.join(self.prefixes)}" + (" without a TTL" if self.only_without_ttl else "")
        prefixes = [bytes_of(prefix) for prefix in self.prefixes]
        return by_prefixes(prefixes, protected, text, without_ttl=self.only_without_ttl)

    def flushes(self, server: CacheServer, *, waived: bool) -> tuple[Flush, ...]:
        """The databases to flush: those that have keys."""
        counted = {number: server.keys_in((number,)) for number in self.numbers if self.flush}
        return tuple(Flush(number, keys, server, waived) for number, keys in counted.items() if keys)


def find_server(report: Report, env: Environment, waiver: str) -> CacheServer:
    """The current master.

    Raises:
        RunbookFailed: the server is a replica, or too few Sentinels name it.
    """
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=True, waiver=waiver)
    server = read_cache_server(block)
    replicas = f", replicas: {server.replicas}" if server.replicas else ""
    report.fact("server", f"{server.address}, {server.version}, {server.role}{replicas}")
    counts = [f"db {number}: {keys:,}" for number, (keys, _) in sorted(server.counts.items())]
    report.fact("keys", ", ".join(counts) or "none")
    report.require(
        "role",
        server.role == "master",
        "name the master or its Sentinels in [redis], then register the blocks again",
        value=server.role,
        expected="master",
    )
    report.fail_if_critical()
    return server


def judge_plan(report: Report, wanted: Wanted, plan: str) -> None:
    """A broad clearing is confirmed with its plan, which pins the number of keys."""
    if wanted.is_broad and report.may_change:
        report.require(
            "confirmed plan",
            bool(plan),
            "run it with an empty confirm, then confirm in the form that the plan links to",
            value="a plan" if plan else "the environment's name only",
            expected="a plan, because more than a cache can be deleted",
        )
        report.fail_if_critical()


def count(report: Report, env: Environment, wanted: Wanted, server: CacheServer) -> Sweep:
    """Count the keys to delete, list the first ones, and report protected keys."""
    found = find_keys(env.redis.at(server.address), wanted.selection(), wanted.numbers, server)
    report_keys(report, "Keys to delete", found)
    rows = [
        (f"db {key.database}", shown(key.key), key.kind, _ttl(key.ttl_ms), size(key.bytes) if key.bytes >= 0 else "?")
        for key in found.first
    ]
    if rows:
        report.table(f"The first {len(rows)} keys", ("database", "key", "type", "TTL", "bytes"), rows)
    report.fact("counted in", f"{duration(found.seconds)}, the longest call {found.longest_seconds * 1000:.1f} ms")
    judge_protected(report, wanted, found)
    keys = server.keys_in(wanted.numbers) if wanted.flush else found.keys
    report.outcome = f"{keys:,} keys would be deleted; to delete them, type {env.name} in confirm"
    return found


def judge_protected(report: Report, wanted: Wanted, found: Sweep) -> None:
    """A clearing leaves protected keys out; a flush cannot."""
    counted = ", ".join(f"{shown(prefix)} {keys:,}" for prefix, keys in found.protected)
    if wanted.flush:
        hint = "delete them first by prefix, or clear other prefixes instead of flushing"
        own = Next("clear-cache", "plan it", {"prefixes": [shown(one) for one, _ in found.protected]})
        report.require("protected keys", not counted, hint, value=counted, expected="none", follow=[own])
    elif counted:
        report.warn("protected keys kept", "to delete them too, name them in prefixes", value=counted)


def report_keys(report: Report, name: str, found: Sweep) -> None:
    """Keys and bytes by prefix, most keys first."""
    about = "≈ " if found.sampled else ""
    rows = [
        (
            f"db {each.database}",
            shown(each.prefix) or "(no prefix)",
            f"{each.keys:,}",
            about + size(each.bytes) if each.measured else "not measured",
            about + f"{each.without_ttl:,}" if each.measured else "not measured",
            f"{each.measured:,}",
        )
        for each in found.counts
    ]
    columns = ("database", "prefix", "keys", "bytes", "without TTL", "keys measured")
    report.table(name, columns, rows, most=50)
    if not found.measurable:
        hint = "permit MEMORY USAGE and PTTL: ACL SETUSER <user> +memory|usage +pttl"
        report.warn("bytes and TTL", hint, value="not measured: the user's ACL forbids it", expected="measured")
    if found.with_ttl:
        report.fact("kept because of their TTL", f"{found.with_ttl:,} keys")


def judge_rights(
    report: Report, env: Environment, order: ClearingOrder, found: Sweep, flushes: Sequence[Flush]
) -> None:
    """The server would carry out the commands for this user now. Only the listed keys are tried."""
    commands = [("FLUSHDB", "ASYNC")] if flushes else [("UNLINK", key.key) for key in found.first]
    for refusal in find_refusals(env.redis.at(order.server.address), commands) if commands else ():
        report.fail("the server permits the deletion", refusal.hint, value=refusal.message, expected="permitted")


def _effect(order: ClearingOrder, flushes: Sequence[Flush]) -> Effect:
    lost = "the application computes cached values again; keys without a TTL are lost"
    if flushes:
        return Effect(
            f"deletes all {counted(sum(each.keys for each in flushes), 'key')} of {counted(len(flushes), 'database')}",
            "",
            lost,
        )
    number = counted(order.planned, "key") if order.planned >= 0 else "all keys"
    return Effect(f"deletes {number}: {order.selection.text}", "", lost)


def describe_undo(report: Report, env: Environment, wanted: Wanted, server: CacheServer) -> None:
    """There is no undo. If more than a cache can be deleted, name the newest backup."""
    if not wanted.is_broad and not server.without_ttl_in(wanted.numbers):
        report.fact("undo", "none: the application creates these keys again")
        return
    try:
        backups = read_store(stores.store_for(env, "redis"), "redis", env.name).backups
        missing = "none"
    except OpsError as error:
        backups, missing = (), error.message
    if backups:
        newest = f"{backups[-1].name}, taken {duration(backups[-1].age_seconds)} ago"
        report.fact("undo", f"none; restore-redis restores all keys of the newest backup, {newest}")
        return
    report.fact("undo", "none, and there is no backup")
    hint = "take a backup first: keys without a TTL can be deleted"
    report.warn("newest backup of Redis", hint, value=missing, follow=[BACKUP])


def unlink(report: Report, env: Environment, order: ClearingOrder, wanted: Wanted, found: Sweep | None) -> None:
    """Unlink the keys; report what was deleted, what was freed, and what was added meanwhile."""
    unlinking = Change(
        unlink_keys.bind(env.redis, order),
        "unlink",
        order.target,
        size=found.bytes if found else 0,
        seconds=found.keys / UNLINKED_PER_SECOND if found else 0.0,
        pins=[partial(_pin, env, order, found.keys if found else -1)],
        begun=State("some keys may be unlinked, the others are untouched", RUN_AGAIN),
        done=_unlinked,
    )
    with carrying_out(report, unlinking, effect=_effect(order, [])) as carry:
        done = carry(unlinking)
        report_keys(report, "Deleted keys", done)
        if order.planned < 0:
            judge_protected(report, wanted, done)
        rate = f", {done.keys / done.seconds:,.0f} a second" if done.seconds > 0 else ""
        report.fact("unlinked", f"{done.keys:,} keys in {duration(done.seconds)}{rate}")
        report.fact("longest call", f"{done.longest_seconds * 1000:.1f} ms")
        if stopped := done.stopped:
            raise OpsError(stopped.message, stopped.hint or RUN_AGAIN)
    report_freed(report, env, order.server)
    block = env.redis.at(order.server.address)
    left = find_keys(block, order.selection, order.databases, read_cache_server(block))
    report.fact("added meanwhile", f"{left.keys:,} keys")
    report.outcome = f"{done.keys:,} keys unlinked ({', '.join(wanted.prefixes)}), {size(done.bytes)} of values"


def _unlinked(done: Sweep) -> State:
    if not done.stopped:
        return State(f"all {done.keys:,} keys were unlinked", "run it with an empty confirm to count the current keys")
    keys = f"at least {done.keys:,} and at most about {done.keys + MOST_STEP:,}" if done.lost else f"{done.keys:,}"
    return State(f"{keys} keys were unlinked by then, the rest is untouched", done.stopped.hint or RUN_AGAIN)


def _pin(env: Environment, order: ClearingOrder, keys: int, report: Report) -> None:
    pin_redis(report, env.redis.at(order.server.address))
    if keys >= 0:
        pin_keys(report, order.where, keys)


def flush_databases(report: Report, env: Environment, order: ClearingOrder, flushes: Sequence[Flush]) -> None:
    """Flush one database after the other."""
    flushing = [_flushing(env, each, sum(one.keys for one in flushes[:number])) for number, each in enumerate(flushes)]
    pins = [partial(_pin, env, order, sum(each.keys for each in flushes))]
    with carrying_out(report, *flushing, effect=_effect(order, flushes), pins=pins) as carry:
        keys = sum(carry(each) for each in flushing)
    report_freed(report, env, order.server)
    report.outcome = f"{keys:,} keys flushed"


def _flushing(env: Environment, each: Flush, before: int) -> Change[[], int]:
    """Plan the flush of one database. `before`: the planned keys of the databases that are flushed before it."""
    others = f"; about {before:,} keys of other databases were" if before else ""
    return Change(
        flush_keys.bind(env.redis, each),
        "FLUSHDB ASYNC",
        each.target,
        begun=State(f"{each.where} ({each.keys:,} keys) may be flushed{others}", PLAN_AGAIN),
        failed=lambda error: (
            None
            if isinstance(error, Unreachable)
            else State(f"{each.where} ({each.keys:,} keys) was not flushed{others}", PLAN_AGAIN)
        ),
    )


def report_freed(report: Report, env: Environment, before: CacheServer) -> None:
    """Memory before and after."""
    freed = read_freed(env.redis.at(before.address))
    report.fact("memory in use", f"{size(before.used_bytes)} before, {size(freed.used_bytes)} after")
    if freed.pending:
        hint = "check INFO memory (lazyfree_pending_objects) again in a few minutes"
        report.warn("values still to be freed", hint, value=f"{freed.pending:,}", expected="0")


def _ttl(milliseconds: int) -> str:
    return {-1: "none", -2: "expired"}.get(milliseconds) or duration(milliseconds / 1000)
