"""Push a branch to a remote of the application's repository, and check that it arrived."""

from __future__ import annotations

from pathlib import Path

from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.application.worktree import git

PUSH = "push"


def require_remote(repository: Path, remote: str) -> None:
    """Raises OpsError if the repository has no such remote."""
    known = git(repository, "remote").split()
    if remote not in known:
        raise OpsError(
            f"{repository} has no remote “{remote[:40]}”",
            f"choose one of: {', '.join(known) or 'none; add one with git remote add'}",
        )


@action(of=lambda remote, branch: Act(PUSH, f"{branch} to {remote}"), idempotent=True)
def push_branch(repository: Path, remote: str, branch: str) -> None:
    """Push a branch; never by force.

    Raises:
        OpsError: the remote refused or is unreachable; the message does not contain the login of its address.
        VerificationFailed: the remote does not have the branch afterwards.
    """
    try:
        git(repository, "push", "--quiet", remote, f"refs/heads/{branch}:refs/heads/{branch}")
        there = git(repository, "ls-remote", remote, f"refs/heads/{branch}").split()
    except CommandFailed as error:
        hint = f"correct the remote and run this again, or git push {remote} {branch}: the branch is kept"
        raise OpsError(f"{branch} was not pushed: {error.message}", hint) from None
    if there[:1] != [git(repository, "rev-parse", f"refs/heads/{branch}").strip()]:
        raise VerificationFailed(f"{remote} does not have {branch} as it was pushed", "check the remote")
