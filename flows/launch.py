"""Run any runbook from the command line, also while Prefect is down.

python -m flows.launch apply-postgres-settings environment=lab override="max_connections = 300"

Without Prefect, recoveries, plans, checks and backups run. Confirmed maintenance needs `--without-prefect`: only this
host's file lock protects the environment then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from prefect import Flow
from prefect.exceptions import ParameterTypeError, SignatureMismatchError, TerminationSignal
from prefect.settings import PREFECT_API_URL
from pydantic import TypeAdapter, ValidationError

from blocks.environment import Environment
from flows.approval import call_approved
from runbook.drivers import exit_code
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.guard.alone import OPTION, refuse_maintenance
from runbook.language.say import say, use_language
from runbook.report import Report
from runbook.wait import until
from tasks.prefect.client import serves

CONTENTS = Path(__file__).parents[1] / "prefect.yaml"
PREFECT_SECONDS = 10.0
HALF_DEAD = "Prefect, or its database, does not answer: this run is none of its flow runs"
USAGE = f"python -m flows.launch RUNBOOK environment=NAME [parameter=value …] [{OPTION}]"


def find_flow(name: str) -> Flow[..., Any]:
    """The runbook of that name, from prefect.yaml: importing all runbooks takes seconds.

    Raises:
        OpsError: there is no such runbook.
    """
    entries = yaml.safe_load(CONTENTS.read_text(encoding="utf-8"))["deployments"]
    entrypoints = {entry["entrypoint"].rpartition(".")[2].replace("_", "-"): entry["entrypoint"] for entry in entries}
    if name not in entrypoints:
        raise OpsError(f"there is no runbook “{name[:60]}”", f"choose one of {', '.join(sorted(entrypoints))}")
    module, _, function = entrypoints[name].rpartition(".")
    found = getattr(importlib.import_module(module), function)
    assert isinstance(found, Flow)
    return found


def add_confirmation(parser: argparse.ArgumentParser) -> None:
    """Add what confirms a plan: its fingerprint, and the environment's name."""
    parser.add_argument("--plan", default="", help="the fingerprint in the plan's report; empty: compare with no plan")
    parser.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")


def parsed(flow: Flow[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """The runbook's parameters from `name=value` words. A value that its parameter does not take as text is JSON.

    Raises:
        OpsError: a word is not `name=value`, or the runbook rejects it.
    """
    types, given = get_type_hints(flow.fn, include_extras=True), dict[str, Any]()
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise OpsError(f"“{word[:60]}” is not a parameter", USAGE)
        given[name] = _value(types.get(name, str), text)
    return checked(flow, given)


def checked(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, validated as the runbook's form does.

    Raises:
        OpsError: a parameter is not valid.
    """
    log = logging.getLogger("prefect.flows")  # would print the same error in another form
    try:
        log.disabled = True
        return dict(flow.validate_parameters(dict(parameters)))
    except ParameterTypeError as error:
        lines = [line.removeprefix(" - ").partition(": ") for line in str(error).splitlines()[1:]]
        problem = "; ".join(f"{name} is {parameters.get(name)}: {why}" for name, _, why in lines)
    except (SignatureMismatchError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
    finally:
        log.disabled = False
    raise OpsError(f"{flow.name} rejects the parameters: {problem[:300]}", "correct them (docs/catalogue.md)")


def _value(kind: Any, text: str) -> Any:
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def launch(
    flow: Flow[..., Any],
    parameters: Mapping[str, Any],
    describe: Callable[[Report], str] = lambda report: "",
    *,
    alone: bool = False,
    without_prefect: bool = False,
) -> int:
    """Run a runbook, print what `describe` makes of its report and the report's sentence; returns the exit code.

    `alone`: not as a flow run, even if Prefect answers. `without_prefect`: allow maintenance while Prefect is down.
    The parameters are validated here: outside a flow run nothing else does it.
    """
    try:
        given = checked(flow, parameters)
        answers = not alone and prefect_answers()
        if not (answers or alone) and PREFECT_API_URL.value():
            print(_said(HALF_DEAD, parameters), file=sys.stderr)
        refusing = contextlib.nullcontext() if answers or alone or without_prefect else refuse_maintenance()
        with refusing, _reported_if_terminated():
            report = call_approved(flow.name, flow if answers else flow.fn, given)
    except RunbookFailed as error:
        print(_described(describe, error.report), end="")
        print(error.report.titled_sentence, file=sys.stderr)
        return 1
    except OpsError as error:
        print(_said(str(error), parameters), file=sys.stderr)
        return 1
    print(f"{_described(describe, report)}{report.titled_sentence}\nreport: {report.path}")
    return 0


def _described(describe: Callable[[Report], str], report: Report) -> str:
    with use_language(report.language):
        return describe(report)


def _said(text: str, parameters: Mapping[str, Any]) -> str:
    """The text, in the language of the environment where it is known."""
    try:
        language = Environment.find(parameters["environment"]).language
    except (OpsError, KeyError):
        return text
    with use_language(language):
        return say(text)


@contextlib.contextmanager
def _reported_if_terminated() -> Iterator[None]:
    """SIGTERM ends a runbook as a cancel in Prefect does: it reports what changed and what is left. Then the process
    ends by the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        raise TerminationSignal(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except TerminationSignal:
        print("ended by SIGTERM: its report lists what changed and what is left", file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def prefect_answers() -> bool:
    """Return True if a Prefect server and its database answer, even under load: only Prefect's lock stops runs on other
    hosts.

    Raises:
        OpsError: it refuses this process's log-in.
    """
    if not PREFECT_API_URL.value():
        return False
    try:
        return until(lambda: serves(PREFECT_SECONDS), what="an answer of Prefect", seconds=PREFECT_SECONDS)
    except Unreachable:
        return False


def main() -> int:
    """The command line."""
    try:
        if len(sys.argv) < 2:
            raise OpsError("no runbook was given", USAGE)
        words = [word for word in sys.argv[2:] if word != OPTION]
        flow = find_flow(sys.argv[1])
        parameters = parsed(flow, words)
    except OpsError as error:
        print(error, file=sys.stderr)
        return 2
    return launch(flow, parameters, without_prefect=len(words) < len(sys.argv) - 2)


if __name__ == "__main__":
    sys.exit(exit_code(main))
