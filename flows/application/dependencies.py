"""The packages that the application is made of: looked at, and updated on a branch (§3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.application import dependency_findings as findings
from flows.application.update_steps import Wish, judge_tests, update_node, update_python
from runbook.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.dependencies import node_packages as node
from tasks.dependencies import python_packages as python
from tasks.dependencies.versions import Level
from tasks.worktree import require_repository, uncommitted, worktree

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
        outdated += findings.judge_python(
            report,
            python.list_python.submit(Path(application.need("python")), seconds),
            python.find_outdated_python.submit(Path(application.need("python")), seconds),
            python.find_python_conflicts.submit(Path(application.need("python")), seconds),
        )
        findings.judge_python_lock(report, application)
        if application.web_directory:
            web = Path(application.web_directory)
            outdated += findings.judge_node(
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

        report.outcome = findings.tell_outdated(report, outdated, known)
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
