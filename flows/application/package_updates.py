"""Packages updated in a worktree and proven there, called with the open report (§3.1, §3.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocks.environment import Environment
from blocks.places import Application
from flows.application.branch import prove_branch
from runbook.errors import OpsError
from runbook.report import Report
from tasks.application.worktree import Worktree, git
from tasks.dependencies import node_packages as node
from tasks.dependencies import python_packages as python
from tasks.dependencies.advisory import canonical
from tasks.dependencies.python_update import pin_python, pinned, virtual_environment
from tasks.dependencies.versions import Level, newest_within, step

Part = Literal["backend", "web"]


@dataclass(frozen=True)
class Done:
    """One package that another version took the place of."""

    part: Part
    name: str
    version: str
    newer: str

    @property
    def row(self) -> tuple[str, ...]:
        return (self.name, self.version, self.newer, step(self.version, self.newer) or "other", self.part)


@dataclass(frozen=True)
class Wish:
    """Which packages, and how far; no names are all of them."""

    level: Level
    packages: tuple[str, ...]
    seconds: int

    def wants(self, name: str) -> bool:
        return not self.packages or canonical(name) in {canonical(one) for one in self.packages}

    def tell_unmet(self, report: Report, done: Sequence[Done]) -> None:
        """Names that were given and not updated."""
        updated = {canonical(one.name) for one in done}
        if left := [one for one in self.packages if canonical(one) not in updated]:
            report.warn(
                "packages that were chosen",
                "see check-dependencies: its name, and how far the newest one is",
                value=f"not updated: {', '.join(left)}",
                expected="all of them",
            )


def update_python(report: Report, application: Application, tree: Worktree, wish: Wish) -> list[Done]:
    """Every pin of the requirement files (and of the lock file, for what they give as a range) moved up to `level`."""
    backend = tree.at(application.source)
    done, live = [], Path(application.need("python"))
    try:
        pins, ranges = pinned(application, backend)
    except OpsError as error:
        report.warn("Python packages", error.hint, value=f"not updated: {error.message}")
        return []
    if ranges:
        report.fact("Python ranges without a lock file", f"{', '.join(ranges)}: pip takes their newest as it is")
    for name, version in pins.items():
        if not wish.wants(name):
            continue
        try:
            newer = newest_within(version, python.versions_of(live, name, wish.seconds), wish.level)
        except OpsError as error:
            report.warn(f"newer versions of {name}", error.hint, value=f"not known: {error.message}")
            continue
        if newer:
            done.append(Done("backend", name, version, newer))
    versions = {one.name: one.newer for one in done}
    return done if _set(report, backend, lambda: pin_python(application, backend, versions, wish.seconds)) else []


def update_node(report: Report, application: Application, tree: Worktree, wish: Wish) -> list[Done]:
    """What the workspace wants directly moved up to `level`, in each package.json and in the lock file."""
    if not application.web_directory:
        return []
    web, done = tree.at(Path(application.web_directory)), []
    try:
        outdated = node.find_outdated_node(web, wish.seconds)
    except OpsError as error:
        report.warn("node packages", error.hint, value=f"not updated: {error.message}")
        return []
    for one in outdated:
        if not wish.wants(one.name):
            continue
        try:
            newer = newest_within(one.version, node.node_versions(web, one.name, wish.seconds), wish.level)
        except OpsError as error:
            report.warn(f"newer versions of {one.name}", error.hint, value=f"not known: {error.message}")
            continue
        if newer:
            done.append(Done("web", one.name, one.version, newer))
    versions = {one.name: one.newer for one in done}
    return done if done and _set(report, web, lambda: set_node(web, versions, wish.seconds)) else []


def _set(report: Report, directory: Path, work: Callable[[], object]) -> bool:
    """Do it; where it fails, put the worktree's files back: half of an update is none."""
    try:
        work()
    except OpsError as error:
        git(directory, "restore", "--", ".")
        report.fail(f"{directory.name}: new versions", error.hint, value=f"not set: {error.message}")
        return False
    return True


def set_node(web: Path, versions: dict[str, str], seconds: float) -> None:
    """These versions in every package of the workspace that wants them, and in the lock file.

    Raises:
        OpsError: pnpm could not.
    """
    wanted = [f"{name}@{version}" for name, version in versions.items()]
    node.pnpm(web, "update", "--recursive", "--lockfile-only", "--ignore-scripts", *wanted, seconds=seconds)


def judge_tests(report: Report, env: Environment, tree: Worktree, parts: Collection[str], seconds: float) -> None:
    """Install what was updated into environments of the worktree, and run the application's tests there."""
    application = env.application
    if "backend" in parts:
        backend = tree.at(application.source)
        venv = _prepared(report, "backend", lambda: virtual_environment(application, backend, beside(tree), seconds))
        if venv:
            prove_branch(report, env, tree, seconds, python=venv / "bin" / "python", parts=("backend",))
    if "web" in parts:
        web = tree.at(Path(application.web_directory))
        if _prepared(report, "web", lambda: node.install_node(web, seconds)):
            prove_branch(report, env, tree, seconds, parts=("web",))


def _prepared(report: Report, part: str, work: Callable[[], Path]) -> Path | None:
    try:
        return work()
    except OpsError as error:
        report.fail(f"{part}: installed", error.hint or "look at the branch; it stays", value=error.message)
        return None


def beside(tree: Worktree) -> Path:
    """It goes with the worktree."""
    return tree.directory.parent / "venv"
