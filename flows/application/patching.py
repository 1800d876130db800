"""Patch a known vulnerability: on a hotfix branch, proven there, then pushed (§3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from packaging.version import InvalidVersion, Version
from pydantic import Field

from blocks.environment import Environment
from blocks.places import Application
from flows.application.branch import judge_suite
from flows.application.package_updates import Part, judge_tests, set_node, venv_of
from flows.application.vulnerabilities import judge_unanswered
from flows.infrastructure.images.building import build_role
from flows.infrastructure.images.deployment import Deployment, deployment_of, require_deployment
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.push import push_branch, require_remote
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


@flow(name="patch-vulnerability", flow_run_name=RunName("patch-vulnerability {environment} {advisory}"))
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

    Finds the vulnerable packages and their dependents, and sets the fixed version that the advisory names on a hotfix
    branch in a git worktree, with the lock files. There it installs the packages, runs the tests, builds, and audits
    again. A branch that is still vulnerable is not pushed. Run it when scan-vulnerabilities finds a critical or high
    vulnerability.

    Without `confirm` it makes and proves the branch; nothing leaves this host. With `confirm` it proves the same branch
    again and pushes it. The live checkout and the installed packages are not changed. To undo: `git branch -D`, after a
    push also `git push --delete`. Next: review and merge the branch, then run deploy-application.

    With `deploy` the same run also deploys the branch, like deploy-application: a version that is not healthy by its
    deadline is rolled back, and the run fails. The run is refused at once if the environment configures no deployment.

    Departs from the manual: `git add .` in the live checkout would commit every file that lies there.

    Args:
        environment: Environment (lab, staging, production …)
        advisory: ID of the vulnerability (required: CVE-…, GHSA-…, PYSEC-…)
        remote: Remote to push to
        seconds: Longest wait for each tool and the tests, in seconds
        deploy: Deploy it after verification and push (as deploy-application does)
        health_seconds: If the application is not healthy within this many seconds after the deployment, roll back
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to push (and deploy). Empty: only make and verify the branch
    """
    env = Environment.find(environment)
    with runbook("Patch vulnerability", env, confirm, plan, changes=deploy, without_confirm="stages") as report:
        if deploy:
            require_deployment(env)
        application = env.application
        if not _ID.fullmatch(advisory.strip()):
            raise OpsError(f"“{advisory[:40]}” is no id of an advisory", "enter it as CVE-2026-12345 or GHSA-…")
        repository = require_repository(application.repository)
        require_remote(repository, remote)
        found = find_vulnerable(report, application, advisory.strip(), seconds)
        _judge_found(report, env, found, seconds, deploy=deploy)
        branch, working, base = _branches(report, repository, found[0].advisory.name)
        with worktree(repository, working, base) as tree:
            if branch == working:
                apply_fixes(application, tree, found, seconds)
                if not tree.commit(f"security: fix {found[0].advisory.name} vulnerability"):
                    raise OpsError(
                        "the repository names the fixed version already",
                        "the installed version is older: deploy the repository with deploy-application",
                    )
            commit = tree.head()
            _prove(report, env, tree, found, seconds)
        report.fact("branch", f"{branch} in {repository}")
        report.fail_if_critical()
        then = "deploy, review and merge it" if deploy else "review, merge and deploy it"
        push = Change(
            push_branch.bind(repository, remote, branch),
            "push",
            f"{branch} to {remote}, then {then}",
            pins=[lambda report: report.pin_state("commit", git(repository, "rev-parse", "HEAD").strip())],
            needs=[lambda _: require_unmoved(repository, branch, commit)],
        )
        deployment = deployment_of_branch(report, env, repository, branch, commit, health_seconds) if deploy else None
        if deployment:
            deployment.judge()
        effect = Effect(
            f"{branch} is pushed to {remote}" + " and deployed" * deploy,
            f"git push {remote} --delete {branch}" + ", deploy-application with the version before" * deploy,
            down="users wait while the services restart" if deploy else 0.0,
        )
        with carrying_out(report, push, *(deployment.lines if deployment else ()), effect=effect) as carry:
            carry(push)
            report.fact("pushed", f"{branch} to {remote}")
            report.outcome = (
                f"{branch} is pushed to {remote}: review and merge it, then deploy it with deploy-application"
            )
            if deployment:
                report.outcome = f"{deployment.carry_out(carry)}; {branch} is pushed to {remote}: review and merge it"
    return report


def _judge_found(
    report: Report, env: Environment, found: Sequence[Vulnerable], seconds: float, *, deploy: bool
) -> None:
    """A table of the vulnerable packages, their dependents, and whether each can be fixed and deployed.

    Raises:
        RunbookFailed: no version fixes one of them.
        OpsError: the deployment would not fix the live packages.
    """
    report.table(
        "Vulnerable",
        ("part", "package", "installed", "fixed in", "severity", "summary"),
        [
            (
                one.part,
                one.advisory.package,
                ", ".join(one.advisory.versions),
                one.fixed or "no version yet",
                one.advisory.severity.name,
                one.advisory.summary[:160],
            )
            for one in found
        ],
    )
    attach_dependents(report, env.application, found, seconds)
    report.require(
        "a version that fixes it",
        all(one.fixed for one in found),
        "block access to the package (a feature flag, a proxy rule) until a version fixes it",
        value=", ".join(f"{one.advisory.package} {one.fixed or 'none'}" for one in found),
    )
    report.fail_if_critical()
    if deploy and any(one.part == "web" for one in found) and not (env.has("docker") and env.docker.containers):
        raise OpsError(
            "a release bundle contains no node packages: the live web application would stay vulnerable",
            "run this without deploy, then build the branch and deploy it by hand",
        )


def _branches(report: Report, repository: Path, name: str) -> tuple[str, str, str]:
    """The hotfix branch, the branch to work on, and its base. An earlier run's branch is proven again unchanged; an
    empty one of a killed run is not used."""
    branch, stamp = f"hotfix/security-patch-{name}", f"{report.started:%Y%m%d-%H%M%S}"
    if not git(repository, "for-each-ref", f"refs/heads/{branch}").strip():
        return branch, branch, "HEAD"
    if git(repository, "rev-list", "--count", f"HEAD..refs/heads/{branch}").strip() == "0":
        report.fact("empty branch of an earlier run", f"{branch} has no commit: git branch -D {branch}")
        return f"{branch}-{stamp}", f"{branch}-{stamp}", "HEAD"
    report.fact("branch of an earlier run", f"{branch}: proven again, not changed")
    return branch, f"ops/proof-{stamp}", f"refs/heads/{branch}"


def _prove(report: Report, env: Environment, tree: Worktree, found: list[Vulnerable], seconds: float) -> None:
    diff = git(tree.directory, "diff", "--no-color", "--no-ext-diff", "HEAD~1..HEAD")
    report.attach(Evidence("Diff", text=fenced(diff[:MOST_DIFF], "diff")))
    parts = {one.part for one in found}
    judge_tests(report, env, tree, parts, seconds)
    if "web" in parts:
        web = tree.at(Path(env.application.web_directory))
        judge_suite(
            report, env, web_suite("web build", env.application, env.application.web_build_command, web), seconds
        )
    audit_again(report, env, tree, found, seconds)


def require_unmoved(repository: Path, branch: str, commit: str) -> None:
    """Check that the branch still is at the proven commit.

    Raises:
        OpsError: it is at another one.
    """
    if git(repository, "rev-parse", f"refs/heads/{branch}").strip() != commit:
        raise OpsError(
            f"{branch} has moved since it was proven at {commit[:12]}", "run this again: it proves the branch again"
        )


def deployment_of_branch(
    report: Report, env: Environment, repository: Path, branch: str, commit: str, seconds: int
) -> Deployment:
    """The deployment of the proven commit. For containers it builds their images; nothing live is changed.

    Raises:
        OpsError: an image does not build, or the engine cannot be read.
    """
    if not (env.has("docker") and env.docker.containers):
        return deployment_of(report, env, branch, seconds, commit=commit)
    version, built = f"hotfix-{commit[:12]}", list[str]()
    with worktree(repository, f"ops/build-{report.started:%Y%m%d-%H%M%S}", commit) as tree:
        source = read_source(str(tree.directory))
        for role, one in env.docker.containers.items():
            if one.dockerfile:
                build_role(report, env.docker, role, source, version)
                built.append(role)
    report.fact("images", f"{version}, on this engine only: after the merge, build the release with build-images")
    return deployment_of(report, env, version, seconds, roles=built)


_VERSION = re.compile(r"\d+(?:\.\d+)*[\w.+-]*")


@dataclass(frozen=True)
class Vulnerable:
    """A vulnerable package of one part, and the lowest fixed version ("" for none)."""

    part: Part
    advisory: Advisory
    fixed: str


def find_vulnerable(report: Report, application: Application, wanted: str, seconds: float) -> list[Vulnerable]:
    """The packages with the vulnerability, by the audits of both parts.

    Raises:
        OpsError: no package has it, or no audit answered.
    """
    scans = dict[Part, Scan]()
    for part in ("backend", "web") if application.web_directory else ("backend",):
        where = Path(application.web_directory if part == "web" else application.python)
        if scan := _audit(report, application, part, where, seconds):
            scans[part] = scan
    found = [
        Vulnerable(part, one, fixed_version(one))
        for part, scan in scans.items()
        for one in scan.found
        if one.is_called(wanted)
    ]
    if not found:
        audited = "; ".join(f"{scan.checked} packages of {part} audited" for part, scan in scans.items())
        raise OpsError(
            f"no package is known to have {wanted} ({audited or 'no audit answered'})",
            "find the ids that the scanners use in the report of scan-vulnerabilities",
        )
    return found


def fixed_version(advisory: Advisory) -> str:
    """The lowest fixed version that is newer than every installed one; "" if none is known."""
    try:
        installed = max(Version(one) for one in advisory.versions)
        fixes = [found[0] for text in advisory.fixed for found in [_VERSION.search(text)] if found]
        return min((one for one in fixes if Version(one) > installed), key=Version, default="")
    except (InvalidVersion, ValueError):
        return ""


def attach_dependents(report: Report, application: Application, found: Sequence[Vulnerable], seconds: float) -> None:
    """The dependents of each package, by pip and pnpm."""
    for one in found:
        name = one.advisory.package
        try:
            if one.part == "backend":
                others = ", ".join(dependents_of(Path(application.need("python")), name, seconds)) or "no other package"
                text = f"Required by: {others}"
            else:
                text = node.node_dependents(Path(application.web_directory), name, seconds)
        except OpsError as error:
            report.warn(f"dependents of {name}", error.hint, value=f"not known: {error.message}")
            continue
        report.attach(Evidence(f"Dependents of {name} ({one.part})", text=fenced(text)))


def apply_fixes(application: Application, tree: Worktree, found: Sequence[Vulnerable], seconds: float) -> None:
    """Set the fixed versions in the worktree's files, lock files included.

    Raises:
        OpsError: a tool failed.
    """
    python = {one.advisory.package: one.fixed for one in found if one.part == "backend"}
    if python:
        pin_python(application, tree.at(application.source), python, seconds, add=True)
    packages = {one.advisory.package: one.fixed for one in found if one.part == "web"}
    if packages:
        web = tree.at(Path(application.web_directory))
        direct = {one.name for one in node.list_node(web, seconds)}
        if chosen := {name: fixed for name, fixed in packages.items() if name in direct}:
            set_node(web, chosen, seconds)
        if inner := [name for name in packages if name not in direct]:  # as far as their dependents allow
            argv = ("update", "--recursive", "--lockfile-only", "--ignore-scripts", "--depth", "100")
            node.pnpm(web, *argv, *inner, seconds=seconds)


def audit_again(report: Report, env: Environment, tree: Worktree, found: Sequence[Vulnerable], seconds: float) -> None:
    """Audit the packages that are installed in the worktree; an audit without an answer proves nothing."""
    for part in dict.fromkeys(one.part for one in found):
        application = env.application
        where = venv_of(tree) / "bin" / "python" if part == "backend" else tree.at(Path(application.web_directory))
        scan = _audit(report, application, part, where, seconds)
        names = {canonical(one.advisory.package) for one in found if one.part == part}
        ids = {id_ for one in found for id_ in one.advisory.ids}
        left = [one for one in scan.found if canonical(one.package) in names and ids & set(one.ids)] if scan else []
        value = (
            "not known"
            if scan is None
            else f"still vulnerable: {left[0].package} {left[0].versions}"
            if left
            else "fixed"
        )
        report.require(
            f"{part}: the vulnerability",
            scan is not None and not left,
            "its dependents require the old version: update them, or override it by hand (pnpm overrides)",
            value=value,
            expected="fixed, by a second audit",
        )


def _audit(report: Report, application: Application, part: Part, where: Path, seconds: float) -> Scan | None:
    try:
        if part == "backend":
            return audit_python(application.model_copy(update={"python": str(where)}), seconds)
        return audit_node(where, tools_of(where)[0], False, seconds)
    except OpsError as error:
        judge_unanswered(report, f"{part}: audit", error)
        return None
