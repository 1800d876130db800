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
from typing import Annotated, Any, Literal, get_args

from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.config import JsonDict

from flows.routine.checklist.texts import Box, Phase

Result = Literal["実施", "未実施", "対象外"]
DONE, NOT_DONE, NOT_APPLICABLE = get_args(Result)
LINK = r"^(https?://\S+)?$"
LEAST_WHY = 3


@dataclass(frozen=True)
class ChecklistAnswer:
    """An answer to a box, and when the form was sent."""

    phase: Phase
    box: Box
    result: Result
    who: str
    at: datetime
    note: str
    link: str


def form(phase: Phase, description: str, hints: Mapping[str, str], filled: Mapping[str, Any]) -> type[RunInput]:
    """The form of a phase: who answers, and for each box a result, who did it, a note and a link. `hints` are shown
    with the boxes (by id); `filled` has earlier answers, and is filled in."""
    fields: dict[str, Any] = {
        "who": (_shown(str, "回答者 (氏名)", "この回答に責任を持つ人", max_length=80), filled.get("who", ...))
    }
    for box in phase.boxes:
        title = f"☐ {box.text}" + (" *" if box.must else "")
        extra: JsonDict = {"title": title, "description": hints.get(box.id, box.how)}
        model = _box_model(box, filled.get(_field(box), {}))
        fields[_field(box)] = (Annotated[model, Field(json_schema_extra=extra)], ...)
    made: type[RunInput] = create_model("Checklist", __base__=RunInput, **fields)
    made._description = description
    return made


def _box_model(box: Box, filled: Mapping[str, Any]) -> type[BaseModel]:
    result = _shown(Result, "結果", "未実施と対象外にはメモに理由を書く")
    who = _shown(str, "実施者", "空なら回答者", max_length=80)
    note = _shown(str, "メモ", "結果、理由、時刻など (秘密は書かない)", max_length=2000)
    link = _shown(str, "リンク", "レポート、課題、文書 (https://…)", pattern=LINK, max_length=500)
    return create_model(
        f"Box_{_field(box)}",
        __config__=ConfigDict(extra="forbid"),
        result=(result, filled.get("result", ...)),
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
    """The answers to another form of this phase that fit the fields of this form."""
    fields = ("who", *(_field(box) for box in phase.boxes))
    return {name: given[name] for name in fields if isinstance(given.get(name), str if name == "who" else dict)}


def answers(phase: Phase, given: RunInput, at: datetime) -> list[ChecklistAnswer]:
    """The answers, by box."""
    found = given.model_dump()
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
            found.append(f"「{one.box.text}」: 回答者がありません")
        if one.result != DONE and len(one.note) < LEAST_WHY:
            found.append(f"「{one.box.text}」: {one.result} の理由をメモに書いてください")
        if not re.fullmatch(LINK, one.link):
            found.append(f"「{one.box.text}」: リンクは https:// で始まります")
    return found
