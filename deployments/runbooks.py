"""The runbooks as an operator needs to know them: read from the flows themselves and from prefect.yaml."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]

from blocks.environment import Environment
from deployments import forms
from runbook.errors import OpsError
from runbook.language.say import Language

ROOT = Path(__file__).resolve().parents[1]
_PLAIN = {str: "text", int: "number", float: "number", bool: "switch"}


@dataclass(frozen=True)
class Parameter:
    """One field of a runbook's form."""

    name: str
    kind: str
    default: str
    help: str


@dataclass(frozen=True)
class Runbook:
    """A deployed flow, as an operator needs to know it."""

    name: str
    entrypoint: str
    title: str
    description: str
    parameters: tuple[Parameter, ...]
    tags: tuple[str, ...]
    schedules: tuple[str, ...]

    @property
    def chapter(self) -> str:
        return self.entrypoint.split(".")[1]

    @property
    def sections(self) -> list[str]:
        return forms.SECTION.findall(self.title)

    @property
    def confirms(self) -> bool:
        """Whether it changes or deletes something: with an empty `confirm` it plans."""
        return any(parameter.name == "confirm" for parameter in self.parameters)


def read_runbooks(path: Path = ROOT / "prefect.yaml") -> list[Runbook]:
    """Every flow that is deployed, in the order of prefect.yaml; one with several entries once, with all its schedules.

    Raises:
        OpsError: an entry names what is no flow.
    """
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]:
        entries.setdefault(entry["entrypoint"], []).append(entry)
    return [_runbook(entrypoint, found) for entrypoint, found in entries.items()]


def shown(entrypoint: str, language: Language) -> str:
    """What the Prefect UI shows of a flow, as Markdown: its title, then its description. Read from its file, since
    importing all takes seconds.

    Raises:
        OpsError: there is no such flow.
    """
    module, _, name = entrypoint.rpartition(".")
    text = _docstrings(ROOT / f"{module.replace('.', '/')}.py").get(name)
    if text is None:
        raise OpsError(f"{entrypoint} is no flow", "correct its entry in prefect.yaml")
    return forms.shown(text, name, language)


@functools.cache
def _docstrings(path: Path) -> dict[str, str]:
    """The docstring of each function of a module; several entries of prefect.yaml are in one."""
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    return {node.name: ast.get_docstring(node) or "" for node in body if isinstance(node, ast.FunctionDef)}


def _runbook(entrypoint: str, entries: Sequence[Mapping[str, Any]]) -> Runbook:
    module, _, name = entrypoint.rpartition(".")
    try:
        flow = getattr(importlib.import_module(module), name)
        text = inspect.getdoc(flow.fn) or ""
    except (ImportError, AttributeError) as error:
        raise OpsError(f"{entrypoint} is no flow", "correct its entry in prefect.yaml") from error
    return Runbook(
        flow.name,
        entrypoint,
        forms.title(text),
        forms.description(text),
        _parameters(flow.fn, forms.helps(text)),
        tuple(dict.fromkeys(tag for entry in entries for tag in entry["tags"])),
        tuple(_schedule(one) for entry in entries for one in entry.get("schedules") or []),
    )


def _parameters(function: Any, helps: Mapping[str, str]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(function, include_extras=True)
    return tuple(
        Parameter(name, _kind(hints[name]), _default(parameter.default), helps.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
    )


def _kind(hint: Any) -> str:
    """What the form shows: `text`, `number`, `switch`, the choices of a drop-down, or a list of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" if choice != "" else "(empty)" for choice in inner)
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    return _PLAIN.get(hint, str(getattr(hint, "__name__", hint)))


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "the deployment's"
    if value in ("", (), []):
        return ""
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _schedule(one: Mapping[str, Any]) -> str:
    when = next((f"{key} `{one[key]}`" for key in ("cron", "rrule", "interval") if key in one), "")
    given = "".join(f", {name} = {value}" for name, value in (one.get("parameters") or {}).items())
    return f"{when} {one.get('timezone', '')}{given}".strip()


def has_to_run(entry: Mapping[str, Any], environment: Environment) -> bool:
    """Whether an environment has everything that an entry of prefect.yaml `needs`: only then it is deployed. A need is
    what `Environment.has` takes; `docker|cloud` is one of the two."""
    return _has_all(environment, entry.get("needs", ()))


def has_schedule(entry: Mapping[str, Any], environment: Environment) -> bool:
    """Whether its schedules are for this environment: it has the entry's `schedule_needs` as well."""
    return has_to_run(entry, environment) and _has_all(environment, entry.get("schedule_needs", ()))


def _has_all(environment: Environment, needs: Sequence[str]) -> bool:
    return all(any(map(environment.has, need.split("|"))) for need in needs)


def flows_for(environment: Environment, path: Path = ROOT / "prefect.yaml") -> set[str]:
    """The names of the flows that are deployed for an environment, such as `clear-cache`."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    found = {str(entry["entrypoint"]) for entry in entries if has_to_run(entry, environment)}
    return {entrypoint.rpartition(".")[2].replace("_", "-") for entrypoint in found}
