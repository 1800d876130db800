"""What the person who approves a run sees: the plan, and a form for the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from prefect.input import RunInput
from pydantic import Field, create_model

from runbook.guard.pins import PARAMETER
from runbook.guard.pins import described as shown
from runbook.language.say import label, say
from runbook.page.markdown import code, escaped
from runbook.report import Report, Status


def approval_form(plan: str, description: str, *, pages: bool) -> type[RunInput]:
    """The plan is part of the answer: what is approved is what was shown."""
    fields: dict[str, Any] = {
        "plan": (_shown(Literal[plan], "Plan", "Only this plan is approved"), plan),
        "code": (
            _shown(str, "One-time code", "Six digits of an approver other than who launched it", max_length=20),
            "",
        ),
        "launched_by": (_shown(str, "Launched by", "If you know it", max_length=80), ""),
    }
    if pages:
        fields["override"] = (
            _shown(
                str,
                "In an emergency: why it runs without an approval",
                "With a reason here the run continues without an approval, and the on-call engineer is called",
                max_length=300,
            ),
            "",
        )
    made: type[RunInput] = create_model("Approval", __base__=RunInput, **fields)
    made._description = description
    return made


def _shown(kind: Any, title: str, description: str, **bounds: Any) -> Any:
    """Prefect's forms show a title and a description only from here."""
    shown = {"title": label(title), "description": say(description)}
    return Annotated[kind, Field(json_schema_extra={**shown}, **bounds)]


def describe_request(report: Report, plan: str, why: str, seconds: float) -> str:
    """What the approver reads above the form."""
    minutes = f"{seconds / 60:.0f}"
    lines = [
        f"**{escaped(label(report.runbook))}** · **{escaped(report.environment)}**: {label('plan')} {code(plan)}. "
        + say(f"Without an approval within {minutes} minutes the run fails")
    ]
    if why:
        lines.insert(0, f"**{say('Not approved yet')}: {escaped(say(why))}**")
    lines.append(described(report))
    return "\n\n".join(lines)


def described(report: Report) -> str:
    """The plan and what warns, as Markdown."""
    steps = [
        f"{number}. {escaped(label(one.step))}: {escaped(say(one.detail))}"
        for number, one in enumerate(report.plan_steps, 1)
    ]
    pins = [f"- {escaped(name)}: {code(str(value))}" for name, value in report.pins.items() if name != PARAMETER]
    warnings = [
        f"- ⚠️ {escaped(label(one.name))}: {escaped(say(one.value))}"
        for one in report.findings
        if one.status is Status.WARN
    ]
    numbers = [f"- {escaped(shown(name, pin))}" for name, pin in report.states.items() if pin.tolerance]
    return "\n".join(_blocks(steps, pins, numbers, warnings))


def _blocks(*blocks: Sequence[str]) -> list[str]:
    return [line for block in blocks if block for line in (*block, "")]
