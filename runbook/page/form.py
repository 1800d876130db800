"""Addresses of deployments' forms in the Prefect UI, filled in: a report offers what to launch next."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.context import FlowRunContext

from runbook.guard.brief import asked_briefly
from runbook.log import logger
from runbook.next import Next
from runbook.page.address import ui_address
from runbook.page.markdown import LITERAL, code, link

MOST = 200
_LIKE_A_NAME = re.compile(r"(?<![\w./-])[a-z]{2,}(?:-[a-z]+)+(?![\w.-])", re.ASCII)
_FENCED = re.compile(r"^((?:`{3,})[^\n]*\n.*?^`{3,}$)", re.MULTILINE | re.DOTALL)


def dumps(value: object) -> str:
    """JSON for a link."""
    return json.dumps(value, ensure_ascii=False, default=str)


def form_address(deployment: object, parameters: Mapping[str, object]) -> str:
    """Of a deployment's form; "" where nobody knows the address of the UI."""
    return ui_address(f"deployments/deployment/{form_path(deployment, parameters)}")


def form_path(deployment: object, parameters: Mapping[str, object]) -> str:
    """The same, relative to the page of any deployment."""
    return f"{deployment}/run?{urllib.parse.urlencode({'parameters': dumps(parameters)})}"


@dataclass(frozen=True)
class Forms:
    """The deployments of some environments: (flow, environment) → id. Empty where Prefect does not answer."""

    deployments: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def link(self, flow: str, environment: str, parameters: Mapping[str, object], otherwise: str = "") -> str:
        """Markdown: a link to the form, or what to launch in its place (`otherwise`: as a command)."""
        deployment = self.deployments.get((flow, environment))
        address = form_address(deployment, parameters) if deployment else ""
        if address:
            return link(f"{flow}/{environment}", address)
        given = "".join(f", {name}={dumps(value)}" for name, value in parameters.items() if name != "environment")
        return code(otherwise) if otherwise else f"launch {flow}/{environment}{given}"

    def linked(self, page: str, environment: str) -> str:
        """A finished page in which each name of a runbook, outside of code and of links, is a link to its form."""
        known = sorted((flow for flow, of in self.deployments if of == environment and "-" in flow), key=len)
        if not known or not ui_address(""):
            return page
        name = rf"(?:{'|'.join(map(re.escape, reversed(known)))})"
        whole = rf"(?:/{re.escape(environment)})?(?![\w/`-]|\.\w)"
        names = re.compile(rf"(?<!`)`(?P<code>{name})`(?!`)|{LITERAL}|(?<![\w./-])(?P<name>{name}){whole}", re.ASCII)

        def form(found: re.Match[str]) -> str:
            flow = found["code"] or found["name"]
            if not flow:
                return found[0]
            address = form_address(self.deployments[flow, environment], {"environment": environment})
            return f"[{found[0]}]({address})"

        parts = _FENCED.split(page)  # every second one is a block of code
        return "".join(part if number % 2 else names.sub(form, part) for number, part in enumerate(parts))

    def next(self, one: Next, environment: str) -> str:
        """A runbook to follow: what for, its form (its command if Prefect does not know it), and the reminder."""
        given = {"environment": environment, **one.parameters}
        address = self.link(one.flow, environment, given, one.command(environment))
        reminder = f" (**{one.reminder}**)" if one.reminder else ""
        return f"{one.why}: {address}{reminder}" if one.why else address + reminder


def may_name_runbook(page: str) -> bool:
    """Whether a page has a word like `full-restore`: for others nobody has to ask Prefect."""
    return bool(_LIKE_A_NAME.search(page))


def read_forms(environments: Sequence[str]) -> Forms:
    """Ask Prefect, once, inside a flow run; outside one it may have died with the rest, and is not waited for."""
    if FlowRunContext.get() is None or not ui_address(""):
        return Forms()
    named = DeploymentFilter(name=DeploymentFilterName(any_=list(environments)))
    try:
        with asked_briefly(), get_client(sync_client=True) as client:
            found = client.read_deployments(deployment_filter=named, limit=MOST)
    except Exception as error:  # a report without links is a report
        logger().warning("the forms of %s could not be asked for: %s", ", ".join(environments), error)
        return Forms()
    flows = {(re.split("[.:]", str(one.entrypoint))[-1].replace("_", "-"), one.name): str(one.id) for one in found}
    return Forms(flows)
