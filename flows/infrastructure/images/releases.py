"""Deploy a commit as files, with a rollback (§4.1)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

from blocks.environment import Environment
from runbook.change import Carrier, Change, Line, State
from runbook.errors import Locked, LockLost, OpsError, RunbookFailed
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
from tasks.releases.release import Live, Release, find_differences, find_release, previous_of, read_live, write_errors
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

    report: Report
    env: Environment
    seconds: int
    again: bool
    release: Release
    now: Live
    missing: tuple[str, ...]

    @classmethod
    def find(
        cls, report: Report, env: Environment, version: str, seconds: int, again: bool, commit: str = ""
    ) -> ReleaseDeployment:
        """Read the live release and the version. `commit`: the version's commit, if known.

        Raises:
            OpsError: the version does not exist, or no service would run it.
        """
        if not env.services_in(SERVICES):
            raise OpsError("the environment names no service that runs a release", "add backend to [services.names]")
        now, release = read_live(env.application), find_release(env.application, version, commit)
        missing = find_missing_packages(env.application, release, PACKAGE_SECONDS)
        return cls(report, env, seconds, again, release, now, tuple(missing))

    @property
    def roles(self) -> list[str]:
        """The services that run from the release."""
        return self.env.services_in(SERVICES)

    @property
    def identity(self) -> str:
        """The release's commit."""
        return self.release.commit

    def judge(self) -> None:
        """Report the live release, and what prevents its replacement.

        Raises:
            OpsError: the application's environment file or its Python would be replaced.
        """
        require_outside(self.env.application, self.release)
        self._report_versions()
        if files := find_uncommitted(self.release, self.now):
            self.report.fail(
                "uncommitted files",
                "move them out of the release's parts, or remove the part from [application] release",
                value=f"{len(files)} would be lost: {', '.join(files[:3])}",
            )
        match self._venv:
            case None:
                self.report.passed("packages", value=self._packages)
            case OpsError(message=message, hint=hint):
                self.report.fail("packages", hint, value=f"{self._packages}; {message}")

    @property
    def _packages(self) -> str:
        return "; ".join(self.missing[:3]) or "all its requirements are installed"

    @cached_property
    def _venv(self) -> Path | OpsError | None:
        """The virtual environment that can change, or why it cannot be changed; None if the release needs no change."""
        application = self.env.application
        if not (self.missing or kept_venv(application, self.release) or venv.renamed_venv(application)):
            return None
        try:
            return venv.venv_of(application)
        except OpsError as error:
            return error

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """The planned changes."""
        return [
            *self._settling,
            *self._accepting,
            self._unpacking,
            *self._installing,
            self._keeping,
            self._restarting,
        ]

    def carry_out(self, carry: Carrier) -> str:
        """Deploy and prove it; returns what runs then.

        Raises:
            RunbookFailed: the version is unhealthy. The report states whether the previous version runs again.
            LockLost: another run can be changing the environment; this one stopped at once.
        """
        release, built = self.release, None
        for settling in self._settling:
            carry(settling, kept_venv(self.env.application, release))
        for accepting in self._accepting:
            carry(accepting)
        if self._can_be_live and self._is_live():
            for line in (self._unpacking, self._keeping, self._restarting):
                carry.skip(line, "this version is live")
            self._prove(self.seconds)
            return f"{release.version} ({release.commit[:12]}) runs, as before"
        place = carry(self._unpacking)
        self.report.at_end(partial(shutil.rmtree, place, ignore_errors=True))
        for installing in self._installing:
            built = carry(installing, place)
        carry(self._keeping)
        carry(self._restarting, built)
        return f"{release.version} ({release.commit[:12]}) runs: {', '.join(self.roles)}"

    @cached_property
    def _settling(self) -> list[Change[[Path | None], str]]:
        """A run was killed between the renames of the virtual environment."""
        application = self.env.application
        if not (isinstance(self._venv, Path) and venv.renamed_venv(application)):
            return []
        return [Change(venv.settle_venv.bind(application), "restore", f"{self._venv}, which a killed run renamed")]

    @cached_property
    def _accepting(self) -> list[Change[[], None]]:
        """After an interrupted deployment the application can be healthy by now. Then its release is the one to roll
        back to, and the copy is deleted."""
        if not self.now.interrupted:
            return []
        delete = delete_previous.bind(self.release)

        def accept() -> None:
            if not read_services(self.env.services, self.roles).stopped:
                try:
                    self._prove(max(self.seconds, BACK_SECONDS))
                except OpsError:
                    return
                delete()

        copy = previous_of(self.release.directory)
        return [Change(accept, "delete", f"{copy}, if the live release is healthy now", by=[delete])]

    @property
    def _can_be_live(self) -> bool:
        """Whether the same commit is live, with its packages."""
        same = self.now.commit == self.release.commit
        return same and not (self.again or self.now.interrupted or self.missing)

    @cached_property
    def _unpacking(self) -> Change[[], Path]:
        return Change(
            unpack_release.bind(self.release),
            "unpack",
            f"{self.release.text}: {', '.join(self.release.parts)}",
            is_optional=self._can_be_live,
        )

    @cached_property
    def _installing(self) -> list[Change[[Path], Path]]:
        """Build a staged virtual environment from the release's own lock file."""
        if not (self.missing and isinstance(self._venv, Path)):
            return []
        application, release = self.env.application, self.release
        settle, build = venv.settle_venv.bind(application), venv.build_venv.bind(application)

        def install(place: Path) -> Path:
            settle(kept_venv(application, release))
            backend = place / inside(release.repository, application.source)
            lock = venv.read_lock(application.model_copy(update={"backend_directory": str(backend)}))
            built = build(lock, self.report.started, PACKAGE_SECONDS)
            now = application.model_copy(update={"python": str(built / "bin" / "python")})
            if left := find_missing_packages(now, release, PACKAGE_SECONDS):
                shutil.rmtree(built, ignore_errors=True)
                raise OpsError(
                    f"{lock.path.name} does not satisfy the release's requirements: {'; '.join(left[:3])}",
                    f"correct {lock.path.name}",
                )
            return built

        return [Change(install, REINSTALL, f"{self._venv}: {self._packages}", by=[settle, build])]

    @cached_property
    def _keeping(self) -> Change[[], None]:
        return Change(
            keep_previous.bind(self.env.application, self.release),
            "copy",
            f"the live release to {previous_of(self.release.directory)}",
            is_optional=self._can_be_live,
        )

    @cached_property
    def _restarting(self) -> Change[[Path | None], None]:
        """Swap the release while the services are stopped, and prove it, or roll back."""
        application, release, live = self.env.application, self.release, self._venv
        swap, restore = swap_release.bind(release), restore_previous.bind(release)
        delete = delete_previous.bind(release)
        swap_venv = venv.swap_venv.bind(application) if isinstance(live, Path) else None
        return_venv = venv.return_venv.bind(application) if isinstance(live, Path) else None

        def restart(built: Path | None) -> None:
            try:
                self.report.require_lock()
                with started_if_cancelled(self.env.services, self.roles):
                    stop_services(self.env.services, self.roles)
                    swap()
                    if built and swap_venv:
                        with write_errors(Path(application.need("python")).parent.parent):
                            swap_venv(built)
                    deadline = time.monotonic() + self.seconds
                    start_services(self.env.services, self.roles, seconds=self.seconds)
                self._prove(max(deadline - time.monotonic(), 1))
            except (Locked, LockLost):  # another run can own the files now
                raise
            except OpsError as error:
                self._roll_back(error, restore, return_venv, delete)
            delete()
            self.report.state = None

        return Change(
            restart,
            "restart",
            f"{', '.join(self.roles)}, then healthy within {self.seconds} s, or roll back",
            by=[swap, restore, delete, *([swap_venv] if swap_venv else []), *([return_venv] if return_venv else [])],
            begun=State(
                "an interrupted deployment",
                "run deploy-application again with the same version: it starts over; the previous version is still "
                "kept",
            ),
            is_optional=self._can_be_live,
        )

    def _report_versions(self) -> None:
        report, now, new = self.report, self.now, self.release
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

    def _prove(self, seconds: float) -> None:
        """Wait until the application is steadily healthy, and every service runs.

        Raises:
            OpsError: not within `seconds`.
        """
        report, started = self.report, time.monotonic()
        health = wait_healthy(self.env.application, seconds=seconds, in_a_row=STEADY, services=self.env.services)
        report.fact("health", health.answer)
        if not health.configured:
            report.warn("the application's health", "configure a health check under [application]", value=health.answer)
        left = read_services(self.env.services, self.roles)
        if left.stopped:
            raise OpsError(f"after {time.monotonic() - started:.0f} s {', '.join(left.stopped)} is stopped")

    def _is_live(self) -> bool:
        """Whether nothing would change: the live files are the commit's, too."""
        changed = find_differences(self.release)
        if changed:
            self.report.warn(
                "live files",
                "find out who changed them; this run replaces them",
                value=f"{len(changed)} differ from the commit: {', '.join(changed[:3])}",
            )
        return not changed

    def _roll_back(
        self,
        error: OpsError,
        restore: Callable[[], None],
        return_venv: Callable[[Path], None] | None,
        delete: Callable[[], None],
    ) -> NoReturn:
        """Restore and start the previous version.

        Raises:
            RunbookFailed: always: the new version is not deployed.
        """
        report, application, services = self.report, self.env.application, self.env.services
        report.fail("the new version is healthy", "read the end of its logs below", value=error.message)
        try:
            report.require_lock()
            with started_if_cancelled(services, self.roles):
                stop_services(services, self.roles)
                restore()
                kept = kept_venv(application, self.release)
                if kept and return_venv:
                    with write_errors(kept):
                        return_venv(kept)
                start_services(services, self.roles)
            require_venv(application, self.release)
            self._prove(max(self.seconds, BACK_SECONDS))
            delete()
            report.state = None
            report.passed("the previous version runs again", value="it is healthy")
        except OpsError as second:
            report.fail("the previous version runs again", LAST_RESORT, value=second.message)
        self._attach_logs()  # last: the rollback comes first
        raise RunbookFailed(report)

    def _attach_logs(self) -> None:
        for role in self.roles:
            try:
                log = masked(self.env.services.logs(role, LOG_LINES))
            except OpsError as unread:
                log = f"not known: {unread.message}"
            self.report.attach(Evidence(f"End of the log of {role}", text=fenced(log[-LOG_CHARACTERS:])))
