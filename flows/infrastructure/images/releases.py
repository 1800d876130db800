"""Deploy a commit as files, with a rollback (§4.1)."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import Locked, LockLost, OpsError, RunbookFailed
from runbook.guard.permit import Act, Permit
from runbook.masking import masked
from runbook.next import Next
from runbook.page.form import read_forms
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from tasks.application.health import wait_healthy
from tasks.application.worktree import git, inside
from tasks.host.services import read_services, start_services, started_if_cancelled, stop_services
from tasks.packages import venv
from tasks.packages.modules import REINSTALL
from tasks.releases.packages import find_missing_packages, kept_venv, require_venv
from tasks.releases.release import Live, Release, find_differences, find_release, read_live, write_errors
from tasks.releases.uncommitted import find_uncommitted, require_outside
from tasks.releases.unpacking import delete_previous, keep_previous, restore_previous, swap_release, unpack_release

SERVICES = ("backend", "frontend")
# Healthy answers in a row, 0.25 s apart: a program that cannot reach its database takes some seconds to report it.
STEADY = 20
# The previous version gets at least this long to become healthy.
BACK_SECONDS = 60
PACKAGE_SECONDS = 1800.0
LOG_LINES, LOG_CHARACTERS = 100, 6000  # the restored version has also written some lines
LAST_RESORT = "run deploy-application with a version that is known to work"


@dataclass(frozen=True)
class ReleaseDeployment:
    """Files and packages staged, then swapped while the services are stopped. `again`: also if the commit runs already;
    `missing`: requirements of the release that are not installed."""

    env: Environment
    seconds: int
    again: bool
    release: Release
    now: Live
    missing: tuple[str, ...]

    @classmethod
    def find(cls, env: Environment, version: str, seconds: int, again: bool, commit: str = "") -> ReleaseDeployment:
        """Read the live release and the version. `commit`: the version's commit, if known.

        Raises:
            OpsError: the version does not exist, or no service would run it.
        """
        if not env.services_in(SERVICES):
            raise OpsError("the environment names no service that runs a release", "add backend to [services.names]")
        now, release = read_live(env.application), find_release(env.application, version, commit)
        missing = find_missing_packages(env.application, release, PACKAGE_SECONDS)
        return cls(env, seconds, again, release, now, tuple(missing))

    @property
    def roles(self) -> list[str]:
        """The services that run from the release."""
        return self.env.services_in(SERVICES)

    @property
    def identity(self) -> str:
        """The release's commit."""
        return self.release.commit

    def plan(self, report: Report) -> list[Act]:
        """Report the live release and the planned steps; returns the acts that need a permit.

        Raises:
            OpsError: the application's environment file or its Python would be replaced.
        """
        require_outside(self.env.application, self.release)
        self._report_versions(report)
        if files := find_uncommitted(self.release, self.now):
            report.fail(
                "uncommitted files",
                "move them out of the release's parts, or remove the part from [application] release",
                value=f"{len(files)} would be lost: {', '.join(files[:3])}",
            )
        report.plan("unpack", f"{self.release.act.target}: {', '.join(self.release.parts)}")
        acts = [self.release.act]
        if packages := self._plan_packages(report):
            acts.append(packages)
        report.plan("restart", f"{', '.join(self.roles)}, then healthy within {self.seconds} s, or roll back")
        return acts

    def _report_versions(self, report: Report) -> None:
        now, new = self.now, self.release
        report.table(
            "Release",
            ("", "version", "commit"),
            [("now", now.version or "not known", now.commit), ("then", new.version, new.commit)],
        )
        if now.known:
            added, removed = (
                git(new.repository, "rev-list", "--count", span).strip()
                for span in (f"{now.commit}..{new.commit}", f"{new.commit}..{now.commit}")
            )
            report.fact("difference", f"{added} commits more than the live release, {removed} fewer")
            back = Next("deploy-application", parameters={"version": now.commit})
            report.fact("rollback", read_forms([self.env.name]).next(back, self.env.name))
        if now.interrupted:
            report.warn(
                "previous version",
                "nothing to do: a rollback of this run restores that copy",
                value="a deployment was interrupted: a copy of the version before it is kept",
            )

    def _plan_packages(self, report: Report) -> Act | None:
        """The packages of the release. They can be changed only in the application's own virtual environment."""
        application = self.env.application
        value = "; ".join(self.missing[:3]) or "all its requirements are installed"
        kept = kept_venv(application, self.release) or venv.renamed_venv(application)
        if not self.missing and not kept:
            report.passed("packages", value=value)
            return None
        try:
            live = venv.venv_of(application)
        except OpsError as error:
            report.fail("packages", error.hint, value=f"{value}; {error.message}")
            return None
        report.plan(REINSTALL, f"{live}: {value}")
        return Act(REINSTALL, str(live))

    def carry_out(self, report: Report, permit: Permit) -> str:
        """Deploy and prove it; returns what runs then.

        Raises:
            RunbookFailed: the version is unhealthy. The report states whether the previous version runs again.
            LockLost: another run can be changing the environment; this one stopped at once.
        """
        application, release = self.env.application, self.release
        if venv.renamed_venv(application):
            venv.settle_venv(permit, application, kept_venv(application, release))
        if self.now.interrupted and self._is_healthy(report):  # the interrupted deployment is proven now
            delete_previous(permit, release)
        elif self._is_live(report):
            self._prove(report, self.seconds)
            return f"{release.version} ({release.commit[:12]}) runs, as before"
        place = unpack_release(permit, release)
        report.at_end(partial(shutil.rmtree, place, ignore_errors=True))
        built = self._build_packages(permit, report, place) if self.missing else None
        keep_previous(permit, application, release)
        report.state_is(
            "an interrupted deployment",
            "run deploy-application again with the same version: it starts over; the previous version is still kept",
        )
        try:
            report.require_lock()
            with started_if_cancelled(self.env.services, self.roles):
                stop_services(self.env.services, self.roles)
                swap_release(permit, release)
                if built:
                    with write_errors(Path(application.need("python")).parent.parent):
                        venv.swap_venv(permit, application, built)
                deadline = time.monotonic() + self.seconds
                start_services(self.env.services, self.roles, seconds=self.seconds)
            self._prove(report, max(deadline - time.monotonic(), 1))
        except (Locked, LockLost):  # another run can own the files now
            raise
        except OpsError as error:
            self._roll_back(report, permit, error)
        delete_previous(permit, release)
        report.state = None
        return f"{release.version} ({release.commit[:12]}) runs: {', '.join(self.roles)}"

    def _build_packages(self, permit: Permit, report: Report, place: Path) -> Path:
        """Build a staged virtual environment from the release's own lock file.

        Raises:
            OpsError: it cannot be built, or does not satisfy the release's requirements.
        """
        application = self.env.application
        venv.settle_venv(permit, application, kept_venv(application, self.release))
        backend = place / inside(self.release.repository, application.source)
        unpacked = application.model_copy(update={"backend_directory": str(backend)})
        lock = venv.read_lock(unpacked)
        built = venv.build_venv(permit, unpacked, lock, report.started, PACKAGE_SECONDS)
        now = application.model_copy(update={"python": str(built / "bin" / "python")})
        if left := find_missing_packages(now, self.release, PACKAGE_SECONDS):
            shutil.rmtree(built, ignore_errors=True)
            raise OpsError(
                f"{lock.path.name} does not satisfy the release's requirements: {'; '.join(left[:3])}",
                f"correct {lock.path.name}",
            )
        return built

    def _prove(self, report: Report, seconds: float) -> None:
        """Wait until the application is steadily healthy, and every service runs.

        Raises:
            OpsError: not within `seconds`.
        """
        started = time.monotonic()
        health = wait_healthy(self.env.application, seconds=seconds, in_a_row=STEADY, services=self.env.services)
        report.fact("health", health.answer)
        if not health.configured:
            report.warn("the application's health", "configure a health check under [application]", value=health.answer)
        left = read_services(self.env.services, self.roles)
        if left.stopped:
            raise OpsError(f"after {time.monotonic() - started:.0f} s {', '.join(left.stopped)} is stopped")

    def _is_live(self, report: Report) -> bool:
        """Whether nothing would change: the same commit, file by file, with its packages."""
        if self.now.commit != self.release.commit or self.again or self.now.interrupted or self.missing:
            return False
        changed = find_differences(self.release)
        if changed:
            report.warn(
                "live files",
                "find out who changed them; this run replaces them",
                value=f"{len(changed)} differ from the commit: {', '.join(changed[:3])}",
            )
        return not changed

    def _is_healthy(self, report: Report) -> bool:
        if read_services(self.env.services, self.roles).stopped:
            return False
        try:
            self._prove(report, max(self.seconds, BACK_SECONDS))
        except OpsError:
            return False
        return True

    def _roll_back(self, report: Report, permit: Permit, error: OpsError) -> None:
        """Restore and start the previous version.

        Raises:
            RunbookFailed: always: the new version is not deployed.
        """
        application, services = self.env.application, self.env.services
        report.fail("the new version is healthy", "read the end of its logs below", value=error.message)
        try:
            report.require_lock()
            with started_if_cancelled(services, self.roles):
                stop_services(services, self.roles)
                restore_previous(permit, self.release)
                if kept := kept_venv(application, self.release):
                    with write_errors(kept):
                        venv.return_venv(permit, application, kept)
                start_services(services, self.roles)
            require_venv(application, self.release)
            self._prove(report, max(self.seconds, BACK_SECONDS))
            delete_previous(permit, self.release)
            report.state = None
            report.passed("the previous version runs again", value="it is healthy")
        except OpsError as second:
            report.fail("the previous version runs again", LAST_RESORT, value=second.message)
        self._attach_logs(report)  # last: the rollback comes first
        raise RunbookFailed(report)

    def _attach_logs(self, report: Report) -> None:
        for role in self.roles:
            try:
                log = masked(self.env.services.logs(role, LOG_LINES))
            except OpsError as unread:
                log = f"not known: {unread.message}"
            report.attach(Evidence(f"End of the log of {role}", text=fenced(log[-LOG_CHARACTERS:])))
