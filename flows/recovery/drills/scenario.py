"""The interface of a drill's scenario, and the state that its steps get."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from prefect import Flow
from prefect.context import FlowRunContext

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.recovery.drills.phases import DrillPhases
from flows.recovery.drills.record import UnfinishedDrill
from runbook.change import Change, State
from runbook.kinds import Bound
from runbook.report import Report
from tasks.backups.manifest import Kind
from tasks.drill.clients import DrillClients
from tasks.faults.disposable import Fault

NOBODY = "nobody is named"
AGAIN = "run run-drill again: it heals the system after a drill that did not end"
RECOVERED = State("the system is recovered, and the drill has not ended", AGAIN)


@dataclass(frozen=True)
class Targets:
    """A scenario's limits, in seconds. `lost_writes`: writes acknowledged before the fault; -1: only the RPO counts."""

    rto_seconds: float
    rpo_seconds: float
    lost_writes: int = -1


@dataclass(frozen=True)
class Refusal:
    """A negative control: the sabotage, the runbook, and the reason of its refusal ("": it accepted the copy)."""

    sabotage: str
    runbook: str
    refused: str


@dataclass(frozen=True)
class Symptom:
    """The first problem that a sensor reported, and when."""

    sensor: str
    text: str
    at: datetime


@dataclass
class Drill:
    """The state of a drill. `runs`: reports of the runbooks that it launched, in order."""

    env: Environment
    report: Report
    directory: Path
    clients: DrillClients
    half_done: UnfinishedDrill
    page: bool = False
    """Whether the on-call person is really paged and must acknowledge."""
    phases: DrillPhases = field(default_factory=DrillPhases)
    fault: Fault | None = None
    symptoms: list[Symptom] = field(default_factory=list)
    runs: list[Report] = field(default_factory=list)
    recovered: datetime | None = None
    served: datetime | None = None
    recovered_to: datetime | None = None
    """The moment of the restored data, if the runbook restores one: the clients may have begun later."""
    done: dict[str, str] = field(default_factory=dict)
    """Boxes of the training checklist that the drill has checked (`checklist.BOXES`), and the evidence."""

    def run(self, flow: Flow[..., Report], **parameters: Any) -> Report:
        """Launch a runbook in the drill's environment; in Prefect as a subflow.

        Raises:
            RunbookFailed: its report is CRITICAL.
        """
        return self.keep(launch(flow, environment=self.env.name, **parameters))

    def keep(self, report: Report) -> Report:
        """Add a runbook's report to this drill."""
        self.runs.append(report)
        return report

    def note(self, **facts: str) -> None:
        """Write notes to disk before a step that the next run would have to undo."""
        self.half_done = self.half_done.noted(self.env.reports_directory, **facts)


def launch(flow: Flow[..., Report], **parameters: Any) -> Report:
    """Run a runbook inside this one, under the lock of this run."""
    call = flow if FlowRunContext.get() else flow.fn
    return call(**parameters)


class Scenario(abc.ABC):
    """One scenario: steady state, fault, recovery by the real runbook, checks. If a step raises OpsError, the drill
    heals the system and is CRITICAL."""

    name: ClassVar[str]
    title: ClassVar[str]
    situation: ClassVar[str]
    goal: ClassVar[str]
    checks: ClassVar[str]
    """As in §8.4."""
    backups: ClassVar[tuple[Kind, ...]]
    """Kinds of backup that must have a verified one before anything is broken."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Parts of the environment that it needs."""
    sensors: ClassVar[tuple[str, ...]]
    """One of these sensors (`detection.SENSORS`) must notice the fault."""

    @abc.abstractmethod
    def targets(self, env: Environment) -> Targets:
        """The limits of this scenario."""

    @abc.abstractmethod
    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return the action that makes the fault, with the arguments that the plan knows."""

    @abc.abstractmethod
    def judge(self, report: Report, env: Environment) -> None:
        """Conditions of the steady state that only this scenario has. Findings only."""

    def strike(self, drill: Drill, fault: Bound[..., Fault]) -> Fault:
        """Make the fault, with the arguments that only the drill knows."""
        return fault()

    @abc.abstractmethod
    def decide(self, drill: Drill) -> None:
        """Phase 2: the runbook's plan (an empty confirm)."""

    @abc.abstractmethod
    def restore(self, drill: Drill) -> Report:
        """DrillPhases 3 and 4: run the runbook; returns its report."""

    @abc.abstractmethod
    def verify(self, drill: Drill) -> None:
        """Phase 5: this scenario's own checks, into `drill.report`. The clients still write."""

    def settled_by(self, env: Environment) -> Sequence[str]:
        """Return the runbooks of `settle`; none where the recovery leaves the steady state."""
        return ()

    def settle(self, drill: Drill) -> None:
        """After the checks: restore the steady state, e.g. a standby to fail over to."""
        assert not self.settled_by(drill.env), "a scenario that names runbooks launches them"

    @abc.abstractmethod
    def control(self, drill: Drill) -> list[Refusal]:
        """The same runbook on sabotaged copies. The live system does not change."""

    @abc.abstractmethod
    def heal(self, drill: Drill) -> None:
        """From any step at which the drill stopped (`drill.half_done`) to a healthy system. Idempotent."""

    def completing(self, env: Environment, broken: Sequence[str]) -> Sequence[Bound[[], Any]]:
        """Return the actions with which `heal` completes a half-done fault. `broken`: the targets that it broke."""
        return ()

    def recovering(self, drill: Drill) -> Change[[], None]:
        """Plan phases 3 and 4."""

        def recover() -> None:
            with drill.phases.phase(3):
                run = self.restore(drill)
            drill.phases.split(run)
            drill.recovered = now()

        return Change(recover, "recover", self.goal, done=RECOVERED)

    def controlling(self, drill: Drill) -> Change[[], list[Refusal]]:
        """Plan the negative controls."""
        return Change(
            lambda: self.control(drill),
            "sabotage a copy",
            "the same runbook must refuse it",
            begun=State("the drill gives sabotaged copies to the runbook", AGAIN),
            done=RECOVERED,
            is_final=True,
        )

    def more_sensors(self) -> Mapping[str, Callable[[Environment, Path], str]]:
        """In addition to `detection.SENSORS`."""
        return {}

    def notes(self) -> dict[str, str]:
        """Notes that the run after a killed one needs."""
        return {}

    def address(self, env: Environment) -> str | Callable[[], str]:
        """Where users are sent."""
        return env.application.url

    def servers(self, env: Environment) -> list[Postgres]:
        """Servers among which the database's client finds the one that accepts writes."""
        return env.nodes()

    def live(self, env: Environment) -> Environment:
        """The environment that serves users after the recovery."""
        return env


def now() -> datetime:
    """UTC."""
    return datetime.now(UTC)
