"""The services of a full restore, held from their stop until what is live is proven."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from blocks.environment import START_ORDER, STOP_ORDER, Environment
from flows.recovery.full.choose import Chosen
from flows.recovery.full.database_server import Found
from flows.redis.restore.steps import put_back
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.host.services import start_services, stop_services
from tasks.redis.restore.swap import stop_redis
from tasks.redis.topology.isolation import detach
from tasks.redis.topology.topology import ReplicationTopology


@dataclass
class Held:
    """The services of one run: since when they are stopped, and how far the swap has come. `last` is the step that
    the next one stands behind in the graph. `undo` is how to go back: only what this run kept is offered."""

    report: Report
    env: Environment
    permit: Permit
    around: ReplicationTopology | None
    running: list[str]
    last: object
    stopping_at: datetime | None = None
    stopped_at: datetime | None = None
    swapped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    undo: str = ""

    def stop(self) -> None:
        """In the manual's order, each proven stopped."""
        if self.stopping_at:
            return
        self.stopping_at = datetime.now(UTC)
        roles = [role for role in self.env.services_in(STOP_ORDER) if role != "redis"]
        self.last = stop_services.after(self.last)(self.env.services, roles)
        if self.env.has("redis"):
            self.take_off()
            self.last = stop_redis.after(self.last)(self.env.redis, self.env.services)
        self.stopped_at = datetime.now(UTC)

    def take_off(self) -> None:
        """The replicas and Sentinels of Redis, before it stops: they would make another server the master."""
        if self.around:
            self.around = detach.after(self.last)(self.permit, self.env.redis, self.around, self.env.reports_directory)

    def start_again(self) -> None:
        """What ran when the run began. A failure of that must not hide why it is done."""
        try:
            start_services(self.env.services, [role for role in START_ORDER if role in self.running])
            if self.around and "redis" in self.running:
                put_back(self.report, self.env, self.permit, self.around)
        except OpsError as error:
            self.report.fail("services started again", error.hint, value=error.message)
            self.report.state_is(
                "nothing live was replaced; services were stopped, and not all of them run again",
                f"start {', '.join(self.running)} by hand, then launch this again",
            )

    def may_have_swapped(self, part: str, left: Sequence[str]) -> None:
        """Nobody can say whether it was: the services stay as they are, and the next run brings all to one state."""
        self.swapped.append(f"perhaps the {part}")
        self.report.state_is(
            f"whether the {part} was swapped is not known; not swapped: {', '.join(left) or 'nothing else'}; services "
            "are stopped",
            f"launch it again with confirm={self.env.name}: it begins anew and ends well",
        )

    def has_swapped(self, part: str, kept: object, left: Sequence[str]) -> None:
        """Note what is live now, for the reader of a run that failed after this."""
        self.swapped.append(part)
        self.kept += [str(kept)] if kept else []
        aside = f"kept aside: {', '.join(self.kept) or 'nothing'}"
        if left:
            self.report.state_is(
                f"swapped: {', '.join(self.swapped)}; not swapped: {', '.join(left)}; services are stopped; {aside}",
                f"launch it again with confirm={self.env.name}: it begins anew and ends well",
            )
        else:
            self.report.state_is(
                f"the backups' data is live, proven; {aside}",
                "fix the findings above and start the services; restoring again would lose what was written since. "
                + self.undo,
            )


@contextlib.contextmanager
def services_held(
    report: Report, permit: Permit, env: Environment, chosen: Chosen, found: Found, when: str, after: object
) -> Iterator[Held]:
    """Stopped first, or at the swap. Where the run fails before anything was swapped, they are as they were found."""
    held = Held(
        report,
        env,
        permit,
        chosen.around_redis,
        [role for role in STOP_ORDER if found.services.running.get(role)],
        after,
    )
    report.state_is(
        "nothing live was replaced; services are as they were found",
        "launch it again when what is said above is put right",
    )
    try:
        if when == "first":
            held.stop()
        yield held
    except BaseException:
        if held.stopping_at and not held.swapped:
            held.start_again()
        raise
