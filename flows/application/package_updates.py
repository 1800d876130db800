"""Update packages in a worktree, install them there, and run the application's tests (§3.1, §3.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.places import Application
from flows.application.branch import run_branch_tests
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Report
from tasks.application.worktree import Worktree, git
from tasks.dependencies import node_packages as node
from tasks.dependencies import python_packages as python
from tasks.dependencies.advisory import canonical
from tasks.dependencies.python_update import pin_python, pinned, virtual_environment
from tasks.dependencies.versions import Level, newest_within, step

Part = Literal["backend", "web"]


@dataclass(frozen=True)
class Update:
    """One updated package: the old and the new version."""

    part: Part
    name: str
    version: str
    newer: str

    @property
    def row(self) -> tuple[str, ...]:
        return (self.name, self.version, self.newer, step(self.version, self.newer) or "other", self.part)


@dataclass(frozen=True)
class PackageSelection:
    """Which packages to update, and how far; no names mean all packages."""

    level: Level
    packages: tuple[str, ...]
    seconds: int

    def includes(self, name: str) -> bool:
        return not self.packages or canonical(name) in {canonical(one) for one in self.packages}

    def report_missing(self, report: Report, done: Sequence[Update]) -> None:
        """WARN about chosen packages that were not updated."""
        updated = {canonical(one.name) for one in done}
        if left := [one for one in self.packages if canonical(one) not in updated]:
            report.warn(
                "chosen packages",
                "check their names, and how far their newest versions are",
                value=f"not updated: {', '.join(left)}",
                expected="all are updated",
                follow=[Next("check-dependencies", "see the newest versions")],
            )


def update_python(report: Report, application: Application, tree: Worktree, chosen: PackageSelection) -> list[Update]:
    """Raise the pins of the requirement files by at most the chosen level; for ranges, the pins of the lock file."""
    backend = tree.at(application.source)
    done, live = [], Path(application.need("python"))
    try:
        pins, ranges = pinned(application, backend)
    except OpsError as error:
        report.warn("Python packages", error.hint, value=f"not updated: {error.message}")
        return []
    if ranges:
        report.fact("Python ranges without a lock file", f"{', '.join(ranges)}: pip installs their newest version")
    for name, version in pins.items():
        if not chosen.includes(name):
            continue
        try:
            newer = newest_within(version, python.versions_of(live, name, chosen.seconds), chosen.level)
        except OpsError as error:
            report.warn(f"newer versions of {name}", error.hint, value=f"not known: {error.message}")
            continue
        if newer:
            done.append(Update("backend", name, version, newer))
    versions = {one.name: one.newer for one in done}
    return done if _set(report, backend, lambda: pin_python(application, backend, versions, chosen.seconds)) else []


def update_node(report: Report, application: Application, tree: Worktree, chosen: PackageSelection) -> list[Update]:
    """Raise the direct dependencies of the workspace by at most the chosen level, with the lock file."""
    if not application.web_directory:
        return []
    web, done = tree.at(Path(application.web_directory)), []
    try:
        outdated = node.find_outdated_node(web, chosen.seconds)
    except OpsError as error:
        report.warn("node packages", error.hint, value=f"not updated: {error.message}")
        return []
    for one in outdated:
        if not chosen.includes(one.name):
            continue
        try:
            newer = newest_within(one.version, node.node_versions(web, one.name, chosen.seconds), chosen.level)
        except OpsError as error:
            report.warn(f"newer versions of {one.name}", error.hint, value=f"not known: {error.message}")
            continue
        if newer:
            done.append(Update("web", one.name, one.version, newer))
    versions = {one.name: one.newer for one in done}
    return done if done and _set(report, web, lambda: set_node(web, versions, chosen.seconds)) else []


def _set(report: Report, directory: Path, work: Callable[[], object]) -> bool:
    """Write the new versions; on an error restore the files: an update is complete or not done."""
    try:
        work()
    except OpsError as error:
        git(directory, "restore", "--", ".")
        report.fail(f"{directory.name}: new versions", error.hint, value=f"not set: {error.message}")
        return False
    return True


def set_node(web: Path, versions: dict[str, str], seconds: float) -> None:
    """Set these versions in every package.json of the workspace that has them, and in the lock file.

    Raises:
        OpsError: pnpm failed.
    """
    wanted = [f"{name}@{version}" for name, version in versions.items()]
    node.pnpm(web, "update", "--recursive", "--lockfile-only", "--ignore-scripts", *wanted, seconds=seconds)


def judge_tests(report: Report, env: Environment, tree: Worktree, parts: Collection[str], seconds: float) -> None:
    """Install the updated packages into the worktree, and run the application's tests there."""
    application = env.application
    if "backend" in parts:
        backend = tree.at(application.source)
        venv = _prepared(report, "backend", lambda: virtual_environment(application, backend, venv_of(tree), seconds))
        if venv:
            run_branch_tests(report, env, tree, seconds, python=venv / "bin" / "python", parts=("backend",))
    if "web" in parts:
        web = tree.at(Path(application.web_directory))
        if _prepared(report, "web", lambda: node.install_node(web, seconds)):
            run_branch_tests(report, env, tree, seconds, parts=("web",))


def _prepared(report: Report, part: str, work: Callable[[], Path]) -> Path | None:
    try:
        return work()
    except OpsError as error:
        report.fail(f"{part}: installed", error.hint or "check the branch; it is kept", value=error.message)
        return None


def venv_of(tree: Worktree) -> Path:
    """The worktree's own virtual environment; it is deleted with the worktree."""
    return tree.directory.parent / "venv"
