"""Any runbook from the command line, also where Prefect has died with the rest:

python -m flows.launch apply-postgres-settings environment=lab override="max_connections = 300"
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from prefect import Flow

from flows.recovery.command import launch
from runbook.errors import OpsError
from runbook.render import dumps

CONTENTS = Path(__file__).parents[1] / "prefect.yaml"
USAGE = "python -m flows.launch RUNBOOK environment=NAME [parameter=value …]"


def command(flow: str, environment: str, parameters: Mapping[str, object]) -> str:
    """What launches a runbook by hand."""
    given = {"environment": environment, **parameters}
    words = [f"{name}={value if isinstance(value, str) else dumps(value)}" for name, value in given.items()]
    return shlex.join(["python", "-m", "flows.launch", flow, *words])


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
    for values in (given, {name: _json(text) for name, text in given.items()}):
        try:
            return dict(flow.validate_parameters(values))
        except Exception as error:  # Prefect's own, pydantic's, and signatures'
            problem = str(error)
    raise OpsError(f"{flow.name} does not take that: {' '.join(problem.split())[:300]}", USAGE)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> int:
    """The command line."""
    try:
        if len(sys.argv) < 2:
            raise OpsError("no runbook is named", USAGE)
        flow = find_flow(sys.argv[1])
        parameters = parsed(flow, sys.argv[2:])
    except OpsError as error:
        print(error, file=sys.stderr)
        return 2
    return launch(flow, parameters)


if __name__ == "__main__":
    sys.exit(main())
