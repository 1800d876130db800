"""The packages that the application is made of: looked at, and updated on a branch (§3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.places import Application
from flows.application.update_steps import Wish, judge_tests, update_node, update_python
from runbook.errors import OpsError
from runbook.kinds import Pending
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.application.worktree import require_repository, uncommitted, worktree
from tasks.dependencies import node_packages as node
from tasks.dependencies import python_packages as python
from tasks.dependencies.python_packages import Newer
from tasks.dependencies.requirements import out_of_step, read_requirements
from tasks.dependencies.versions import LEVELS, Level, Outdated, Package, newest_by_level

MOST_DIFF = 200_000


@flow(name="check-dependencies", flow_run_name="check-dependencies {environment}")
def check_dependencies(environment: str, seconds: Annotated[int, Field(ge=30, le=7200)] = 600) -> Report:
    """依存パッケージ更新: 現在の依存関係・更新可能なパッケージ・競合の確認 (§3.1)

    Lists the packages of the backend's Python environment and of the web application's workspace; splits what is
    outdated into patch, minor and major; tells conflicts (pip check, peers of pnpm) and lock files that are out of step
    with their manifests. Run it monthly, and before update-dependencies.

    It changes nothing. What an index or registry did not answer for is told as not known: pip prints an empty list of
    outdated packages, and exits 0, where its index is away. Evidence: the inventory.

    Departs from the manual: `pnpm update --latest`, its “minor” update, crosses majors: here they are apart.

    Args:
        environment: 対象の環境
        seconds: 各ツールを待つ秒数の上限
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
            report.fact("web application", "not looked at: the environment names no web_directory")

        def known(of: str, name: str) -> list[str]:
            if of == "node":
                return node.node_versions(Path(application.web_directory), name, seconds)
            return python.versions_of(Path(application.need("python")), name, seconds)

        report.outcome = tell_outdated(report, outdated, known)
    return report


@flow(name="update-dependencies", flow_run_name="update-dependencies {environment} {level}")
def update_dependencies(
    environment: str,
    level: Level = "patch",
    packages: tuple[str, ...] = (),
    seconds: Annotated[int, Field(ge=30, le=14400)] = 1800,
) -> Report:
    """依存パッケージ更新: パッチ・マイナー・メジャー更新、特定パッケージの更新 (§3.1)

    Updates the packages that the application names itself (requirement files, package.json of the whole workspace), all
    or chosen ones, by no more than `level`, with their lock files: on a branch, in a worktree. There it installs them
    into environments of their own, and runs the application's tests. The report has the diff. Run it monthly.

    The live checkout and what is installed are not touched, nothing is merged or pushed. The branch stays, also where
    tests fail (then the run is Failed and tells which); `git branch -D` undoes it. A run that is killed leaves a
    worktree that the next one removes: launch it again.

    Departs from the manual: it updates in place, and calls “minor” what crosses majors.

    Args:
        environment: 対象の環境
        level: 更新の幅 (patch, minor, major)
        packages: 対象のパッケージ。空なら全て
        seconds: 各ツールとテストを待つ秒数の上限
    """
    env = Environment.find(environment)
    with runbook("Update dependencies", env) as report:
        application = env.application
        repository = require_repository(application.repository)
        if left := uncommitted(repository):
            report.fact("checkout", f"{len(left)} files with changes that no commit has: the branch is without them")
        wish, branch = Wish(level, packages, seconds), f"dependencies/{level}-{report.started:%Y%m%d-%H%M%S}"
        with worktree(repository, branch) as tree:
            done = [*update_python(report, application, tree, wish), *update_node(report, application, tree, wish)]
            report.table("Updated", ("package", "from", "to", "step", "in"), [one.row for one in done])
            wish.tell_unmet(report, done)
            if not tree.commit(f"Update dependencies ({level}): {', '.join(one.name for one in done)[:200]}"):
                report.outcome = f"nothing to update by a {level} version"
                return report
            report.attach(Evidence("Diff", text=fenced(tree.diff()[:MOST_DIFF], "diff")))
            report.fact("branch", f"{branch} in {repository}, from {tree.base[:12]}")
            judge_tests(report, env, tree, {one.part for one in done}, seconds)
            report.outcome = f"{len(done)} packages are updated on the branch {branch}: look at it, and merge it"
    return report


T = TypeVar("T")
Known = Callable[[str, str], Iterable[str]]
MOST = 5


def answered(report: Report, what: str, pending: Pending[T], nothing: T) -> T:
    """Its answer; without one it is told, and `nothing` goes on."""
    try:
        return pending.result()
    except OpsError as error:
        report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")
        return nothing


def judge_python(
    report: Report, listed: Pending[tuple[Package, ...]], outdated: Pending[Newer], conflicts: Pending[tuple[str, ...]]
) -> list[tuple[str, Outdated]]:
    """Inventory and conflicts; returns what is outdated."""
    packages = answered(report, "Python: installed packages", listed, ())
    report.table("Python packages", ("package", "version"), [(one.name, one.version) for one in packages])
    report.fact("Python packages", len(packages) or "not known")
    newer = answered(report, "Python: outdated packages", outdated, Newer((), ()))
    if newer.not_known:
        report.warn(
            "Python: newer versions",
            "see that pip's index can be reached; these may be outdated too",
            value=f"not known of {len(newer.not_known)}: {_few(newer.not_known)}",
        )
    _judge_none(report, "Python: conflicts", conflicts, "pip installs what is required by: pip install --upgrade")
    return [("Python", one) for one in newer.found]


def judge_python_lock(report: Report, application: Application) -> None:
    """Whether the lock file gives what the requirement files want."""
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
        "make it anew from its manifests, and commit it",
        value=f"out of step: {_few(problems)}" if problems else "in step",
    )


def judge_node(
    report: Report,
    listed: Pending[tuple[Package, ...]],
    outdated: Pending[tuple[Outdated, ...]],
    peers: Pending[tuple[str, ...]],
    lock: Pending[str],
) -> list[tuple[str, Outdated]]:
    """Inventory, peers and lock file; returns what is outdated."""
    packages = answered(report, "node: packages", listed, ())
    rows = [(one.name, one.version, ", ".join(one.places)) for one in packages]
    report.table("node packages", ("package", "version", "wanted by"), rows)
    report.fact("node packages", f"{len(packages)} wanted directly" if packages else "not known")
    _judge_none(report, "node: peers", peers, "install the peer in the version that is wanted, or update who wants it")
    problem = answered(report, "node: lock file", lock, None)
    if problem is not None:
        report.prefer(
            "node: lock file",
            not problem,
            "pnpm install --lockfile-only, and commit pnpm-lock.yaml",
            value=f"out of step: {problem[:200]}" if problem else "in step",
        )
    return [("node", one) for one in answered(report, "node: outdated packages", outdated, ())]


def tell_outdated(report: Report, outdated: Sequence[tuple[str, Outdated]], known: Known) -> str:
    """The newest version of each level, and one finding for a level; returns it in a sentence. The tools tell the very
    newest only: behind a major version there may be a patch that is wanted."""
    rows, missed, counted = [], [], Counter[Level]()
    for of, one in sorted(outdated, key=lambda item: (item[0], item[1].name)):
        try:
            found = newest_by_level(one, known(of, one.name))
        except OpsError:
            missed.append(one.name)
            found = newest_by_level(one, ())
        rows.append((one.name, one.version, *found, of, ", ".join(one.places)))
        counted.update(level for level, version in zip(LEVELS, found, strict=True) if version)
    report.table("Outdated", ("package", "installed", "patch", "minor", "major", "of", "wanted by"), rows)
    if missed:
        report.warn(
            "versions before the newest",
            "see that the index and the registry can be reached",
            value=f"not known of {len(missed)}: {_few(missed)}",
        )
    for place, level in enumerate(LEVELS, 2):
        names = [f"{row[0]} {row[1]} → {row[place]}" for row in rows if row[place]]
        if level == "major":  # to be decided, not to be hurried
            report.fact("major versions", f"{len(names)}: {_few(names)}" if names else "none")
            continue
        report.prefer(
            f"outdated by a {level} version",
            not names,
            f"update-dependencies with level={level}",
            value=f"{len(names)}: {_few(names)}" if names else "none",
        )
    told = ", ".join(f"{counted[level]} {level}" for level in LEVELS if counted[level])
    return f"newer versions: {told}" if told else "nothing is known to be outdated"


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
