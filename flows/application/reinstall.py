"""Reinstall the application's packages from the lock files (§3.1)."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from flows.application.code_findings import workspace_of
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.pins import digest
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.application.programs import find_program
from tasks.application.worktree import inside, require_repository, uncommitted
from tasks.packages import modules, venv
from tasks.packages.modules import REINSTALL
from tasks.packages.users import users_of

Part = Literal["web", "backend"]


@flow(name="reinstall-dependencies", flow_run_name=RunName("reinstall-dependencies {environment} {parts}"))
def reinstall_dependencies(
    environment: str,
    parts: tuple[Part, ...] = ("web", "backend"),
    seconds: Annotated[int, Field(ge=10, le=7200)] = 1800,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """全パッケージの再インストール (§3.1)

    Reinstalls node_modules of the pnpm workspace and the backend's virtual environment from the lock files, and clears
    Turbo's caches. Run it when packages are damaged, or differ from the lock files.

    It installs staged copies alongside the live ones and proves them: pnpm lists every dependency in its version, pip
    check passes, and the imports of the backend's sources work. Then it swaps them by rename and proves them again. The
    old copies are deleted after that, but kept while a process can still load from them. If a proof fails, the old
    copies stay live. It is safe to run again after a kill: the next run first finishes or reverts the killed one.

    A virtual environment cannot be moved. Each has a permanent name, and `venv` becomes a link to it.

    Departs from the manual: nothing is deleted first (`rm -rf node_modules`); `pnpm turbo clean` does not exist.

    Args:
        environment: Environment (lab, staging, production …)
        parts: Parts (web: node_modules; backend: the Python virtual environment)
        seconds: Time limit of each step, in seconds
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Reinstall dependencies", env, confirm, plan, changes=True) as report:
        if not parts:
            raise OpsError("no part is chosen", "choose web, backend or both in parts")
        lines = [_web(report, env, seconds)] if "web" in parts else []
        lines += [_backend(report, env, seconds)] if "backend" in parts else []
        locks = [workspace_of(env) / modules.LOCK] if "web" in parts else []
        locks += [venv.read_lock(env.application).path] if "backend" in parts else []
        digests = ", ".join(f"{lock.name} {digest([lock.read_bytes()])}" for lock in locks)
        effect = Effect(
            f"the packages of {first_of(parts)} are installed again, by the lock files",
            "not needed",
            down="the services restart",
        )
        pins = [lambda report: report.pin_state("lock files", digests)]
        with carrying_out(report, *lines, effect=effect, pins=pins) as carry:
            report.outcome = "; ".join([carry(line) for line in lines])
    return report


def _web(report: Report, env: Environment, seconds: float) -> Change[[], str]:
    """Build a staged copy, prove it, swap, prove again; only then delete the old one."""
    web = workspace_of(env)
    find_program("node")
    find_program("pnpm")
    if not (web / modules.LOCK).is_file():
        raise OpsError(
            f"there is no {modules.LOCK} in {web}", "create it with pnpm install --lockfile-only, and commit it"
        )
    settle, build = modules.settle_modules.bind(web), modules.build_modules.bind(web)
    swap, keep = modules.swap_modules.bind(web), modules.keep_modules.bind(web)
    clear, drop = modules.clear_turbo.bind(web), modules.drop_old_modules.bind(web)

    def reinstall() -> str:
        if left := settle():
            report.fact("earlier run", left)
        built = build(seconds)
        try:
            swap()
            modules.prove_modules(web, seconds)
        except BaseException:
            modules.restore_old(web)
            shutil.rmtree(modules.staging_of(web), ignore_errors=True)
            raise
        keep()
        report.fact("Turbo's caches", ", ".join(clear()) or "none")
        if not _used(report, "node_modules", users_of(web, modules.NODE)):
            drop()
        return f"{built.dependencies} direct dependencies of the workspace match the lock file"

    return Change(
        reinstall,
        REINSTALL,
        f"{web}: node_modules of the workspace, by {modules.LOCK}",
        size=modules.read_bytes(web),
        by=[settle, build, swap, keep, clear, drop],
    )


def _backend(report: Report, env: Environment, seconds: float) -> Change[[], str]:
    """Build it under its final name and prove it there; the swap is one rename of the link."""
    application = env.application
    live, lock = venv.venv_of(application), venv.read_lock(application)
    if lock.loose:
        report.warn(
            "lock of the backend",
            "pin them (pip freeze): otherwise two installations differ",
            value=f"{len(lock.loose)} without a version: {', '.join(lock.loose[:3])}",
        )
    settle, build = venv.settle_venv.bind(application), venv.build_venv.bind(application)
    swap, put_back = venv.swap_venv.bind(application), venv.return_venv.bind(application)
    drop = venv.drop_old_venvs.bind(application)

    def reinstall() -> str:
        if left := settle():
            report.fact("earlier run", left)
        python = Path(application.need("python"))
        before = venv.read_failing_imports(application, python, seconds) if python.exists() else set()
        built = build(lock, report.started, seconds)
        try:
            _judge_imports(report, before, venv.read_failing_imports(application, built / "bin" / "python", seconds))
        except OpsError:
            settle()  # deletes it: it is marked as not proven
            raise
        used = users_of(live)
        old = swap(built)
        try:
            _judge_imports(report, before, venv.read_failing_imports(application, python, seconds))
        except OpsError:
            put_back(old)
            raise
        _judge_ignored(report, env, live)
        if not _used(report, "virtual environment", used):
            drop()
        return f"{live} is {built.name}, by {lock.path.name}"

    detail = f"{live}: the backend's environment, by {lock.path.name}"
    return Change(reinstall, REINSTALL, detail, by=[settle, build, swap, put_back, drop])


def _judge_ignored(report: Report, env: Environment, link: Path) -> None:
    """The pattern `venv/` in .gitignore matches directories only: git clean would delete the link."""
    with contextlib.suppress(OpsError):
        repository = require_repository(env.application.repository)
        if str(inside(repository, link.parent) / link.name) in uncommitted(repository):
            report.warn(
                "link of the virtual environment",
                f"write {link.name} without a slash in .gitignore",
                value=f"git does not ignore {link}, which is now a link",
            )


def _judge_imports(report: Report, before: set[str], after: set[str]) -> None:
    """Every import that worked before must work now. Imports that failed before are a WARN.

    Raises:
        OpsError: an import works no longer.
    """
    if lost := sorted(after - before):
        raise OpsError(
            f"the new environment cannot import {'; '.join(lost[:3])}",
            "add the missing packages to the lock file; the old environment is live",
        )
    if after and not any(found.name == "imports" for found in report.findings):
        report.warn(
            "imports",
            "add the packages to the lock file, if the application needs them",
            value=f"failed before, and fail now: {'; '.join(sorted(after)[:3])}",
        )


def _used(report: Report, what: str, users: list[str]) -> bool:
    """Whether a process can still load from the old copy: then it is kept until the next run."""
    if users:
        report.warn(
            f"old {what} is kept",
            "restart these processes; the next run of this runbook deletes the old copy",
            value=f"in use by {', '.join(users[:5])}",
        )
    return bool(users)
