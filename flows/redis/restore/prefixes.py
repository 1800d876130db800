"""restore-redis of chosen prefixes, into a server that goes on serving (§2.3): plain functions with the open report."""

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
from flows.redis.restore.choice import Restorable
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.units import size
from tasks.backups.catalogue import Backup, instead_of
from tasks.redis.backup.snapshot import RDB
from tasks.redis.cache.flushing import slack
from tasks.redis.content.manifest import COLUMNS as PROOF
from tasks.redis.content.manifest import EXPIRING, RedisContent, compare
from tasks.redis.content.reading import held_still, read_content, shown
from tasks.redis.keys import read_prefix, widest
from tasks.redis.line import Line, live_line
from tasks.redis.restore.equal import compare_keys
from tasks.redis.restore.prefixes import ACT, Extra, Order, count_keys, find_refusal, restore_keys
from tasks.redis.restore.writes import Writes, watched_writes
from tasks.redis.scratch import scratch_server
from tasks.redis.scratch_place import scratch_place
from tasks.redis.sentinels import find_master, read_sentinels, require_master
from tasks.redis.server import connected

KEYS_PER_SECOND = 15_000


@dataclass(frozen=True)
class PrefixRestore:
    """A backup in a scratch server, the live server, and what is to be carried over; what others write is watched."""

    report: Report
    env: Environment
    block: Redis
    scratch: redis.Redis
    live: Line
    order: Order
    writes: Writes

    @property
    def acts(self) -> tuple[Act, ...]:
        """What it needs a permit for."""
        return (Act(ACT, self.order.target),)

    def run(self, permit: Permit) -> None:
        """Keep what is live, put the keys back as the backup holds them, and prove that key by key.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report says in what state it is.
            RunbookFailed: what is live afterwards is not what the backup holds.
        """
        report, block, order = self.report, self.block, self.order
        report.state_is("the live data was not touched", "launch it again when what is said above is put right")
        kept = keep_live(report, self.env, block)
        require_same(self.env, block)
        back = undo(kept, [one.prefix for one in order.held])
        report.fact("undo", back)
        report.state_is(
            f"some keys are as in the backup, others as before; all of before are in {kept.name}",
            f"launch it again: it begins from the start and ends well; or {back}",
        )
        try:
            done = restore_keys(permit, block, self.scratch, self.live, order, self.writes)
            findings.tell_restored(report, done, self.writes)
            found = compare_keys.after(done)(block, self.scratch, self.live, order, self.writes)
        except OpsError as error:
            raise promoted(self.env, block, error) or error from None
        require_same(self.env, block, waived=True)
        findings.tell_comparison(report, found, self.writes, back)


@contextlib.contextmanager
def prepare(
    report: Report, env: Environment, chosen: Restorable, prefixes: Sequence[str], extra: Extra, expected_removed: int
) -> Iterator[PrefixRestore]:
    """Load and prove the backup, count, judge and plan.

    Raises:
        OpsError, Unreachable: the live server refuses or does not answer.
        RunbookFailed: the backup is not what it should be, or something stands in the way.
    """
    names = widest([read_prefix(prefix) for prefix in prefixes])
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=True, waiver=None)
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
        yield PrefixRestore(report, env, block, scratch, live, order, writes)


def require_same(env: Environment, block: Redis, *, waived: bool = False) -> None:
    """A master that was replaced takes writes for some seconds more, and loses them: `waived` where they are done.

    Raises:
        OpsError: the Sentinels name another, or (unless waived) too few of them name this one.
    """
    try:
        require_master(env.redis, block.address, waived=waived)
    except OpsError as error:
        raise promoted(env, block, error) or error from None


def promoted(env: Environment, block: Redis, error: OpsError) -> OpsError | None:
    """What to say where another server was made the master: the old one drops its clients, and refuses writes."""
    with contextlib.suppress(OpsError):
        now = find_master(env.redis).address
        if now != block.address:
            return OpsError(
                f"{now} was made the master in the middle of this ({error.message})",
                "launch it again: it begins anew there",
            )
    return None


@contextlib.contextmanager
def loaded(report: Report, env: Environment, chosen: Restorable) -> Iterator[redis.Redis]:
    """A scratch server that holds the backup, proven to be what its manifest says.

    Raises:
        RunbookFailed: it is not.
    """
    backup = chosen.backup
    with scratch_server(env.redis, backup.path, rdb=RDB) as client, scratch_place() as place:
        if chosen.proven:
            sidecar = place / EXPIRING
            actual = read_content(client, sidecar)
            expected = RedisContent.model_validate(backup.manifest.content)
            found = compare(expected, backup.path / EXPIRING, actual, sidecar)
            report.table("The backup, loaded, against its manifest", PROOF, found.rows())
            report.require(
                "the backup holds what its manifest says",
                found.is_equal,
                "" if found.is_equal else instead_of(backup),
                value="; ".join(found.differences[:3]) or f"every key, in {len(found.proofs)} databases",
                expected="no difference",
            )
            report.fail_if_critical()
        yield client


def judge(report: Report, env: Environment, block: Redis, order: Order, refusal: str, *, whole: bool = False) -> None:
    """What must hold before anything is changed; `whole`: the backup takes the place of everything.

    Raises:
        RunbookFailed: it does not.
    """
    report.require(
        "the live server takes the backup's keys",
        not refusal,
        "correct [redis] server_program, or the server's databases; a replica: restore its master",
        value=refusal or block.address,
        expected="a master of a version that reads them",
    )
    report.require(
        "keys under the prefixes",
        bool(order.held),
        "look at the prefixes' spelling: capitals and the colon count",
        value=f"{order.keys:,} in the backup",
        expected="some",
    )
    with connected(block) as client:
        memory = client.info("memory")
    limit, used = int(memory.get("maxmemory", 0)), 0 if whole else int(memory["used_memory"])
    report.require(
        "memory of the live server",
        not limit or used + order.bytes < limit,
        "CONFIG SET maxmemory higher for the time of the restore: else keys would be refused, or others evicted",
        value=f"{size(used)} stay, {size(order.bytes)} to come",
        expected=f"less than {size(limit)}" if limit else "no limit",
    )
    judge_kept(report, env, block)
    report.fail_if_critical()


def judge_removed(report: Report, order: Order, expected: int) -> None:
    """The live keys that the backup does not have, against the number that the plan showed: these come back from the
    undo only. A run after one that was killed finds fewer."""
    found, most = order.removed, expected + slack(expected)
    if not report.confirm and order.extra == "remove":
        report.pin("expected_removed", found)
    elif found and report.confirm:
        report.require(
            "expected_removed",
            found <= most,
            "plan again with an empty confirm, look at what would go, and launch what it says",
            value=f"{found:,} live keys would go",
            expected=f"at most {most:,}, as the plan showed" if expected else "the number that the plan showed",
        )


def plan(report: Report, order: Order) -> None:
    """What is kept, restored and removed, by database and prefix."""
    report.plan("keep", "a whole backup of the live server: the undo")
    for one in order.held[: findings.MOST_ROWS]:
        name = shown(one.prefix) or "every key"
        others = "go" if order.extra == "remove" else "stay"
        report.plan(
            "restore",
            f"db {one.database}, {name}: {one.backup:,} keys of the backup over {one.live:,} live ones; {one.extra:,} "
            f"that it does not have {others}",
            size=one.bytes,
            seconds=max(0.1, one.backup / KEYS_PER_SECOND),
        )
    if len(order.held) > findings.MOST_ROWS:
        report.plan("restore", f"and {len(order.held) - findings.MOST_ROWS} more")
    report.plan("prove", "every key of both sides, in small pieces", seconds=max(0.1, order.keys / KEYS_PER_SECOND))


def undo(kept: Backup, prefixes: Sequence[bytes]) -> str:
    """How to go back."""
    names = sorted({shown(prefix) for prefix in prefixes if prefix})
    which = f" prefixes=[{', '.join(names)}] extra=remove" if names else ""
    return f"restore-redis with backup={kept.name}{which}"
