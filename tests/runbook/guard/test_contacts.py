"""Whom to call: in a report that is CRITICAL, and in no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import pytest

from runbook.errors import RunbookFailed
from runbook.report import Report
from runbook.run import TABLE, runbook
from tests.runbook.system import System

CONTACTS = [("role", "phone"), ("オンコールSRE", "000-0000-0001")]


def run(system: System, *, well: bool) -> Report:
    try:
        with runbook("Trial", system) as report:
            report.require("it works", well, "repair it")
    except RunbookFailed as error:
        return error.report
    return report


def test_whom_to_call(system: System) -> None:
    named = dataclasses.replace(system, contacts=CONTACTS)
    (told,) = run(named, well=False).evidence
    assert (told.name, told.columns, told.rows) == (TABLE, CONTACTS[0], (CONTACTS[1],))
    assert run(named, well=True).evidence == []
    assert run(system, well=False).evidence == [], "nobody is named"


def test_that_nobody_knows_whom_to_call_hides_nothing(system: System) -> None:
    class Broken(System):
        def whom_to_call(self, owners: Collection[str]) -> Sequence[Sequence[str]]:
            raise ConnectionError

    report = run(Broken(system.reports_directory), well=False)
    assert [one.name for one in report.findings] == ["it works"]
    assert report.path


@pytest.mark.parametrize("owners", [(), ("database", "DBA")])
def test_the_owner_s_contacts_come_first(owners: tuple[str, ...]) -> None:
    from blocks.people.alerts import Alerts, Contact, Level

    contacts = {"on-call": Contact(role="SRE"), "dba": Contact(role="DBA", owners=["DBA"])}
    alerts = Alerts(contacts=contacts, path=[Level(contacts=["on-call"])], channels=["file"], file="f")
    assert [row[0] for row in alerts.rows(owners)] == (["DBA", "SRE"] if owners else ["SRE", "DBA"])
