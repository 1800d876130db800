"""What weekly_check, monthly_maintenance and review_costs say of a real engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.routine.costs import review_costs
from flows.routine.monthly import monthly_maintenance
from flows.routine.weekly import weekly_check
from runbook.report import Report
from tests.fixtures.application.broken import reported
from tests.fixtures.engine import NAME, Engine
from tests.fixtures.reports import rows

pytestmark = pytest.mark.system
CLOUD = """
[cloud]
endpoint = "http://127.0.0.1:9"
region = "ap-northeast-1"
disk_price = 0.1
prices_from = "a test"
"""


def said(report: Report, name: str) -> str:
    """A finding's status and value."""
    (found,) = [one for one in report.findings if one.name == name]
    return f"{found.status}: {found.value}"


def leave(engine: Engine) -> str:
    """What nobody uses: a container that stopped, an image without a name, a volume. Returns the volume's name."""
    ended = engine.run("ended", "sh", "-c", "dd if=/dev/zero of=/file bs=1000000 count=3; exit 3")
    assert ended.wait()["StatusCode"] == 3
    engine.image("old", "RUN dd if=/dev/zero of=/f bs=1000000 count=5")
    nameless = engine.client.images.get(f"{engine.prefix}-old:1").id
    engine.image("new", "LABEL a=2")
    engine.client.images.get(f"{engine.prefix}-new:1").tag(f"{engine.prefix}-old", "1")
    assert not engine.client.images.get(nameless).tags
    return str(engine.client.volumes.create(f"{engine.prefix}-left").name)


def test_the_week_s_page_has_what_nobody_uses(engine: Engine, environment: Callable[[str], None]) -> None:
    environment("")
    well = reported(lambda: weekly_check.fn(NAME))
    for name in ("images without a tag", "volumes without a mount", "networks without containers"):
        assert said(well, name) == "OK: none"
    volume = leave(engine)
    report = reported(lambda: weekly_check.fn(NAME))
    assert said(report, "images without a tag").startswith("WARN: 1, 5.0 MB")
    assert volume in said(report, "volumes without a mount")
    assert said(report, "stopped containers").startswith("WARN: 1, 3.0 MB")
    assert "launch clean-docker/dock" in report.facts["Docker"]


def test_the_costs_page_tells_idle_containers_and_the_price_of_what_nobody_uses(
    engine: Engine, environment: Callable[[str], None]
) -> None:
    environment(CLOUD)
    engine.run("idle", mem_limit="1g")
    leave(engine)
    report = reported(lambda: review_costs.fn(NAME, 1))
    assert said(report, "idle containers") == f"WARN: {engine.prefix}-idle"
    saved = {row[0]: row[1:] for row in rows(report, "What could be saved")}
    assert saved["1 images without a name"] == ("5.0 MB", "0.00 USD", "launch clean-docker/dock")
    assert saved["1 stopped containers"][0] == "3.0 MB"
    sheet = reported(lambda: monthly_maintenance.fn(NAME, 1))
    boxes = {row[2]: row for row in rows(sheet, "Monthly checklist (§7.4)")}
    assert "clean-docker" in str(rows(sheet, "What could be saved"))
    assert boxes["Removal of unused resources"][0].startswith("⚠")
