"""The Python packages that a release wants, against those that are there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.worktree import git, inside
from tasks.dependencies.python_packages import list_python
from tasks.dependencies.requirements import Wanted, out_of_step, read_requirements
from tasks.packages.venv import lock_names, renamed_venv
from tasks.releases.release import Release, before_of
from tasks.releases.unpacking import VENV


@probe
def find_packages_behind(application: Application, release: Release, seconds: float) -> list[str]:
    """What the file that the release's packages are installed from wants and the application's Python has not; empty
    where it has all of it, or where there is no such file.

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
    installed = [Wanted(Requirement(f"{one.name}=={one.version}"), Path("pip list")) for one in has]
    return out_of_step(wanted, installed)


def kept_venv(application: Application, release: Release) -> Path | None:
    """The virtual environment that what ran before had, where `venv` is another one since; None where it is not, or
    where that one is gone."""
    named = _named_venv(application, release)
    return named if named and named.is_dir() else None


def require_venv(application: Application, release: Release) -> None:
    """
    Raises:
        OpsError: `venv` is another one than what ran before had.
    """
    if named := _named_venv(application, release):
        raise OpsError(
            f"the virtual environment of what ran before, {named}, is gone",
            "deploy a version that is known to be well: its packages are installed anew",
        )


def _named_venv(application: Application, release: Release) -> Path | None:
    venv, note = Path(application.need("python")).parent.parent, before_of(release.directory) / VENV
    if not note.is_file():
        return None
    noted = Path(note.read_text(encoding="utf-8"))
    if noted == venv.resolve():
        return None
    return venv.with_name(f"{venv.name}-old") if noted == venv.parent.resolve() / venv.name else noted
