"""The application's packages: check them, and update them on a branch (§3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from blocks.environment import Environment
from blocks.places import Application
from flows.application.package_updates import PackageSelection, judge_tests, update_node, update_python
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.kinds import Pending
from runbook.next import Next
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.worktree import require_repository, uncommitted, worktree
from tasks.dependencies import node_packages as node
from tasks.dependencies import python_packages as python
from tasks.dependencies.python_packages import Newer
from tasks.dependencies.requirements import out_of_step, read_requirements
from tasks.dependencies.versions import LEVELS, Level, Outdated, Package, newest_by_level

MOST_DIFF = 200_000


@flow(name="check-dependencies", flow_run_name=RunName("check-dependencies {environment}"))
def check_dependencies(environment: str, seconds: Annotated[int, Field(ge=30, le=7200)] = 600) -> Report:
    """依存パッケージ更新: 現在の依存関係・更新可能なパッケージ・競合の確認 (§3.1)

    Lists the packages of the backend's Python environment and of the web application's workspace. Groups outdated ones
    by patch, minor and major. Reports conflicts (pip check, peer dependencies of pnpm) and lock files that do not match
    their manifests. Run it monthly, and before update-dependencies.

    It changes nothing. Without an answer of the index or the registry the versions are “not known”: pip prints an empty
    list and exits 0 if its index is unreachable. Evidence: the inventory.

    Departs from the manual: its “minor” update, `pnpm update --latest`, also installs major versions; here they are
    separate.

    Args:
        environment: Environment (lab, staging, production …)
        seconds: Longest wait for each tool, in seconds
    """
    env = Environment.find(environment)
    with runbook("Check dependencies", env) as report:
        application, outdated = env.application, []
        outdated += judge_python(
            report,
            python.list_python.submit(Path(application.need("python")), seconds),
            python.find_outdated_python.submit(Path(application.need("python")), seconds),
            python.find_python_conflicts.submit(Path(application.need("python")), seconds),
        )
        judge_python_lock(report, application)
        if application.web_directory:
            web = Path(application.web_directory)
            outdated += judge_node(
                report,
                node.list_node.submit(web, seconds),
                node.find_outdated_node.submit(web, seconds),
                node.find_peer_problems.submit(web, seconds),
                node.find_node_lock_problem.submit(web, seconds),
            )
        else:
            report.fact("web application", "not checked: the environment names no web_directory")

        def known(of: str, name: str) -> list[str]:
            if of == "node":
                return node.node_versions(Path(application.web_directory), name, seconds)
            return python.versions_of(Path(application.need("python")), name, seconds)

        report.outcome = judge_outdated(report, outdated, known)
    return report


@flow(name="update-dependencies", flow_run_name=RunName("update-dependencies {environment} {level}"))
def update_dependencies(
    environment: str,
    level: Level = "patch",
    packages: tuple[str, ...] = (),
    seconds: Annotated[int, Field(ge=30, le=14400)] = 1800,
) -> Report:
    """依存パッケージ更新: パッチ・マイナー・メジャー更新、特定パッケージの更新 (§3.1)

    Updates the direct dependencies (requirement files, every package.json of the workspace), all or chosen ones, by at
    most `level`, with their lock files. It works on a branch in a git worktree, installs the packages into separate
    environments there, and runs the application's tests. The report has the diff. Run it monthly.

    The live checkout and the installed packages are not changed; nothing is merged or pushed. The branch is kept, also
    if tests fail (then the run is Failed and names them). To undo: `git branch -D`. A killed run leaves a worktree; the
    next run deletes it.

    Departs from the manual: it updates in place, and its “minor” update also installs major versions.

    Args:
        environment: Environment (lab, staging, production …)
        level: How far to update (patch, minor, major)
        packages: Packages. Empty: all
        seconds: Longest wait for each tool and the tests, in seconds
    """
    env = Environment.find(environment)
    with runbook("Update dependencies", env) as report:
        application = env.application
        repository = require_repository(application.repository)
        if left := uncommitted(repository):
            report.fact("checkout", f"{len(left)} files with uncommitted changes, which the branch does not have")
        chosen = PackageSelection(level, packages, seconds)
        branch = f"dependencies/{level}-{report.started:%Y%m%d-%H%M%S}"
        with worktree(repository, branch) as tree:
            done = [*update_python(report, application, tree, chosen), *update_node(report, application, tree, chosen)]
            report.table("Updated", ("package", "old version", "new version", "step", "in"), [one.row for one in done])
            chosen.report_missing(report, done)
            if not tree.commit(f"Update dependencies ({level}): {', '.join(one.name for one in done)[:200]}"):
                report.outcome = f"nothing to update by a {level} version"
                return report
            report.attach(Evidence("Diff", text=fenced(tree.diff()[:MOST_DIFF], "diff")))
            report.fact("branch", f"{branch} in {repository}, from {tree.base[:12]}")
            judge_tests(report, env, tree, {one.part for one in done}, seconds)
            report.outcome = f"{len(done)} packages are updated on the branch {branch}: review and merge it"
    return report


T = TypeVar("T")
Known = Callable[[str, str], Iterable[str]]
MOST = 5


def answered(report: Report, what: str, pending: Pending[T], nothing: T) -> T:
    """Its answer; without one WARN, and `nothing` is used instead."""
    try:
        return pending.result()
    except OpsError as error:
        report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")
        return nothing


def judge_python(
    report: Report, listed: Pending[tuple[Package, ...]], outdated: Pending[Newer], conflicts: Pending[tuple[str, ...]]
) -> list[tuple[str, Outdated]]:
    """Inventory and conflicts; returns the outdated packages."""
    packages = answered(report, "Python: installed packages", listed, ())
    report.table("Python packages", ("package", "version"), [(one.name, one.version) for one in packages])
    report.fact("Python packages", len(packages) or "not known")
    newer = answered(report, "Python: outdated packages", outdated, Newer((), ()))
    if newer.not_known:
        report.warn(
            "Python: newer versions",
            "check that pip's index can be reached; these packages can be outdated too",
            value=f"not known for {len(newer.not_known)}: {_few(newer.not_known)}",
        )
    _judge_none(report, "Python: conflicts", conflicts, "install the required versions: pip install --upgrade")
    return [("Python", one) for one in newer.found]


def judge_python_lock(report: Report, application: Application) -> None:
    """Whether the lock file satisfies the requirement files."""
    backend = application.source
    if not application.requirements_lock:
        report.fact("Python lock file", "none is named in [application] requirements_lock")
        return
    try:
        wanted = read_requirements([backend / name for name in application.requirements])
        problems = out_of_step(wanted, read_requirements([backend / application.requirements_lock]))
    except OpsError as error:
        report.warn("Python: lock file", error.hint, value=f"not known: {error.message}")
        return
    report.prefer(
        "Python: lock file",
        not problems,
        "generate it again from its manifests, and commit it",
        value=f"does not match: {_few(problems)}" if problems else "matches",
    )


def judge_node(
    report: Report,
    listed: Pending[tuple[Package, ...]],
    outdated: Pending[tuple[Outdated, ...]],
    peers: Pending[tuple[str, ...]],
    lock: Pending[str],
) -> list[tuple[str, Outdated]]:
    """Inventory, peer dependencies and lock file; returns the outdated packages."""
    packages = answered(report, "node: packages", listed, ())
    rows = [(one.name, one.version, ", ".join(one.places)) for one in packages]
    report.table("node packages", ("package", "version", "required by"), rows)
    report.fact("node packages", f"{len(packages)} direct dependencies" if packages else "not known")
    _judge_none(
        report, "node: peers", peers, "install the required version of the peer, or update the package that requires it"
    )
    problem = answered(report, "node: lock file", lock, None)
    if problem is not None:
        report.prefer(
            "node: lock file",
            not problem,
            "run pnpm install --lockfile-only, and commit pnpm-lock.yaml",
            value=f"does not match: {problem[:200]}" if problem else "matches",
        )
    return [("node", one) for one in answered(report, "node: outdated packages", outdated, ())]


def judge_outdated(report: Report, outdated: Sequence[tuple[str, Outdated]], known: Known) -> str:
    """One finding for each level; returns a summary. The tools print only the newest version of all: an older patch
    release may be the one to install."""
    rows, missed, counted = [], [], Counter[Level]()
    for of, one in sorted(outdated, key=lambda item: (item[0], item[1].name)):
        try:
            found = newest_by_level(one, known(of, one.name))
        except OpsError:
            missed.append(one.name)
            found = newest_by_level(one, ())
        rows.append((one.name, one.version, *found, of, ", ".join(one.places)))
        counted.update(level for level, version in zip(LEVELS, found, strict=True) if version)
    report.table("Outdated", ("package", "installed", "patch", "minor", "major", "from", "required by"), rows)
    if missed:
        report.warn(
            "versions before the newest",
            "check that the index and the registry can be reached",
            value=f"not known for {len(missed)}: {_few(missed)}",
        )
    for place, level in enumerate(LEVELS, 2):
        names = [f"{row[0]} {row[1]} → {row[place]}" for row in rows if row[place]]
        if level == "major":  # an upgrade project, no routine update
            report.fact("major versions", f"{len(names)}: {_few(names)}" if names else "none")
            continue
        report.prefer(
            f"outdated by a {level} version",
            not names,
            "update them on a branch",
            value=f"{len(names)}: {_few(names)}" if names else "none",
            follow=[Next("update-dependencies", parameters={"level": level})],
        )
    summary = ", ".join(f"{counted[level]} {level}" for level in LEVELS if counted[level])
    return f"newer versions: {summary}" if summary else "no package is known to be outdated"


def _judge_none(report: Report, what: str, pending: Pending[tuple[str, ...]], hint: str) -> None:
    try:
        problems = pending.result()
    except OpsError as error:
        report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")
        return
    report.prefer(what, not problems, hint, value=f"{len(problems)}: {_few(problems)}" if problems else "none")


def _few(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return "; ".join(texts[:MOST]) + more
