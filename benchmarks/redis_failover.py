"""A Redis failover under a client that writes as fast as it can (§8.3): decision, switch and first acknowledged write
apart, and what was lost of what was acknowledged.

The servers are a group of its own (a master, a replica, three Sentinels), new in each round; the flow runs in a process
of its own, without Prefect: what its steps cost there stands beside the other figures already.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.figures import Figure
from lab.progress import Tell
from lab.state.base import CHECKOUT
from runbook import shell
from tasks.redis.server import call
from tests.redis.servers import MASTER, NAME, Group, replicated
from tests.redis.writer import Writer

FAILOVER = "flows.recovery.redis.failover:redis_failover"
ROUNDS = 3
BAR_SECONDS = 3.0
DOWN_AFTER_MS = 5000
PHASES = ("decision", "switch", "first acknowledged write", "switch and first acknowledged write")


@dataclass(frozen=True)
class Round:
    """One failover. `gap_seconds`: the longest time without an acknowledged write, as the client saw it."""

    phases: dict[str, float]
    acknowledged: int
    lost: int
    gap_seconds: float


def figures(tell: Tell, rounds: int = ROUNDS) -> list[Figure]:
    """Planned failovers.

    Raises:
        OpsError: one failed.
    """
    done = []
    for number in range(rounds):
        done.append(planned())
        last = done[-1]
        together = last.phases["switch and first acknowledged write"]
        tell(f"redis failover {number + 1}: {together:.2f} s, {last.lost} of {last.acknowledged:,} writes lost")
    lost, writes = sum(one.lost for one in done), sum(one.acknowledged for one in done)
    shown = f"{lost} of {writes:,} in {rounds} rounds"
    return [
        *(
            Figure.seconds(
                f"Redis failover, planned: {phase}",
                [one.phases[phase] for one in done],
                BAR_SECONDS if phase == PHASES[-1] else None,
            )
            for phase in PHASES
        ),
        Figure.seconds("… longest time without an acknowledged write", [one.gap_seconds for one in done], BAR_SECONDS),
        Figure("… acknowledged writes lost", lost, 0, shown=shown),
    ]


def planned() -> Round:
    """One planned failover, under load from before it until after it."""
    with _group() as group, Writer(group) as writer:
        argv = [sys.executable, "-m", "benchmarks.call", FAILOVER]
        argv += [json.dumps({"environment": NAME, "mode": "planned", "confirm": NAME}), "--direct"]
        facts = json.loads(shell.run(argv, directory=CHECKOUT, inherit=("*",)).stdout.splitlines()[-1])["facts"]
        writer.wait(50)
        new = group.at(group.agreed_master())
        writer.stop()
        phases = {phase: float(facts[phase].removesuffix(" s")) for phase in PHASES}
        return Round(phases, len(writer.acknowledged), len(writer.lost(new)), writer.longest_gap())


@contextmanager
def _group() -> Iterator[Group]:
    """Registered as an environment, for processes that this one starts."""
    kept = dict(os.environ)
    try:
        with replicated() as group:
            for sentinel in group.sentinels:
                call(sentinel.client(), "SENTINEL", "SET", MASTER, "down-after-milliseconds", DOWN_AFTER_MS)
            group.register(Variables())
            yield group
    finally:
        os.environ.clear()
        os.environ.update(kept)


class Variables:
    """What `register` needs of pytest's monkeypatch; `_group` puts the variables back."""

    def setenv(self, name: str, value: str) -> None:
        """Set it."""
        os.environ[name] = value
