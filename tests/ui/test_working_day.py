"""The Prefect UI as the place of work, in a real browser: from a fresh deployment to a report that one can act on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from playwright.sync_api import expect

from deployments.runbooks import shown
from lab import lifecycle
from lab.client import Lab
from lab.servers import valkey
from tests.ui.browser import Operator, given
from tests.ui.language import LANGUAGE, in_lab

pytestmark = pytest.mark.system

PREFIX = "cache:page:"
KEYS = 1500


@pytest.fixture
def cache(place: Lab) -> Iterator[redis.Redis]:
    """The lab's Redis, with cached pages."""
    services, _ = lifecycle.existing(place.name)
    with redis.Redis.from_url(valkey.url(services.state)) as client:
        client.mset({f"{PREFIX}{number}": "x" * 200 for number in range(KEYS)})
        yield client
        if left := list(client.scan_iter(f"{PREFIX}*")):
            client.unlink(*left)


def keys(cache: redis.Redis) -> int:
    return sum(1 for _ in cache.scan_iter(f"{PREFIX}*", count=1000))


def test_from_a_tag_to_the_report_of_what_was_done(place: Lab, cache: redis.Redis, somebody: Operator) -> None:
    """Find, read, fill in, dry run, follow the plan's form, confirm, read."""
    expect(somebody.tagged("redis", "§2.2")).to_have_count(1)
    somebody.choose("clear-cache", "redis", "§2.2")
    told = somebody.describe()
    assert told.partition("\n")[0] == shown("flows.redis.cache.clear_cache", LANGUAGE).partition("\n")[0]
    assert "Args" not in told, "help stands in the form"

    form = somebody.custom_run()
    form.add("prefixes", PREFIX)
    expect(form.text("environment")).to_have_value(place.name)
    expect(form.text("confirm")).to_have_value("")
    somebody.page.get_by_role("heading", name="Parameters").scroll_into_view_if_needed()
    somebody.picture("form", height=1000)
    somebody.submit()
    somebody.state("Planned")
    plan = somebody.report("clear-cache")
    expect(plan).to_contain_text("PLANNED")
    expect(plan).to_contain_text(f"{KEYS:,}")
    assert keys(cache) == KEYS, "a plan changes nothing"
    somebody.picture("plan", height=1000)

    plan.get_by_role("link", name=in_lab("the form")).click()
    filled = somebody.form()
    assert given(somebody.page.url)["prefixes"] == [PREFIX]
    assert "confirm" not in given(somebody.page.url), "whoever confirms types it"
    expect(filled.parameter("prefixes").get_by_role("textbox")).to_have_value(PREFIX)
    filled.text("confirm").fill(place.name)
    somebody.submit()
    somebody.state("Completed", "Warning")
    somebody.log("unlinked")
    somebody.picture("run")

    report = somebody.report("clear-cache")
    expect(report.get_by_role("heading", level=1)).to_contain_text(f"{in_lab('Clear cache')} · {place.name}")
    assert keys(cache) == 0
    plots = somebody.plots()
    assert plots.get("steps", 0) > 0, plots


def test_a_look_with_plots(place: Lab, somebody: Operator) -> None:
    """A check by two clicks, and its report with pictures that are really drawn."""
    expect(somebody.tagged("redis").filter(has_text="check-redis")).not_to_have_count(0)
    somebody.picture("deployments")
    somebody.choose("check-redis-memory", "§2.1")
    somebody.custom_run()
    somebody.submit()
    somebody.state("Completed", "Warning", "Failed")
    report = somebody.report("check-redis-memory")
    plots = somebody.plots()
    assert len(plots) >= 2, plots
    assert all(plots.values()), plots
    report.get_by_role("img").first.scroll_into_view_if_needed()
    somebody.picture("report", height=1000)


def test_forms_are_usable(place: Lab, somebody: Operator) -> None:
    """Choices are offered, help stands beside each field, what is out of bounds is refused before anything runs."""
    somebody.choose("backup-database", "§1.2")
    form = somebody.custom_run()
    assert form.choices("kind") == ["full", "schema", "tables", "sql", "sql.gz"]
    somebody.choose("check-redis-memory", "§2.1")
    form = somebody.custom_run()
    expect(form.parameter("environment")).to_contain_text(in_lab("Environment (lab, staging, production …)"))


def test_a_run_that_found_something_critical_is_red(place: Lab, somebody: Operator) -> None:
    """It says in a sentence what is wrong, and its report is there all the same. Markdown in a value stays text."""
    hostile = "backup_20200101_000000 ![p](q) [log in](q) *b*"
    somebody.choose("restore-database", "§1.2")
    form = somebody.custom_run()
    form.text("backup").fill(hostile)
    somebody.submit()
    somebody.state("Failed")
    report = somebody.report("restore-database")
    expect(report.get_by_role("heading", level=1)).to_contain_text("CRITICAL")
    expect(report).to_contain_text(hostile)
    expect(report.get_by_role("link", name="log in", exact=True)).to_have_count(0)
    expect(report.get_by_role("img", name="p", exact=True)).to_have_count(0)


def test_the_ui_asks_nobody_else(somebody: Operator) -> None:
    """But for the library of one analyst, which is loaded even where analytics are off: docs/security.md."""
    for page in ("/dashboard", "/deployments", "/runs", "/artifacts", "/automations"):
        somebody.open(page)
        expect(somebody.page.get_by_role("main")).to_be_visible()
    assert somebody.strangers <= {"sr-client-cfg.amplitude.com"}
