"""The checkout that images are built from: its commit and its uncommitted changes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import CommandFailed, OpsError
from runbook.kinds import probe
from tasks.application.worktree import git, uncommitted


@dataclass(frozen=True)
class BuildSource:
    """A git checkout. `origin`: its remote without credentials; `dirty`: uncommitted files."""

    directory: Path
    revision: str
    origin: str
    dirty: tuple[str, ...]

    @property
    def short(self) -> str:
        """The tag of images built from it."""
        return self.revision[:12] + ("-dirty" if self.dirty else "")


@probe
def read_source(checkout: str) -> BuildSource:
    """Read the state of the checkout.

    Raises:
        OpsError: no checkout is configured, or it is not a git checkout.
    """
    if not checkout:
        raise OpsError("the environment names no checkout to build from", "add checkout under [docker]")
    directory = Path(checkout)
    if not directory.is_dir():
        raise OpsError(f"{checkout} does not exist", "correct [docker] checkout, or clone the application there")
    try:
        revision = git(directory, "rev-parse", "HEAD").strip()
        dirty = tuple(uncommitted(directory))
    except CommandFailed as error:
        raise OpsError(
            f"{checkout} is not a usable git checkout: {error.message}",
            "correct [docker] checkout; the worker's user must own it",
        ) from None
    return BuildSource(directory, revision, _origin(directory), dirty)


def _origin(directory: Path) -> str:
    try:
        return re.sub(r"//[^/@]*@", "//", git(directory, "config", "--get", "remote.origin.url").strip())
    except CommandFailed:  # no remote
        return ""
