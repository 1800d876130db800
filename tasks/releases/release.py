"""A release of the application: the parts of one commit of its repository that run.

The file `RELEASE` in the application's directory names the live commit. While `<directory>.release-before` exists, a
deployment has not ended (tasks.releases.unpacking).

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
from runbook.kinds import probe
from tasks.application.files import directory_of
from tasks.application.worktree import git, require_repository

RELEASE = "RELEASE"
_VERSION = re.compile(r"\w[\w./+-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class Release:
    """A commit of the repository, its version as entered by the operator, and the parts of it that are unpacked."""

    version: str
    commit: str
    repository: Path
    parts: tuple[str, ...]
    directory: Path

    @property
    def text(self) -> str:
        """The version, its commit and where it is unpacked."""
        return f"{self.version} ({self.commit[:12]}) into {self.directory}"


@dataclass(frozen=True)
class Live:
    """The live release by the file `RELEASE`, each "" if unknown; whether the repository has that commit (`known`); and
    whether a deployment was interrupted."""

    version: str
    commit: str
    known: bool
    interrupted: bool


@probe
def find_release(application: Application, version: str, commit: str = "") -> Release:
    """The commit of a version: a tag, a branch or a commit of the repository; of `commit` where that is given.

    Raises:
        OpsError: there is none, it lacks a part or has a submodule there, or the repository is what runs.
    """
    repository, directory = require_repository(application.repository), directory_of(application)
    if directory.is_relative_to(repository) or repository.is_relative_to(directory):
        raise OpsError(
            f"the application runs from the checkout {repository}: a release cannot be unpacked over it",
            "use separate directories for [application] repository and directory",
        )
    if not _VERSION.fullmatch(version):
        raise OpsError(f"“{version[:40]}” is no version", "name a tag, a branch or a commit of the repository")
    try:
        commit = git(repository, "rev-parse", "--verify", "--quiet", f"{commit or version}^{{commit}}").strip()
    except CommandFailed:
        raise OpsError(
            f"{repository} has no version “{version}”", "correct the version, or run git fetch there first"
        ) from None
    parts = tuple(application.release)
    if missing := [part for part in parts if not git(repository, "ls-tree", commit, "--", part).strip()]:
        raise OpsError(
            f"{version} has no {', '.join(missing)}", "choose another version, or correct [application] release"
        )
    listed = git(repository, "ls-tree", "-r", "-z", commit, "--", *parts).split("\0")
    if modules := [line.partition("\t")[2] for line in listed if line.startswith("160000 ")]:
        raise OpsError(
            f"{version} has submodules, which are not unpacked: {', '.join(modules[:3])}",
            "remove them from [application] release, or commit their files",
        )
    return Release(version, commit, repository, parts, directory)


@probe
def read_live(application: Application) -> Live:
    """The live release, by the file `RELEASE`."""
    directory = directory_of(application)
    try:
        words = (directory / RELEASE).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        words = []
    version, commit = (*words, "", "")[:2]
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return Live(version, "", False, previous_of(directory).is_dir())
    try:
        git(require_repository(application.repository), "cat-file", "-e", f"{commit}^{{commit}}")
        known = True
    except CommandFailed:
        known = False
    return Live(version, commit, known, previous_of(directory).is_dir())


@probe
def find_differences(release: Release) -> list[str]:
    """Files of the live parts that differ from the commit, or are missing.

    Raises:
        OpsError: the commit cannot be unpacked for the comparison.
    """
    with tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        place = Path(folder, "release")
        extract(release, place)
        names = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_symlink() or path.is_file()]
        return [str(name) for name in names if not _same(place / name, release.directory / name)]


def previous_of(directory: Path) -> Path:
    """The directory of the previous release during a deployment."""
    return directory.with_name(f"{directory.name}.release-before")


def extract(release: Release, place: Path) -> None:
    """Unpack its parts into a new directory.

    Raises:
        OpsError: the disk is full, the archive has a path outside the directory, or it lacks a part.
    """
    with write_errors(place), tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        shutil.rmtree(place, ignore_errors=True)
        archive = Path(folder, "release.tar")
        git(release.repository, "archive", "--format=tar", f"--output={archive}", release.commit, "--", *release.parts)
        place.mkdir()
        with tarfile.open(archive) as content:
            content.extractall(place, filter="data")
    if missing := [part for part in release.parts if not os.path.lexists(place / part)]:
        raise OpsError(
            f"git archive leaves {', '.join(missing)} out of {release.version}",
            "remove export-ignore from .gitattributes, or correct [application] release",
        )


@contextlib.contextmanager
def write_errors(place: Path) -> Iterator[None]:
    """Turn errors of the file system into an OpsError."""
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise OpsError(f"{place} cannot be written: {error}", "free disk space there, or correct its owner") from None


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
