"""Asking people: the run suspends with a form, and starts again from the top when somebody has answered.

Answered keys return at once. So this code must depend on the answers only: the same answers lead to the same keys, on
any worker, and after any number of restarts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from prefect.context import FlowRunContext
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_base_key
from pydantic import ValidationError

from blocks.environment import Environment
from flows.monitoring.wording import OWNERS
from flows.routine.checklist import forms
from flows.routine.checklist.forms import ChecklistAnswer
from flows.routine.checklist.history import Past, hint_for
from flows.routine.checklist.texts import Checklist, Phase
from runbook.errors import OpsError
from runbook.guard.suspended import suspend
from runbook.language.say import label, say
from tasks.prefect.suspended_runs import read_inputs

LAUNCH = "launch the deployment run-checklist in the Prefect UI: only there can people answer"
MOST_ATTEMPTS = 50


@dataclass(frozen=True)
class Answered:
    """All of a checklist's answers, when it was launched, until when it was due, and when each phase was answered."""

    checklist: Checklist
    launched: datetime
    due: date
    answers: tuple[ChecklistAnswer, ...]
    at: Mapping[str, datetime]


@dataclass(frozen=True)
class Asking:
    """The context of every form of a run."""

    env: Environment
    checklist: Checklist
    launched: datetime
    due: date
    past: Past | None
    drilled: Mapping[str, str]
    taken_over: str = ""
    """The id of a run that ended before its last answer: its answers are filled in."""


def launched_at() -> datetime:
    """When the current run first started.

    Raises:
        OpsError: the run cannot wait for people.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        raise OpsError("this run has no deployment, so it cannot wait for people", LAUNCH)
    return run.start_time or datetime.now(UTC)


def ask(asking: Asking) -> Answered:
    """Ask phase by phase. The run suspends here while it waits.

    Raises:
        OpsError: Prefect cannot suspend this run (it is a subflow).
    """
    found, at = list[ChecklistAnswer](), dict[str, datetime]()
    for phase in asking.checklist.phases:
        given = _phase(asking, phase, found)
        found += given
        at[phase.id] = given[0].at
    return Answered(asking.checklist, asking.launched, asking.due, tuple(found), at)


def _phase(asking: Asking, phase: Phase, before: list[ChecklistAnswer]) -> list[ChecklistAnswer]:
    """Ask until the answers are complete: each time under a new key, with the sent answers filled in."""
    wrong, filled = list[str](), _taken_over(asking, phase)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        key = f"{phase.id}-{attempt}"
        hints = {box.id: hint_for(box, phase, asking.past, asking.drilled) for box in phase.boxes}
        model = forms.form(phase, _description(asking, phase, before, wrong), hints, filled)
        try:
            sent = _suspended(model, key)
        except ValidationError:  # the checklist was changed while somebody answered
            filled, wrong = {}, [say("The checklist was changed in the meantime. Please answer again")]
            continue
        filled, given = forms.english(sent.model_dump()), forms.answers(phase, sent, _answered_at(key))
        if not (wrong := forms.problems(given)):
            return given
    raise OpsError(f"{phase.en} was answered {MOST_ATTEMPTS} times, never completely", "run it again")


def _suspended(model: type[RunInput], key: str) -> RunInput:
    try:
        return suspend(model, key, None)
    except RuntimeError as error:
        raise OpsError(f"this run cannot wait for people: {error}", LAUNCH) from None


def _answered_at(key: str) -> datetime:
    """When the answer under a key came in; Prefect keeps it with the answer."""
    name = keyset_from_base_key(f"suspended-{key}")["response"]
    context = FlowRunContext.get()
    assert context
    assert context.flow_run
    found = read_inputs(str(context.flow_run.id), name)
    return found[-1].at if found else datetime.now(UTC)


def _taken_over(asking: Asking, phase: Phase) -> Mapping[str, Any]:
    """The answers to a phase in the run that is taken over; none if that run was deleted."""
    if not asking.taken_over:
        return {}
    found = read_inputs(asking.taken_over, f"suspended-{phase.id}-")
    given = [one.value for one in found if one.key.endswith("-response") and isinstance(one.value, dict)]
    return forms.fitting(phase, given[-1]) if given else {}


def _description(asking: Asking, phase: Phase, before: list[ChecklistAnswer], wrong: list[str]) -> str:
    """Markdown above the form."""
    chosen = asking.checklist
    number = chosen.phases.index(phase) + 1
    lines = [
        f"## {say(chosen.en)} · {asking.env.title or asking.env.name}",
        f"**{say(phase.heading)}** ({number}/{len(chosen.phases)}) · {label('due')} **{asking.due}** · "
        f"{label('owner')} {say(OWNERS.get(chosen.owner, chosen.owner))}",
    ]
    if wrong:
        lines.append("\n".join([f"### ⚠️ {say('Please correct this')}", *(f"- {one}" for one in wrong)]))
    lines.append(say("“*” marks mandatory boxes (CRITICAL if they are not carried out)."))
    undone = [say(one.box.en) for one in before if one.result == forms.NOT_DONE]
    if undone:
        lines.append(f"{say('Not carried out until now')}: {', '.join(undone)}")
    if asking.past:
        lines.append(asking.past.summary())
    return "\n\n".join(lines)
