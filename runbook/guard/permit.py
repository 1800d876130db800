"""Permission to do something that cannot be undone: minted by the report only, checked again by the action itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from prefect.context import FlowRunContext

from runbook.errors import NotConfirmed
from runbook.target import Target


class PlanOnly(Exception):
    """`confirm` is empty: the run ends here with its plan. Never seen outside `runbook(...)`."""


AUTOMATION = "AUTOMATION"


def is_scheduled() -> bool:
    """Whether a schedule launched this very run."""
    context = FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.auto_scheduled)


def launched_by() -> str:
    """The automation that launched this very run; "" where a person, a schedule or another flow did."""
    context = FlowRunContext.get()
    by = context.flow_run.created_by if context and context.flow_run else None
    return str(by.display_value) if by and by.type == AUTOMATION else ""


def is_without_person(confirm: str) -> bool:
    """Whether a schedule or an automation filled in `confirm`: no person did."""
    return bool(confirm and (is_scheduled() or launched_by()))


def is_unattended(target: Target) -> bool:
    """Whether a schedule or an automation launched this very run, and the environment's TOML (`unattended`, reviewed in
    git) lets it do without a person what it does. Somebody who launches it with an empty `confirm` gets the plan all
    the same."""
    context = FlowRunContext.get()
    flow = context.flow if context else None
    return bool((is_scheduled() or launched_by()) and flow and flow.name in target.unattended)


@dataclass(frozen=True)
class Act:
    """One irreversible deed: a kind ("swap database") and what it is done to ("app_db")."""

    kind: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind} {self.target}"


@dataclass(frozen=True)
class Permit:
    """What a run was allowed to do, in which environment."""

    environment: str
    acts: tuple[Act, ...]

    def require(self, kind: str, target: str) -> None:
        """Check that this very act was permitted.

        Raises:
            NotConfirmed: it was not.
        """
        if Act(kind, target) not in self.acts:
            allowed = ", ".join(map(str, self.acts))
            raise NotConfirmed(f"“{kind} {target}” is not in this run's permit", f"permitted: {allowed}")

    def require_environment(self, environment: str) -> None:
        """Check that this permit is the environment's own.

        Raises:
            NotConfirmed: it was minted for another.
        """
        if environment != self.environment:
            raise NotConfirmed(f"this permit is for {self.environment}, not for {environment}")


class CarriesOut(Protocol):
    """A probe or an action, which carries out a step of a plan."""

    name: str


@dataclass(frozen=True)
class PlannedStep:
    """One line of a plan. `bytes` and `seconds` are estimates, 0 where there is none. `by`: the names of the probes and
    actions that carry it out, from the one that begins it to the one that ends it. `shared`: the call that carries out
    the line before carries out this one too."""

    step: str
    detail: str
    bytes: int = 0
    seconds: float = 0.0
    by: tuple[str, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the planned one: a share of it, and `least` in any case."""

    share: float
    least: int = 0

    def around(self, planned: int) -> int:
        """The largest difference that is allowed."""
        return max(math.ceil(planned * self.share), self.least)


@dataclass(frozen=True)
class Pin:
    """A value that a confirmed run must find again. `written` is a position in bytes that ordinary writes advance; −1
    where nothing counts them. `lost`: it is replaced, and what is written to it after the plan is lost too.
    `tolerance`: the value is a number, which may differ by so much. `items`: digests of a list that is deleted."""

    value: str
    written: int = -1
    lost: bool = False
    tolerance: Tolerance | None = None
    items: tuple[str, ...] = ()
