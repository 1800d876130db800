"""check_types on real checkouts: mypy and TypeScript's own compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest

from flows.application.types import check_types
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.fixtures.application.checkouts import NAME, Checkout, program, replace
from tests.fixtures.application.seeded import PYTHON_FILE, WEB_FILE, ill_type


def failed(**given: object) -> Report:
    with pytest.raises(RunbookFailed) as caught:
        check_types.fn(NAME, **given)  # type: ignore[arg-type]
    return caught.value.report


def finding(report: Report, name: str) -> str:
    (found,) = [found for found in report.findings if found.name == name]
    return f"{found.status}: {found.value} — {found.hint}"


def test_a_clean_checkout_passes_and_stays_as_it_was(checkout: Checkout) -> None:
    before = checkout.state()
    report = check_types.fn(NAME)
    assert checkout.state() == before
    assert finding(report, "mypy").startswith("OK: 0 errors, 0 warnings in 3 files")
    assert finding(report, "tsc").startswith("OK: 0 errors, 0 warnings in 7 files")
    assert "no HTML report: it needs lxml" in report.facts["mypy"]
    assert report.status is Status.OK


def test_errors_of_both_languages_are_found(checkout: Checkout, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ill_type(checkout)
    (checkout.root / "note.txt").write_text("not committed\n")
    before = checkout.state()
    report = failed(files=[PYTHON_FILE, WEB_FILE])
    assert checkout.state() == before
    assert "CRITICAL: 1 errors" in finding(report, "mypy")
    assert "CRITICAL: 1 errors" in finding(report, "tsc")
    assert "1 files with uncommitted changes" in report.facts["checkout"]
    (table,) = [kept for kept in report.evidence if kept.name.startswith("Problems")]
    assert [row[:4] for row in table.rows] == [
        (PYTHON_FILE, "9", "mypy", "assignment"),
        (WEB_FILE, "5", "tsc", "TS2322"),
    ]
    monkeypatch.setenv("PYTHONPATH", str(node / "lxml"))
    strict = failed(files=[PYTHON_FILE], strict=True)
    assert "2 errors, 0 warnings in 1 files" in finding(strict, "mypy")
    assert "wrong" in Path(strict.facts["HTML report"]).read_text()


def test_a_file_that_is_not_there_or_not_checked_is_told(checkout: Checkout) -> None:
    for files in (["backend/none.py"], ["../trial.toml"], ["web/package.json"]):
        with pytest.raises(OpsError):
            check_types.fn(NAME, files=files)
    for project in (checkout.web / "tsconfig.json", *checkout.web.glob("[ap]*/*/tsconfig.json")):
        project.write_text('{ "files": [], "references": [{ "path": "packages/ui" }] }')
    assert "tsc checked no file" in finding(failed(files=["web/eslint.config.js"]), "tsc")


@pytest.mark.parametrize(
    "text",
    ["exit 0", "echo garbage", 'case "$1" in --version) echo "mypy 2.0";; *) echo "Traceback"; exit 1;; esac'],
    ids=["silent", "garbage", "traceback"],
)
def test_a_tool_that_gives_no_answer_is_no_pass(
    sources: Checkout, fake: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend's environment has none, so that those on PATH are taken."""
    environment = tmp_path / "trial.toml"
    environment.write_text(replace(environment.read_text(), 'python = "', 'python = "/nowhere'))
    program(fake / "mypy", text)
    program(sources.web / "node_modules/.bin/tsc", text.replace("mypy 2.0", "Version 5.9.0"))
    report = failed()
    for tool in ("mypy", "tsc"):
        assert finding(report, tool).startswith("CRITICAL: ")
        assert "by hand" in finding(report, tool) or "check" in finding(report, tool)


def test_a_tool_that_hangs_is_ended_with_its_children(sources: Checkout) -> None:
    pids = sources.root.parent / "pids"
    program(sources.web / "node_modules/.bin/tsc", f"sleep 600 & echo $! >{pids}; wait")
    report = failed(tools=("tsc",), seconds=30)
    assert "tsc did not end within 30 s" in finding(report, "tsc")
    assert pids.exists(), "it began"
    until(lambda: not psutil.pid_exists(int(pids.read_text())), what="the end of its child", seconds=120)


def test_what_is_not_installed_is_told_and_the_rest_goes_on(
    sources: Checkout, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("git", "setpriv"):
        (folder / name).symlink_to(str(shutil.which(name)))
    at = str(shutil.which("node"))
    monkeypatch.setenv("PATH", str(folder))
    assert "node is not installed — install Node.js" in finding(failed(tools=("tsc",)), "tsc")
    (folder / "node").symlink_to(at)
    report = failed()
    assert "node_modules — run reinstall-dependencies with parts=web" in finding(report, "tsc")
    assert finding(report, "mypy").startswith("OK")
