"""check_dependencies and update_dependencies: the real pip, pnpm and git, an index and a registry on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.application.dependencies import check_dependencies, update_dependencies
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.dependencies.python_packages import find_outdated_python
from tasks.dependencies.requirements import out_of_step, pin, read_requirements
from tasks.dependencies.versions import Outdated, newest_by_level, newest_within, step
from tests.fixtures.application.packaged import IN_GIT, NAME, Packaged, put_in
from tests.fixtures.reports import bad, rows


def updated(**parameters: Any) -> Report:
    """The report, also of a run that failed."""
    try:
        return update_dependencies.fn(NAME, **parameters)
    except RunbookFailed as error:
        return error.report


def test_what_is_there_and_outdated_is_told_by_its_step(packaged: Packaged) -> None:
    packaged.in_git()
    report = check_dependencies.fn(NAME)
    assert rows(report, "Python packages") == [("interviewkit", "1.0.0")]
    assert rows(report, "node packages") == [("chatkit", "1.0.0", "page")]
    assert rows(report, "Outdated") == [
        ("interviewkit", "1.0.0", "1.0.3", "1.2.0", "2.0.0", "Python", ""),
        ("chatkit", "1.0.0", "1.0.4", "1.1.0", "2.0.0", "node", "page"),
    ]
    assert bad(report) == {
        "outdated by a patch version": "2: interviewkit 1.0.0 → 1.0.3; chatkit 1.0.0 → 1.0.4",
        "outdated by a minor version": "2: interviewkit 1.0.0 → 1.2.0; chatkit 1.0.0 → 1.1.0",
    }
    assert packaged.untouched()
    (packaged.root / "backend/requirements.txt").write_text("interviewkit>=1.2\nmissingkit\n")
    member = packaged.root / "web/apps/page/package.json"
    member.write_text(member.read_text().replace('"chatkit": "1.0.0"', '"chatkit": "^1.1.0"'))
    packaged.registry.mode = "500"
    found = bad(check_dependencies.fn(NAME))
    assert (
        "interviewkit 1.0.0, but requirements.txt requires >=1.2; missingkit is not in it" in found["Python: lock file"]
    )
    assert "chatkit" in found["node: lock file"]
    assert found["Python: newer versions"] == "not known for 1: interviewkit (no answer)"
    assert found["node: outdated packages"].startswith("not known: pnpm")


def test_an_index_that_fails_is_not_one_without_the_package(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its address, which pip repeats in the error, contains 404."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{packaged.registry.url}/404/simple")
    assert find_outdated_python.work(packaged.python, 600).not_known == ("interviewkit (not in the index)",)
    packaged.registry.mode = "500"
    assert find_outdated_python.work(packaged.python, 600).not_known == ("interviewkit (no answer)",)


@pytest.mark.system
def test_conflicts_are_told(packaged: Packaged) -> None:
    packaged.in_git()
    venv = packaged.base / "venv"
    subprocess.run(["cp", "-a", packaged.python.parents[1], venv], check=True)
    put_in(venv, packaged.registry.wheel("needykit", "1.0.0", ("interviewkit>=1.2",)))
    packaged.describe(IN_GIT, str(venv / "bin/python"))
    packaged.registry.tarball("peerkit", "1.0.0", peerDependencies={"chatkit": "^2.0.0", "gonekit": "^1.0.0"})
    web = packaged.root / "web"
    member = web / "apps/page/package.json"
    member.write_text(member.read_text().replace('"chatkit": "1.0.0"', '"chatkit": "1.0.0", "peerkit": "1.0.0"'))
    argv = ["pnpm", "install", "--lockfile-only", "--config.auto-install-peers=false"]
    subprocess.run(argv, cwd=web, check=True, capture_output=True)
    (web / ".npmrc").write_text("auto-install-peers=false\n")
    found = bad(check_dependencies.fn(NAME))
    assert found["Python: conflicts"].startswith("1: needykit 1.0.0 has requirement interviewkit>=1.2")
    assert found["node: peers"] == (
        "2: apps/page: peerkit 1.0.0 requires gonekit ^1.0.0 but has none; "
        "apps/page: peerkit 1.0.0 requires chatkit ^2.0.0 but has 1.0.0"
    )


def test_an_update_is_a_branch_with_its_diff_and_passing_tests(packaged: Packaged) -> None:
    packaged.in_git()
    report = updated(level="patch")
    assert bad(report) == {}, report.sentence()
    assert rows(report, "Updated") == [
        ("interviewkit", "1.0.0", "1.0.3", "patch", "backend"),
        ("chatkit", "1.0.0", "1.0.4", "patch", "web"),
    ]
    (diff,) = [item.text for item in report.evidence if item.name == "Diff"]
    assert diff.count("+interviewkit==1.0.3") == 2, "the lock file too"
    assert {"web/pnpm-lock.yaml", "web/apps/page/package.json"} <= {
        line[6:] for line in diff.splitlines() if line.startswith("+++")
    }
    assert packaged.untouched()
    (branch,) = set(packaged.branches()) - {"main"}
    assert branch.startswith("dependencies/patch-")
    again = updated(level="minor", packages=("chatkit", "nokit"))
    assert rows(again, "Updated") == [("chatkit", "1.0.0", "1.1.0", "minor", "web")]
    assert bad(again) == {"chosen packages": "not updated: nokit"}


@pytest.mark.system
def test_failing_tests_leave_the_branch_and_are_named(packaged: Packaged) -> None:
    packaged.in_git()
    report = updated(level="major")
    assert report.status is Status.CRITICAL
    found = bad(report)
    assert "FAIL: test_its_version_is_1" in found["backend tests"]
    assert "its version is 1" in found["web tests"]
    assert packaged.untouched()
    assert len(packaged.branches()) == 2


def test_nothing_to_update_leaves_no_branch_and_no_repository_is_said(packaged: Packaged) -> None:
    packaged.in_git()
    assert updated(packages=("nokit",)).outcome == "nothing to update by a patch version"
    packaged.registry.mode = "500"
    found = bad(updated())
    assert found["newer versions of interviewkit"].startswith("not known")
    assert found["node packages"].startswith("not updated: pnpm")
    assert packaged.branches() == ["main"]
    packaged.registry.mode = "right"
    packaged.describe(IN_GIT + 'lock_command = ["nowhere-lock"]')
    report = updated(packages=("interviewkit",))
    assert bad(report)["backend: new versions"] == "not set: there is no program nowhere-lock"
    assert (packaged.branches(), rows(report, "Updated")) == (["main"], []), "half of an update is none"
    packaged.describe()
    with pytest.raises(RunbookFailed, match="names no repository"):
        update_dependencies.fn(NAME)


@pytest.mark.system
def test_a_killed_update_is_launched_again(packaged: Packaged) -> None:
    packaged.in_git()
    code = f"from flows.application.dependencies import update_dependencies as f; f.fn({NAME!r}, packages=('interviewkit',))"
    environment = {**os.environ, "OPS_FAILPOINT": "before virtual_environment"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not packaged.untouched(), "its worktree is left"
    report = updated(packages=("interviewkit",))
    assert bad(report) == {}
    assert packaged.untouched()


def test_versions_within_a_level() -> None:
    known = ["1.0.0", "1.0.9", "1.0.10", "1.3.0", "1.4.0rc1", "2.0.0", "nonsense"]
    assert [newest_within("1.0.2", known, level) for level in ("patch", "minor", "major")] == [
        "1.0.10",
        "1.3.0",
        "2.0.0",
    ]
    assert newest_within("2.0.0", known, "major") == ""
    assert newest_by_level(Outdated("kit", "1.0.2", "2.0.0"), known) == ("1.0.10", "1.3.0", "2.0.0")
    assert newest_by_level(Outdated("kit", "1.0.2", "1.0.10"), []) == ("1.0.10", "", "")
    assert newest_by_level(Outdated("kit", "x", "y"), []) == ("", "", "y")
    assert [step("1.2", "1.2.1"), step("0.1.0", "0.2.0"), step("x", "1")] == ["patch", "minor", None]


def test_a_pin_is_moved_without_its_old_hashes(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# kept\nA_kit[x]==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via b\nb==2 ; python_version > '3'\n"
    )
    assert pin(lock, "a-kit", "1.1")
    assert pin(lock, "b", "2.1")
    assert lock.read_text() == "# kept\nA_kit[x]==1.1\n    # via b\nb==2.1 ; python_version > '3'\n"
    assert not pin(lock, "c", "1")
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("-r other.txt\na-kit>=1.1\nb<2\nwinkit; sys_platform == 'nowhere'\n")
    problems = out_of_step(read_requirements([wanted]), read_requirements([lock]))
    assert problems == ["it has b 2.1, but wanted.txt requires <2"]
    with pytest.raises(OpsError, match="cannot be read"):
        read_requirements([tmp_path / "none.txt"])


def test_a_tool_that_prints_nonsense_is_no_answer(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged.in_git()
    fakes = packaged.base / "fakes"
    fakes.mkdir()
    monkeypatch.setenv("PATH", str(fakes), prepend=":")
    (fakes / "pnpm").write_text("#!/bin/sh\necho '{\"odd\": [1]}'\n")
    (fakes / "pnpm").chmod(0o755)
    packaged.describe(IN_GIT, "/nowhere/python")
    found = bad(check_dependencies.fn(NAME))
    told = {name for name, value in found.items() if value.startswith("not known: ")}
    assert told >= {"node: packages", "node: outdated packages", "node: peers"}
    assert told >= {"Python: installed packages", "Python: outdated packages", "Python: conflicts"}
