"""Files in the live parts that come from no commit: a deployment would delete them with the replaced part."""

from __future__ import annotations

import os
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.worktree import git
from tasks.releases.release import Live, Release


def require_outside(application: Application, release: Release) -> None:
    """Check that a deployment does not replace the application's environment file or its Python.

    Raises:
        OpsError: one of them is in a part of the release.
    """
    for name in filter(None, (application.env_file, application.python)):
        lexical, real = Path(name).absolute(), Path(name).parent.resolve() / Path(name).name
        for part in release.parts:
            if any(path.is_relative_to(release.directory / part) for path in (lexical, real)):
                raise OpsError(
                    f"{name} is under {part}, which a release replaces",
                    f"move it to another directory, or remove {part} from [application] release",
                )


@probe
def find_uncommitted(release: Release, live: Live) -> list[str]:
    """Files in the live parts that no commit has, without Python's compiled files."""
    found = [name for part in release.parts for name in _files(release.directory, part)]
    return sorted(set(found) - _committed(release, live)) if found else []


def _files(directory: Path, part: str) -> list[str]:
    top, names = directory / part, list[str]()
    if top.is_symlink() or not top.is_dir():
        return []
    for folder, folders, files in os.walk(top):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = [name for name in folders if name != "__pycache__" and name not in links]
        names += [
            str(Path(folder, name).relative_to(directory)) for name in (*files, *links) if not name.endswith(".pyc")
        ]
    return names


def _committed(release: Release, live: Live) -> set[str]:
    """Files of all commits, not only of these two: an interrupted or manual deployment leaves files of others."""
    commits = [release.commit, *([live.commit] if live.known else [])]
    listed = [
        git(release.repository, "ls-tree", "-r", "-z", "--name-only", one, "--", *release.parts) for one in commits
    ]
    added = ("log", "--all", "--no-renames", "--diff-filter=A", "--name-only", "--format=", "-z")
    listed.append(git(release.repository, *added, "--", *release.parts))
    return {name for text in listed for name in text.split("\0")}
