"""Links to other runbooks' forms."""

from __future__ import annotations

import json
import urllib.parse
import uuid

import pytest
from prefect import flow
from prefect.settings import PREFECT_UI_URL, temporary_settings

from runbook.page.form import Forms, read_forms


@flow
def other(environment: str, target: str = "") -> None:
    """What is linked to."""


@flow
def diagnosis(environment: str) -> tuple[str, str]:
    forms = read_forms([environment])
    given = {"environment": environment, "target": "751"}
    return forms.link("other", environment, given), forms.link("nowhere", environment, given)


@pytest.mark.usefixtures("prefect_server")
def test_the_form_of_a_deployment_is_filled_in() -> None:
    name = f"t{uuid.uuid4().hex[:8]}"
    deployed = other.to_deployment(name).apply(work_pool_name=None)
    with temporary_settings({PREFECT_UI_URL: "http://ui:1/v2"}):
        link, nowhere = diagnosis(name)
    place, _, query = link.removeprefix(f"[other/{name}](").removesuffix(")").partition("?")
    assert place == f"http://ui:1/v2/deployments/deployment/{deployed}/run"
    (given,) = urllib.parse.parse_qs(query)["parameters"]
    assert json.loads(given) == {"environment": name, "target": "751"}
    assert nowhere == f'launch nowhere/{name}, target="751"'


def test_without_prefect_it_is_said_in_words() -> None:
    link = Forms().link("other", "lab", {"environment": "lab", "target": "751"})
    assert link == 'launch other/lab, target="751"'
