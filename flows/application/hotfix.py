"""A hotfix brought to where the application runs, called with the open report of the runbook that made it (§3.2)."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.infrastructure.building import build_role
from flows.infrastructure.deployment import Way, way_of
from runbook.errors import OpsError
from runbook.report import Report
from tasks.docker.source import read_source
from tasks.worktree import git, worktree


def require_unmoved(repository: Path, branch: str, commit: str) -> None:
    """
    Raises:
        OpsError: the branch is no longer at the commit that was proven.
    """
    if git(repository, "rev-parse", f"refs/heads/{branch}").strip() != commit:
        raise OpsError(f"{branch} has moved since it was proven at {commit[:12]}", "launch it again: it is proven anew")


def way_of_branch(report: Report, env: Environment, repository: Path, branch: str, commit: str, seconds: int) -> Way:
    """How the commit that was proven is deployed. Containers get images that are built from it here; nothing that runs
    is changed.

    Raises:
        OpsError: an image does not build, or what is there cannot be read.
    """
    if not (env.has("docker") and env.docker.containers):
        return way_of(env, branch, seconds, commit=commit)
    version, built = f"hotfix-{commit[:12]}", list[str]()
    with worktree(repository, f"ops/build-{report.started:%Y%m%d-%H%M%S}", commit) as tree:
        source = read_source(str(tree.directory))
        for role, one in env.docker.containers.items():
            if one.dockerfile:
                build_role(report, env.docker, role, source, version)
                built.append(role)
    report.fact("images", f"{version}, on this engine only: make the release with build-images when it is merged")
    return way_of(env, version, seconds, roles=built)
