"""PostgreSQL failovers under clients that write as fast as they can (§8.3): decision, fencing, and promotion until the
first acknowledged write apart, and what was lost of what was acknowledged.

Each on a cluster of its own (a primary, a standby, a receiver of WAL; a commit returns when one of the two has it),
new in each round; the flow runs in a process of its own, without Prefect.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.figures import Figure
from benchmarks.place import call, variables
from lab.progress import Tell
from tests.fixtures.postgres.clusters import NAME, running_cluster
from tests.fixtures.postgres.templates import Template

FLOW = "flows.recovery.postgres.failover:postgres_failover"
ROUNDS = 3
BAR_SECONDS = 3.0
# The last of them counts from pg_promote's call, and so has the promotion in it.
PHASES = ("decision", "fencing", "promote", "first acknowledged write")


@dataclass(frozen=True)
class Round:
    """One failover: seconds of each phase, and what a client saw."""

    phases: dict[str, float]
    acknowledged: int
    lost: int


def figures(tell: Tell, rounds: int = ROUNDS) -> list[Figure]:
    """Planned, and of a primary that was killed.

    Raises:
        OpsError: one failed.
    """
    template = Template.made()
    try:
        return [line for mode in ("planned", "unplanned") for line in _mode(template, mode, tell, rounds)]
    finally:
        template.remove()


def _mode(template: Template, mode: str, tell: Tell, rounds: int) -> list[Figure]:
    done = []
    for number in range(rounds):
        done.append(failover(template, mode))
        last = done[-1]
        tell(
            f"postgres failover, {mode} {number + 1}: {last.phases[PHASES[-1]]:.2f} s from pg_promote to a write, "
            f"{last.lost} of {last.acknowledged:,} writes lost"
        )
    name = f"PostgreSQL failover, {mode}"
    *apart, to_write = ([one.phases[phase] for one in done] for phase in PHASES)
    lost, writes = sum(one.lost for one in done), sum(one.acknowledged for one in done)
    return [
        *(Figure.seconds(f"{name}: {phase}", took) for phase, took in zip(PHASES, apart, strict=False)),
        Figure.seconds(f"{name}: promote → first acknowledged write", to_write, BAR_SECONDS),
        Figure("… acknowledged writes lost", lost, 0, shown=f"{lost} of {writes:,} in {rounds} rounds"),
    ]


def failover(template: Template, mode: str) -> Round:
    """One, under two clients that write from before it until after it. They have ended when their account is drawn."""
    with running_cluster(template) as cluster, variables(**cluster.variables):
        with cluster.writing() as writes:
            writes.wait(200)
            if mode == "unplanned":
                cluster.crash("postgres")
            facts = call(FLOW, NAME, direct=True, mode=mode, confirm=NAME).facts
            writes.wait(50)
        lost = writes.lost(cluster.sql("standby", "SELECT id FROM writes"))
        phases = {phase: float(facts[phase].removesuffix(" s")) for phase in PHASES}
        return Round(phases, len(writes.acknowledged), len(lost))
