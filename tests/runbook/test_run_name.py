"""A run's name in Prefect: the runbook, the environment, what it works on."""

from __future__ import annotations

import pytest
from prefect import flow
from prefect.runtime import flow_run

from runbook.run_name import RunName


@pytest.mark.parametrize(
    ("template", "parameters", "name"),
    [
        ("restore {environment} {backup}", {"backup": "latest", "confirm": ""}, "restore lab latest plan"),
        ("restore {environment} {backup}", {"backup": "latest", "confirm": "lab"}, "restore lab latest confirmed"),
        ("clear {environment} {prefixes}", {"prefixes": ["a:", "b:"], "confirm": ""}, "clear lab a:,b: plan"),
        ("undo {environment} {kept}", {"kept": "", "confirm": "lab"}, "undo lab confirmed"),
        ("review {environment} {days}d", {"days": 30}, "review lab 30d"),
        ("check {environment}", {}, "check lab now"),
        ("create {environment} {message}", {"message": "x" * 99}, f"create lab {'x' * 59}…"),
    ],
)
def test_it_says_what(template: str, parameters: dict[str, object], name: str) -> None:
    assert RunName(template).format(environment="lab", **parameters) == name


def test_prefect_takes_it(prefect_server: str) -> None:
    @flow(name="named", flow_run_name=RunName("named {environment} {kind}"))
    def named(environment: str, kind: str, confirm: str = "") -> str:
        return str(flow_run.name)

    assert named("lab", "full") == "named lab full plan"
    assert named("lab", "full", confirm="lab") == "named lab full confirmed"
