"""Restore of some prefixes into a server that keeps serving (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import judge_kept, keep_live
from flows.redis.master import judge_master
from flows.redis.restore import findings
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import loss_of, pass_serving
from flows.redis.restore.steps import UNTOUCHED
from runbook.change import Carrier, Change, Check, Line, State
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.guard.permit import PlannedStep
from runbook.kinds import Bound
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.backups.catalogue import Backup, instead_of
from tasks.redis.backup.snapshot import RDB
from tasks.redis.cache.flushing import slack
from tasks.redis.content.manifest import COLUMNS as PROOF
from tasks.redis.content.manifest import EXPIRING, RedisContent, compare, expiring_in
from tasks.redis.content.reading import held_still, read_content, shown
from tasks.redis.keys import read_prefix, widest
from tasks.redis.line import RedisLine, live_line
from tasks.redis.restore.equal import compare_keys
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.prefixes import (
    Extra,
    Restored,
    RestoreOrder,
    count_keys,
    find_refusal,
    restore_functions,
    restore_keys,
)
from tasks.redis.restore.writes import LiveWrites, watched_writes
from tasks.redis.scratch import scratch_server
from tasks.redis.scratch_place import scratch_place
from tasks.redis.sentinels import find_master, read_sentinels, require_master
from tasks.redis.server import connected

KEYS_PER_SECOND = 15_000


@dataclass(frozen=True)
class PrefixRestore:
    """The keys under some prefixes are restored from a scratch server. `writes`: the clients', meanwhile."""

    order: RestoreOrder
    writes: LiveWrites
    keeping: Change[[], Backup]
    restoring: Change[[LiveWrites], Restored]
    proving: Check[[Restored, LiveWrites, str], None]

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        return [self.keeping, self.restoring, self.proving]

    def carry_out(self, carry: Carrier) -> None:
        """Keep the live data as a backup, restore the keys, and compare them with the backup one by one.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report states its state.
            RunbookFailed: the live keys differ from the backup.
        """
        back = undo_of(self.order, carry(self.keeping))
        done = carry(self.restoring, self.writes)
        carry(self.proving, done, self.writes, back)


@contextlib.contextmanager
def prepare(
    report: Report,
    env: Environment,
    chosen: RestorableRedis,
    prefixes: Sequence[str],
    extra: Extra,
    expected_removed: int,
) -> Iterator[PrefixRestore]:
    """Load and prove the backup, count the keys, check the live server, and plan.

    Raises:
        OpsError, Unreachable: the live server refuses or does not answer.
        RunbookFailed: the backup differs from its manifest, or a check failed.
    """
    names = widest([read_prefix(prefix) for prefix in prefixes])
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=True, waiver=None)
    judged = read_live(block)
    report.fact("server", block.address)
    report.fact("prefixes", ", ".join(shown(name) for name in names))
    with (
        loaded(report, env, chosen) as scratch,
        held_still(scratch),
        live_line(block) as live,
        watched_writes(block, live, names) as writes,
    ):
        order = count_keys(block, scratch, live, names, extra)
        judge_removed(report, order, expected_removed)
        judge(report, env, block, order, find_refusal(block, scratch, live, order))
        loss, route = loss_of(chosen.backup, prefixes), KeyRoute(block, scratch, live, order)
        keeping = _keeping(report, env, block, judged, loss, order)
        yield PrefixRestore(order, writes, keeping, restoring(report, env, route, loss), proving(report, env, route))


def require_same(env: Environment, block: Redis, *, waived: bool = False) -> None:
    """The server is still the master: a replaced one accepts writes for some seconds and loses them. `waived`: the
    writes are done.

    Raises:
        OpsError: the Sentinels name another master, or (unless waived) too few name this one.
    """
    try:
        require_master(env.redis, block.address, waived=waived)
    except OpsError as error:
        raise promoted(env, block, error) or error from None


@contextlib.contextmanager
def naming_new_master(env: Environment, block: Redis) -> Iterator[None]:
    """An error inside names another server that was promoted, if that is why."""
    try:
        yield
    except OpsError as error:
        raise promoted(env, block, error) or error from None


def promoted(env: Environment, block: Redis, error: OpsError) -> OpsError | None:
    """The error if another server was promoted: the old master then closes connections and refuses writes."""
    with contextlib.suppress(OpsError):
        now = find_master(env.redis).address
        if now != block.address:
            return OpsError(
                f"{now} was promoted during the restore ({error.message})",
                "run it again: it starts over on the new master",
            )
    return None


@contextlib.contextmanager
def loaded(report: Report, env: Environment, chosen: RestorableRedis) -> Iterator[redis.Redis]:
    """A scratch server with the backup, proven equal to its manifest.

    Raises:
        RunbookFailed: they differ.
    """
    backup = chosen.backup
    with scratch_server(env.redis, backup.path, rdb=RDB) as client, scratch_place() as place:
        if chosen.proven:
            sidecar = place / EXPIRING
            actual = read_content(client, sidecar)
            expected = RedisContent.model_validate(backup.manifest.content)
            found = compare(expected, expiring_in(backup.path), actual, sidecar)
            report.table("The backup, loaded, against its manifest", PROOF, found.rows())
            report.require(
                "the backup equals its manifest",
                found.is_equal,
                "" if found.is_equal else instead_of(backup),
                value="; ".join(found.differences[:3]) or f"every key, in {len(found.proofs)} databases",
                expected="no difference",
            )
            report.fail_if_critical()
        yield client


def judge(
    report: Report, env: Environment, block: Redis, order: RestoreOrder, refusal: str, *, whole: bool = False
) -> None:
    """The conditions of a restore; `whole`: the backup replaces all data.

    Raises:
        RunbookFailed: a condition is not met.
    """
    report.require(
        "the live server accepts the backup's keys",
        not refusal,
        "correct [redis] server_program, or the server's databases; for a replica, restore its master",
        value=refusal or block.address,
        expected="a master of a version that reads them",
    )
    report.require(
        "keys under the prefixes",
        bool(order.held),
        "check the prefixes' spelling: case and the colon matter",
        value=f"{order.keys:,} in the backup",
        expected="at least 1",
    )
    with connected(block) as client:
        memory = client.info("memory")
    limit, used = int(memory.get("maxmemory", 0)), 0 if whole else int(memory["used_memory"])
    report.require(
        "memory of the live server",
        not limit or used + order.bytes < limit,
        "raise maxmemory for the time of the restore: otherwise keys are refused, or others evicted",
        value=f"{size(used)} used, {size(order.bytes)} to restore",
        expected=f"less than {size(limit)}" if limit else "no limit",
        follow=[Next("apply-redis-settings", "raise maxmemory", {"override": f"maxmemory {used + 2 * order.bytes}"})],
    )
    judge_kept(report, env, block)
    report.fail_if_critical()


def judge_removed(report: Report, order: RestoreOrder, expected: int) -> None:
    """The live keys that are not in the backup, against the plan's number: only the undo restores them. After a killed
    run there are fewer."""
    found, most = order.removed, expected + slack(expected)
    if not report.confirm and order.extra == "remove":
        report.pin("expected_removed", found)
    elif found and report.confirm:
        report.require(
            "expected_removed",
            found <= most,
            "plan again with an empty confirm, check the keys to delete, and confirm the new plan",
            value=f"{found:,} live keys would be deleted",
            expected=f"at most {most:,}, as in the plan" if expected else "the plan's number",
        )


@dataclass(frozen=True)
class KeyRoute:
    """A scratch server with a backup, the live server, and the keys to copy from one to the other."""

    block: Redis
    scratch: redis.Redis
    live: RedisLine
    order: RestoreOrder


def _keeping(
    report: Report, env: Environment, block: Redis, judged: LiveRedis, loss: Loss, order: RestoreOrder
) -> Change[[], Backup]:
    """The backup of the live data. Then the server must still be the judged one: the next line replaces its keys."""

    def keep() -> Backup:
        kept = keep_live(report, env, block)
        require_same(env, block)
        pass_serving(report, block, judged, loss)
        report.fact("undo", undo_of(order, kept))
        return kept

    return Change(
        keep,
        "keep",
        "a full backup of the live server: the undo",
        begun=UNTOUCHED,
        done=partial(_may_be_replaced, order),
    )


def _may_be_replaced(order: RestoreOrder, kept: Backup) -> State:
    back = undo_of(order, kept)
    return State(
        f"some keys are restored, others are not; {kept.name} has all keys of before",
        f"run it again: it starts over; or {back}",
    )


def restoring(
    report: Report, env: Environment, route: KeyRoute, loss: Loss, *, functions: bool = False
) -> Change[[LiveWrites], Restored]:
    """Restore and delete keys: a line for each database and prefix. `functions`: replace the function libraries too."""
    given = (route.block, route.scratch, route.live, route.order)
    keys = restore_keys.bind(*given)
    libraries = restore_functions.bind(*given) if functions else None

    def restore(writes: LiveWrites) -> Restored:
        with naming_new_master(env, route.block):
            done = keys(writes)
            problem = libraries() if libraries else ""
        report.loses(loss)
        if problem:
            report.warn("functions", "restore them by hand: FUNCTION RESTORE", value=problem)
        findings.report_restored(report, done, writes)
        return done

    first, *others = _steps(route.order)
    by: list[Bound[..., Any]] = [keys, *([libraries] if libraries else [])]
    return Change(restore, first.step, first.detail, size=first.bytes, seconds=first.seconds, more=others, by=by)


def proving(report: Report, env: Environment, route: KeyRoute) -> Check[[Restored, LiveWrites, str], None]:
    """The comparison of both servers. Its last argument is the run that undoes the restore."""

    def prove(done: Restored, writes: LiveWrites, back: str) -> None:
        with naming_new_master(env, route.block):
            found = compare_keys.after(done)(route.block, route.scratch, route.live, route.order, writes)
        require_same(env, route.block, waived=True)
        findings.judge_comparison(report, found, writes, back)

    seconds = max(0.1, route.order.keys / KEYS_PER_SECOND)
    return Check(prove, "prove", "every key of both servers, in small parts", seconds=seconds)


def _steps(order: RestoreOrder) -> list[PlannedStep]:
    """The lines of the plan: restore and delete, by database and prefix."""
    steps = []
    for one in order.held[: findings.MOST_ROWS]:
        name = shown(one.prefix) or "every key"
        others = "are deleted" if order.extra == "remove" else "stay"
        detail = (
            f"db {one.database}, {name}: {one.backup:,} keys of the backup over {one.live:,} live ones; {one.extra:,} "
            f"that it does not have {others}"
        )
        steps.append(PlannedStep("restore", detail, one.bytes, max(0.1, one.backup / KEYS_PER_SECOND)))
    if len(order.held) > findings.MOST_ROWS:
        steps.append(PlannedStep("restore", f"and {len(order.held) - findings.MOST_ROWS} more"))
    return steps


def undo_of(order: RestoreOrder, kept: Backup) -> str:
    """The run that undoes it."""
    names = sorted({shown(one.prefix) for one in order.held if one.prefix})
    which = f" prefixes=[{', '.join(names)}] extra=remove" if names else ""
    return f"restore-redis with backup={kept.name}{which}"
