"""The catalogue and the manual's coverage: current, and nothing of the manual is left out."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from prefect._vendor.croniter import croniter

from blocks.config import toml
from blocks.environment import Environment
from blocks.monitoring import Monitoring
from deployments import messages
from deployments.catalogue import covered, main, manual, pages
from deployments.deploy import called, chosen, project_version
from deployments.generated import outdated
from deployments.runbooks import ROOT, Runbook, read_runbooks, shown
from runbook.language.say import Language
from tests.test_deployments import FLOWS, JAPANESE


def test_every_section_of_the_manual_has_a_flow() -> None:
    found = covered(read_runbooks())
    assert {number for number in manual()["sections"] if not found[number]} == set()


def test_it_has_the_manual_s_sections() -> None:
    """§1.1 to §8.4, and the appendices."""
    numbers = [number for number in manual()["sections"] if number.startswith("§")]
    assert {number[1] for number in numbers} == set("12345678")
    assert [number for number in manual()["sections"] if "付録" in number] == ["付録A", "付録B", "付録C"]
    for chapter, last in {"1": 5, "2": 4, "3": 4, "4": 3, "5": 4, "6": 4, "7": 4, "8": 4}.items():
        assert [n for n in numbers if n[1] == chapter] == [f"§{chapter}.{number}" for number in range(1, last + 1)]


def test_every_flow_is_in_it_with_all_its_parameters() -> None:
    runbooks = {one.entrypoint: one for one in read_runbooks()}
    assert set(runbooks) == {found.entrypoint for found in FLOWS}
    for found in FLOWS:
        one = runbooks[found.entrypoint]
        assert [parameter.name for parameter in one.parameters] == list(found.parameters)
        assert all(parameter.help for parameter in one.parameters), one.name
        assert one.description, one.name
        assert one.chapter in manual()["folders"], f"deployments/manual.toml: [folders] lacks {one.chapter}"


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("one", read_runbooks(), ids=lambda one: one.name)
def test_what_the_ui_shows_reads_as_markdown(one: Runbook, language: Language) -> None:
    """The title by itself, then paragraphs; help stands in the form. Nothing turns into code, HTML or a title."""
    tokens = MarkdownIt().enable("table").parse(shown(one.entrypoint, language))
    title, *paragraphs = (token.content for token in tokens if token.type == "inline")
    assert (title == one.title) is (language == "ja")
    assert bool(JAPANESE.search(title)) is (language == "ja")
    assert all(section.replace("付録", "appendix ") in title for section in one.sections) or language == "ja"
    assert paragraphs
    assert not re.search(r"^\s*(Args|Returns|Raises):", shown(one.entrypoint, language), re.MULTILINE)
    kinds = {inner.type for token in tokens for inner in (token, *(token.children or []))}
    assert not {"code_block", "html_block", "html_inline", "heading_open", "hr"} & kinds


def test_what_is_deployed_has_that_and_its_version() -> None:
    environment = toml.environment(os.environ["OPS_ENVIRONMENT"])
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    entries = chosen(content, environment, {environment.name: "process"})["deployments"]
    assert len(entries) > 100
    for entry in entries:
        assert entry["description"] == shown(entry["entrypoint"], environment.language)
        assert "Args:" not in entry["description"]
        assert entry["version"] == project_version()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert project_version().removesuffix("-dirty") == commit.strip()


CONTENT = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
EVERY = {called(entry, "x"): entry for entry in CONTENT["deployments"]}


def deployed(environment: Environment, *, scheduled: bool = False) -> set[str]:
    """What an environment gets, as it is called in one of the name x."""
    named = environment.model_copy(update={"name": "x", "pools": {}}).with_parts(environment.parts())
    entries = chosen(CONTENT, named, {"x": "process"})["deployments"]
    return {called(entry, "x") for entry in entries if entry.get("schedules") or not scheduled}


def runs_a_day(environment: Environment) -> dict[str, float]:
    """How many runs each entry's schedules start on a day, over four weeks that begin on a Monday."""
    entries = chosen(CONTENT, environment, {environment.name: "process"})["deployments"]
    begin, days = datetime(2026, 11, 2), 28
    ends, found = begin + timedelta(days=days), dict[str, float]()
    for entry in entries:
        moments = [croniter(one["cron"], begin) for one in entry.get("schedules") or []]
        number = sum(1 for one in moments for _ in takewhile(lambda at: at < ends, one.all_next(datetime)))
        found[called(entry, environment.name)] = number / days
    return found


def test_with_a_watcher_the_checks_of_every_few_minutes_are_hourly_in_prefect() -> None:
    """What people see in the list of runs is what matters: 700 runs a day hide it."""
    lab = toml.environment(os.environ["OPS_ENVIRONMENT"])
    named = lab.model_copy(update={"slugs": {**lab.slugs, "monitoring": "ops-monitoring/x"}})
    before, after = (
        runs_a_day(named.with_parts({**lab.parts(), "monitoring": Monitoring(watcher=watcher)}))
        for watcher in (False, True)
    )
    assert before.keys() == after.keys()
    often = {name for name, runs in before.items() if runs > 24}
    wanted = ("escalate", "check-recovery-objectives", "take-due-backups")
    assert often == {f"{one}/{lab.name}" for one in wanted}
    assert {round(after[name]) for name in often} == {24}, "once an hour"
    assert all(before[name] == after[name] for name in before.keys() - often)
    print(f"runs a day: {sum(before.values()):.0f} without a watcher, {sum(after.values()):.0f} with one")
    assert sum(before.values()) > 670
    assert sum(after.values()) < 110


def without(environment: Environment, *parts: str) -> Environment:
    return environment.derived({}, without=parts, reports=environment.reports_directory)


def test_only_what_an_environment_has_is_deployed() -> None:
    """`Failed` each night, where there is nothing to prune, would call somebody."""
    lab = toml.environment(os.environ["OPS_ENVIRONMENT"])
    whole = deployed(lab)
    absent = {need for one in EVERY.keys() - whole for need in EVERY[one]["needs"]}
    assert absent <= {
        "docker",
        "docker.checkout",
        "docker|cloud",
        "certificates",
        "certificates.domains",
        "cloud",
        "backups.prefect",
        "copies.prefect",
        "prefect_server",
        "prefect_server.keep_days",
    }
    gone = whole - deployed(without(lab, "copies"))
    assert gone == {
        "replicate-backups/x",
        *(f"prune-backups/x-copies{kind}" for kind in ("", "-redis", "-files", "-cluster")),
    }
    assert whole - deployed(without(lab, "alerts")) == {"escalate/x", "acknowledge-incident/x"}
    for part, chapter in (("redis", "redis"), ("logs", "logs"), ("ai_providers", "ai_providers")):
        left = {EVERY[one]["entrypoint"].split(".")[1] for one in deployed(without(lab, part))}
        assert chapter not in left, part
    real = lab.model_copy(update={"disposable": False}).with_parts(lab.parts())
    assert whole - deployed(real) == {
        "run-drill/x",
        "run-performance-test/x",
        *(f"run-checklist/x-drill-{when}" for when in ("preparation", "day", "follow-up")),
    }
    assert deployed(real.model_copy(update={"drill_environment": "lab"}).with_parts(lab.parts())) == whole
    bare = without(lab, *(lab.slugs.keys() - {"postgres", "services"}))
    assert len(deployed(bare)) < 50
    alone = deployed(bare, scheduled=True)
    assert "check-replication/x" not in alone, "there is nothing that follows"
    assert "daily-check/x-resources" in alone, "which judges how far transaction ids are from wraparound"
    assert "check-corruption/x" in alone


def test_what_an_entry_needs_is_a_part_that_there_can_be() -> None:
    """A misspelt one would be deployed nowhere; a part that a chapter is of is among its entries' needs."""
    for name, entry in EVERY.items():
        for need in [
            one for each in (*entry.get("needs", ()), *entry.get("schedule_needs", ())) for one in each.split("|")
        ]:
            part, _, field = need.partition(".")
            kind = toml.PARTS.get(part)
            assert kind or need in Environment.model_fields, (name, need)
            assert not field or (kind and (field in kind.model_fields or hasattr(kind, field))), (name, need)
        chapter = entry["entrypoint"].split(".")[1]
        if wanted := {"redis": "redis", "logs": "logs", "ai_providers": "ai_providers"}.get(chapter):
            assert wanted in {need.partition(".")[0] for need in entry["needs"]}, name


def test_what_has_a_frequency_has_a_schedule() -> None:
    for name, entry in EVERY.items():
        assert bool(entry.get("schedules")) == (entry["tags"][3] != "on-demand"), name


def test_the_pages_are_current() -> None:
    assert outdated(pages()) == [], "run: make catalogue"


def test_the_catalogues_of_translations_are_current() -> None:
    made = messages.files()
    assert outdated(made) == [], "run: make messages"
    assert {*messages.OWN.rglob("*.po")} <= {*made}, "no catalogue of a folder that is gone"


def test_both_readmes_count_every_runbook_and_fit_on_two_screens() -> None:
    chapters = [found.entrypoint.split(".")[1] for found in FLOWS]
    for path, text in pages().items():
        if path.name.startswith("README"):
            counted = re.findall(r"\[(\w+)\]\(docs/catalogue\.md#\1\) \| [^|]+ \| (\d+) \|", text)
            assert dict(counted) == {one: str(chapters.count(one)) for one in chapters}, path.name
            assert len(text.split()) <= 1000, path.name


def test_its_command_writes_what_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deployments.generated.ROOT", tmp_path)
    monkeypatch.setattr("deployments.catalogue.pages", lambda: {tmp_path / "page.md": "new\n"})
    monkeypatch.setattr("sys.argv", ["catalogue", "--check"])
    assert main() == 1
    assert "make catalogue" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["catalogue"])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["catalogue", "--check"])
    assert main() == 0
