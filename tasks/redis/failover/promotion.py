"""A promotion as it is seen from outside: who was chosen, who is master now, who agrees, who follows (§8.3)."""

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
from tasks.application.acknowledged import Account
from tasks.redis.failover.group import Member, quick_client, read_member
from tasks.redis.sentinels import SentinelView, ask_sentinels

AGREE_SECONDS = 20.0
TURNING_SECONDS = 0.5
UNKNOWN_TIMEOUT_SECONDS = 180.0
"""The Sentinels' own failover-timeout where none is set."""
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Choice:
    """What was judged and is pinned: from which master to which replica, and who else may be promoted.

    `replicas` are all that a promotion may be seen at; `needed` those that must have every byte before it;
    `sentinels` those that answer, of which the first is asked and `majority` must agree in the end. `pause_seconds`:
    for how long writes may stand still without the Sentinels taking the master for dead.
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
        """What the permit names."""
        return f"{self.master} → {self.candidate}"


@dataclass(frozen=True)
class HandOver:
    """How it went. Seconds are counted from the moment in which writes were paused (or a dead master was acted on).

    `stood` is the offset of the stream at which it stood still when paused, -1 where it was not.
    """

    old: str
    new: Member
    how: str
    stood: int
    replid: str
    unbroken: bool
    caught_up_seconds: float
    switch_seconds: float
    agreed_seconds: float
    first_write_seconds: float
    account: Account

    @property
    def missing_bytes(self) -> int:
        """Bytes of the old master's stream that the new one did not have when it was promoted; -1 where unknown."""
        if self.stood < 0 or self.new.earlier_replid != self.replid:
            return -1
        return max(0, self.stood - self.new.promoted_at)

    @property
    def lost_nothing(self) -> bool:
        """Proven: writes stood still until the old master was none any more, and the new one had all before."""
        return self.missing_bytes == 0 and self.unbroken and not self.account.missing


def await_promotion(block: Redis, choice: Choice, seconds: float, look: Callable[[], None] | None = None) -> Member:
    """The first of the replicas that says that it is a master."""
    with clients_of(block, choice.replicas) as clients:

        def promoted() -> Member | None:
            for address, client in clients.items():
                with contextlib.suppress(redis.RedisError):  # the Sentinels end clients' connections
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


def await_late_promotion(block: Redis, choice: Choice) -> Member:
    """The same, of a failover that was begun and takes its time: nobody can call it off, and a replica that stood still
    is promoted whenever it wakes. So it is waited for until the Sentinels themselves have ended it.

    Raises:
        OpsError: they have given it up, and nobody was promoted.
        Unreachable: they, or the one that was asked, do not say so for longer than it may take.
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
    # The Sentinel gives up after its failover-timeout, which it counts anew with each of two steps.
    return await_promotion(
        block, choice, 2 * (max(known) or UNKNOWN_TIMEOUT_SECONDS) + AGREE_SECONDS, require_under_way
    )


def await_agreement(block: Redis, choice: Choice, new: Member) -> None:
    """Until all Sentinels that answer, and enough of them, name the new master.

    The one that carries it out gives clients the new address while it still turns the other replicas round, however
    long that takes: it is not waited for beyond `TURNING_SECONDS`, as writes stand still.
    """
    turning = time.monotonic() + TURNING_SECONDS

    def agreed() -> bool:
        late = time.monotonic() > turning
        answers = [view for view in views(block, choice) if view.answers]
        named = [view.master == new.address or (late and view.in_progress) for view in answers]
        return len(answers) >= choice.majority and all(named)

    told = f"agreement of the Sentinels on {new.address}"
    until(agreed, what=told, seconds=AGREE_SECONDS, every_seconds=0.05, hint="run it again: it reports the master")


def views(block: Redis, choice: Choice) -> tuple[SentinelView, ...]:
    return ask_sentinels(block.model_copy(update={"sentinels": list(choice.sentinels)})).views


@probe
def wait_in_sync(block: Redis, master: str, addresses: Sequence[str], seconds: float) -> dict[str, Member]:
    """Wait until the servers follow `master` and have all that it has now; those that do not in time are in the answer
    as they are (`is_in_sync_with`)."""
    found: dict[str, Member] = {}
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
