"""The emergency of a known vulnerability: patched on a hotfix branch, proven there, pushed (§3.2)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.application import patch_steps as steps
from flows.application.branch import judge_suite
from flows.application.hotfix import require_unmoved, way_of_branch
from flows.application.update_steps import judge_tests
from flows.infrastructure.deployment import require_way
from runbook.errors import OpsError
from runbook.markdown import fenced
from runbook.permit import Act
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.code.suite import web_suite
from tasks.pushing import PUSH, push_branch, require_remote
from tasks.worktree import Worktree, git, require_repository, worktree

_ID = re.compile(r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)+")
MOST_DIFF = 200_000


@flow(name="patch-vulnerability", flow_run_name="patch-vulnerability {environment} {advisory}")
def patch_vulnerability(
    environment: str,
    advisory: str = "",
    remote: str = "origin",
    seconds: Annotated[int, Field(ge=30, le=14400)] = 1800,
    deploy: bool = False,
    health_seconds: Annotated[int, Field(ge=1)] = 120,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """セキュリティパッチ適用: Critical脆弱性の緊急対応 (§3.2)

    Finds the packages that have the vulnerability and who depends on them, takes the version that its advisory says
    fixes it, and sets it on a hotfix branch in a worktree, with the lock files. There it installs everything, runs the
    tests, builds, and audits again: a vulnerability that is not proven gone is not pushed. Run it when
    scan-vulnerabilities finds one that is critical or high.

    Without `confirm` the branch is made and proven, and nothing leaves this host; with it that very branch is proven
    again and pushed. The live checkout and what is installed are not touched. `git branch -D` undoes it, and after a
    push `git push --delete`. Next: review and merge it, then deploy it with the runbook deploy-application.

    With `deploy` the same run goes on and deploys that branch as deploy-application does: what is not healthy by its
    deadline is taken back by itself, and the run fails. An environment that describes no way to deploy is refused
    before anything begins.

    Departs from the manual: `git add .` in the live checkout would commit whatever lies there.

    Args:
        environment: 対象の環境
        advisory: 脆弱性のID (必須。CVE-…, GHSA-…, PYSEC-…)
        remote: プッシュ先のリモート
        seconds: 各ツールとテストを待つ秒数の上限
        deploy: 検証とプッシュの後、そのまま配備する (deploy-application と同じ手順)
        health_seconds: 配備後この秒数以内に正常にならなければ元のバージョンに戻す
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力するとプッシュ (と配備) する。空ならブランチの作成と検証まで
    """
    env = Environment.find(environment)
    with runbook("Patch vulnerability", env, confirm, plan, changes=deploy) as report:
        if deploy:
            require_way(env)
        application = env.application
        if not _ID.fullmatch(advisory.strip()):
            raise OpsError(f"“{advisory[:40]}” is no id of an advisory", "write it like CVE-2026-12345 or GHSA-…")
        repository = require_repository(application.repository)
        require_remote(repository, remote)
        holes = steps.find_holes(report, application, advisory.strip(), seconds)
        report.table("Vulnerable", ("part", "package", "installed", "safe version", "severity", "what"),
                     [(one.part, one.advisory.package, ", ".join(one.advisory.versions), one.safe or "none yet",
                       one.advisory.severity.name, one.advisory.summary[:160]) for one in holes])  # fmt: skip
        steps.tell_dependents(report, application, holes, seconds)
        report.expect("a version that fixes it", all(one.safe for one in holes),
                      "there is none yet: take the package out of reach (a flag, a proxy's rule), and ask again",
                      value=", ".join(f"{one.advisory.package} {one.safe or 'none'}" for one in holes))  # fmt: skip
        report.fail_if_critical()
        if deploy and any(one.part == "web" for one in holes) and not (env.has("docker") and env.docker.containers):
            raise OpsError("a release that is unpacked brings no node packages: what runs stays vulnerable",
                           "launch it without deploy, and deploy what is built from the branch by hand")  # fmt: skip
        branch, working, base = _branches(report, repository, holes[0].advisory.name)
        with worktree(repository, working, base) as tree:
            if branch == working:
                steps.apply(application, tree, holes, seconds)
                if not tree.commit(f"security: fix {holes[0].advisory.name} vulnerability"):
                    raise OpsError("the repository names the safe version already",
                                   "what is installed is behind it: deploy it with deploy-application")  # fmt: skip
            commit = tree.head()
            _prove(report, env, tree, holes, seconds)
        report.fact("branch", f"{branch} in {repository}")
        report.fail_if_critical()
        then = "deploy it, review and merge it" if deploy else "review, merge and deploy it"
        report.plan("push", f"{branch} to {remote}, then {then}")
        way = way_of_branch(report, env, repository, branch, commit, health_seconds) if deploy else None
        report.pin_state("commit", git(repository, "rev-parse", "HEAD").strip())
        permit = report.permit(Act(PUSH, f"{branch} to {remote}"), *(way.plan(report) if way else ()))
        require_unmoved(repository, branch, commit)
        push_branch(permit, repository, remote, branch)
        report.fact("pushed", f"{branch} to {remote}")
        report.outcome = f"{branch} is pushed to {remote}: review and merge it, then deploy it with deploy-application"
        if way:
            report.outcome = f"{way.carry_out(report, permit)}; {branch} is pushed to {remote}: review and merge it"
    return report


def _branches(report: Report, repository: Path, name: str) -> tuple[str, str, str]:
    """The hotfix branch, the one to work on, and what that begins from: a branch that an earlier run committed is
    proven again as it is; one that a killed run left empty is left alone."""
    branch, stamp = f"hotfix/security-patch-{name}", f"{report.started:%Y%m%d-%H%M%S}"
    if not git(repository, "for-each-ref", f"refs/heads/{branch}").strip():
        return branch, branch, "HEAD"
    if git(repository, "rev-list", "--count", f"HEAD..refs/heads/{branch}").strip() == "0":
        report.fact("left by an earlier run", f"{branch} has no commit of its own: git branch -D {branch}")
        return f"{branch}-{stamp}", f"{branch}-{stamp}", "HEAD"
    report.fact("made by an earlier run", f"{branch}: it is proven again, and not changed")
    return branch, f"ops/proof-{stamp}", f"refs/heads/{branch}"


def _prove(report: Report, env: Environment, tree: Worktree, holes: list[steps.Hole], seconds: float) -> None:
    diff = git(tree.directory, "diff", "--no-color", "--no-ext-diff", "HEAD~1..HEAD")
    report.attach(Evidence("Diff", text=fenced(diff[:MOST_DIFF], "diff")))
    parts = {one.part for one in holes}
    judge_tests(report, env, tree, parts, seconds)
    if "web" in parts:
        web = tree.at(Path(env.application.web_directory))
        judge_suite(
            report, env, web_suite("web build", env.application, env.application.web_build_command, web), seconds
        )
    steps.prove_gone(report, env, tree, holes, seconds)
