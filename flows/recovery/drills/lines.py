"""The plan of a drill, line by line: the fault, the recovery, the steady state, the negative controls, the clean-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from flows.recovery.drills import alerting, leftovers, record, steady
from flows.recovery.drills.record import UnfinishedDrill
from flows.recovery.drills.scenario import AGAIN, RECOVERED, Drill, Refusal, Scenario
from runbook.change import Change, Line, State
from runbook.current import removed
from runbook.failpoint import failpoint
from runbook.report import Report
from tasks.drill.direct import drop_table
from tasks.faults.disposable import BREAK, Fault

TABLE = "table interview_ops_drill"
HOLD_AGAIN = "run run-drill again to hold a new one"
HEALED = State("the system is healed, and the drill has not ended", AGAIN)
ENDED = State("the drill has ended, and the system is healthy", HOLD_AGAIN)


@dataclass(frozen=True)
class DrillLines:
    """The changes of a drill. `settling` is None where the recovery leaves the steady state."""

    breaking: Change[[], Fault]
    recovering: Change[[], None]
    settling: Change[[], None] | None
    controlling: Change[[], list[Refusal]]
    cleaning: Change[[], None]

    @classmethod
    def of(cls, drill: Drill, scenario: Scenario) -> DrillLines:
        """Plan a drill of this scenario."""
        return cls(
            _breaking(drill, scenario),
            scenario.recovering(drill),
            _settling(drill, scenario),
            scenario.controlling(drill),
            cleaning(drill, scenario, "the clients' table, and the old data that the recoveries kept", leftovers.clear),
        )

    @property
    def in_order(self) -> list[Line[..., Any]]:
        """Return the lines as they are carried out."""
        lines = (self.breaking, self.recovering, self.settling, self.controlling, self.cleaning)
        return [one for one in lines if one]


def _breaking(drill: Drill, scenario: Scenario) -> Change[[], Fault]:
    """Plan the fault, which needs the steady state. If the drill fails, the reverse heals the system."""
    fault = scenario.fault(drill.env)

    def strike() -> Fault:
        drill.note(step="the fault")  # on disk first
        failpoint("drill: noted")
        drill.fault = scenario.strike(drill, fault)
        drill.report.fact("fault", drill.fault.what)
        failpoint("drill: struck")
        return drill.fault

    def judge(report: Report) -> None:
        drill.done |= steady.judge(report, drill.env, scenario, drill.directory / "evidence")

    def heal() -> None:
        scenario.heal(drill)
        drill.report.state_is(HEALED.what, HEALED.hint)

    broken = State("the drill has broken the system", AGAIN)
    return Change(
        strike,
        BREAK,
        ", ".join(act.target for act in fault.acts),
        by=[fault],
        needs=[judge],
        begun=broken,
        done=broken,
        reverse=heal,
    )


def _settling(drill: Drill, scenario: Scenario) -> Change[[], None] | None:
    runbooks = ", ".join(scenario.settled_by(drill.env))
    if not runbooks:
        return None
    work = partial(scenario.settle, drill)
    return Change(work, "return to the steady state", runbooks, done=RECOVERED)


def healing(drill: Drill, scenario: Scenario, left: UnfinishedDrill) -> Change[[], None]:
    """Plan to heal the system after a killed drill."""
    return Change(
        partial(scenario.heal, drill),
        "heal",
        left.text,
        by=scenario.completing(drill.env, left.broken),
        begun=State(f"a half-done drill is being healed: {left.text}", AGAIN),
        done=HEALED,
    )


def cleaning(drill: Drill, scenario: Scenario, what: str, end: Callable[[Drill], object]) -> Change[[], None]:
    """Plan what ends a drill. `end`: deletes or reports the old data that its recoveries kept."""

    def clean() -> None:
        live = scenario.live(drill.env)
        drop_table(live.postgres, live.postgres.database)
        removed(TABLE)
        alerting.close(drill)
        end(drill)
        record.forget(drill.env.reports_directory)

    return Change(clean, "clean up", what, done=ENDED)
