"""The reports of many runbooks from one flow run, which calls them one after another as their deployments would.

A runbook that takes a `confirm` plans; one that changes nothing runs. Left out are the others, which back up or test
something, and `CALLING` and `SLOW`.
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
from runbook.page import render, width
from runbook.page.form import Forms
from runbook.report import Report
from tests.test_deployments import FLOWS, Found

CALLING = {"escalate", "run-checklist", "remind-checklists", "take-due-backups", "acknowledge-incident", "run-drill"}
"""They call people, wait for people, or launch other runs."""
SLOW = {"check-dependencies", "update-dependencies", "lint-code", "check-types", "scan-vulnerabilities"}
"""Each works for 5 to 20 s on the application's sources."""


@dataclass
class Published:
    """A report's page as it is published, in each language; of which runbook."""

    runbook: str
    pages: dict[Language, str]


@dataclass
class Collector:
    """In the place of what writes and publishes reports: it does the same, and keeps what is published."""

    language: Language
    runbook: str = ""
    found: list[Published] = field(default_factory=list)

    def write(self, report: Report, directory: Path, often: bool, forms: Forms) -> str:
        """As run._write: what a page in the other language would be is kept as well."""
        page, pages = _WRITE(report, directory, often, forms), dict[Language, str]()
        for language in get_args(Language):
            with use_language(language):
                pages[language] = width.fit(render.markdown(report, forms))
        self.found.append(Published(self.runbook, pages))
        return page

    def publish(self, markdown: str, key: str, description: str) -> object:
        """As create_markdown_artifact."""
        self.found[-1].pages[self.language] = markdown
        return _PUBLISH(markdown=markdown, key=key, description=description)


_WRITE, _PUBLISH = run._write, run.create_markdown_artifact


def is_called(found: Found) -> bool:
    """Whether a call without `confirm` changes nothing, and needs nobody."""
    plans = "confirm" in found.parameters or "changes=True" not in inspect.getsource(found.flow.fn)
    return plans and found.flow.name not in CALLING | SLOW


def collect(deployments: Mapping[str, DeploymentResponse], language: Language) -> list[Published]:
    """A report of each deployed runbook that only reads. `deployments`: by the flow's name. `language`: theirs."""
    collector = Collector(language)

    @flow(name="collect-reports")
    def collect_reports() -> None:
        for found in FLOWS:
            if (there := deployments.get(found.flow.name)) and is_called(found):
                collector.runbook = found.flow.name
                with _run_of(there), suppress(OpsError):  # which its report states
                    found.flow.fn(**there.parameters)

    replaced = {"_write": collector.write, "create_markdown_artifact": collector.publish}
    with mock.patch.multiple(run, **replaced):
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
