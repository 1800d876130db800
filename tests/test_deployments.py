"""The graph of deployments, pinned without a list to keep: whatever is a flow must be deployed, documented and tested.

It fails for a flow that was added and not entered in prefect.yaml, as well as for an entry whose flow is gone.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint
from prefect.schedules import Schedule
from prefect.utilities.callables import parameter_schema

import flows
from flows.troubleshooting.symptoms import read_symptoms
from runbook.report import Report
from runbook.run_name import RunName

ROOT = Path(__file__).parents[1]
FREQUENCIES = {"continuous", "daily", "weekly", "monthly", "quarterly", "yearly", "on-demand"}
OWNERS = {"SRE", "DBA", "DevOps", "セキュリティ", "QA", "マネージャー", "開発者", "全員", "外部監査人", "アーキテクト"}
NAME = "{{ $OPS_ENVIRONMENT }}"
SECTION = re.compile(r"§\d+(?:\.\d+)?|付録[ABC]")
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
# The lab starts programs of its own; tests do too.
PACKAGES = ("runbook", "blocks", "tasks", "flows", "deployments")


@dataclass(frozen=True)
class Found:
    """A flow and its entrypoint."""

    entrypoint: str
    flow: Flow[..., Any]

    @property
    def chapter(self) -> str:
        return self.entrypoint.split(".")[1]

    @property
    def docstring(self) -> str:
        return inspect.getdoc(self.flow.fn) or ""

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.flow.fn).parameters)

    @property
    def hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.flow.fn, include_extras=True)


def find_flows() -> Iterator[Found]:
    """Every flow that is defined (not only imported) in a module of `flows`."""
    for module in pkgutil.walk_packages(flows.__path__, "flows."):
        content = vars(importlib.import_module(module.name))
        for name, value in content.items():
            if isinstance(value, Flow) and value.fn.__module__ == module.name:
                yield Found(f"{module.name}.{name}", value)


@functools.cache
def deployments() -> list[dict[str, Any]]:
    """The entries of prefect.yaml, merged with their anchors."""
    return list(yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"])


def entries(found: Found) -> list[dict[str, Any]]:
    """One, or several with parameters of their own, where a flow serves several rows of the maintenance table."""
    return [entry for entry in deployments() if entry["entrypoint"] == found.entrypoint]


def label(entry: dict[str, Any]) -> str:
    return str(entry["entrypoint"]) + str(entry["name"]).removeprefix(NAME)


FLOWS = list(find_flows())
EACH_FLOW = pytest.mark.parametrize("found", FLOWS, ids=lambda found: found.entrypoint)
EACH_ENTRY = pytest.mark.parametrize("entry", deployments(), ids=label)


def test_what_may_run_unattended_is_there() -> None:
    """A misspelt name would plan every night, and never do anything."""
    for path in sorted((ROOT / "deployments" / "environments").glob("*.toml")):
        named = set(tomllib.loads(path.read_text(encoding="utf-8")).get("unattended", []))
        assert named <= {found.flow.name for found in FLOWS}, path.name


def test_there_are_flows() -> None:
    assert len(FLOWS) > 5


@EACH_FLOW
def test_a_flow_has_one_entry_named_plainly(found: Found) -> None:
    """Automations and links find a flow by it: `clear-cache/production`."""
    names = [entry["name"].removeprefix(NAME) for entry in entries(found)]
    assert names.count("") == 1
    assert all(re.fullmatch(r"(-[a-z]+)+", name) for name in names if name), "a suffix says what it is for"
    assert len(set(names)) == len(names)


@EACH_FLOW
def test_further_entries_differ_in_their_parameters(found: Found) -> None:
    given = [(entry["parameters"], entry["tags"][3]) for entry in entries(found)]  # or in how often they run
    assert [one for one in given if given.count(one) > 1] == [], "why are there two?"


@EACH_ENTRY
def test_an_entry_s_flow_loads_as_a_module(entry: dict[str, Any]) -> None:
    assert ":" not in entry["entrypoint"], "a path would put the script's folder first on sys.path"
    assert load_flow_from_entrypoint(entry["entrypoint"]).fn.__module__ in entry["entrypoint"]


def test_every_entry_s_flow_was_found() -> None:
    assert {entry["entrypoint"] for entry in deployments()} == {found.entrypoint for found in FLOWS}


@EACH_FLOW
def test_an_entry_s_parameters_are_the_flow_s(found: Found) -> None:
    for entry in entries(found):
        given = entry["parameters"]
        assert given["environment"] == NAME
        assert "confirm" not in given, "a deployment confirms nothing"
        if not entry.get("schedules"):  # a form of which a person has to fill in a part
            given = dict.fromkeys(parameter_schema(found.flow.fn).required, "…") | given
        values = found.flow.validate_parameters({**given, "environment": "lab"})
        assert values["environment"] == "lab"
        for schedule in entry.get("schedules") or []:
            assert "confirm" not in (schedule.get("parameters") or {}), "a schedule alone confirms nothing"
            found.flow.validate_parameters({**given, **(schedule.get("parameters") or {})})


@EACH_ENTRY
def test_an_entry_is_for_every_environment(entry: dict[str, Any]) -> None:
    assert entry["name"].startswith(NAME)
    assert entry["work_pool"]["name"] == NAME


@EACH_ENTRY
def test_an_entry_s_schedules_can_be_read(entry: dict[str, Any]) -> None:
    for schedule in entry.get("schedules") or []:
        kept = {key: value for key, value in schedule.items() if key in ("cron", "rrule", "interval", "timezone")}
        assert kept.get("timezone"), "a schedule without a time zone is UTC"
        Schedule(**kept)


@EACH_FLOW
def test_a_flow_is_named_as_its_function(found: Found) -> None:
    assert found.flow.name == found.flow.fn.__name__.replace("_", "-")
    template = found.flow.flow_run_name
    assert isinstance(template, RunName)
    given = {name: f"‹{name}›" for name in found.parameters}
    words = template.format(**given).split()
    assert words[:2] == [found.flow.name, "‹environment›"]
    assert len(words) > 2, "and what it works on"


def test_no_two_flows_have_one_name() -> None:
    assert [name for name, count in Counter(found.flow.name for found in FLOWS).items() if count > 1] == []


@EACH_FLOW
def test_a_flow_begins_with_the_environment(found: Found) -> None:
    first = next(iter(found.parameters.values()))
    assert (first.name, found.hints["environment"], first.default) == ("environment", str, inspect.Parameter.empty)


@EACH_FLOW
def test_a_flow_returns_its_report(found: Found) -> None:
    assert found.hints["return"] is Report


@EACH_FLOW
def test_a_flow_that_destroys_takes_confirm_and_no_other_does(found: Found) -> None:
    if asks_permit(found.flow.fn):
        assert found.hints["confirm"] is str
        assert found.parameters["confirm"].default == ""
    else:
        assert "confirm" not in found.parameters


def test_every_plan_states_its_effect() -> None:
    """What is lost, the downtime, the undo: with the check above, each flow with `confirm` states them."""
    calls = [
        (name, node.lineno, {word.arg for word in node.keywords})
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called(node) in ("permit", "carrying_out")
    ]
    assert len(calls) > 40
    assert [(name, line) for name, line, words in calls if "effect" not in words] == []


@EACH_FLOW
def test_no_parameter_is_optional(found: Found) -> None:
    for name, hint in found.hints.items():
        assert type(None) not in members(hint), f"{name}: the form shows tabs that start on None; prefer “” or []"


@EACH_FLOW
def test_a_docstring_is_the_description_and_the_form_s_help(found: Found) -> None:
    (first, *_) = found.docstring.splitlines()
    assert JAPANESE.search(first), "it starts with the manual's title"
    assert SECTION.search(first), "and its section"
    body, _, help_text = found.docstring.partition("\nArgs:\n")
    assert len(body.split("\n\n")) >= 2, "then what it does, when to run it, how to undo it"
    lines = dict(re.findall(r"^ {4}(\w+): +(\S.*)$", help_text, re.MULTILINE))
    assert list(lines) == list(found.parameters), "one line for each parameter, in their order"


@EACH_FLOW
def test_the_form_shows_that_help(found: Found) -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(found.flow.fn)
    for name in found.parameters:
        assert schema.properties[name].get("description"), f"Prefect finds no help for {name}"


@EACH_FLOW
def test_tags_are_section_owner_chapter_and_frequency(found: Found) -> None:
    """The list of deployments shows the first two or three only. Behind them what the maintenance table says: tests/deployments/test_maintenance.py."""
    for entry in entries(found):
        section, owner, chapter, frequency, *_ = entry["tags"]
        assert chapter == found.chapter
        assert section in SECTION.findall(found.docstring.splitlines()[0])
        assert frequency in FREQUENCIES
        assert owner in OWNERS


@EACH_FLOW
def test_a_flow_has_a_test(found: Found) -> None:
    names = names_in_tests(found.chapter)
    assert found.flow.fn.__name__ in names, f"no module of tests/{found.chapter} calls it"


@functools.cache
def names_in_tests(chapter: str) -> set[str]:
    modules = (ROOT / "tests" / chapter).rglob("test_*.py")
    return {name for path in modules for name in names_in(ast.parse(path.read_text(encoding="utf-8")))}


def names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.Constant(value=str(text)):  # a command line: "-m", "flows.recovery.full_restore"
                yield from text.split(".")


def asks_permit(function: types.FunctionType | Any) -> bool:
    """Whether the flow asks for a permit: it is visible where the flow is."""
    tree = ast.parse(source_of(function))
    return any(called(node) in ("permit", "carrying_out") for node in ast.walk(tree) if isinstance(node, ast.Call))


def source_of(function: types.FunctionType | Any) -> str:
    """The source of a flow, and of the functions of its module that it needs."""
    module, found, todo = vars(sys.modules[function.__module__]), dict[str, str](), [function]
    while todo:
        one = todo.pop()
        found[one.__name__] = textwrap.dedent(inspect.getsource(one))
        words = set(re.findall(r"\w+", found[one.__name__])) - set(found)
        needed = [module[word] for word in words if inspect.isfunction(module.get(word))]
        todo += [needs for needs in needed if needs.__module__ == function.__module__]
    return "\n".join(found.values())


def called(call: ast.Call) -> str:
    """The last word of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def members(hint: Any) -> set[Any]:
    """What a type is made of, unions and annotations taken apart."""
    found = {hint}
    for argument in typing.get_args(hint):
        if typing.get_origin(hint) is not typing.Literal:
            found |= members(argument)
    return found


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The project's modules by path, parsed. Meanwhile the garbage collector would search a growing heap in vain, for two
    thirds of the time."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    gc.disable()
    try:
        return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    finally:
        gc.freeze()
        gc.enable()


def uses(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports or reaches, but for annotations: `subprocess.run`, `prefect.task`."""
    known = {}
    hints = {id(inner) for node in ast.walk(tree) for hint in hints_of(node) for inner in ast.walk(hint)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                known[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                yield name.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{known.get(node.value.id, '')}.{node.attr}"
        elif isinstance(node, ast.Name):
            yield known.get(node.id, node.id)


def hints_of(node: ast.AST) -> Iterator[ast.AST]:
    for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if hint:
            yield hint


STARTS_PROGRAMS = re.compile(
    r"subprocess\.(?!(TimeoutExpired|SubprocessError|CalledProcessError|PIPE|DEVNULL|STDOUT)$)\w+|os\.(system|popen|fork|forkpty|exec\w+|spawn\w+|posix_spawn\w*)|pty(\..*)?"
    r"|asyncio\.(subprocess|create_subprocess_\w+)(\..*)?|multiprocessing(\..*)?|sh|pexpect|prefect_shell(\..*)?"
)
MAKES_TASKS = re.compile(r"prefect\.(task|Task|tasks\.\w+|tasks)")


@pytest.mark.parametrize(
    ("what", "allowed"),
    [(STARTS_PROGRAMS, {"runbook/shell.py"}), (MAKES_TASKS, {"runbook/kinds.py"})],
    ids=["programs", "tasks"],
)
def test_one_module_alone(what: re.Pattern[str], allowed: set[str]) -> None:
    assert {path for path, tree in modules().items() if any(map(what.fullmatch, uses(tree)))} == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.Popen([])",
        "import subprocess\nsubmit(subprocess.run, [])",
        "import subprocess as s\ns.run([])",
        "from subprocess import run",
        "import os\nos.system('ls')",
        "from os import execvp as go",
        "import os as o\no.popen('ls')",
        "import asyncio\nasyncio.create_subprocess_exec('ls')",
        "def f():\n    import subprocess\n    return subprocess.check_output('ls')",
    ],
)
def test_that_check_sees_every_way(source: str) -> None:
    assert any(map(STARTS_PROGRAMS.fullmatch, uses(ast.parse(source))))
    harmless = "import subprocess\ndef f(child: subprocess.Popen) -> None:\n    raise subprocess.TimeoutExpired"
    assert not any(map(STARTS_PROGRAMS.fullmatch, uses(ast.parse(harmless))))


@pytest.mark.parametrize(
    "source", ["from prefect import task", "import prefect\nprefect.task(f)", "from prefect.tasks import Task as T"]
)
def test_that_check_sees_every_task(source: str) -> None:
    assert any(map(MAKES_TASKS.fullmatch, uses(ast.parse(source))))
    assert not any(map(MAKES_TASKS.fullmatch, uses(ast.parse("from prefect import flow\nfrom tasks import host"))))


def next_runbooks(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Each `Next("name", …, {"parameter": …})` with a literal name: the name, and the parameters' literal names."""
    for one in ast.walk(tree):
        if isinstance(one, ast.Call) and getattr(one.func, "id", "") == "Next" and one.args:
            given = [one.args[2]] if len(one.args) > 2 else [k.value for k in one.keywords if k.arg == "parameters"]
            keys = [key for value in given if isinstance(value, ast.Dict) for key in value.keys]
            if isinstance(one.args[0], ast.Constant):
                yield one.args[0].value, {key.value for key in keys if isinstance(key, ast.Constant)}


def test_every_runbook_that_a_finding_names_as_the_next_one_exists_and_takes_those_parameters() -> None:
    known = {found.flow.name: set(inspect.signature(found.flow.fn).parameters) for found in FLOWS}
    named = [(path, *one) for path, tree in modules().items() for one in next_runbooks(tree)]
    wrong = [(path, name, given) for path, name, given in named if name not in known or given - known[name]]
    assert named
    assert wrong == []


def test_every_runbook_of_a_symptom_exists_and_takes_the_values_of_its_form() -> None:
    known = {found.flow.name: found for found in FLOWS}
    for one in (runbook for symptom in read_symptoms() for runbook in symptom.runbooks):
        flow = known[one.flow].flow
        assert "confirm" not in one.parameters, "a link confirms nothing"
        required = dict.fromkeys(parameter_schema(flow.fn).required, "…")
        assert flow.validate_parameters({**required, "environment": "lab", **one.parameters})


def test_that_check_sees_a_name_and_a_parameter() -> None:
    assert list(next_runbooks(ast.parse('Next("no-such", "why", {"also": 1})'))) == [("no-such", {"also"})]


def test_each_class_has_a_name_of_its_own() -> None:
    """A reader who searches a class finds one."""
    named = Counter(
        node.name
        for path, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in named.items() if times > 1] == []


def test_no_module_is_long() -> None:
    long = {path: lines for path in modules() if (lines := len((ROOT / path).read_text().splitlines())) > 430}
    assert long == {}
