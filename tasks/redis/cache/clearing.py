"""Count the keys of a clearing, and unlink them page by page (§2.2).

No call occupies the server for longer than a fraction of a millisecond, except for one large value: other clients are
served in between. Deletions reach the replicas as UNLINK.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.progress import progress
from runbook.wait import until
from tasks.redis.background import in_background
from tasks.redis.cache.flushing import slack
from tasks.redis.cache.pages import SweepRequest
from tasks.redis.cache.selection import KeySelection
from tasks.redis.cache.server import CacheServer, MasterCheck, reason, require_same
from tasks.redis.cache.sweep import FIRST_KEYS, Sweep, SweepTally, describe, sweep
from tasks.redis.server import connected

UNLINK = "unlink Redis keys of"
MEASURED_KEYS = 20_000
FREEING_SECONDS = 60.0


@dataclass(frozen=True)
class ClearingOrder:
    """A planned clearing. `planned` keys were counted, and it stops beyond their tolerance; -1: not counted. `waived`:
    too few Sentinels may name the master."""

    selection: KeySelection
    databases: tuple[int, ...]
    server: CacheServer
    planned: int = -1
    waived: bool = False

    @property
    def where(self) -> str:
        """The databases, for people."""
        return f"{', '.join(f'db {number}' for number in self.databases) or 'any database'} of {self.server.address}"

    @property
    def target(self) -> str:
        """The keys and databases, for people and permits."""
        counted = f": {self.planned:,} keys" if self.planned >= 0 else ""
        return f"{self.selection.text} in {self.where}{counted}"

    def require_planned(self, keys: int) -> None:
        """Raises OpsError if more keys were unlinked than the tolerance allows (by one page at most)."""
        if self.planned >= 0 and keys > self.planned + slack(self.planned):
            raise OpsError(
                f"there are more keys than the {self.planned:,} planned ones",
                "find out which client adds them, then plan again with an empty confirm",
            )


@dataclass(frozen=True)
class Freed:
    """Memory after the clearing. `pending` values are still being freed."""

    used_bytes: int
    pending: int


@probe
def find_keys(block: Redis, selection: KeySelection, databases: tuple[int, ...], server: CacheServer) -> Sweep:
    """Count what a clearing would unlink, by prefix, and describe the first keys.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses a command, or was restarted or demoted since it was read.
    """
    tally = SweepTally(server.keys_in(databases))
    with connected(block) as client, progress(lambda: tally.progress("counted")):

        def pages() -> Generator[None, None, None]:
            for number in databases:
                yield from sweep(block, number, _request(selection, server, number), tally, names=FIRST_KEYS)

        require_same(client, server)
        in_background(pages())
        require_same(client, server)
        return tally.result(describe(block, tally.names))


@action(of=lambda order: Act(UNLINK, order.target))
def unlink_keys(block: Redis, order: ClearingOrder) -> Sweep:
    """Unlink the order's keys, page by page. An error ends it and is part of the result (`stopped`).

    A server that is no longer the master refuses a page (READONLY). Every second, and after the last page, it is also
    compared with the server that was planned, and the Sentinels are queried.
    """
    server, tally = block.at(order.server.address), SweepTally(order.server.keys_in(order.databases))
    try:
        with connected(server) as client, progress(lambda: tally.progress("unlinked")):
            recheck = MasterCheck(block, client, order.server, waived=order.waived)
            in_background(_unlink(server, order, tally, recheck))
    except OpsError as error:
        return tally.result(stopped=reason(block, server.address, error), lost=isinstance(error, Unreachable))
    return tally.result()


def _unlink(
    server: Redis, order: ClearingOrder, tally: SweepTally, recheck: MasterCheck
) -> Generator[None, None, None]:
    def before_page() -> None:
        order.require_planned(tally.keys)
        recheck()

    for number in order.databases:
        recheck.now()  # each database has its own connection, which another server may accept
        request = _request(order.selection, order.server, number, unlink=True)
        yield from sweep(server, number, request, tally, before_page=before_page)
    recheck.now()


@probe
def read_freed(block: Redis) -> Freed:
    """Memory in use once the unlinked values are freed, or after a minute.

    Raises:
        Unreachable: the server does not answer.
    """
    with connected(block) as client:

        def pending() -> int:
            return int(client.info("memory").get("lazyfree_pending_objects", 0))

        with contextlib.suppress(Unreachable):
            until(lambda: not pending(), what="the freeing of unlinked values", seconds=FREEING_SECONDS)
        return Freed(int(client.info("memory")["used_memory"]), pending())


def _request(selection: KeySelection, server: CacheServer, number: int, *, unlink: bool = False) -> SweepRequest:
    return SweepRequest(selection, unlink, max(1, server.keys_in((number,)) // MEASURED_KEYS))
