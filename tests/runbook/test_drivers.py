"""No raw error of a driver reaches whoever launched a run: every class of them is a sentence with a next step."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import botocore.exceptions
import docker.errors
import httpx
import psycopg
import psycopg.errors
import pytest
import redis.exceptions
import sqlalchemy.exc

from flows.recovery.objectives import board
from runbook.drivers import described, exit_code
from runbook.errors import RunbookFailed, Unreachable
from runbook.run import runbook
from tests.runbook.system import System


def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for one in kind.__subclasses__():
        yield from subclasses(one)


def errors() -> Iterator[BaseException]:
    """One of each class; what only its constructor could fill in is left out."""
    for root in (
        psycopg.Error,
        redis.exceptions.RedisError,
        httpx.HTTPError,
        httpx.InvalidURL,
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        docker.errors.DockerException,
        sqlalchemy.exc.SQLAlchemyError,
    ):
        for kind in subclasses(root):
            said = "the server said something\nDETAIL:  Key (email)=(hanako@example.com) already exists."
            try:
                yield kind(said)
            except (
                TypeError,
                KeyError,
                AttributeError,
                ValueError,
            ):  # it wants more to be made: its class alone is told
                error = kind.__new__(kind)
                error.args = (said,)
                if not isinstance(error, docker.errors.DockerException):
                    yield error


def test_every_error_of_every_driver_is_a_sentence_with_a_next_step() -> None:
    found = list(errors())
    assert len(found) > 300, "the drivers are there"
    for error in found:
        refused = described(error)
        assert refused is not None, type(error)
        assert refused.hint, type(error)
        assert not re.search(r"\b\w+(?:Error|Exception)\b", refused.message), refused.message
        assert "hanako@example.com" not in refused.message
    assert described(ValueError("no driver's")) is None


def test_a_run_that_meets_one_fails_with_that_sentence(system: System) -> None:
    cases = {
        "permission denied for table users": (psycopg.errors.InsufficientPrivilege, "that right"),
        "could not extend file": (psycopg.errors.DiskFull, "free-disk-emergency"),
        "terminating connection": (psycopg.errors.AdminShutdown, "start the server"),
        "deadlock detected": (psycopg.errors.DeadlockDetected, "run it again"),
    }
    for said, (kind, hint) in cases.items():
        with pytest.raises(RunbookFailed) as caught, runbook("Restore", system):
            raise kind(said)
        (finding,) = caught.value.report.findings
        assert said in finding.name
        assert hint in finding.hint
        assert kind.__name__ not in caught.value.report.sentence()
    wrapped = sqlalchemy.exc.OperationalError("SELECT secret", {}, psycopg.errors.AdminShutdown("gone"))
    assert isinstance(described(wrapped), Unreachable)
    assert "SELECT secret" not in str(described(wrapped))


ROOT = Path(__file__).resolve().parents[2]
OPENING = {
    "psycopg": {"connect"},
    "redis": {"Redis", "from_url", "Sentinel"},
    "boto3": {"Session", "client", "resource"},
    "httpx": {"Client", "AsyncClient", "get", "head", "post", "put", "patch", "delete", "request", "stream"},
    "docker": {"DockerClient", "APIClient", "from_env"},
    "sqlalchemy": {"create_engine"},
}
ERRORS = {"boto3": {"botocore", "boto3"}}
TRANSLATED_BY = {
    "blocks/cloud.py": "tasks/cloud/aws.py",
    "blocks/redis/server.py": "tasks/redis/greeting.py",
    "blocks/s3.py": "tasks/s3/requests.py",
}
"""Blocks open a client; these are the modules through which all of its calls go."""
LEFT_TO_THE_RUN = {"tasks/drill/lost_writes.py"}
"""Its docstring says which errors it raises: a drill calls it inside its runbook."""
BEFORE_A_RUN = {
    *("Environment.find", "expectations.prepare", "runbook", "kind_of", "is_foreign", "where_disposable"),
    "board.rebuilt",  # it catches whatever it meets: the test below
    *("_target", "_asked"),  # the environment alone; what a checklist asks, before there is a report
}
"""What a flow may call before its runbook is open."""
WITHOUT_A_RUN = {"run_drill"}
"""It opens its runbook in a function of its own."""


def modules(pattern: str) -> dict[str, ast.Module]:
    """The modules in whose text a pattern is."""
    paths = [
        path
        for layer in ("runbook", "blocks", "tasks", "flows", "deployments")
        for path in sorted((ROOT / layer).rglob("*.py"))
    ]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    return {name: ast.parse(text) for name, text in texts.items() if re.search(pattern, text, re.MULTILINE)}


def origins(module: ast.Module) -> dict[str, str]:
    """The names of a module that are a driver, or came from one."""
    found = dict[str, str]()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {(one.asname or one.name).partition(".")[0]: one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {one.asname or one.name: node.module.partition(".")[0] for one in node.names}
    return found


def calls(nodes: Iterable[ast.AST]) -> Iterator[str]:
    return (ast.unparse(one.func) for node in nodes for one in ast.walk(node) if isinstance(one, ast.Call))


def opened(module: ast.Module) -> set[str]:
    """Whose clients a module opens."""
    known = origins(module)
    words = (call.split(".") for call in calls([module]))
    return {
        driver
        for first, *_, last in (w * 2 if len(w) == 1 else w for w in words)
        if (driver := known.get(first, "")) in OPENING and last in OPENING[driver]
    }


def caught(module: ast.Module) -> set[str]:
    """Whose errors a module catches, by name or as whatever a driver raises."""
    known, found = origins(module), set[str]()
    for node in ast.walk(module):
        kinds = [node.type] if isinstance(node, ast.ExceptHandler) and node.type else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            kinds = list(node.args)
        names = {
            ast.unparse(one).partition(".")[0]
            for kind in kinds
            for one in ast.walk(kind)
            if isinstance(one, ast.Name | ast.Attribute)
        }
        found |= {known.get(name, "") for name in names} | ({"every"} if "Exception" in names else set())
    return found


def test_who_opens_a_client_translates_its_errors() -> None:
    parsed = modules(rf"^\s*(?:import|from) (?:{'|'.join([*OPENING, 'botocore'])})\b")
    openers = {name: drivers for name, module in parsed.items() if (drivers := opened(module))}
    assert len(openers) > 15, "the walk finds them"
    raw = [
        (name, driver)
        for name, drivers in openers.items()
        if name not in LEFT_TO_THE_RUN
        for driver in drivers
        if not caught(parsed[TRANSLATED_BY.get(name, name)]) & {*ERRORS.get(driver, {driver}), "every"}
    ]
    assert raw == [], "catch that driver's errors there, or go through the block's client"
    assert TRANSLATED_BY.keys() <= openers.keys()


def entered_before(statement: ast.With) -> list[ast.AST]:
    """What a `with` evaluates and enters before its runbook is open: the items before it, and its own arguments."""
    found = list[ast.AST]()
    for item in statement.items:
        call = item.context_expr
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "runbook":
            return [*found, *call.args, *(one.value for one in call.keywords)]
        found.append(call)
    return found


def outside_runbook(flow: ast.FunctionDef) -> Iterator[ast.AST]:
    """The parts of a flow that run without a runbook."""
    for one in flow.body:
        if isinstance(one, ast.With) and any("runbook(" in ast.unparse(item) for item in one.items):
            yield from entered_before(one)
        else:
            yield one


def test_a_flow_queries_servers_only_inside_its_runbook() -> None:
    """There every error of a driver that no step has put into words becomes a sentence."""
    outside = dict[str, set[str]]()
    for name, module in modules(r"^@flow\(").items():
        for flow in module.body:
            if not (isinstance(flow, ast.FunctionDef) and "flow(" in " ".join(map(ast.unparse, flow.decorator_list))):
                continue
            if flow.name not in WITHOUT_A_RUN and (found := set(calls(outside_runbook(flow))) - BEFORE_A_RUN):
                outside[f"{name}: {flow.name}"] = found
    assert outside == {}


def test_what_a_with_enters_before_its_runbook_counts_as_outside() -> None:
    text = """
def flow(env):
    with opened(env.postgres) as connection, runbook("Title", env.named(read(env))) as report, later():
        inside(connection)
"""
    (flow,) = ast.parse(text).body
    assert isinstance(flow, ast.FunctionDef)
    assert set(calls(outside_runbook(flow))) == {"opened", "env.named", "read"}


def test_a_board_that_cannot_be_rebuilt_changes_no_result(
    system: System, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A flow enters it before its runbook is open, and leaves it when that has ended."""

    def gone(*_: object) -> None:
        raise psycopg.errors.AdminShutdown("terminating connection")

    monkeypatch.setattr(board.standing, "read", lambda _: True)
    monkeypatch.setattr(board, "read_recovery_points", gone)
    with board.rebuilt(system):  # type: ignore[arg-type]
        pass
    assert "the recovery board was not rebuilt: PostgreSQL" in caplog.text
    with pytest.raises(RunbookFailed), board.rebuilt(system), runbook("Restore", system):  # type: ignore[arg-type]
        raise psycopg.errors.DiskFull("could not extend file")


def test_a_program_prints_a_drivers_error_as_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise psycopg.errors.DiskFull("could not extend file")

    assert exit_code(main) == 1
    assert "free-disk-emergency" in capsys.readouterr().err
    raw = [
        name
        for name, module in modules(r"^    sys\.exit\(main\(\)\)").items()
        if set(origins(module).values()) & {*OPENING, "blocks", "flows", "prefect"}
        and not caught(module) & OPENING.keys()
    ]
    assert raw == [], "write sys.exit(exit_code(main))"
