"""The reports of many runbooks in one flow run, which calls them one after another as their deployments would.

A runbook that takes a `confirm` plans; one that changes nothing runs. Left out are the others, which back up or test
something, and `CALLING`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args
from unittest import mock

from prefect import flow
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext

from runbook import run
from runbook.errors import OpsError
from runbook.language.say import Language, use_language
from runbook.page import render
from runbook.page.form import Forms
from runbook.report import Report
from tests.test_deployments import FLOWS, Found

CALLING = {"escalate", "run-checklist", "remind-checklists", "take-due-backups", "acknowledge-incident", "run-drill"}
"""They call people, wait for people, or launch other runs."""


@dataclass(frozen=True)
class Reported:
    """The page of one report in each language, and the runbook that was called."""

    runbook: str
    pages: Mapping[Language, str]


@dataclass
class Collector:
    """Stands in for what writes the report's files and returns its page: the same, and keeps the page."""

    runbook: str = ""
    found: list[Reported] = field(default_factory=list)

    def write(self, report: Report, directory: Path, often: bool, forms: Forms) -> str:
        shown = _WRITE(report, directory, often, forms)
        pages = dict[Language, str]()
        for language in get_args(Language):
            with use_language(language):
                pages[language] = render.markdown(report, forms)
        self.found.append(Reported(self.runbook, pages))
        return shown


_WRITE = run._write


def only_reads(found: Found) -> bool:
    """Whether a call without `confirm` changes nothing."""
    plans = "confirm" in found.parameters or "changes=True" not in inspect.getsource(found.flow.fn)
    return plans and found.flow.name not in CALLING


def collect(deployments: Mapping[str, DeploymentResponse]) -> list[Reported]:
    """A report of each deployed runbook that only reads. `deployments`: by the flow's name."""
    collector = Collector()

    @flow(name="collect-reports")
    def collect_reports() -> None:
        for found in FLOWS:
            if (there := deployments.get(found.flow.name)) and only_reads(found):
                collector.runbook = found.flow.name
                # The report says what went wrong, whatever it was.
                with _run_of(there), suppress(OpsError):
                    found.flow.fn(**there.parameters)

    with mock.patch.object(run, "_write", collector.write):
        collect_reports()
    return collector.found


@contextmanager
def _run_of(deployment: DeploymentResponse) -> Iterator[None]:
    """The flow run of the block is one of this deployment, for what it says about itself."""
    context = FlowRunContext.get()
    assert context
    assert context.flow_run
    own = {"deployment_id": deployment.id, "parameters": deployment.parameters, "tags": deployment.tags}
    with context.model_copy(update={"flow_run": context.flow_run.model_copy(update=own)}):
        yield
