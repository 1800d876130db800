"""A release of the application: files of one commit, unpacked beside what runs and put into its place.

`<directory>.release-next` is what was unpacked. `<directory>.release-before` is a copy of what ran: it is whole before
anything is replaced, and goes when its successor, or what it was put back as, has proven itself. As long as it is there
a deployment has not ended, whoever died, and it is the way back. `RELEASE` in the directory says which commit is live.

Source: https://git-scm.com/docs/git-archive
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook import durable
from runbook.errors import CommandFailed, OpsError
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Act, Permit
from tasks.files import directory_of
from tasks.worktree import git, require_repository

UNPACK = "unpack"
RELEASE, VENV = "RELEASE", "VENV"
_VERSION = re.compile(r"\w[\w./+-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class Release:
    """A commit of the repository, by the name that somebody gave it, and the parts of it that are unpacked."""

    version: str
    commit: str
    repository: Path
    parts: tuple[str, ...]
    directory: Path

    @property
    def act(self) -> Act:
        """What has to be permitted."""
        return Act(UNPACK, f"{self.version} ({self.commit[:12]}) into {self.directory}")


@dataclass(frozen=True)
class Live:
    """What `RELEASE` says, each "" where nobody knows; whether the repository has that commit; and whether a deployment
    was broken off."""

    version: str
    commit: str
    known: bool
    broken_off: bool


@probe
def find_release(application: Application, version: str) -> Release:
    """The commit of a version: a tag, a branch or a commit of the repository.

    Raises:
        OpsError: there is none, it lacks a part, or the repository is what runs.
    """
    repository, directory = require_repository(application.repository), directory_of(application)
    if directory.is_relative_to(repository) or repository.is_relative_to(directory):
        raise OpsError(f"the checkout {repository} is itself what runs: a release cannot be unpacked over it",
                       "set [application] repository and directory apart")  # fmt: skip
    if not _VERSION.fullmatch(version):
        raise OpsError(f"“{version[:40]}” is no version", "name a tag, a branch or a commit of the repository")
    try:
        commit = git(repository, "rev-parse", "--verify", "--quiet", f"{version}^{{commit}}").strip()
    except CommandFailed:
        raise OpsError(f"{repository} has no version “{version}”", "correct it, or git fetch there first") from None
    parts = tuple(application.release)
    if missing := [part for part in parts if not git(repository, "ls-tree", commit, "--", part).strip()]:
        raise OpsError(f"{version} has no {', '.join(missing)}",
                       "choose another version, or correct [application] release")  # fmt: skip
    return Release(version, commit, repository, parts, directory)


@probe
def read_live(application: Application) -> Live:
    """Which version is live."""
    directory = directory_of(application)
    try:
        words = (directory / RELEASE).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        words = []
    version, commit = (*words, "", "")[:2]
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return Live(version, "", False, before_of(directory).is_dir())
    try:
        git(require_repository(application.repository), "cat-file", "-e", f"{commit}^{{commit}}")
        known = True
    except CommandFailed:
        known = False
    return Live(version, commit, known, before_of(directory).is_dir())


@action(idempotent=True)
def unpack_release(permit: Permit, application: Application, release: Release) -> Path:
    """Unpack it beside the live directory; returns where.

    Raises:
        OpsError: there is no room, or the archive has what leads out of it.
    """
    permit.require(UNPACK, release.act.target)
    place = _next(release.directory)
    with _told(place), tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        shutil.rmtree(place, ignore_errors=True)
        archive = Path(folder, "release.tar")
        git(release.repository, "archive", "--format=tar", f"--output={archive}", release.commit, "--", *release.parts)
        place.mkdir()
        with tarfile.open(archive) as content:
            content.extractall(place, filter="data")
        (place / RELEASE).write_text(f"{release.version} {release.commit}\n", encoding="utf-8")
    return place


@action(idempotent=True)
def keep_before(permit: Permit, application: Application, release: Release) -> None:
    """Copy what runs aside, whole; what a run that was killed had kept stays the way back."""
    permit.require(UNPACK, release.act.target)
    before, live = before_of(release.directory), release.directory
    if before.is_dir():
        return
    fresh = before.with_name(f"{before.name}.new")
    with _told(fresh):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for part in (*release.parts, RELEASE):
            _copy(live / part, fresh / part)
        (fresh / VENV).write_text(str(Path(application.python).parent.parent.resolve()), encoding="utf-8")
        fresh.rename(before)
        durable.sync(before.parent)


@action(idempotent=True)
def swap_release(permit: Permit, application: Application, release: Release) -> None:
    """Put what was unpacked into its place, part by part. Whoever runs from there must be stopped."""
    permit.require(UNPACK, release.act.target)
    place = _next(release.directory)
    with _told(release.directory):
        for part in (*release.parts, RELEASE):
            if (place / part).exists():
                _replace(place / part, release.directory / part)
            failpoint(f"release: {Path(part).name} replaced")
        shutil.rmtree(place, ignore_errors=True)


@action(idempotent=True)
def put_before_back(permit: Permit, application: Application, release: Release) -> None:
    """What ran before is live again, part by part; the copy stays until that has proven itself."""
    permit.require(UNPACK, release.act.target)
    before = before_of(release.directory)
    with _told(release.directory):
        for part in (*release.parts, RELEASE):
            live = release.directory / part
            if not (before / part).exists():
                _remove(live)
                continue
            fresh = live.with_name(f".{live.name}.back")
            _remove(fresh)
            _copy(before / part, fresh)
            _replace(fresh, live)


@action(idempotent=True)
def drop_before(permit: Permit, release: Release) -> None:
    """The deployment has ended: what runs has proven itself."""
    permit.require(UNPACK, release.act.target)
    for path in (before_of(release.directory), _next(release.directory)):
        shutil.rmtree(path, ignore_errors=True)


def _next(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.release-next")


def before_of(directory: Path) -> Path:
    """Where what ran before is kept while a deployment goes on."""
    return directory.with_name(f"{directory.name}.release-before")


def _copy(source: Path, target: Path) -> None:
    """A part, where there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    elif source.exists():
        shutil.copy2(source, target, follow_symlinks=False)


def _replace(fresh: Path, live: Path) -> None:
    """By rename: a part is the old one or the new one."""
    old = live.with_name(f".{live.name}.old")
    _remove(old)
    live.parent.mkdir(parents=True, exist_ok=True)
    if live.exists():
        live.rename(old)
    fresh.rename(live)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise OpsError(f"{place} cannot be written: {error}", "make room there, or correct its owner") from None
