"""The Python packages that a release requires, compared with the installed ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.worktree import git, inside
from tasks.dependencies.python_packages import list_python
from tasks.dependencies.requirements import WantedPackage, out_of_step, read_requirements
from tasks.packages.venv import lock_names, renamed_venv
from tasks.releases.release import Release, previous_of
from tasks.releases.unpacking import VENV


@probe
def find_missing_packages(application: Application, release: Release, seconds: float) -> list[str]:
    """Requirements of the release that the application's Python does not satisfy; empty if there are none, or if the
    release has no requirement file.

    Raises:
        OpsError: pip gave no answer, or the file cannot be read.
    """
    backend = inside(release.repository, application.source)
    names = [str(backend / name) for name in lock_names(application)]
    there = git(release.repository, "ls-tree", "-r", "-z", "--name-only", release.commit, "--", *names).split("\0")
    name = next((name for name in names if name in there), None)
    if name is None:
        return []
    with tempfile.TemporaryDirectory(prefix="ops-release-") as folder:
        file = Path(folder, Path(name).name)
        file.write_text(git(release.repository, "show", f"{release.commit}:{name}"), encoding="utf-8")
        wanted = read_requirements([file])
    renamed = renamed_venv(application)
    python = renamed / "bin" / Path(application.need("python")).name if renamed else Path(application.need("python"))
    has = list_python.work(python, seconds)
    installed = [WantedPackage(Requirement(f"{one.name}=={one.version}"), Path("pip list")) for one in has]
    return out_of_step(wanted, installed)


def kept_venv(application: Application, release: Release) -> Path | None:
    """The previous release's virtual environment, if `venv` is another one now; None if it is the same, or is
    missing."""
    named = _named_venv(application, release)
    return named if named and named.is_dir() else None


def require_venv(application: Application, release: Release) -> None:
    """Check that `venv` is the virtual environment of the previous release.

    Raises:
        OpsError: it is another one.
    """
    if named := _named_venv(application, release):
        raise OpsError(
            f"the virtual environment of the previous release, {named}, is missing",
            "deploy a version that is known to work: its packages are then installed again",
        )


def _named_venv(application: Application, release: Release) -> Path | None:
    venv, note = Path(application.need("python")).parent.parent, previous_of(release.directory) / VENV
    if not note.is_file():
        return None
    noted = Path(note.read_text(encoding="utf-8"))
    if noted == venv.resolve():
        return None
    return venv.with_name(f"{venv.name}-old") if noted == venv.parent.resolve() / venv.name else noted
