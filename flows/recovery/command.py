"""Recoveries from the command line: with Prefect where it answers, without it where it died with the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from prefect import Flow
from prefect.settings import PREFECT_API_URL

from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.report import Report
from runbook.wait import until

PREFECT_SECONDS = 10.0


def launch(
    flow: Flow[..., Any], parameters: Mapping[str, Any], tell: Callable[[Report], str] = lambda report: "",
    *, alone: bool = False,
) -> int:  # fmt: skip
    """Run a recovery and print its sentence, after what there is to `tell` of its report; the exit code. `alone`: not
    as a flow run, even where Prefect answers."""
    call = flow if not alone and prefect_answers() else flow.fn
    try:
        report = call(**parameters)
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
