"""Keys that may go, counted and unlinked page by page (§2.2).

No call holds the server for longer than a fraction of a millisecond, but for what a single big value takes: other
clients go in between. What is deleted propagates to the replicas as UNLINK.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.progress import progress
from runbook.wait import until
from tasks.redis.background import in_background
from tasks.redis.cache.flushing import slack
from tasks.redis.cache.pages import Ask
from tasks.redis.cache.recheck import Recheck, reason
from tasks.redis.cache.selection import Selection
from tasks.redis.cache.server import CacheServer, require_same
from tasks.redis.cache.sweep import FIRST_KEYS, Pace, Sweep, Tally, describe, sweep
from tasks.redis.server import connected

UNLINK = "unlink Redis keys of"
MEASURED_KEYS = 20_000
FREEING_SECONDS = 60.0


@dataclass(frozen=True)
class Order:
    """What is to be unlinked, as it was planned: `planned` -1 was not counted, then as many go as are found; else it
    stops where the number is beyond the tolerance. `waived`: the Sentinels need not vouch for the master."""

    selection: Selection
    databases: tuple[int, ...]
    server: CacheServer
    planned: int = -1
    keys_per_second: int = 0
    waived: bool = False

    @property
    def where(self) -> str:
        """For people."""
        return f"{', '.join(f'db {number}' for number in self.databases) or 'any database'} of {self.server.address}"

    @property
    def target(self) -> str:
        """For people and permits."""
        counted = f": {self.planned:,} keys" if self.planned >= 0 else ""
        return f"{self.selection.told} in {self.where}{counted}"

    def require_room(self, keys: int) -> None:
        """Raises OpsError where more were unlinked than the tolerance allows (by a page at most)."""
        if self.planned >= 0 and keys > self.planned + slack(self.planned):
            raise OpsError(
                f"there are more keys than the {self.planned:,} that were planned",
                "look who adds them, then plan again with an empty confirm",
            )


@dataclass(frozen=True)
class Freed:
    """Memory after the work; `pending` values are still being freed."""

    used_bytes: int
    pending: int


@probe
def find_keys(block: Redis, selection: Selection, databases: tuple[int, ...], server: CacheServer) -> Sweep:
    """Count what a clearing would unlink, by prefix, and describe the first keys.

    Raises:
        Unreachable: it does not answer.
        OpsError: it refuses a command, or is not the server that it was (restarted, or with another role).
    """
    tally = Tally(server.keys_in(databases))
    with connected(block) as client, progress(lambda: tally.told("counted")):

        def pages() -> Generator[None, None, None]:
            for number in databases:
                yield from sweep(block, number, _ask(selection, server, number), tally, names=FIRST_KEYS)

        require_same(client, server)
        in_background(pages())
        require_same(client, server)
        return tally.result(describe(block, tally.names))


@action
def unlink_keys(permit: Permit, block: Redis, order: Order) -> Sweep:
    """Unlink what the order names, page by page. An error on the way ends it and is part of the result (`stopped`).

    That the server is still the master it says itself with every page that unlinks (READONLY); every second, and after
    the last page, it is asked whether it is the same, and the Sentinels whether they vouch for it.

    Raises:
        NotConfirmed: the permit does not cover the order.
    """
    permit.require(UNLINK, order.target)
    server, tally = block.at(order.server.address), Tally(order.server.keys_in(order.databases))
    try:
        with connected(server) as client, progress(lambda: tally.told("unlinked")):
            recheck = Recheck(block, client, order.server, waived=order.waived)
            in_background(_unlinking(server, order, tally, recheck))
    except OpsError as error:
        return tally.result(stopped=reason(block, server.address, error), lost=isinstance(error, Unreachable))
    return tally.result()


def _unlinking(server: Redis, order: Order, tally: Tally, recheck: Recheck) -> Generator[None, None, None]:
    pace = Pace(order.keys_per_second)

    def between() -> None:
        order.require_room(tally.keys)
        pace.keep(tally.keys)
        recheck()

    for number in order.databases:
        recheck.now()  # each has a connection of its own, that another server may take
        ask = _ask(order.selection, order.server, number, unlink=True)
        yield from sweep(server, number, ask, tally, most_step=pace.most_step, between=between)
    recheck.now()


@probe
def read_freed(block: Redis) -> Freed:
    """Memory in use when what was unlinked has been freed, or a minute later.

    Raises:
        Unreachable: it does not answer.
    """
    with connected(block) as client:

        def pending() -> int:
            return int(client.info("memory").get("lazyfree_pending_objects", 0))

        with contextlib.suppress(Unreachable):
            until(lambda: not pending(), what="the freeing", seconds=FREEING_SECONDS)
        return Freed(int(client.info("memory")["used_memory"]), pending())


def _ask(selection: Selection, server: CacheServer, number: int, *, unlink: bool = False) -> Ask:
    stride = max(1, server.keys_in((number,)) // MEASURED_KEYS)
    return Ask(selection, unlink, stride, server.scripts)
