"""A commit unpacked into the place of what runs, with the way back, called with the open report (§4.1)."""

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
from runbook.page.form import read_forms
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report
from tasks.application.health import wait_healthy
from tasks.application.worktree import git, inside
from tasks.host.services import read_services, start_services, stop_services
from tasks.packages import venv
from tasks.packages.modules import REINSTALL
from tasks.releases.packages import find_packages_behind, kept_venv, require_venv
from tasks.releases.release import Live, Release, find_differences, find_release, read_live, told
from tasks.releases.strangers import find_strangers, require_outside
from tasks.releases.unpacking import drop_before, keep_before, put_before_back, swap_release, unpack_release

SERVICES = ("backend", "frontend")
# Good answers in a row, a quarter of a second apart: a program that does not find its database takes some seconds to
# say so.
STEADY = 20
# What was well before gets this long at least to be so again.
BACK_SECONDS = 60
PACKAGE_SECONDS = 1800.0
LOG_LINES, LOG_CHARACTERS = 100, 6000
"""What was before has written a few lines of its own by then."""


@dataclass(frozen=True)
class Unpack:
    """Files beside, packages beside, swapped while the services stop. `again`: also where that commit runs already;
    `behind`: what the release wants of packages and is not there."""

    env: Environment
    seconds: int
    again: bool
    release: Release
    now: Live
    behind: tuple[str, ...]

    @classmethod
    def found(cls, env: Environment, version: str, seconds: int, again: bool, commit: str = "") -> Unpack:
        """What is there, and that version; `commit`: what it is, where that is known and not asked.

        Raises:
            OpsError: there is no such version or nothing that would run it.
        """
        if not env.services_in(SERVICES):
            raise OpsError("the environment names no service that runs a release", "add backend to [services.names]")
        now, release = read_live(env.application), find_release(env.application, version, commit)
        behind = find_packages_behind(env.application, release, PACKAGE_SECONDS)
        return cls(env, seconds, again, release, now, tuple(behind))

    @property
    def roles(self) -> list[str]:
        """The services that run from there."""
        return self.env.services_in(SERVICES)

    @property
    def identity(self) -> str:
        """The release's commit."""
        return self.release.commit

    def plan(self, report: Report) -> list[Act]:
        """What is there, what would be done; returns what has to be permitted.

        Raises:
            OpsError: the application's environment file or its Python would be replaced.
        """
        require_outside(self.env.application, self.release)
        self._report_results(report)
        if strangers := find_strangers(self.release, self.now):
            report.fail(
                "files that no commit has",
                "move them out of the release's parts, or take the part off [application] release",
                value=f"{len(strangers)} would be lost: {', '.join(strangers[:3])}",
            )
        report.plan("unpack", f"{self.release.act.target}: {', '.join(self.release.parts)}")
        acts = [self.release.act]
        if packages := self._plan_packages(report):
            acts.append(packages)
        report.plan("restart", f"{', '.join(self.roles)}, then be healthy within {self.seconds} s or go back")
        return acts

    def _report_results(self, report: Report) -> None:
        now, new = self.now, self.release
        report.table(
            "Release",
            ("", "version", "commit"),
            [("now", now.version or "not known", now.commit), ("then", new.version, new.commit)],
        )
        if now.known:
            brought, left = (
                git(new.repository, "rev-list", "--count", span).strip()
                for span in (f"{now.commit}..{new.commit}", f"{new.commit}..{now.commit}")
            )
            report.fact("difference", f"{brought} commits more than what runs, {left} fewer")
            back = {"environment": self.env.name, "version": now.commit}
            report.fact("the way back", read_forms([self.env.name]).link("deploy-application", self.env.name, back))
        if now.broken_off:
            report.warn(
                "what ran before",
                "this run goes back to that where it must",
                value="a deployment was broken off: a copy of what ran before it is kept",
            )

    def _plan_packages(self, report: Report) -> Act | None:
        """The packages that the release wants. Where Python is not the application's own they cannot be changed."""
        application = self.env.application
        value = "; ".join(self.behind[:3]) or "all that it wants are there"
        kept = kept_venv(application, self.release) or venv.renamed_venv(application)
        if not self.behind and not kept:
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
        """Deployed, and proven; returns what runs then.

        Raises:
            RunbookFailed: the version is not well; what was before runs again, or the report says that it does not.
            LockLost: another run may be changing the environment: nothing more was touched.
        """
        application, release = self.env.application, self.release
        if venv.renamed_venv(application):
            venv.settle_venv(permit, application, kept_venv(application, release))
        if self.now.broken_off and self._is_well(report):  # its successor has proven itself since
            drop_before(permit, release)
        elif self._is_live(report):
            self._prove(report, self.seconds)
            return f"{release.version} ({release.commit[:12]}) runs, as before"
        place = unpack_release(permit, release)
        report.at_end(partial(shutil.rmtree, place, ignore_errors=True))
        built = self._build_packages(permit, report, place) if self.behind else None
        keep_before(permit, application, release)
        report.state_is(
            "a deployment that was broken off",
            "launch deploy-application again with the same version: it begins anew, and what ran before is still kept",
        )
        try:
            report.require_lock()
            stop_services(self.env.services, self.roles)
            swap_release(permit, release)
            if built:
                with told(Path(application.need("python")).parent.parent):
                    venv.swap_venv(permit, application, built)
            deadline = time.monotonic() + self.seconds
            start_services(self.env.services, self.roles, seconds=self.seconds)
            self._prove(report, max(deadline - time.monotonic(), 1))
        except (Locked, LockLost):  # what is there is another run's now
            raise
        except OpsError as error:
            self._go_back(report, permit, error)
        drop_before(permit, release)
        report.state = None
        return f"{release.version} ({release.commit[:12]}) runs: {', '.join(self.roles)}"

    def _build_packages(self, permit: Permit, report: Report, place: Path) -> Path:
        """An environment beside the live one, by the release's own lock file.

        Raises:
            OpsError: it cannot be made, or has not what the release wants.
        """
        application = self.env.application
        venv.settle_venv(permit, application, kept_venv(application, self.release))
        backend = place / inside(self.release.repository, application.source)
        unpacked = application.model_copy(update={"backend_directory": str(backend)})
        lock = venv.read_lock(unpacked)
        built = venv.build_venv(permit, unpacked, lock, report.started, PACKAGE_SECONDS)
        now = application.model_copy(update={"python": str(built / "bin" / "python")})
        if left := find_packages_behind(now, self.release, PACKAGE_SECONDS):
            shutil.rmtree(built, ignore_errors=True)
            raise OpsError(
                f"what {lock.path.name} installs is not what the release wants: {'; '.join(left[:3])}",
                f"correct {lock.path.name}",
            )
        return built

    def _prove(self, report: Report, seconds: float) -> None:
        """The application answers well for a while, and every service still runs.

        Raises:
            OpsError: not within the deadline.
        """
        started = time.monotonic()
        health = wait_healthy(self.env.application, seconds=seconds, in_a_row=STEADY, services=self.env.services)
        report.fact("health", health.answer)
        if not health.configured:
            report.warn("the application's health", "describe a health check under [application]", value=health.answer)
        left = read_services(self.env.services, self.roles)
        if left.stopped:
            raise OpsError(f"after {time.monotonic() - started:.0f} s {', '.join(left.stopped)} does not run")

    def _is_live(self, report: Report) -> bool:
        """Whether nothing would change: that very commit, file by file, with its packages."""
        if self.now.commit != self.release.commit or self.again or self.now.broken_off or self.behind:
            return False
        changed = find_differences(self.release)
        if changed:
            report.warn(
                "live files",
                "find out who changed them; they are replaced now",
                value=f"{len(changed)} are not as committed: {', '.join(changed[:3])}",
            )
        return not changed

    def _is_well(self, report: Report) -> bool:
        if read_services(self.env.services, self.roles).stopped:
            return False
        try:
            self._prove(report, max(self.seconds, BACK_SECONDS))
        except OpsError:
            return False
        return True

    def _go_back(self, report: Report, permit: Permit, error: OpsError) -> None:
        """What ran before again.

        Raises:
            RunbookFailed: always: the version is not there.
        """
        application, services = self.env.application, self.env.services
        report.fail(
            "the new version is healthy", "look at its logs below; what was before runs again", value=error.message
        )
        hint = "launch deploy-application with a version that is known to be well"
        try:
            report.require_lock()
            stop_services(services, self.roles)
            put_before_back(permit, self.release)
            if kept := kept_venv(application, self.release):
                with told(kept):
                    venv.return_venv(permit, application, kept)
            start_services(services, self.roles)
            require_venv(application, self.release)
            self._prove(report, max(self.seconds, BACK_SECONDS))
            drop_before(permit, self.release)
            report.state = None
            report.passed("what was before runs again", value="and is healthy")
        except OpsError as second:
            report.fail("what was before runs again", hint, value=second.message)
        self._attach_logs(report)  # last: the way back waits for no log
        raise RunbookFailed(report)

    def _attach_logs(self, report: Report) -> None:
        for role in self.roles:
            try:
                log = masked(self.env.services.logs(role, LOG_LINES))
            except OpsError as unread:
                log = f"not known: {unread.message}"
            report.attach(Evidence(f"End of the log of {role}", text=fenced(log[-LOG_CHARACTERS:])))
