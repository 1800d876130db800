"""HTTP requests described in an environment's TOML: a smoke check, a drill's write, a load test's request.

Texts may name values in braces: `{user}`, `{password}`, `{now}`, `{random}` (new in every run), a name of
`[application] secrets_env`, and what an earlier step took. This module imports no other module of the project: the
load generator reads it in a process of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Values = Mapping[str, object]
BUILT_IN = ("user", "password", "now", "random")
TEXT = "text"
"""What a write or a question sends: unique, so that it can be found again."""
SHOWN = 5000
"""Of an answer; whoever shows it masks secrets before it is cut shorter."""
_NAME = re.compile(r"\{(\w+)\}")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


class StepFailed(Exception):
    """An answer is not the described one. Its text names no secret."""


class Request(NamedTuple):
    """A request with every name replaced by its value."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    form: dict[str, str] | None

    @property
    def arguments(self) -> dict[str, Any]:
        """For `request()` of httpx and of requests."""
        content = {"data": self.form} if self.form else {} if self.body is None else {"json": self.body}
        return {"headers": self.headers, **content}


class HttpStep(BaseModel):
    """One request and the answer that is expected."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="", description="for reports; empty: method and path")
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "GET"
    path: str = Field(description="below [application] url, e.g. /login")
    headers: dict[str, str] = {}
    body: Any = Field(default=None, description="sent as JSON")
    form: dict[str, str] = Field(default={}, description="sent as a form, instead of body")
    status: list[int] = Field(default=[200], description="accepted statuses of the answer")
    take: dict[str, str] = Field(default={}, description="name → place of a value in the JSON answer: items.0.id")
    expect: dict[str, Any] = Field(default={}, description="place in the JSON answer → its value; items.# counts them")
    seconds: float = Field(default=30.0, gt=0, le=3600, description="deadline of the whole step")

    @field_validator("status", mode="before")
    @classmethod
    def _one_or_more(cls, status: object) -> object:
        return [status] if isinstance(status, int) else status

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(f"a path begins with /: {path[:60]}")
        return path

    @field_validator("take")
    @classmethod
    def _names_that_can_be_used(cls, take: dict[str, str]) -> dict[str, str]:
        for name in take:
            if not _IDENTIFIER.fullmatch(name):
                raise ValueError(f"{name[:40]} is no name: letters, digits and _")
        return take

    @property
    def title(self) -> str:
        """For a report."""
        return self.name or f"{self.method} {self.path}"

    @property
    def used(self) -> set[str]:
        """The names in braces."""
        return {
            name
            for text in _texts([self.path, self.headers, self.body, self.form, self.expect])
            for name in _NAME.findall(text)
        }

    def request(self, values: Values) -> Request:
        """What is sent.

        Raises:
            StepFailed: no value has that name.
        """
        form = {key: str(_filled(text, values)) for key, text in self.form.items()} or None
        headers = {key: str(_filled(text, values)) for key, text in self.headers.items()}
        return Request(self.method, str(_filled(self.path, values)), headers, _filled(self.body, values), form)

    def judge(self, status: int, content: bytes, values: Values) -> dict[str, object]:
        """The values that are taken from an answer.

        Raises:
            StepFailed: status, a value or a comparison is wrong.
        """
        if status not in self.status:
            accepted = " or ".join(map(str, self.status))
            raise StepFailed(f"{self.method} {self.path} answers {status} instead of {accepted}: {reason_in(content)}")
        if not self.take and not self.expect:
            return {}
        try:
            body = json.loads(content)
        except ValueError:
            raise StepFailed(f"{self.method} {self.path}: the answer is no JSON") from None
        taken = {name: self._value(body, place) for name, place in self.take.items()}
        known = {**values, **taken}
        for place, wanted in self.expect.items():
            found, expected = value_at(body, place), _filled(wanted, known)
            if found != expected:
                raise StepFailed(f"{place} of the answer is {_shown(found)}, expected {_shown(expected)}")
        return taken

    def _value(self, body: object, place: str) -> object:
        value = value_at(body, place)
        if value is None:
            raise StepFailed(f"the answer has no {place}")
        if isinstance(value, str) and not value.strip():
            raise StepFailed(f"{place} of the answer is empty")
        return value


class WriteStep(HttpStep):
    """A write of a drill's client: its body has `{text}`, and `stored_in` names the column that holds it afterwards."""

    stored_in: str = Field(description="schema.table.column or table.column")
    every: int = Field(default=1, ge=1, description="1: each time; 25: instead of every 25th other write")

    @field_validator("stored_in")
    @classmethod
    def _a_column(cls, stored_in: str) -> str:
        if stored_in.count(".") not in (1, 2) or not all(stored_in.split(".")):
            raise ValueError("write it like table.column")
        return stored_in

    @property
    def column(self) -> tuple[str, str, str]:
        """Schema, table and column."""
        *schema, table, column = self.stored_in.split(".")
        return (schema or ["public"])[0], table, column

    @model_validator(mode="after")
    def _is_recognisable(self) -> Self:
        if TEXT not in self.used:
            raise ValueError("a write sends {text}, by which it is found in the database")
        return self


class LoadStep(HttpStep):
    """What a user of the load test does."""

    weight: int = Field(default=1, ge=1, description="how often, against the others")
    ai: bool = Field(default=False, description="asks an AI: as often as ai_answers at most; 429 is its limit at work")


class HttpWrites(BaseModel):
    """What the client of a drill writes through the application: `login` first, then `steps`."""

    model_config = ConfigDict(extra="forbid")

    login: list[HttpStep] = []
    steps: list[WriteStep] = []

    @model_validator(mode="after")
    def _begins_with_one_of_each_time(self) -> Self:
        if self.steps and self.steps[0].every != 1:
            raise ValueError("the first of steps is written each time: every = 1")
        return self


class HttpQuestion(BaseModel):
    """A user's question to the AI. `before`: e.g. a log-in; `ask` sends `{text}` and takes `answer`, perhaps `provider`
    and `model`; the answer to `stored` holds every question and answer that is stored."""

    model_config = ConfigDict(extra="forbid")

    before: list[HttpStep] = []
    ask: HttpStep | None = None
    stored: HttpStep | None = None

    @model_validator(mode="after")
    def _is_a_question(self) -> Self:
        if self.ask and (TEXT not in self.ask.used or "answer" not in self.ask.take):
            raise ValueError("ask sends {text}, and takes answer")
        return self


def unknown_name(steps: Sequence[HttpStep], known: Sequence[str]) -> str:
    """The first step that uses a name which nothing before it gives, and the name; "" where there is none."""
    names = {*BUILT_IN, *known}
    for step in steps:
        if missing := step.used - names - set(step.take):
            return f"{step.title} uses {{{min(missing)}}}, which no step before it takes"
        names |= set(step.take)
    return ""


def value_at(body: object, place: str) -> object:
    """`items.0.id` of a JSON value, `items.#` for their number; None where there is no such value."""
    for part in place.split("."):
        if part == "#" and isinstance(body, list | dict):
            body = len(body)
        elif isinstance(body, list) and re.fullmatch(r"-?\d+", part) and -len(body) <= int(part) < len(body):
            body = body[int(part)]
        elif isinstance(body, dict) and part in body:
            body = body[part]
        else:
            return None
    return body


def reason_in(content: bytes) -> str:
    """What an answer says of itself: its `detail`, `message` or `error`, else how it begins."""
    try:
        body = json.loads(content)
    except ValueError:
        return " ".join(content[:SHOWN].decode(errors="replace").split())
    for key in ("detail", "message", "error"):
        if isinstance(body, dict) and body.get(key):
            return str(body[key])[:SHOWN]
    return json.dumps(body, ensure_ascii=False)[:SHOWN]


def strings_in(body: object) -> set[str]:
    """Every text in a JSON value."""
    return set(_texts(body))


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for item in value.values():
                yield from _texts(item)


def _filled(value: Any, values: Values) -> Any:
    """Every `{name}` replaced. A text that is one name alone keeps the value's type."""
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if alone := _NAME.fullmatch(value):
        return _value_of(alone[1], values)
    return _NAME.sub(lambda match: str(_value_of(match[1], values)), value)


def _value_of(name: str, values: Values) -> object:
    if name not in values:
        raise StepFailed(f"no value is called {name}")
    return values[name]


def _shown(value: object) -> str:
    return "missing" if value is None else json.dumps(value, ensure_ascii=False)[:SHOWN]
