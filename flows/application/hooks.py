"""Hooks that check every commit (§3.4)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from blocks.environment import Environment
from blocks.places import Application
from flows.application.branch import report_branch
from flows.application.code_findings import checkout_of, workspace_of
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.masking import without_logins
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.programs import answer, python_program, web_program
from tasks.application.worktree import Worktree, git, inside, link_packages, sweep, worktree
from tasks.code import hooks
from tasks.code.hooks import FILE, IDS, INSTALL, HooksPlace

BRANCH = "ops/pre-commit"
Origin = Literal["auto", "repositories", "local"]


@flow(name="install-pre-commit", flow_run_name=RunName("install-pre-commit {environment}"))
def install_pre_commit(
    environment: str,
    origin: Origin = "auto",
    seconds: Annotated[int, Field(ge=10, le=7200)] = 900,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Pre-commit Hooks設定 (§3.4)

    Adds the hooks ruff, ruff-format and eslint to .pre-commit-config.yaml, on the branch ops/pre-commit in a git
    worktree. Runs all hooks on all files there, and commits the file and the repairs of the hooks. Existing hooks and
    comments in the file are kept. With `confirm` it also installs pre-commit into the git hooks of the live checkout;
    an existing hook is kept and still runs. To undo: pre-commit uninstall, git branch -D ops/pre-commit.

    The hooks come from the tools' own repositories, pinned to the versions that the application uses. If these cannot
    be reached (`auto`), or on request, a `local` repository runs the application's own programs.

    Departs from the manual: the file is merged, not overwritten. The manual's revisions (ruff v0.1.11, eslint v9.0.0)
    differ from the application's own tools.

    Args:
        environment: Environment (lab, staging, production …)
        origin: Source of the hooks (auto: local if it cannot be reached)
        seconds: Time limit of each step, in seconds
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to also run pre-commit install in the live checkout. Empty: only show the
            plan
    """
    env = Environment.find(environment)
    with runbook("Install pre-commit", env, confirm, plan) as report:
        repository, application = checkout_of(report, env), env.application
        program = python_program(application, "pre-commit")
        place = _place(application, repository, workspace_of(env), seconds)
        text = _config(repository, "HEAD")
        named = hooks.read_hooks(text)
        missing = [hook for hook in IDS if hook not in named]
        report.fact("existing hooks", ", ".join(named) or "none")
        if loose := hooks.unpinned(named):
            report.warn(
                "revisions of hooks",
                "pin them: pre-commit autoupdate --freeze",
                value=f"not pinned: {', '.join(loose)}",
            )
        added = _added(report, env, place, missing, origin)
        _on_branch(report, env, program, hooks.merged(text, added) if added else text, seconds)
        installing = Change(
            hooks.install_hook.bind(program, repository, seconds),
            INSTALL,
            f"{repository}: git runs pre-commit before every commit there",
            pins=[lambda report: report.pin_state("commit", git(repository, "rev-parse", "HEAD").strip())],
        )
        effect = Effect(f"git runs pre-commit before every commit in {repository}", "pre-commit uninstall")
        with carrying_out(report, installing, effect=effect) as carry:
            report.fact("hook", carry(installing))
        report.outcome = f"{', '.join(missing) or 'no hook'} added; pre-commit is installed in {repository}"
    return report


def _place(application: Application, repository: Path, web: Path, seconds: float) -> HooksPlace:
    ruff, eslint = python_program(application, "ruff"), web_program(web, "eslint")
    versions = [answer([tool, "--version"], web, seconds=seconds).stdout for tool in (ruff, eslint)]
    numbers = [re.search(r"\d+\.\d+\.\d+", version) for version in versions]
    config = next((path for path in sorted(web.glob("eslint.config.*"))), None)
    if not config or not all(numbers):
        raise OpsError(
            "ESLint's configuration or a tool's version was not found",
            f"create {web}/eslint.config.js, and check that ruff and eslint answer --version",
        )
    within = ruff.is_relative_to(repository)
    folders = ["" if (path := str(inside(repository, folder))) == "." else path for folder in (application.source, web)]
    return HooksPlace(
        ruff=str(ruff.relative_to(repository)) if within else "ruff",
        ruff_version=numbers[0][0] if numbers[0] else "",
        eslint=str(Path(folders[1], "node_modules", ".bin", "eslint")),
        eslint_version=numbers[1][0] if numbers[1] else "",
        backend=folders[0],
        web=folders[1],
        config=str(Path(folders[1], config.name)),
    )


def _config(repository: Path, commit: str) -> str:
    """The configuration file in a commit; "" if it has none."""
    listed = git(repository, "ls-tree", "--name-only", commit, "--", FILE)
    return git(repository, "show", f"{commit}:{FILE}") if listed.strip() else ""


def _added(
    report: Report, env: Environment, place: HooksPlace, missing: list[str], origin: Origin
) -> list[dict[str, Any]]:
    """The missing hooks, from a source that this host reaches.

    Raises:
        OpsError: `origin` is "repositories", and they cannot be reached.
    """
    if not missing or origin == "local":
        return hooks.local_hooks(place, missing)
    packages = hooks.eslint_packages(Path(env.application.web_directory))
    remote = hooks.remote_hooks(place, missing, packages)
    reached = hooks.read_reachable(
        Path(env.application.need("repository")), {one["repo"]: one["rev"] for one in remote}
    )
    lost = {url: why for url, why in reached.items() if why}
    if not lost:
        return remote
    errors = "; ".join(f"{url}: {why}" for url, why in lost.items())[:300]
    if origin == "repositories":
        raise OpsError(f"hook repositories cannot be reached: {errors}", "choose origin=local, or open the network")
    report.warn(
        "hook repositories", "nothing to do: local hooks run the application's own ruff and eslint", value=errors
    )
    return hooks.local_hooks(place, missing)


def _on_branch(report: Report, env: Environment, program: Path, text: str, seconds: float) -> None:
    """Commit the file, run the hooks twice (the first time they may repair), commit what they repaired."""
    repository = Path(git(Path(env.application.need("repository")), "rev-parse", "--show-toplevel").strip())
    sweep(repository)
    there = bool(git(repository, "for-each-ref", f"refs/heads/{BRANCH}"))
    if there and _config(repository, BRANCH) != text:
        if git(repository, "rev-list", "--count", f"HEAD..refs/heads/{BRANCH}").strip() != "0":
            raise OpsError(f"the branch {BRANCH} exists with other hooks", f"merge it, or git branch -D {BRANCH}")
        git(repository, "branch", "--quiet", "-D", BRANCH)  # a killed run left it without a commit
        there = False
    working = f"ops/proof-{report.started:%Y%m%d-%H%M%S}" if there else BRANCH
    with worktree(repository, working, f"refs/heads/{BRANCH}" if there else "HEAD") as tree:
        link_packages(tree, Path(env.application.web_directory))
        _link_ruff(env.application, tree)
        if not there:
            (tree.directory / FILE).write_text(text, encoding="utf-8")
            tree.commit("Hooks that check every commit: ruff, ruff-format, eslint", [Path(FILE)])
        cache = env.reports_directory / "cache" / "pre-commit"
        first = hooks.run_hooks(program, tree, cache, seconds)
        repaired = tree.changed()
        if not there:
            tree.commit("Repairs of the hooks")
        ran = hooks.run_hooks(program, tree, cache, seconds) if repaired else first
        _judge(report, ran.hooks)
        report.attach(Evidence("pre-commit run --all-files", text=fenced(without_logins(ran.text)[-8000:])))
        report.fact("repaired by the hooks", f"{len(repaired)} files")
        if there:
            report.fact("branch", f"{BRANCH} exists already with these hooks, and they ran again: merge it")
        elif tree.head() != tree.base:
            report_branch(report, env, tree)


def _judge(report: Report, ended: Mapping[str, str]) -> None:
    failed = [name for name, how in ended.items() if how == "Failed"]
    report.prefer(
        "hooks on all files",
        not failed,
        "fix the files that they name: until then git refuses every commit of these files",
        value=f"failed: {', '.join(failed)}" if failed else f"{len(ended)} ran",
    )


def _link_ruff(application: Application, tree: Worktree) -> None:
    """Hooks call ruff by its path if it is in the checkout: the worktree then gets a link to the live environment.
    Otherwise they call it by name: it must be on the PATH of this worker and of every developer."""
    ruff = python_program(application, "ruff")
    environment = ruff.parent.parent
    if not environment.is_relative_to(tree.repository):
        if not shutil.which("ruff"):
            raise OpsError(
                f"ruff is not on PATH, only at {ruff}",
                "put it on the PATH of this worker and of every developer: the hooks call it by name",
            )
        return
    there = tree.directory / environment.relative_to(tree.repository)
    if not there.exists():
        there.symlink_to(environment)
