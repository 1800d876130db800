"""Three in the morning: each symptom leads to its runbook's form, filled in, within three clicks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml  # type: ignore[import-untyped]
from playwright.sync_api import Locator, TimeoutError, expect
from prefect.client.orchestration import get_client

from deployments import deploy, entries, start_page
from lab.client import Lab
from tests.ui.browser import Operator, given
from tests.ui.language import LANGUAGE, in_lab
from tests.ui.width import HEIGHT, WIDTHS, too_wide

pytestmark = pytest.mark.system

PICTURE = 720
MOST_CLICKS, REDRAWN_MILLISECONDS = 20, 3000
# What is typed into the search box → the runbook whose form has to open, and what that fills in besides the environment.
SYMPTOMS: dict[str, tuple[str, dict[str, object]]] = {
    "database is slow": ("diagnose-database", {}),
    "redis is full": ("check-redis-memory", {}),
    "昨日": ("restore-to-point", {"by": "time"}),
    "証明書": ("check-certificates", {}),
    "as admin": ("search-audit-log", {"user": "admin", "action": "login"}),
    "すべて消えた": ("full-restore", {}),
}


@pytest.fixture
def certificates(place: Lab) -> Iterator[None]:
    """The lab has no certificates: their check is deployed as it is where there are some, with the page that links it."""
    content = yaml.safe_load((deploy.ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    own = [one for one in content if one["entrypoint"].endswith(".check_certificates")]
    plain = [{**one, "schedules": [], "description": "", "version": "1"} for one in own]
    filled = entries.filled(plain, {"OPS_ENVIRONMENT": place.name})
    entries.publish([*filled, *start_page.symptom_entries(filled, place.name, LANGUAGE)], [], {}, LANGUAGE)
    there = deploy.deployed(content, place.name) | start_page.read_symptom_deployments(place.name)
    start_page.describe_start(there, place.name, "Start here", LANGUAGE)
    yield
    with get_client(sync_client=True) as client:
        for name, one in there.items():
            if name.startswith("check-certificates/"):
                client.delete_deployment(one.id)


def test_six_symptoms_lead_to_their_forms_in_three_clicks(place: Lab, certificates: None, somebody: Operator) -> None:
    """From the dashboard at a desk: the list, whose first page has all six, the row's menu, its form."""
    page = somebody.page
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})
    for words, (flow, filled) in SYMPTOMS.items():
        somebody.open("/dashboard")
        page.get_by_role("link", name="Deployments", exact=True).first.click()
        row = page.locator("tbody tr").filter(has_text=re.compile(words, re.IGNORECASE))
        expect(row).to_have_count(1)
        expect(row).to_contain_text(flow)
        open_row_form(row)
        check_form(somebody, place, filled)


def test_six_symptoms_are_found(place: Lab, certificates: None, somebody: Operator) -> None:
    """By the search box. From start-here's page with one click."""
    page = somebody.page
    somebody.open("/deployments")
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})
    for words, (flow, filled) in SYMPTOMS.items():
        page.get_by_role("link", name="Deployments", exact=True).first.click()
        page.get_by_placeholder("Search deployments").fill(words)
        row = page.locator("tbody tr").filter(has_text=f"({place.name})")
        expect(row).to_have_count(1)
        expect(row).to_contain_text(flow)
        if flow == "full-restore":  # the list hides the tags behind the first that fit
            expect(row).to_contain_text("§8.2")
            expect(row).to_contain_text("SRE")
        open_row_form(row)
        check_form(somebody, place, filled)

    somebody.open("/deployments?flowOrDeploymentName=start-here")
    own = page.locator("tbody tr").filter(has_text=f"({place.name})")
    own.get_by_role("link").first.click()
    page.get_by_role("tab", name="Description").click()
    described, start = page.get_by_role("tabpanel", name="Description"), page.url
    expect(described.get_by_role("heading").first).to_be_visible()
    for width in WIDTHS:  # on a phone the tabs above the text are wider than the window: Prefect's own
        assert too_wide(page, width, around=False) == []
    somebody.picture("start-here", height=PICTURE)
    for flow, filled in SYMPTOMS.values():
        first = described.locator("strong").get_by_role("link", name=flow, exact=True).first
        address = first.get_attribute("href") or ""
        assert given(address) == {"environment": place.name, **filled}
    first.click()
    check_form(somebody, place, filled)

    somebody.open(start)
    somebody.custom_run()
    somebody.submit()
    somebody.state("Completed", "Warning", "Planned")
    report = somebody.report("start-here")
    expect(report.get_by_role("heading", level=1)).to_contain_text(f"{in_lab('Start here')} · {place.name}")
    expect(report).to_contain_text(in_lab("lock held by"))
    for width in WIDTHS:
        assert too_wide(page, width) == []


def open_row_form(row: Locator) -> None:
    """By the menu at the row's end, opened again where the list was drawn anew under it."""
    item = row.page.get_by_role("menuitem", name="Custom Run")
    for _ in range(MOST_CLICKS):
        row.get_by_role("button", name="Open menu").click()
        try:
            item.click(timeout=REDRAWN_MILLISECONDS)
        except TimeoutError:
            continue
        return
    raise AssertionError("the row's menu does not stay open")


def check_form(somebody: Operator, place: Lab, filled: dict[str, object]) -> None:
    """The form that is open has these values; nobody has confirmed anything."""
    form = somebody.form()
    expect(form.text("environment")).to_have_value(place.name)
    values = given(somebody.page.url)
    assert values.items() >= filled.items()
    assert "confirm" not in values
