"""A phase of a checklist as a form in the Prefect UI, and the checks of its answers.

Prefect checks an answer against the form's JSON schema only. A validator that refused one here would fail the run, and
lose all earlier answers. So the model accepts everything that the schema accepts, and `problems` lists what to ask
again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.config import JsonDict

from flows.routine.checklist.texts import Box, Phase
from runbook.language.say import label, say

DONE, NOT_DONE, NOT_APPLICABLE = RESULTS = ("carried out", "not carried out", "not applicable")
"""As reports have them; the form shows them in the environment's language."""
_OLDER = {"実施": DONE, "未実施": NOT_DONE, "対象外": NOT_APPLICABLE}
LINK = r"^(https?://\S+)?$"
LEAST_WHY = 3


@dataclass(frozen=True)
class ChecklistAnswer:
    """An answer to a box, and when the form was sent."""

    phase: Phase
    box: Box
    result: str
    who: str
    at: datetime
    note: str
    link: str


def form(phase: Phase, description: str, hints: Mapping[str, str], filled: Mapping[str, Any]) -> type[RunInput]:
    """The form of a phase: who answers, and for each box a result, who did it, a note and a link. `hints` are shown
    with the boxes (by id); `filled` has earlier answers, and is filled in."""
    who = _shown(str, label("Your name"), say("Who is responsible for these answers"), max_length=80)
    fields: dict[str, Any] = {"who": (who, filled.get("who", ...))}
    for box in phase.boxes:
        title = f"☐ {say(box.en)}" + (" *" if box.must else "")
        extra: JsonDict = {"title": title, "description": hints.get(box.id, say(box.how))}
        model = _box_model(box, filled.get(_field(box), {}))
        fields[_field(box)] = (Annotated[model, Field(json_schema_extra=extra)], ...)
    made: type[RunInput] = create_model("Checklist", __base__=RunInput, **fields)
    made._description = description
    return made


def _box_model(box: Box, filled: Mapping[str, Any]) -> type[BaseModel]:
    why = say("If it was not carried out or is not applicable, write the reason in the note")
    result = _shown(Literal[tuple(map(say, RESULTS))], label("Result"), why)
    who = _shown(str, label("Carried out by"), say("Empty: you"), max_length=80)
    note = _shown(str, label("Note"), say("Result, reason, time (no secrets)"), max_length=2000)
    link = _shown(str, label("Link"), say("A report, an issue, a document (https://…)"), pattern=LINK, max_length=500)
    return create_model(
        f"Box_{_field(box)}",
        __config__=ConfigDict(extra="forbid"),
        result=(result, say(filled["result"]) if "result" in filled else ...),
        who=(who, filled.get("who", "")),
        note=(note, filled.get("note", "")),
        link=(link, filled.get("link", "")),
    )


def _shown(kind: Any, title: str, description: str, **bounds: Any) -> Any:
    """Prefect's forms show a title and a description only from `json_schema_extra`."""
    return Annotated[kind, Field(json_schema_extra={"title": title, "description": description}, **bounds)]


def _field(box: Box) -> str:
    return box.id.replace("-", "_")


def fitting(phase: Phase, given: Mapping[str, Any]) -> dict[str, Any]:
    """The answers to another form of this phase that fit the fields of this form. That form may have been in another
    language."""
    fields = ("who", *(_field(box) for box in phase.boxes))
    fit = {name: given[name] for name in fields if isinstance(given.get(name), str if name == "who" else dict)}
    return english(fit)


def english(given: Mapping[str, Any]) -> dict[str, Any]:
    """A form's answers with their results as reports have them."""
    return {
        name: {**one, "result": result_of(one["result"])} if isinstance(one, dict) and "result" in one else one
        for name, one in given.items()
    }


def result_of(text: str) -> str:
    """The result that a form or an older report has in another language."""
    return next((one for one in RESULTS if text == say(one)), _OLDER.get(text, text))


def answers(phase: Phase, given: RunInput, at: datetime) -> list[ChecklistAnswer]:
    """The answers, by box."""
    found = english(given.model_dump())
    rows = [(box, found[_field(box)]) for box in phase.boxes]
    return [
        ChecklistAnswer(
            phase,
            box,
            row["result"],
            row["who"].strip() or found["who"].strip(),
            at,
            row["note"].strip(),
            row["link"].strip(),
        )
        for box, row in rows
    ]


def problems(given: list[ChecklistAnswer]) -> list[str]:
    """Problems that must be asked again, in the form's language."""
    found = []
    for one in given:
        if not one.who:
            found.append(say(f"“{one.box.en}”: your name is missing"))
        if one.result != DONE and len(one.note) < LEAST_WHY:
            found.append(say(f"“{one.box.en}”: write in the note why it is {one.result}"))
        if not re.fullmatch(LINK, one.link):
            found.append(say(f"“{one.box.en}”: a link begins with https://"))
    return found
