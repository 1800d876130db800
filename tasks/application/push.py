"""A branch pushed to a remote of the application's repository, and seen to be there."""

from __future__ import annotations

from pathlib import Path

from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.guard.permit import Permit
from runbook.kinds import action
from tasks.application.worktree import git

PUSH = "push"


def require_remote(repository: Path, remote: str) -> None:
    """Raises OpsError where the repository knows no such remote."""
    known = git(repository, "remote").split()
    if remote not in known:
        raise OpsError(
            f"{repository} has no remote “{remote[:40]}”",
            f"choose one of: {', '.join(known) or 'none; add one with git remote add'}",
        )


@action(idempotent=True)
def push_branch(permit: Permit, repository: Path, remote: str, branch: str) -> None:
    """Push it; never over other commits.

    Raises:
        OpsError: the remote refused or was not reached; a login in its address is not in the message.
        VerificationFailed: it is not there afterwards.
    """
    permit.require(PUSH, f"{branch} to {remote}")
    try:
        git(repository, "push", "--quiet", remote, f"refs/heads/{branch}:refs/heads/{branch}")
        there = git(repository, "ls-remote", remote, f"refs/heads/{branch}").split()
    except CommandFailed as error:
        hint = f"the branch is kept: correct the remote and launch it again, or git push {remote} {branch}"
        raise OpsError(f"{branch} was not pushed: {error.message}", hint) from None
    if there[:1] != [git(repository, "rev-parse", f"refs/heads/{branch}").strip()]:
        raise VerificationFailed(f"{remote} does not have {branch} as it was pushed", "look at the remote")
