"""Runbooks from the command line: with Prefect where it answers, without it where it died with the rest. Any of them:

python -m flows.launch apply-postgres-settings environment=lab override="max_connections = 300"

Without it a recovery runs, and a plan, a check or a backup. Maintenance that is confirmed needs `--without-prefect`:
only this host's file lock protects the environment then.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml  # type: ignore[import-untyped]
from prefect import Flow
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.settings import PREFECT_API_URL

from flows.approval import call_approved
from runbook.drivers import exit_code
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.guard.alone import OPTION, refuse_maintenance
from runbook.report import Report
from runbook.wait import until

CONTENTS = Path(__file__).parents[1] / "prefect.yaml"
PREFECT_SECONDS = 10.0
USAGE = f"python -m flows.launch RUNBOOK environment=NAME [parameter=value …] [{OPTION}]"


def find_flow(name: str) -> Flow[..., Any]:
    """The runbook of that name, by the table of contents: importing all of them takes seconds.

    Raises:
        OpsError: there is none.
    """
    entries = yaml.safe_load(CONTENTS.read_text(encoding="utf-8"))["deployments"]
    entrypoints = {entry["entrypoint"].rpartition(".")[2].replace("_", "-"): entry["entrypoint"] for entry in entries}
    if name not in entrypoints:
        raise OpsError(f"there is no runbook “{name[:60]}”", f"choose one of {', '.join(sorted(entrypoints))}")
    module, _, function = entrypoints[name].rpartition(".")
    found = getattr(importlib.import_module(module), function)
    assert isinstance(found, Flow)
    return found


def parsed(flow: Flow[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """`name=value` as the runbook's parameters: JSON where it is any other than a text.

    Raises:
        OpsError: a word is none, or the runbook does not take it.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise OpsError(f"“{word[:60]}” is no parameter", USAGE)
        given[name] = text
    try:
        return checked(flow, given)
    except OpsError:
        return checked(flow, {name: _json(text) for name, text in given.items()})


def checked(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as the runbook's form would take them.

    Raises:
        OpsError: it does not.
    """
    log = logging.getLogger("prefect.flows")  # which would tell it too, in its own way
    try:
        log.disabled = True
        return dict(flow.validate_parameters(dict(parameters)))
    except ParameterTypeError as error:
        lines = [line.removeprefix(" - ").partition(": ") for line in str(error).splitlines()[1:]]
        said = "; ".join(f"{name} is {parameters.get(name)}: {why}" for name, _, why in lines)
    except (SignatureMismatchError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
    finally:
        log.disabled = False
    raise OpsError(f"{flow.name} does not take that: {said[:300]}", "correct it (docs/catalogue.md)")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def launch(
    flow: Flow[..., Any],
    parameters: Mapping[str, Any],
    tell: Callable[[Report], str] = lambda report: "",
    *,
    alone: bool = False,
    without_prefect: bool = False,
) -> int:
    """Run a runbook and print its sentence, after what there is to `tell` of its report; the exit code. `alone`: not as
    a flow run, even where Prefect answers. Where it does not answer, maintenance that changes something needs
    `without_prefect`. The parameters' bounds are checked here: outside a flow run nobody else does."""
    try:
        given = checked(flow, parameters)
        answers = not alone and prefect_answers()
        with contextlib.nullcontext() if answers or alone or without_prefect else refuse_maintenance():
            report = call_approved(flow.name, flow if answers else flow.fn, given)
    except RunbookFailed as error:
        print(tell(error.report), end="")
        print(error, file=sys.stderr)
        return 1
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{tell(report)}{report.sentence()}\nreport: {report.path}")
    return 0


def prefect_answers() -> bool:
    """Whether a Prefect server lives, be it ever so busy: only it keeps runs on other hosts away."""
    address = PREFECT_API_URL.value()
    if not address:
        return False

    def answered() -> bool:
        try:
            return bool(httpx.get(f"{address}/health", timeout=3, trust_env=False).status_code)
        except httpx.HTTPError:
            return False

    try:
        return until(answered, what="an answer of Prefect", seconds=PREFECT_SECONDS)
    except Unreachable:
        return False


def main() -> int:
    """The command line."""
    try:
        if len(sys.argv) < 2:
            raise OpsError("no runbook is named", USAGE)
        words = [word for word in sys.argv[2:] if word != OPTION]
        flow = find_flow(sys.argv[1])
        parameters = parsed(flow, words)
    except OpsError as error:
        print(error, file=sys.stderr)
        return 2
    return launch(flow, parameters, without_prefect=len(words) < len(sys.argv) - 2)


if __name__ == "__main__":
    sys.exit(exit_code(main))
