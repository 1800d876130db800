"""A dedicated branch in a git worktree, for changes of the application's code. The live checkout is never changed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook import shell
from runbook.errors import CommandFailed, OpsError, excerpt
from runbook.guard.process import is_abandoned, this_process
from tasks.application.programs import GIT_VARIABLES

SECONDS = 120.0
PREFIX = "ops-worktree"
LEFT_OUT = (".git", "dist", ".next", ".turbo")
AUTHOR = ("-c", "user.name=interview-ops", "-c", "user.email=interview-ops@localhost")
# The checkout's hooks would also run in the worktree, where their tools are missing.
NO_HOOKS = ("-c", "core.hooksPath=/dev/null")


@dataclass(frozen=True)
class Worktree:
    """A checkout of `branch`, created from the commit `base`."""

    repository: Path
    directory: Path
    branch: str
    base: str

    def at(self, path: Path) -> Path:
        """The path in this worktree of a `path` in the live checkout.

        Raises:
            OpsError: `path` is not in the repository.
        """
        return self.directory / inside(self.repository, path)

    def changed(self) -> list[str]:
        """Tracked files that differ from the last commit."""
        return [name for name in self._git("diff", "--name-only", "-z", "HEAD").split("\0") if name]

    def commit(self, message: str, added: Sequence[Path] = ()) -> str:
        """Commit changed tracked files and the new files `added`; returns the commit, "" without changes. Other new
        files are never committed."""
        self._git("add", "--update", ".")
        for path in added:
            self._git("add", "--force", "--", str(path))
        if not self._git("diff", "--cached", "--name-only"):
            return ""
        self._git("commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message)
        return self.head()

    def head(self) -> str:
        """The current commit."""
        return self._git("rev-parse", "HEAD").strip()

    def diff(self) -> str:
        """All commits of this worktree as one patch."""
        return self._git("diff", "--no-color", "--no-ext-diff", f"{self.base}..HEAD")

    def _git(self, *arguments: str) -> str:
        return git(self.directory, *arguments)


def git(directory: Path, *arguments: str) -> str:
    """Run git; returns its output.

    Raises:
        CommandFailed: git refused; the message has its reason.
        OpsError: git is not installed, or did not end.
    """
    return shell.run(
        ["git", *AUTHOR, *NO_HOOKS, *arguments],
        directory=directory,
        environment={"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"},
        inherit=GIT_VARIABLES,
        timeout_seconds=SECONDS,
        hint="check the repository: run git status there",
    ).stdout


def inside(repository: Path, path: Path) -> Path:
    """`path` relative to the repository's top directory.

    Raises:
        OpsError: it is not in the repository.
    """
    try:
        return path.resolve().relative_to(repository.resolve())
    except ValueError:
        raise OpsError(
            f"{path} is not in the repository {repository}",
            "correct repository, backend_directory or backend_source, web_directory",
        ) from None


def require_repository(named: str) -> Path:
    """The top directory of a git checkout.

    Raises:
        OpsError: no path is given, or it is not a git checkout.
    """
    if not named:
        raise OpsError("the environment names no repository", "add repository under [application]: the git checkout")
    if not Path(named).is_dir():
        raise OpsError(f"{named} does not exist", "correct [application] repository, or clone the application there")
    try:
        top = git(Path(named), "rev-parse", "--show-toplevel").strip()
    except CommandFailed as error:
        raise OpsError(
            f"{named} is not a usable git checkout: {error.message}",
            "correct [application] repository; the worker's user must own it",
        ) from None
    if not Path(top).is_absolute() or not Path(top).is_dir():
        raise OpsError(
            f"git reports “{excerpt(top)}” as the top directory of {named}", "check by hand that this program is git"
        )
    return Path(top)


def uncommitted(repository: Path) -> list[str]:
    """Uncommitted files of the live checkout: a new branch does not contain their changes."""
    return [line[3:] for line in git(repository, "status", "--porcelain", "-z").split("\0") if line]


@contextlib.contextmanager
def worktree(repository: Path, branch: str, base: str = "HEAD") -> Iterator[Worktree]:
    """A worktree on a new branch, in a temporary directory, deleted after the block. A branch with commits is kept. The
    worktrees of killed runs are deleted first.

    Raises:
        CommandFailed: git refuses, e.g. because the branch exists.
    """
    sweep(repository)
    commit = git(repository, "rev-parse", "--verify", f"{base}^{{commit}}").strip()
    known = git(repository, "for-each-ref", f"refs/heads/{branch}").strip()
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{this_process().text}.")).resolve()
    try:
        git(repository, "worktree", "add", "--quiet", "-b", branch, str(directory / "tree"), commit)
        tree = Worktree(repository, directory / "tree", branch, commit)
        yield tree
    finally:
        _remove(repository, directory, "" if known else branch, commit)


def _remove(repository: Path, directory: Path, branch: str, base: str) -> None:
    _forget(repository, directory / "tree")
    if branch and git(repository, "for-each-ref", "--format=%(objectname)", f"refs/heads/{branch}").strip() == base:
        git(repository, "branch", "--quiet", "-D", branch)


def _forget(repository: Path, tree: Path) -> None:
    """Delete one worktree and git's record of it. `git worktree prune` would also delete records of unseen
    worktrees."""
    shutil.rmtree(tree.parent, ignore_errors=True)
    if f"worktree {tree}" in git(repository, "worktree", "list", "--porcelain").splitlines():
        git(repository, "worktree", "remove", "--force", "--force", str(tree))


def sweep(repository: Path) -> None:
    """Delete the worktrees of dead runs. Their branches are kept: somebody may need the commits."""
    for line in git(repository, "worktree", "list", "--porcelain").splitlines():
        found = re.fullmatch(rf"worktree (.*/{PREFIX}-([^/]+)\.[^/.]+/tree)", line)
        if found and _is_abandoned(found[2], Path(found[1]).parent):
            _forget(repository, Path(found[1]))


def _is_abandoned(owner: str, directory: Path) -> bool:
    try:
        return is_abandoned(owner, directory)
    except OSError:  # a container's private /tmp: git lists a worktree that this process cannot see
        return False


def link_packages(tree: Worktree, web: Path) -> None:
    """Copy the live workspace's node_modules into the worktree. A link would lead tools to the live sources of the
    workspace's own packages."""
    for found in packages_of(web):
        target = tree.at(found.parent) / "node_modules"
        if target.parent.is_dir() and not target.exists():
            shell.run(["cp", "-a", "--reflink=auto", found, target], timeout_seconds=1800)


def packages_of(web: Path) -> list[Path]:
    """The outermost node_modules directories of a workspace and its packages."""
    found = []
    for folder, names, _ in os.walk(web):
        if "node_modules" in names:
            found.append(Path(folder) / "node_modules")
        names[:] = [name for name in names if not name.startswith("node_modules") and name not in LEFT_OUT]
    return sorted(found)
