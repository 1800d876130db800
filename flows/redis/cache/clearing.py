"""What must hold before clear-cache clears, and what it tells (§2.2). Plain functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blocks.environment import Environment
from flows import store as stores
from flows.redis.master import judge_master
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Permit
from runbook.report import Report
from runbook.units import duration, size
from tasks.backups.retention import read_store
from tasks.redis.cache.clearing import Order, find_keys, read_freed, unlink_keys
from tasks.redis.cache.flushing import EVERYTHING, Flush, flush_keys, slack
from tasks.redis.cache.selection import Selection, literal_head, of_pattern, of_prefixes
from tasks.redis.cache.server import CacheServer, find_refusals, read_cache_server
from tasks.redis.cache.sweep import MOST_STEP, Sweep
from tasks.redis.content.reading import shown
from tasks.redis.keys import bytes_of
from tasks.redis.sentinels import read_sentinels

MOST_ROWS = 50
# Seen of a server on one of two busy cores.
UNLINKED_PER_SECOND = 300_000
PLAN_AGAIN = "plan again with an empty confirm, and look at what it shows"


def judge_server(report: Report, env: Environment, waiver: str) -> CacheServer:
    """Which server it is: the one that is the master now.

    Raises:
        RunbookFailed: it is a replica, or too few Sentinels vouch for it.
    """
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=True, waiver=waiver)
    server = read_cache_server(block)
    replicas = f", replicas: {server.replicas}" if server.replicas else ""
    report.fact("server", f"{server.address}, {server.version}, {server.role}{replicas}")
    report.require(
        "role",
        server.role == "master",
        "name the master in [redis], or its Sentinels; then register the blocks again",
        value=server.role,
        expected="master",
    )
    report.fail_if_critical()
    return server


def judge_number(report: Report, wanted: Wanted, keys: int, expected: int) -> None:
    """The number of keys against the one that was confirmed. A clearing that was killed finds fewer: that is well."""
    if not keys:
        return
    if expected:
        most, least = expected + slack(expected), expected - slack(expected) if wanted.flush else 0
        report.require(
            "expected_keys",
            least <= keys <= most,
            f"the number has changed: {PLAN_AGAIN}",
            value=f"{keys:,}",
            expected=f"{least:,} to {most:,}",
        )
    elif wanted.is_broad and report.confirm:
        report.fail(
            "expected_keys",
            f"it is not enough to confirm the environment here: {PLAN_AGAIN}, then type its number of keys",
            value="not given",
            expected="the number of keys that the plan showed",
        )


def judge_protected(report: Report, wanted: Wanted, found: Sweep) -> None:
    """A flush cannot leave protected keys out, a clearing does."""
    told = ", ".join(f"{shown(prefix)} {count:,}" for prefix, count in found.protected)
    hint = f"if they shall go too, name them in include_protected: {', '.join(wanted.protected)}"
    if wanted.flush:
        report.require("protected keys", not told, f"clear by prefix instead; {hint}", value=told, expected="none")
    elif told:
        report.warn("protected keys were left out", hint, value=told)


def tell_counted(report: Report, found: Sweep) -> None:
    """What would go, by prefix, and the first keys by name."""
    tell_table(report, "Keys that are meant", found)
    rows = [
        (f"db {key.database}", shown(key.key), key.kind, _ttl(key.ttl_ms), size(key.bytes) if key.bytes >= 0 else "?")
        for key in found.first
    ]
    if rows:
        report.table(f"The first {len(rows)} keys", ("database", "key", "type", "TTL", "bytes"), rows)
    report.fact("counted in", f"{duration(found.seconds)}, the longest call {found.longest_seconds * 1000:.1f} ms")


def tell_table(report: Report, name: str, found: Sweep) -> None:
    """Keys and bytes by prefix, most keys first."""
    about = "≈ " if found.sampled else ""
    rows: list[Sequence[object]] = []
    for count in found.counts[:MOST_ROWS]:
        known = count.measured > 0
        rows.append(
            (
                f"db {count.database}",
                shown(count.prefix) or "(no prefix)",
                f"{count.keys:,}",
                about + size(count.bytes) if known else "not measured",
                about + f"{count.without_ttl:,}" if known else "not measured",
                f"{count.measured:,}",
            )
        )
    if len(found.counts) > MOST_ROWS:
        rows.append((f"… {len(found.counts) - MOST_ROWS} more", *[""] * 5))
    report.table(name, ("database", "prefix", "keys", "bytes", "without TTL", "keys measured"), rows)
    if not found.measurable:
        report.warn("bytes and TTL: not measured", "permit it: ACL SETUSER … +memory|usage +pttl", value="forbidden")
    if found.with_ttl:
        report.fact("left alone for their TTL", f"{found.with_ttl:,} keys")


def count(
    report: Report, env: Environment, wanted: Wanted, server: CacheServer, numbers: tuple[int, ...], expected: int
) -> Sweep:
    """Count what is meant, show it, and compare it with what was confirmed."""
    found = find_keys(env.redis.at(server.address), wanted.selection(), numbers, server)
    tell_counted(report, found)
    keys = server.keys_in(numbers) if wanted.flush else found.keys
    judge_protected(report, wanted, found)
    judge_number(report, wanted, keys, expected)
    also = f" and {keys} in expected_keys" if wanted.is_broad else ""
    report.outcome = f"{keys:,} keys would go; to carry it out, type {env.name} in confirm{also}"
    return found


def plan_unlink(report: Report, order: Order, found: Sweep) -> None:
    """The line of the plan."""
    rate = min(order.keys_per_second or UNLINKED_PER_SECOND, UNLINKED_PER_SECOND)
    report.plan("unlink", order.target, size=found.bytes, seconds=found.keys / rate)


def flushes_of(wanted: Wanted, server: CacheServer, numbers: tuple[int, ...], waived: bool) -> tuple[Flush, ...]:
    """What is to be flushed: databases with keys in them."""
    if wanted.flush == "all":
        each = {EVERYTHING: server.keys_in(numbers)}
    else:
        each = {number: server.keys_in((number,)) for number in numbers}
    return tuple(Flush(number, keys, server, waived) for number, keys in each.items() if keys)


def judge_rights(report: Report, env: Environment, order: Order, found: Sweep, flushes: Sequence[Flush]) -> None:
    """Whether the server would do it for this user, now: the commands are tried and thrown away. Of keys, those that
    are shown are tried."""
    commands: list[tuple[object, ...]]
    if flushes:
        commands = [(each.command, "ASYNC") for each in flushes]
    elif order.selection.without_ttl and not order.server.scripts:
        commands = [("PEXPIRE", key.key, 0, "NX") for key in found.first]
    else:
        commands = [("UNLINK", key.key) for key in found.first]
    for refusal in find_refusals(env.redis.at(order.server.address), commands) if commands else ():
        report.fail("the server would do it", refusal.hint, value=refusal.message, expected="for this user, now")


def plan_flush(report: Report, flushes: Sequence[Flush]) -> None:
    """A line for each database, and what FLUSHALL does beside."""
    for flush in flushes:
        report.plan("FLUSHALL ASYNC" if flush.database == EVERYTHING else "FLUSHDB ASYNC", flush.target)
        if flush.database == EVERYTHING and flush.server.saves:
            report.warn(
                "FLUSHALL saves too",
                "take a backup first: backup-redis",
                value="the server has save points: its RDB on disk is empty at once",
            )


def tell_undo(report: Report, env: Environment, wanted: Wanted, server: CacheServer, numbers: tuple[int, ...]) -> None:
    """There is none. Where more than a cache may go, the newest backup is named."""
    if not wanted.is_broad and not server.without_ttl_in(numbers):
        report.fact("undo", "none: the application makes these keys anew")
        return
    try:
        backups = read_store(stores.store_for(env, "redis"), "redis", env.name).backups
        missing = "there is none"
    except OpsError as error:
        backups, missing = (), error.message
    if backups:
        newest = f"{backups[-1].name}, {duration(backups[-1].age_seconds)} old"
        report.fact("undo", f"none; the newest backup is {newest} (restore-redis brings back all of it)")
        return
    report.fact("undo", "none, and there is no backup")
    report.warn("newest backup of Redis", "take one first: backup-redis; keys without a TTL may go", value=missing)


def unlink_wanted(report: Report, permit: Permit, env: Environment, order: Order, wanted: Wanted) -> None:
    """Do it, and tell what went, what was freed, and what is there again."""
    report.state_is("some keys may be unlinked, the others are untouched", "launch it again: it takes what is left")
    done = unlink_keys(permit, env.redis, order)
    tell_table(report, "Keys that were unlinked", done)
    if order.planned < 0:
        judge_protected(report, wanted, done)
    rate = f", {done.keys / done.seconds:,.0f} a second" if done.seconds > 0 else ""
    report.fact("unlinked", f"{done.keys:,} keys in {duration(done.seconds)}{rate}")
    report.fact("longest call", f"{done.longest_seconds * 1000:.1f} ms")
    if stopped := done.stopped:
        report.state = None
        keys = f"at least {done.keys:,} and at most about {done.keys + MOST_STEP:,}" if done.lost else f"{done.keys:,}"
        what = f"{stopped.message}: {keys} keys were unlinked by then, the rest is untouched"
        raise OpsError(what, stopped.hint or "launch it again: it takes what is left")
    report.state_is(
        f"{done.keys:,} keys were unlinked, all that were meant", "an empty confirm shows what is there now"
    )
    block = env.redis.at(order.server.address)
    tell_freed(report, env, order.server)
    left = find_keys(block, order.selection, order.databases, read_cache_server(block))
    report.fact("added meanwhile, and there now", f"{left.keys:,} keys")
    report.outcome = f"{done.keys:,} keys unlinked ({order.selection.told}), {size(done.bytes)} of values"


def flush_wanted(report: Report, permit: Permit, env: Environment, flushes: Sequence[Flush]) -> None:
    """Do it, database by database."""
    keys, before = 0, ""
    for each in flushes:
        report.state_is(
            f"{each.which} ({each.keys:,} keys) may be flushed{before}", "plan again: it shows what is left"
        )
        try:
            keys += flush_keys(permit, env.redis, each)
        except Unreachable:
            raise
        except OpsError:
            report.state_is(
                f"{each.which} ({each.keys:,} keys) was not flushed{before}", "plan again: it shows what is left"
            )
            raise
        before = f"; {keys:,} keys of other databases were"
    tell_freed(report, env, flushes[0].server)
    report.outcome = f"{keys:,} keys flushed"


def tell_freed(report: Report, env: Environment, before: CacheServer) -> None:
    """Memory before and after."""
    freed = read_freed(env.redis.at(before.address))
    report.fact("memory in use", f"{size(before.used_bytes)} before, {size(freed.used_bytes)} after")
    if freed.pending:
        report.warn("values still to be freed", "look again at INFO memory", value=f"{freed.pending:,}")


def _ttl(milliseconds: int) -> str:
    return {-1: "none", -2: "gone"}.get(milliseconds) or duration(milliseconds / 1000)


Flushing = Literal["", "database", "all"]


@dataclass(frozen=True)
class Wanted:
    """The parameters of a run, as they belong together. `protected` are the environment's prefixes."""

    protected: tuple[str, ...]
    prefixes: tuple[str, ...]
    pattern: str
    databases: tuple[int, ...]
    all_databases: bool
    only_without_ttl: bool
    flush: Flushing
    include_protected: tuple[str, ...]

    def require_sense(self) -> None:
        """Raises OpsError where they contradict each other, or mean more than they say."""
        given = [bool(self.prefixes), bool(self.pattern), bool(self.flush)]
        strange = [name for name in self.include_protected if name not in self.protected]
        refusals = {
            "say what goes: prefixes, a pattern or flush, one of them": sum(given) != 1,
            "an empty prefix means every key: flush is for that": "" in self.prefixes,
            "only_without_ttl takes keys that were meant to stay: it needs named prefixes": (
                self.only_without_ttl and not self.prefixes
            ),
            "name the databases, or choose all_databases": not self.databases and not self.all_databases,
            "databases and all_databases contradict each other": (
                (self.all_databases or self.flush == "all") and self.databases not in ((), (0,))
            ),
            "to flush every database choose flush=all": self.flush == "database" and self.all_databases,
            f"include_protected names {', '.join(strange)}; protected are {', '.join(self.protected)}": bool(strange),
        }
        for reason, holds in refusals.items():
            if holds:
                raise OpsError(reason, "correct the parameters: nothing was looked at")

    @property
    def head(self) -> bytes:
        """What the pattern's keys begin with."""
        return literal_head(bytes_of(self.pattern, glob=True))

    @property
    def named(self) -> tuple[str, ...]:
        """Protected prefixes that may be touched: included, or named by a prefix or by the pattern's beginning."""
        heads = [bytes_of(prefix) for prefix in self.prefixes] + [self.head]
        return tuple(
            name
            for name in self.protected
            if name in self.include_protected or any(head.startswith(bytes_of(name)) for head in heads)
        )

    @property
    def is_broad(self) -> bool:
        """Whether the number of keys must be confirmed too: it may be data that nobody makes anew."""
        return bool(self.flush or self.only_without_ttl or self.named or (self.pattern and not self.head))

    def selection(self) -> Selection:
        """The keys that are meant; of a flush all of them, so that they can be shown first."""
        guarded = [bytes_of(name) for name in self.protected if name not in self.include_protected]
        if not self.prefixes:
            pattern = self.pattern or "*"
            return of_pattern(bytes_of(pattern, glob=True), guarded, f"pattern {pattern}")
        told = ", ".join(self.prefixes) + (" without a TTL" if self.only_without_ttl else "")
        raw = [bytes_of(prefix) for prefix in self.prefixes]
        return of_prefixes(raw, guarded, f"prefix {told}", without_ttl=self.only_without_ttl)

    def numbers(self, server: CacheServer) -> tuple[int, ...]:
        """The databases that are meant."""
        if self.all_databases or self.flush == "all":
            return tuple(sorted(server.counts))
        return tuple(sorted(set(self.databases)))
