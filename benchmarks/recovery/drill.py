"""A drill of a database failure (§8.4) on the bench lab: how long the fault went unnoticed, and what the drill itself
cost. It is the last measurement: the other server is the primary afterwards."""

from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.place import NAME, Place
from tests.recovery.conftest import System
from tests.recovery.drills.running import steady

DRILL = "flows.recovery.drills.drill:run_drill"
BACKUP = "flows.database.base_backup:backup_cluster"
OVERHEAD = "overhead of the drill"
VERIFY = "flows.database.backup:verify_backup"


def figures(place: Place) -> list[Figure]:
    """Raises OpsError where the drill is not passed."""
    place.call(BACKUP, kind="full")
    place.call(VERIFY, kind="cluster")
    steady(System(place.lab))
    called = place.call(DRILL, scenario="database_failure", confirm=NAME)
    seconds = {part: float(took) for part, took in _table(called.told(), "The drill's seconds")}
    own = seconds["the drill itself"]
    place.tell(f"drill: {called.seconds:.1f} s; its own overhead: {called.facts[OVERHEAD]}")
    return [
        Figure.seconds(
            "database failure in a drill: from the fault until the monitoring noticed it",
            [seconds["waiting for the alarm"]],
        ),
        Figure(
            "a drill's own overhead: neither waiting for the alarm, nor runbooks, nor checks",
            own,
            ours=own,
            unit="s",
            shown=f"{own:.2f} s of {called.seconds:.1f} s",
        ),
    ]


def _table(report: dict[str, object], name: str) -> list[list[str]]:
    evidence = report["evidence"]
    assert isinstance(evidence, list)
    return next(list(one["rows"]) for one in evidence if one["name"] == name)
