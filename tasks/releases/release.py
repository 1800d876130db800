"""A release of the application: the parts of one commit of its repository that run.

`RELEASE` in the application's directory says which commit is live. As long as `<directory>.release-before` is there a
deployment has not ended, whoever died (tasks.releases.unpacking).

Source: https://git-scm.com/docs/git-archive
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook.errors import CommandFailed, OpsError
from runbook.guard.permit import Act
from runbook.kinds import probe
from tasks.application.files import directory_of
from tasks.application.worktree import git, require_repository

UNPACK = "unpack"
RELEASE = "RELEASE"
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
def find_release(application: Application, version: str, commit: str = "") -> Release:
    """The commit of a version: a tag, a branch or a commit of the repository; of `commit` where that is given.

    Raises:
        OpsError: there is none, it lacks a part or has a submodule there, or the repository is what runs.
    """
    repository, directory = require_repository(application.repository), directory_of(application)
    if directory.is_relative_to(repository) or repository.is_relative_to(directory):
        raise OpsError(
            f"the checkout {repository} is itself what runs: a release cannot be unpacked over it",
            "set [application] repository and directory apart",
        )
    if not _VERSION.fullmatch(version):
        raise OpsError(f"“{version[:40]}” is no version", "name a tag, a branch or a commit of the repository")
    try:
        commit = git(repository, "rev-parse", "--verify", "--quiet", f"{commit or version}^{{commit}}").strip()
    except CommandFailed:
        raise OpsError(f"{repository} has no version “{version}”", "correct it, or git fetch there first") from None
    parts = tuple(application.release)
    if missing := [part for part in parts if not git(repository, "ls-tree", commit, "--", part).strip()]:
        raise OpsError(
            f"{version} has no {', '.join(missing)}", "choose another version, or correct [application] release"
        )
    listed = git(repository, "ls-tree", "-r", "-z", commit, "--", *parts).split("\0")
    if modules := [line.partition("\t")[2] for line in listed if line.startswith("160000 ")]:
        raise OpsError(
            f"{version} has submodules, which are not unpacked: {', '.join(modules[:3])}",
            "take them off [application] release, or commit their files",
        )
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


@probe
def find_differences(release: Release) -> list[str]:
    """Files of the live parts that are not as that commit has them, or are not there.

    Raises:
        OpsError: it cannot be unpacked to be compared.
    """
    with tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        place = Path(folder, "release")
        extract(release, place)
        names = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_symlink() or path.is_file()]
        return [str(name) for name in names if not _same(place / name, release.directory / name)]


def before_of(directory: Path) -> Path:
    """Where what ran before is kept while a deployment goes on."""
    return directory.with_name(f"{directory.name}.release-before")


def extract(release: Release, place: Path) -> None:
    """Its parts as files, in a new directory.

    Raises:
        OpsError: there is no room, or the archive has what leads out of it, or is without a part.
    """
    with told(place), tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        shutil.rmtree(place, ignore_errors=True)
        archive = Path(folder, "release.tar")
        git(release.repository, "archive", "--format=tar", f"--output={archive}", release.commit, "--", *release.parts)
        place.mkdir()
        with tarfile.open(archive) as content:
            content.extractall(place, filter="data")
    if missing := [part for part in release.parts if not os.path.lexists(place / part)]:
        raise OpsError(
            f"git leaves {', '.join(missing)} out of what it unpacks of {release.version}",
            "look for export-ignore in .gitattributes, or correct [application] release",
        )


@contextlib.contextmanager
def told(place: Path) -> Iterator[None]:
    """What the disk refuses, as an OpsError."""
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise OpsError(f"{place} cannot be written: {error}", "make room there, or correct its owner") from None


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
