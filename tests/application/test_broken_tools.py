"""Tools that are missing, fail, hang or print nonsense: each flow names the tool and what to do, masks what it repeats,
leaves no process, and changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.application.dependencies import check_dependencies, update_dependencies
from flows.application.hooks import BRANCH, install_pre_commit
from flows.application.lint import lint_code
from flows.application.patching import patch_vulnerability
from flows.application.reinstall import reinstall_dependencies
from flows.application.types import check_types
from flows.application.vulnerabilities import scan_vulnerabilities
from runbook.report import Report
from tasks.application import worktree
from tests.fixtures.advisories import CVE
from tests.fixtures.application.broken import (
    HANGS_SECONDS,
    MODES,
    Mode,
    broken,
    nobody_left,
    reported,
    seconds_for,
    told,
)
from tests.fixtures.application.checkouts import NAME, Checkout, program, replace
from tests.fixtures.application.packaged import NODE as NODE_PROGRAMS
from tests.fixtures.application.packaged import Packaged

EACH = pytest.mark.parametrize("mode", MODES)
# As the shells and launchers of the other tools need them.
SYSTEM = ("git", "setpriv", "node", "sh", "env", "cat", "sleep", "cp", "uname", "dirname", "sed", "basename")

CODE: dict[str, Callable[[int], Report]] = {
    "mypy": lambda seconds: check_types.fn(NAME, tools=("mypy",), seconds=seconds),
    "tsc": lambda seconds: check_types.fn(NAME, tools=("tsc",), seconds=seconds),
    "ruff": lambda seconds: lint_code.fn(NAME, tools=("ruff", "ruff format"), seconds=seconds),
    "eslint": lambda seconds: lint_code.fn(NAME, tools=("eslint",), seconds=seconds),
    "pre-commit": lambda seconds: install_pre_commit.fn(NAME, origin="local", seconds=seconds, confirm=NAME),
    "git": lambda seconds: check_types.fn(NAME, tools=("mypy",), seconds=seconds),
}


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH: this machine's own tools, but none of those that are tried."""
    folder = tmp_path / "only"
    folder.mkdir()
    for name in SYSTEM:
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sys.executable", "/nowhere/bin/python")  # a worker that has none of them beside it
    return folder


@EACH
@pytest.mark.parametrize("tool", CODE)
def test_a_tool_of_the_code_gives_no_answer(
    sources: Checkout, only: Path, tmp_path: Path, tool: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "trial.toml"
    environment.write_text(replace(environment.read_text(), 'python = "', 'python = "/nowhere'))
    if (tool, mode) == ("git", "hangs"):
        monkeypatch.setattr(worktree, "SECONDS", HANGS_SECONDS)
    for name, says in (("ruff", "ruff 0.15.0"), ("eslint", "v10.15.0"), ("mypy", "mypy 2.0")):
        program(only / name, f"echo {says}")
    before, branches = sources.state(), sources.branches()
    (only / tool).unlink(missing_ok=True)
    broken(only / tool, mode)
    try:
        report = reported(lambda: CODE[tool](seconds_for(mode)))
    finally:
        monkeypatch.undo()  # the real git again
    found = told(report, tool)
    assert (f"did not end within {HANGS_SECONDS} s" in found) is (mode == "hangs")
    assert ("is not installed" in found or "no program" in found) is (mode == "missing")
    if mode == "hangs":
        nobody_left(only / tool)
    assert sources.state() == before
    kept = [BRANCH] if tool == "pre-commit" and mode != "missing" else []  # the next launch goes on with it
    assert sources.branches() == [*branches, *kept]
    assert not (sources.root / ".git/hooks/pre-commit").exists()


SCANS = ("pip-audit", "npm", "pnpm", "trivy", "grype")


@EACH
@pytest.mark.parametrize("tool", SCANS)
def test_a_scanner_gives_no_answer(packaged: Packaged, only: Path, tool: str, mode: Mode) -> None:
    web = packaged.base / "web"
    web.mkdir()
    (web / "package.json").write_text('{"name": "web", "version": "1.0.0"}')
    (web / {"npm": "package-lock.json"}.get(tool, "pnpm-lock.yaml")).touch()
    images = 'images = ["grc-backend:latest"]' if tool in ("trivy", "grype") else ""
    packaged.describe(f'web_directory = "{web}"\n{images}')
    broken(only / tool, mode)
    found = told(
        reported(lambda: scan_vulnerabilities.fn(NAME, seconds=seconds_for(mode))), "image" if images else tool
    )
    if mode == "missing" and images:
        assert "trivy" in found
        assert "grype" in found
    else:
        assert tool in found
    assert (f"did not end within {HANGS_SECONDS} s" in found) is (mode == "hangs")
    if mode == "hangs":
        nobody_left(only / tool)


PACKAGES: dict[str, Callable[[int], Report]] = {
    "check": lambda seconds: check_dependencies.fn(NAME, seconds=seconds),
    "update": lambda seconds: update_dependencies.fn(NAME, seconds=seconds),
    "patch": lambda seconds: patch_vulnerability.fn(NAME, CVE, seconds=seconds, confirm=NAME),
    "reinstall": lambda seconds: reinstall_dependencies.fn(NAME, parts=("web",), seconds=seconds, confirm=NAME),
}


CASES = [
    ("pip", "check"),
    ("pip", "update"),
    ("pnpm", "check"),
    ("pnpm", "update"),
    ("pnpm", "reinstall"),
    ("pip-audit", "patch"),
]


@EACH
@pytest.mark.parametrize(("tool", "flow"), CASES)
def test_a_tool_of_the_packages_gives_no_answer(
    packaged: Packaged, only: Path, tool: str, flow: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{only}{os.pathsep}{NODE_PROGRAMS}")
    packaged.in_git()
    if flow == "patch":
        packaged.git("remote", "add", "origin", str(packaged.base / "origin"))
    monkeypatch.setenv("PATH", str(only))
    broken(only / tool, mode)
    found = told(reported(lambda: PACKAGES[flow](seconds_for(mode))), tool)
    assert (f"did not end within {HANGS_SECONDS} s" in found) is (mode == "hangs")
    assert ("is not installed" in found) is (mode == "missing")
    if mode == "hangs":
        nobody_left(only / tool)
    assert packaged.untouched()
    assert packaged.branches() == ["main"]
