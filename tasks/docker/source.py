"""The checkout that images are built from: its commit, and what no commit has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.application.worktree import git, uncommitted


@dataclass(frozen=True)
class Source:
    """A git checkout. `origin`: where it was cloned from, without credentials; `dirty`: what no commit has."""

    directory: Path
    revision: str
    origin: str
    dirty: tuple[str, ...]

    @property
    def short(self) -> str:
        """The tag of an image that was built from it."""
        return self.revision[:12] + ("-dirty" if self.dirty else "")


@probe
def read_source(checkout: str) -> Source:
    """The state of the checkout.

    Raises:
        OpsError: none is named, or it is none.
    """
    if not checkout:
        raise OpsError("the environment names no checkout to build from", "add checkout under [docker]")
    directory = Path(checkout)
    if not directory.is_dir():
        raise OpsError(f"{checkout} is not there", "correct [docker] checkout, or clone the application there")
    try:
        revision = git(directory, "rev-parse", "HEAD").strip()
        dirty = tuple(uncommitted(directory))
    except CommandFailed as error:
        raise OpsError(
            f"{checkout} is no git checkout that can be used: {error.message}",
            "correct [docker] checkout; the worker's user must own it",
        ) from None
    return Source(directory, revision, _origin(directory), dirty)


def _origin(directory: Path) -> str:
    try:
        return re.sub(r"//[^/@]*@", "//", git(directory, "config", "--get", "remote.origin.url").strip())
    except CommandFailed:  # it has none
        return ""
