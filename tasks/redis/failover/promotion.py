"""A promotion: the choice, the new master, the Sentinels' agreement, the replicas (§8.3)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.wait import until
from tasks.application.acknowledged import AcknowledgedWrites
from tasks.redis.failover.group import GroupMember, quick_client, read_member
from tasks.redis.sentinels import SentinelView, ask_sentinels

AGREE_SECONDS = 20.0
TURNING_SECONDS = 0.5
UNKNOWN_TIMEOUT_SECONDS = 180.0
"""The Sentinels' default failover-timeout."""
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class PromotionChoice:
    """The pinned choice: from which master to which replica.

    `replicas`: all that can be promoted; `needed`: those that must have every byte before; `sentinels`: those that
    answer; the first starts the failover, and `majority` must agree at the end. `pause_seconds`: how long writes can be
    paused before the Sentinels see the master as down.
    """

    master: str
    candidate: str
    replid: str
    needed: tuple[str, ...]
    replicas: tuple[str, ...]
    sentinels: tuple[str, ...]
    majority: int
    pause_seconds: float
    coordinated: bool = False

    @property
    def target(self) -> str:
        """The act's target in a permit."""
        return f"{self.master} → {self.candidate}"


@dataclass(frozen=True)
class HandOver:
    """The result. Seconds are counted from the pause of writes (or the start of an unplanned failover).

    `stood`: the stream's offset during the pause, -1: no pause.
    """

    old: str
    new: GroupMember
    how: str
    stood: int
    replid: str
    unbroken: bool
    caught_up_seconds: float
    switch_seconds: float
    agreed_seconds: float
    first_write_seconds: float
    account: AcknowledgedWrites

    @property
    def missing_bytes(self) -> int:
        """Bytes of the old master's stream that the new master lacked at its promotion; -1: unknown."""
        if self.stood < 0 or self.new.earlier_replid != self.replid:
            return -1
        return max(0, self.stood - self.new.promoted_at)

    @property
    def lost_nothing(self) -> bool:
        """Proven: writes were paused until the old master was demoted, and the new master had all of them."""
        return self.missing_bytes == 0 and self.unbroken and not self.account.missing


def await_promotion(
    block: Redis, choice: PromotionChoice, seconds: float, look: Callable[[], None] | None = None
) -> GroupMember:
    """The first replica that reports the role master."""
    with clients_of(block, choice.replicas) as clients:

        def promoted() -> GroupMember | None:
            for address, client in clients.items():
                with contextlib.suppress(redis.RedisError):  # the Sentinels close clients' connections
                    if client.info("replication")["role"] == "master":
                        member = read_member(block, address)
                        return member if member.is_master else None
            if look:
                look()
            return None

        found = until(
            promoted,
            what="a promotion",
            seconds=seconds,
            every_seconds=POLL_SECONDS,
            hint="check the Sentinels' logs (-failover-abort-…), then run it again: it reports the master",
        )
    assert found
    return found


def await_late_promotion(block: Redis, choice: PromotionChoice) -> GroupMember:
    """The same for a failover that is in progress. It cannot be aborted, and a suspended replica is promoted when it
    resumes. So wait until the Sentinels have ended it.

    Raises:
        OpsError: they aborted it, and no replica was promoted.
        Unreachable: they do not report its end in time.
    """

    def require_under_way() -> None:
        seen = views(block, choice)
        moving = any(view.in_progress or view.master not in ("", choice.master) for view in seen)
        if seen[0].answers and not moving:
            raise OpsError(
                "the Sentinels aborted their failover: no replica was promoted in time; writes continue",
                f"check {choice.candidate} (is it suspended?) and the Sentinels' logs, then run it again",
            )

    known = [view.settings.get("failover-timeout", 0) / 1000 for view in views(block, choice)]
    # The Sentinel aborts after its failover-timeout, which starts again with each of two steps.
    return await_promotion(
        block, choice, 2 * (max(known) or UNKNOWN_TIMEOUT_SECONDS) + AGREE_SECONDS, require_under_way
    )


def await_agreement(block: Redis, choice: PromotionChoice, new: GroupMember) -> None:
    """Wait until all Sentinels that answer, and enough of them, name the new master.

    The Sentinel that carries it out gives clients the new address while it still reconfigures the other replicas.
    Because writes are paused, that is awaited for at most `TURNING_SECONDS`.
    """
    turning = time.monotonic() + TURNING_SECONDS

    def agreed() -> bool:
        late = time.monotonic() > turning
        answers = [view for view in views(block, choice) if view.answers]
        named = [view.master == new.address or (late and view.in_progress) for view in answers]
        return len(answers) >= choice.majority and all(named)

    what = f"agreement of the Sentinels on {new.address}"
    until(agreed, what=what, seconds=AGREE_SECONDS, every_seconds=0.05, hint="run it again: it reports the master")


def views(block: Redis, choice: PromotionChoice) -> tuple[SentinelView, ...]:
    return ask_sentinels(block.model_copy(update={"sentinels": list(choice.sentinels)})).views


@probe
def wait_in_sync(block: Redis, master: str, addresses: Sequence[str], seconds: float) -> dict[str, GroupMember]:
    """Wait until the servers follow `master` and have its current bytes; returns their state, also of those that are
    late (`is_in_sync_with`)."""
    found: dict[str, GroupMember] = {}
    target = read_member(block, master)

    def in_sync() -> bool:
        for address in addresses:
            if address not in found or not found[address].is_in_sync_with(target):
                found[address] = read_member(block, address)
        return all(found[address].is_in_sync_with(target) for address in addresses)

    with contextlib.suppress(Unreachable):
        until(in_sync, what="replicas in sync", seconds=seconds)
    return found


@contextlib.contextmanager
def clients_of(block: Redis, addresses: Sequence[str]) -> Iterator[dict[str, redis.Redis]]:
    clients = {address: quick_client(block.at(address)) for address in addresses}
    try:
        yield clients
    except redis.RedisError as error:
        raise block.refused(error) from None
    finally:
        for client in clients.values():
            client.close()
