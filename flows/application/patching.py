"""The emergency of a known vulnerability: patched on a hotfix branch, proven there, pushed (§3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from packaging.version import InvalidVersion, Version
from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from blocks.places import Application
from flows.application.branch import judge_suite
from flows.application.update_steps import Part, beside, judge_tests, set_node
from flows.application.vulnerabilities import judge_unanswered
from flows.infrastructure.images.building import build_role
from flows.infrastructure.images.deployment import Way, require_way, way_of
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.application.push import PUSH, push_branch, require_remote
from tasks.application.worktree import Worktree, git, require_repository, worktree
from tasks.code.suite import web_suite
from tasks.dependencies import node_packages as node
from tasks.dependencies.advisory import Advisory, Scan, canonical
from tasks.dependencies.node_audit import audit_node, tools_of
from tasks.dependencies.python_audit import audit_python
from tasks.dependencies.python_packages import dependents_of
from tasks.dependencies.python_update import pin_python
from tasks.docker.source import read_source

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
        holes = find_holes(report, application, advisory.strip(), seconds)
        report.table(
            "Vulnerable",
            ("part", "package", "installed", "safe version", "severity", "what"),
            [
                (
                    one.part,
                    one.advisory.package,
                    ", ".join(one.advisory.versions),
                    one.safe or "none yet",
                    one.advisory.severity.name,
                    one.advisory.summary[:160],
                )
                for one in holes
            ],
        )
        tell_dependents(report, application, holes, seconds)
        report.require(
            "a version that fixes it",
            all(one.safe for one in holes),
            "there is none yet: take the package out of reach (a flag, a proxy's rule), and ask again",
            value=", ".join(f"{one.advisory.package} {one.safe or 'none'}" for one in holes),
        )
        report.fail_if_critical()
        if deploy and any(one.part == "web" for one in holes) and not (env.has("docker") and env.docker.containers):
            raise OpsError(
                "a release that is unpacked brings no node packages: what runs stays vulnerable",
                "launch it without deploy, and deploy what is built from the branch by hand",
            )
        branch, working, base = _branches(report, repository, holes[0].advisory.name)
        with worktree(repository, working, base) as tree:
            if branch == working:
                apply(application, tree, holes, seconds)
                if not tree.commit(f"security: fix {holes[0].advisory.name} vulnerability"):
                    raise OpsError(
                        "the repository names the safe version already",
                        "what is installed is behind it: deploy it with deploy-application",
                    )
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


def _prove(report: Report, env: Environment, tree: Worktree, holes: list[Hole], seconds: float) -> None:
    diff = git(tree.directory, "diff", "--no-color", "--no-ext-diff", "HEAD~1..HEAD")
    report.attach(Evidence("Diff", text=fenced(diff[:MOST_DIFF], "diff")))
    parts = {one.part for one in holes}
    judge_tests(report, env, tree, parts, seconds)
    if "web" in parts:
        web = tree.at(Path(env.application.web_directory))
        judge_suite(
            report, env, web_suite("web build", env.application, env.application.web_build_command, web), seconds
        )
    prove_gone(report, env, tree, holes, seconds)


def require_unmoved(repository: Path, branch: str, commit: str) -> None:
    """
    Raises:
        OpsError: the branch is no longer at the commit that was proven.
    """
    if git(repository, "rev-parse", f"refs/heads/{branch}").strip() != commit:
        raise OpsError(f"{branch} has moved since it was proven at {commit[:12]}", "launch it again: it is proven anew")


def way_of_branch(report: Report, env: Environment, repository: Path, branch: str, commit: str, seconds: int) -> Way:
    """How the commit that was proven is deployed. Containers get images that are built from it here; nothing that runs
    is changed.

    Raises:
        OpsError: an image does not build, or what is there cannot be read.
    """
    if not (env.has("docker") and env.docker.containers):
        return way_of(env, branch, seconds, commit=commit)
    version, built = f"hotfix-{commit[:12]}", list[str]()
    with worktree(repository, f"ops/build-{report.started:%Y%m%d-%H%M%S}", commit) as tree:
        source = read_source(str(tree.directory))
        for role, one in env.docker.containers.items():
            if one.dockerfile:
                build_role(report, env.docker, role, source, version)
                built.append(role)
    report.fact("images", f"{version}, on this engine only: make the release with build-images when it is merged")
    return way_of(env, version, seconds, roles=built)


_VERSION = re.compile(r"\d+(?:\.\d+)*[\w.+-]*")


@dataclass(frozen=True)
class Hole:
    """A package of one part that has the vulnerability, and the version that has it no longer ("" for none)."""

    part: Part
    advisory: Advisory
    safe: str


def find_holes(report: Report, application: Application, wanted: str, seconds: float) -> list[Hole]:
    """Where the vulnerability is, by the audits of both parts.

    Raises:
        OpsError: no package has it, or no audit told.
    """
    scans = dict[Part, Scan]()
    for part in ("backend", "web") if application.web_directory else ("backend",):
        where = Path(application.web_directory if part == "web" else application.python)
        if scan := _audit(report, application, part, where, seconds):
            scans[part] = scan
    holes = [
        Hole(part, one, safe_version(one))
        for part, scan in scans.items()
        for one in scan.found
        if one.is_called(wanted)
    ]
    if not holes:
        told = "; ".join(f"{scan.looked_at} packages of {part} looked at" for part, scan in scans.items())
        raise OpsError(
            f"no package is known to have {wanted} ({told or 'nothing was looked at'})",
            "see scan-vulnerabilities for its ids; what is not known there is not known here",
        )
    return holes


def safe_version(advisory: Advisory) -> str:
    """The lowest version that fixes it and is newer than every one that is there; "" where none is known."""
    try:
        there = max(Version(one) for one in advisory.versions)
        fixes = [found[0] for text in advisory.fixed for found in [_VERSION.search(text)] if found]
        return min((one for one in fixes if Version(one) > there), key=Version, default="")
    except (InvalidVersion, ValueError):
        return ""


def tell_dependents(report: Report, application: Application, holes: Sequence[Hole], seconds: float) -> None:
    """Who depends on each, as pip and pnpm tell it."""
    for hole in holes:
        name = hole.advisory.package
        try:
            if hole.part == "backend":
                found = ", ".join(dependents_of(Path(application.need("python")), name, seconds)) or "no other package"
                text = f"Required by: {found}"
            else:
                text = node.node_dependents(Path(application.web_directory), name, seconds)
        except OpsError as error:
            report.warn(f"who depends on {name}", error.hint, value=f"not known: {error.message}")
            continue
        report.attach(Evidence(f"Who depends on {name} ({hole.part})", text=fenced(text)))


def apply(application: Application, tree: Worktree, holes: Sequence[Hole], seconds: float) -> None:
    """The safe versions in the worktree's files, lock files included.

    Raises:
        OpsError: they cannot be.
    """
    python = {hole.advisory.package: hole.safe for hole in holes if hole.part == "backend"}
    if python:
        pin_python(application, tree.at(application.source), python, seconds, add=True)
    packages = {hole.advisory.package: hole.safe for hole in holes if hole.part == "web"}
    if packages:
        web = tree.at(Path(application.web_directory))
        direct = {one.name for one in node.list_node(web, seconds)}
        if chosen := {name: safe for name, safe in packages.items() if name in direct}:
            set_node(web, chosen, seconds)
        if inner := [name for name in packages if name not in direct]:  # as far as those that want it allow
            argv = ("update", "--recursive", "--lockfile-only", "--ignore-scripts", "--depth", "100")
            node.pnpm(web, *argv, *inner, seconds=seconds)


def prove_gone(report: Report, env: Environment, tree: Worktree, holes: Sequence[Hole], seconds: float) -> None:
    """Audit again what was installed in the worktree: no answer is no proof."""
    for part in dict.fromkeys(hole.part for hole in holes):
        application = env.application
        where = beside(tree) / "bin" / "python" if part == "backend" else tree.at(Path(application.web_directory))
        scan = _audit(report, application, part, where, seconds)
        names = {canonical(hole.advisory.package) for hole in holes if hole.part == part}
        ids = {one for hole in holes for one in hole.advisory.ids}
        left = [one for one in scan.found if canonical(one.package) in names and ids & set(one.ids)] if scan else []
        value = (
            "not known" if scan is None else f"still there: {left[0].package} {left[0].versions}" if left else "gone"
        )
        report.require(
            f"{part}: the vulnerability",
            scan is not None and not left,
            "its dependents hold the old version: update them, or override it by hand (pnpm overrides)",
            value=value,
            expected="gone by a second audit",
        )


def _audit(report: Report, application: Application, part: Part, where: Path, seconds: float) -> Scan | None:
    try:
        if part == "backend":
            return audit_python(application.model_copy(update={"python": str(where)}), seconds)
        return audit_node(where, tools_of(where)[0], False, seconds)
    except OpsError as error:
        judge_unanswered(report, f"{part}: audit", error)
        return None
