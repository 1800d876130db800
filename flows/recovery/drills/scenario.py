"""What a scenario of a drill is, and what its steps get."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from prefect import Flow
from prefect.context import FlowRunContext

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.recovery.drills.phases import Phases
from flows.recovery.drills.record import HalfDone
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from tasks.backups.manifest import Kind
from tasks.drill.clients import Clients
from tasks.faults.disposable import Fault


@dataclass(frozen=True)
class Targets:
    """What a scenario must reach. `lost_writes`: of the acknowledged ones before the fault; -1 where only the RPO
    (seconds) counts."""

    rto_seconds: float
    rpo_seconds: float
    lost_writes: int = -1


@dataclass(frozen=True)
class Refusal:
    """A negative control: what was sabotaged, in what copy, and how the runbook refused it; empty: it did not."""

    sabotage: str
    runbook: str
    refused: str


@dataclass(frozen=True)
class Symptom:
    """What a sensor of the monitoring said first, and when."""

    sensor: str
    told: str
    at: datetime


@dataclass
class Drill:
    """One drill as it goes on. `runs` are the reports of the runbooks that it launched, in their order."""

    env: Environment
    report: Report
    permit: Permit
    directory: Path
    clients: Clients
    half_done: HalfDone
    page: bool = False
    """Whether the on-call person is really paged, and must acknowledge."""
    phases: Phases = field(default_factory=Phases)
    fault: Fault | None = None
    symptoms: list[Symptom] = field(default_factory=list)
    runs: list[Report] = field(default_factory=list)
    recovered: datetime | None = None
    served: datetime | None = None
    recovered_to: datetime | None = None
    """The moment of the data that came back, where the runbook goes back to one: the clients may have begun later."""
    done: dict[str, str] = field(default_factory=dict)
    """Boxes of the training checklist that a machine has checked (`checklist.BOXES`), and what it saw."""

    def run(self, flow: Flow[..., Report], **parameters: Any) -> Report:
        """Launch a runbook in the drill's environment: in Prefect as a subflow, which the graph shows.

        Raises:
            RunbookFailed: its report is CRITICAL.
        """
        return self.keep(launch(flow, environment=self.env.name, **parameters))

    def keep(self, report: Report) -> Report:
        """Note a runbook's report as one of this drill's."""
        self.runs.append(report)
        return report

    def note(self, **facts: str) -> None:
        """On disk before something is done that a run after this one would have to put right."""
        self.half_done = self.half_done.noted(self.env.reports_directory, **facts)


def launch(flow: Flow[..., Report], **parameters: Any) -> Report:
    """A runbook inside this one: its lock is the one that is held."""
    call = flow if FlowRunContext.get() else flow.fn
    return call(**parameters)


class Scenario(abc.ABC):
    """One scenario: steady state, fault, recovery by the real runbook, checks. Every step may raise OpsError: the drill
    then heals the system, and is CRITICAL."""

    name: ClassVar[str]
    title: ClassVar[str]
    situation: ClassVar[str]
    goal: ClassVar[str]
    checks: ClassVar[str]
    """As in §8.4."""
    backups: ClassVar[tuple[Kind, ...]]
    """Kinds of which a verified backup must be there before anything is broken."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Parts of the environment without which it cannot be held."""
    sensors: ClassVar[tuple[str, ...]]
    """Of `detection.SENSORS`: one of these must notice the fault."""

    @abc.abstractmethod
    def targets(self, env: Environment) -> Targets:
        """What must be reached."""

    @abc.abstractmethod
    def acts(self, env: Environment) -> list[Act]:
        """What a permit is needed for: `Act(BREAK, …)`, as the fault asks for it."""

    @abc.abstractmethod
    def judge(self, report: Report, env: Environment) -> None:
        """More of the steady state than every drill judges. Findings only."""

    @abc.abstractmethod
    def strike(self, drill: Drill) -> Fault:
        """The fault, for real."""

    @abc.abstractmethod
    def decide(self, drill: Drill) -> None:
        """Phase 2: the runbook's plan (an empty confirm)."""

    @abc.abstractmethod
    def restore(self, drill: Drill) -> Report:
        """Phases 3 and 4: the runbook, confirmed; returns its report."""

    @abc.abstractmethod
    def verify(self, drill: Drill) -> None:
        """Phase 5: this scenario's own checks, into `drill.report`. The clients still write."""

    @abc.abstractmethod
    def settle(self, drill: Drill) -> None:
        """After the checks: everything as it was before, e.g. a standby to fail over to."""

    @abc.abstractmethod
    def control(self, drill: Drill) -> list[Refusal]:
        """The same runbook on sabotaged copies. Whatever comes of it, the live system stays as it is."""

    @abc.abstractmethod
    def heal(self, drill: Drill) -> None:
        """From wherever the drill stopped (`drill.half_done` says it) to a healthy system. Idempotent."""

    def more_sensors(self) -> Mapping[str, Callable[[Environment, Path], str]]:
        """Besides `detection.SENSORS`."""
        return {}

    def notes(self) -> dict[str, str]:
        """What a run after a killed one must know of it."""
        return {}

    def address(self, env: Environment) -> str | Callable[[], str]:
        """Where users are sent."""
        return env.application.url

    def servers(self, env: Environment) -> list[Postgres]:
        """Where the client of the database looks for one that takes writes."""
        return env.nodes()

    def live(self, env: Environment) -> Environment:
        """The environment in which the system lives after the recovery."""
        return env


def now() -> datetime:
    """UTC."""
    return datetime.now(UTC)
