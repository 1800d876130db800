"""A branch of its own in a git worktree: where the application's code is changed, never in the live checkout."""

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
# Hooks of the checkout want what only the checkout has, and would run in the worktree too.
NO_HOOKS = ("-c", "core.hooksPath=/dev/null")


@dataclass(frozen=True)
class Worktree:
    """A checkout of `branch`, which began at the commit `base`."""

    repository: Path
    directory: Path
    branch: str
    base: str

    def at(self, path: Path) -> Path:
        """The same place as `path` of the live checkout, here.

        Raises:
            OpsError: `path` is not in the repository.
        """
        return self.directory / inside(self.repository, path)

    def changed(self) -> list[str]:
        """Files that git knows and that differ from what was committed last."""
        return [name for name in self._git("diff", "--name-only", "-z", "HEAD").split("\0") if name]

    def commit(self, message: str, added: Sequence[Path] = ()) -> str:
        """Commit what git knows and was changed, and the new files `added`; returns the commit, "" where nothing was
        changed. What tools left behind is never committed."""
        self._git("add", "--update", ".")
        for path in added:
            self._git("add", "--force", "--", str(path))
        if not self._git("diff", "--cached", "--name-only"):
            return ""
        self._git("commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message)
        return self.head()

    def head(self) -> str:
        """The newest commit here."""
        return self._git("rev-parse", "HEAD").strip()

    def diff(self) -> str:
        """Everything that was committed here, as a patch."""
        return self._git("diff", "--no-color", "--no-ext-diff", f"{self.base}..HEAD")

    def _git(self, *arguments: str) -> str:
        return git(self.directory, *arguments)


def git(directory: Path, *arguments: str) -> str:
    """What git printed.

    Raises:
        CommandFailed: it refused; the message has its reason.
        OpsError: it is not installed, or did not end.
    """
    return shell.run(
        ["git", *AUTHOR, *NO_HOOKS, *arguments],
        directory=directory,
        environment={"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"},
        inherit=GIT_VARIABLES,
        timeout_seconds=SECONDS,
        hint="look at the repository: git status there says more",
    ).stdout


def inside(repository: Path, path: Path) -> Path:
    """`path` seen from the repository's top.

    Raises:
        OpsError: it is not in it.
    """
    try:
        return path.resolve().relative_to(repository.resolve())
    except ValueError:
        raise OpsError(
            f"{path} is not in the repository {repository}",
            "correct repository, backend_directory or backend_source, web_directory",
        ) from None


def require_repository(named: str) -> Path:
    """The git checkout of that name, by its top directory.

    Raises:
        OpsError: none is named, or it is none.
    """
    if not named:
        raise OpsError("the environment names no repository", "add repository under [application]: the git checkout")
    if not Path(named).is_dir():
        raise OpsError(f"{named} is not there", "correct [application] repository, or clone the application there")
    try:
        top = git(Path(named), "rev-parse", "--show-toplevel").strip()
    except CommandFailed as error:
        raise OpsError(
            f"{named} is no git checkout that can be used: {error.message}",
            "correct [application] repository; the worker's user must own it",
        ) from None
    if not Path(top).is_absolute() or not Path(top).is_dir():
        raise OpsError(f"git says that the top of {named} is “{excerpt(top)}”", "run git by hand there: is it git?")
    return Path(top)


def uncommitted(repository: Path) -> list[str]:
    """What the live checkout has that no commit has: a branch is made without it."""
    return [line[3:] for line in git(repository, "status", "--porcelain", "-z").split("\0") if line]


@contextlib.contextmanager
def worktree(repository: Path, branch: str, base: str = "HEAD") -> Iterator[Worktree]:
    """A worktree on a new branch, in a temporary directory. When the block is left the worktree goes; the branch stays
    where something was committed to it. What killed runs left is removed first.

    Raises:
        CommandFailed: git refuses, e.g. because there is such a branch already.
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
    """One worktree and what git knows of it; others' are theirs (`git worktree prune` takes those out of sight too)."""
    shutil.rmtree(tree.parent, ignore_errors=True)
    if f"worktree {tree}" in git(repository, "worktree", "list", "--porcelain").splitlines():
        git(repository, "worktree", "remove", "--force", "--force", str(tree))


def sweep(repository: Path) -> None:
    """Worktrees of runs that live no longer. Their branches stay: what was committed is somebody's to look at."""
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
    """Copy the live workspace's node_modules to the same places of the worktree: a link would lead tools back to the
    live sources of the workspace's own packages."""
    for found in packages_of(web):
        target = tree.at(found.parent) / "node_modules"
        if target.parent.is_dir() and not target.exists():
            shell.run(["cp", "-a", "--reflink=auto", found, target], timeout_seconds=1800)


def packages_of(web: Path) -> list[Path]:
    """The node_modules of a workspace: its own and those of its packages, the outermost only."""
    found = []
    for folder, names, _ in os.walk(web):
        if "node_modules" in names:
            found.append(Path(folder) / "node_modules")
        names[:] = [name for name in names if not name.startswith("node_modules") and name not in LEFT_OUT]
    return sorted(found)
