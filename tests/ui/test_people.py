"""What the Prefect UI asks of people: a checklist's forms, and who takes an alert."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from lab.client import Lab
from tests.ui.browser import Operator
from tests.ui.language import in_lab

pytestmark = pytest.mark.system


def test_a_checklist_is_answered(place: Lab, somebody: Operator) -> None:
    """The run waits with a form for each phase; what was answered is in its report."""
    somebody.choose("run-checklist", "routine")
    form = somebody.custom_run()
    form.choose("checklist", "cost_review")
    run = somebody.submit()
    somebody.state("Suspended")
    expect(somebody.report("how-to-resume")).to_contain_text("Resume")
    somebody.open(f"/runs/flow-run/{run}")
    for phase in (1, 2):
        asked = somebody.resume()
        expect(asked.root).to_contain_text(f"({phase}/2)")
        asked.text(in_lab("Your name")).fill("山田 太郎")
        assert asked.choose_each(in_lab("Result"), in_lab("carried out")) > 0
        if phase == 1:
            asked.text(in_lab("Your name")).scroll_into_view_if_needed()
            somebody.picture("checklist", height=1000)
        asked.resume()
        somebody.open(f"/runs/flow-run/{run}")
        somebody.state(*(["Suspended"] if phase == 1 else ["Completed", "Warning"]))
    report = somebody.report("run-checklist")
    expect(report).to_contain_text("山田 太郎")


def test_an_alert_is_acknowledged(place: Lab, somebody: Operator) -> None:
    """Escalated, found open, taken by somebody: nobody else is told from then on."""
    somebody.choose("escalate", "monitoring", "付録C")
    form = somebody.custom_run()
    form.text("what").fill("UIの試験: エラー率が高い")
    form.text("key").fill("ui-test")
    somebody.submit()
    somebody.state("Completed", "Warning", "Failed")
    expect(somebody.report("escalate")).to_contain_text("UIの試験: エラー率が高い")

    somebody.choose("acknowledge-incident", "monitoring", "付録C")
    form = somebody.custom_run()
    assert form.choices("action") == ["acknowledge", "resolve"]
    form.text("incident").fill("ui-test")
    form.text("by").fill("佐藤 花子")
    somebody.picture("acknowledge")
    somebody.submit()
    somebody.state("Completed", "Warning")
    expect(somebody.report("acknowledge-incident").get_by_role("heading", level=1)).to_contain_text("OK")

    somebody.choose("acknowledge-incident", "monitoring", "付録C")
    form = somebody.custom_run()
    form.text("incident").fill("ui-test")
    form.text("by").fill("佐藤 花子")
    form.choose("action", "resolve")
    somebody.submit()
    somebody.state("Completed", "Warning")
