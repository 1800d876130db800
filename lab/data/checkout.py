"""The application's git checkout: where its developers commit, and what releases are unpacked from."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.application.install import SOURCE
from lab.application.sources import write_sources
from lab.processes import run, write
from lab.progress import Tell
from lab.servers.services import fingerprint_of
from lab.state.environment import clean_environment
from lab.state.layout import Layout

LAB = "lab@localhost"
SETTINGS = ("-c", "user.name=lab", "-c", f"user.email={LAB}", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0")


def commit_sources(layout: Layout, tell: Tell) -> str:
    """Make the checkout, or commit new sources where nobody but the lab has committed yet. Returns the commit of these
    very sources, "" where the checkout has none: git is not installed, or somebody works there."""
    repository, stamp = layout.repository, layout.root / "committed"
    fingerprint = fingerprint_of(SOURCE, {})
    known, _, commit = stamp.read_text().partition(" ") if stamp.exists() else ("", "", "")
    if known == fingerprint and (repository / ".git").is_dir():
        return commit.strip()
    if shutil.which("git") is None:
        tell("git is not installed: there is no checkout of the application, and the runbooks of §3 say so")
        return ""
    if not (repository / ".git").is_dir():
        repository.mkdir(parents=True, exist_ok=True)
        _git(repository, "init", "--quiet", "--bare", "--initial-branch=main", str(layout.remote))
        _git(repository, "init", "--quiet", "--initial-branch=main")
        _git(repository, "remote", "add", "origin", str(layout.remote))
    elif _is_somebodys(repository):
        tell(f"the application's sources are new, and {repository} has work of yours: it stays as it is")
        return ""
    else:
        _git(repository, "rm", "-r", "--quiet", "--ignore-unmatch", ".")
    write_sources(repository)
    _git(repository, "add", "--all")
    _git(repository, "commit", "--quiet", "--allow-empty", "--no-gpg-sign", "--message", "The application")
    _git(repository, "push", "--quiet", "--set-upstream", "origin", "HEAD")
    commit = _git(repository, "rev-parse", "HEAD").strip()
    write(stamp, f"{fingerprint} {commit}\n", 0o600)
    tell(f"the application's checkout is {repository}")
    return commit


def _is_somebodys(repository: Path) -> bool:
    """Whether its newest commit is another's, or something stands in no commit."""
    author = _git(repository, "log", "-1", "--all", "--date-order", "--format=%ae").strip()
    return author not in ("", LAB) or bool(_git(repository, "status", "--porcelain"))


def _git(repository: Path, *arguments: str) -> str:
    return run(["git", *SETTINGS, *arguments], cwd=repository, environment=clean_environment())
