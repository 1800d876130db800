"""What routine runbooks have in common: a source that does not answer is told, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.kinds import Pending
from runbook.report import Report, Status

T = TypeVar("T")
NOT_MEASURED = "not measured"


def not_measured(report: Report, name: str, why: str, hint: str) -> None:
    """What has no source is never well."""
    report.warn(name, hint, value=f"{NOT_MEASURED}: {why}")


def part(
    report: Report, name: str, work: Callable[[], T], *, hint: str = "", otherwise: Status = Status.WARN
) -> T | None:
    """One part of a page: what it cannot read is one finding, and no reason to leave out the rest. `hint` is what to
    do next, before what the error itself says."""
    try:
        return work()
    except OpsError as error:
        told = "; ".join(text for text in (hint, error.hint) if text) or "look at it"
        report.expect(name, False, told, value=f"{NOT_MEASURED}: {error.message}", otherwise=otherwise)
        return None


def named(report: Report, env: Environment, name: str, *parts: str) -> bool:
    """Whether the environment names the parts that a measurement needs; where not, that is told."""
    if missing := [one for one in parts if not env.has(one)]:
        told = " and ".join(f"[{one}]" for one in missing)
        not_measured(report, name, f"the environment names no {told}", f"add {told} to its TOML and register it")
    return not missing


def answer(pending: Pending[T]) -> Callable[[], T]:
    """What a step that was submitted found, for `part`."""
    return pending.result
