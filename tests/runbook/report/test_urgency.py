"""After the change, what it led to comes first; what was advised in place of it is over."""

from __future__ import annotations

from runbook.next import Next
from runbook.page.render import markdown
from runbook.report import Report, Status


def restored() -> Report:
    """A report whose run was permitted after its first two findings."""
    report = Report("Full restore", "lab")
    report.warn("standby", "promote it instead", follow=[Next("postgres-failover")], alternative=True)
    report.warn("files backup", "back them up from now on")
    report.permitted, report.judged = True, len(report.findings)
    report.warn("no base backup of the new timeline", "take one now")
    return report


def test_a_warning_about_the_result_comes_before_those_of_the_judging() -> None:
    report = restored()
    report.settle()
    assert report.sentence().endswith("Next: take one now")
    assert "**do now:** take one now" in markdown(report)
    assert [one.name for one in report.most_urgent if one.status is Status.WARN] == [
        "no base backup of the new timeline",
        "files backup",
    ]
    assert "postgres-failover" not in markdown(report)


def test_before_the_change_the_alternative_comes_first() -> None:
    report = restored()
    report.permitted = False
    assert "promote it instead" in report.sentence()


def test_the_undo_is_filled_in_at_the_head_of_the_page() -> None:
    report = restored()
    report.undo_is(Next("undo-full-restore", "", {"kept": "data.superseded_20261201_090000"}))
    head = markdown(report).partition("## Findings")[0]
    assert "undo-full-restore environment=lab kept=data.superseded_20261201_090000" in head
