"""Restore of some prefixes into a server that keeps serving (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import redis

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import judge_kept, keep_live
from flows.redis.master import judge_master
from flows.redis.restore import findings
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import loss_of, pass_serving
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report
from runbook.units import size
from tasks.backups import publishing
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
from tasks.redis.restore.prefixes import ACT, Extra, RestoreOrder, count_keys, find_refusal, restore_keys
from tasks.redis.restore.writes import LiveWrites, watched_writes
from tasks.redis.scratch import scratch_server
from tasks.redis.scratch_place import scratch_place
from tasks.redis.sentinels import find_master, read_sentinels, require_master
from tasks.redis.server import connected

KEYS_PER_SECOND = 15_000


@dataclass(frozen=True)
class PrefixRestore:
    """A backup in a scratch server, the live server, the keys to restore, and the clients' writes meanwhile. `loss`:
    what the keys' restore loses."""

    report: Report
    env: Environment
    block: Redis
    scratch: redis.Redis
    live: RedisLine
    order: RestoreOrder
    writes: LiveWrites
    judged: LiveRedis
    loss: Loss

    @property
    def acts(self) -> tuple[Act, ...]:
        """The acts of its permit."""
        return (Act(ACT, self.order.target),)

    def run(self, permit: Permit) -> None:
        """Keep the live data as a backup, restore the keys, and compare them with the backup one by one.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report states its state.
            RunbookFailed: the live keys differ from the backup.
        """
        report, block, order = self.report, self.block, self.order
        report.state_is("the live data was not touched", "fix the findings above, then run it again")
        kept = keep_live(report, self.env, block)
        require_same(self.env, block)
        pass_serving(report, block, self.judged, self.loss)
        back = undo(kept, [one.prefix for one in order.held])
        report.fact("undo", back)
        report.state_is(
            f"some keys are restored, others are not; {kept.name} has all keys of before",
            f"run it again: it starts over; or {back}",
        )
        try:
            done = restore_keys(permit, block, self.scratch, self.live, order, self.writes)
            report.loses(self.loss)
            findings.report_restored(report, done, self.writes)
            found = compare_keys.after(done)(block, self.scratch, self.live, order, self.writes)
        except OpsError as error:
            raise promoted(self.env, block, error) or error from None
        require_same(self.env, block, waived=True)
        findings.judge_comparison(report, found, self.writes, back)


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
        plan(report, order)
        loss = loss_of(chosen.backup, prefixes)
        yield PrefixRestore(report, env, block, scratch, live, order, writes, judged, loss)


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


def plan(report: Report, order: RestoreOrder) -> None:
    """The steps: keep, restore and delete, by database and prefix."""
    report.plan("keep", "a full backup of the live server: the undo", by=[publishing.publish])
    for number, one in enumerate(order.held[: findings.MOST_ROWS]):
        name = shown(one.prefix) or "every key"
        others = "are deleted" if order.extra == "remove" else "stay"
        report.plan(
            "restore",
            f"db {one.database}, {name}: {one.backup:,} keys of the backup over {one.live:,} live ones; {one.extra:,} "
            f"that it does not have {others}",
            size=one.bytes,
            seconds=max(0.1, one.backup / KEYS_PER_SECOND),
            by=[restore_keys],
            shared=number > 0,
        )
    if len(order.held) > findings.MOST_ROWS:
        more = f"and {len(order.held) - findings.MOST_ROWS} more"
        report.plan("restore", more, by=[restore_keys], shared=True)
    seconds = max(0.1, order.keys / KEYS_PER_SECOND)
    report.plan("prove", "every key of both servers, in small parts", seconds=seconds, by=[compare_keys])


def undo(kept: Backup, prefixes: Sequence[bytes]) -> str:
    """The run that undoes it."""
    names = sorted({shown(prefix) for prefix in prefixes if prefix})
    which = f" prefixes=[{', '.join(names)}] extra=remove" if names else ""
    return f"restore-redis with backup={kept.name}{which}"
