"""Runbooks from the command line, as a diagnosis without Prefect offers them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from blocks.redis.server import Redis
from flows.launch import find_flow, launch, main, parsed
from flows.troubleshooting import diagnosis
from flows.troubleshooting.database_sessions import full_cause
from flows.troubleshooting.diagnosis import Diagnosis
from flows.troubleshooting.disk import free_disk_emergency
from flows.troubleshooting.disk_usage import _ADVICE
from flows.troubleshooting.redis import _clear, _more_memory
from runbook.errors import OpsError
from runbook.next import Next
from runbook.page.form import Forms
from tests.fixtures import forked
from tests.troubleshooting.conftest import Host

ROOT = Path(__file__).parents[2]
CHAPTER = sorted((ROOT / "flows/troubleshooting").glob("*.py"))


def test_what_a_diagnosis_offers_is_taken_by_its_runbook() -> None:
    block = Redis(data_directory="/d", drop_prefixes=["cache:"])
    cause = full_cause("h:1", most=400)
    offered = [*cause.follow, _clear(block), *_more_memory(None)]
    for one in offered:
        words = shlex.split(one.command("lab"))
        values = parsed(find_flow(words[3]), words[4:])
        assert values["environment"] == "lab"
        for name, value in one.parameters.items():
            assert list(values[name]) == value if isinstance(value, list) else values[name] == value
    assert {"max_connections = 600", "maxmemory 2gb"} <= {str(one.parameters.get("override")) for one in offered}


def test_bounds_hold_without_prefect_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A log that was rotated a minute ago is not old."""
    assert launch(free_disk_emergency, {"environment": "sick", "log_days": 0}, alone=True) == 1
    assert "free-disk-emergency rejects the parameters" in capsys.readouterr().err


def test_every_runbook_of_the_chapter_can_be_launched_by_its_form() -> None:
    """With the environment alone, where nothing else is filled in."""
    named = {
        one.args[0].value
        for path in CHAPTER
        for one in ast.walk(ast.parse(path.read_text()))
        if isinstance(one, ast.Call) and getattr(one.func, "id", "") == "Next" and isinstance(one.args[0], ast.Constant)
    }
    named |= {flow for flow, _ in _ADVICE.values() if flow}
    assert len(named) > 20
    for flow in map(str, named):
        assert parsed(find_flow(flow), ["environment=lab"])["environment"] == "lab"


def test_a_probe_that_hangs_or_may_not_look_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "PROBE_SECONDS", 0.1)
    found = Diagnosis(None, None)  # type: ignore[arg-type]
    assert found.ask("does it hang?", threading.Event().wait) is None
    assert found.ask("may it look?", Path("/proc/1/mem/x").read_bytes) is None
    assert [question for question, _ in found.unmeasured] == ["does it hang?", "may it look?"]


def test_with_prefect_they_are_forms_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Forms({(flow, "lab"): f"id-of-{flow}" for flow in ("apply-redis-settings", "undo-redis-settings")})
    apply, undo = _more_memory(None)
    with temporary_settings({PREFECT_UI_URL: "http://ui/v2"}):
        text = deployed.next(apply, "lab")
        assert "http://ui/v2/deployments/deployment/id-of-undo" in deployed.next(undo, "lab")
    address = re.search(r"\((http://ui/v2/deployments/deployment/id-of-apply-redis-settings/run\?\S+)\)", text)
    assert address
    (filled,) = parse_qs(urlsplit(address[1]).query)["parameters"]
    assert json.loads(filled) == {"environment": "lab", **apply.parameters}
    assert "undo it then" in text


def test_each_value_is_read_by_its_parameters_type() -> None:
    """A transaction ID looks like a number, and is a text, whatever the other values are."""
    words = ["environment=2026", "by=before_transaction", "target=758", "timeline=1", 'tables=["public.users"]']
    values = parsed(find_flow("restore-to-point"), words)
    assert (values["environment"], values["target"], values["timeline"]) == ("2026", "758", 1)
    assert values["tables"] == ["public.users"]
    values = parsed(find_flow("full-restore"), ["environment=lab", "before=758", "strict=true"])
    assert (values["before"], values["strict"]) == ("758", True)


@pytest.mark.parametrize("words", [["environment"], ["environment=lab", "overide=x"], ["environment=lab", "keep=-2"]])
def test_what_it_does_not_take_is_told(words: list[str]) -> None:
    with pytest.raises(OpsError):
        parsed(find_flow("discard-superseded"), words)
    with pytest.raises(OpsError, match="choose one of"):
        find_flow("flush-everything")


def test_it_runs_without_a_prefect_server(host: Host) -> None:
    words = shlex.split(Next("diagnose-redis").command("sick"))
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = forked.run(words[1:], variables)
    assert done.returncode == 0, done.stderr
    assert "Diagnose Redis on sick: OK: nothing found" in done.stdout


def test_without_prefect_maintenance_needs_a_flag_that_states_the_risk(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only Prefect keeps runs of other hosts away. Plans, backups and recoveries run without it."""

    def run(runbook: str, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch", runbook, "environment=sick", *words])
        return main(), "".join(capsys.readouterr())

    clear = ("clear-cache", 'prefixes=["cache:"]')
    with temporary_settings(restore_defaults={PREFECT_API_URL}), host.redis.block().client() as client:
        client.set("cache:1", "x")
        code, told = run(*clear)
        assert (code, "PLANNED" in told) == (0, True), told
        code, told = run(*clear, "confirm=sick")
        assert code == 1
        assert "add --without-prefect and accept the risk: only this host's file lock" in told
        assert client.exists("cache:1")
        code, told = run(*clear, "confirm=sick", "--without-prefect")
        assert code == 0, told
        assert not client.exists("cache:1")
        code, told = run("contain-incident", "confirm=sick", "reason=trial", "by=me")
        assert "--without-prefect" not in told, "a recovery"
        code, told = run("release-containment", "confirm=sick")
        assert code == 0, told
