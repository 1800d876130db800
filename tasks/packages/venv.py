"""Reinstall the backend's virtual environment from its lock file (§3.1).

A virtual environment cannot be moved: its scripts contain its path. So each has a permanent name
(`venv-20260215093000`) and is proven there. `venv` is a link to it, and replacing the link is one rename. A `venv` that
is still a directory is renamed once (`venv-old`). `.ops-building` marks one that is not proven.

Source: https://docs.python.org/3/library/venv.html, https://pip.pypa.io/en/stable/cli/pip_check/
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.application.programs import PYTHON_VARIABLES, answer
from tasks.application.worktree import git
from tasks.dependencies.python_packages import conflicts_in
from tasks.packages.modules import REINSTALL
from tasks.packages.users import users_of

BUILDING = ".ops-building"
LOCKS = ("requirements.lock", "requirements.txt")
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
print("imported", len(sys.argv) - 1)
"""
_PINNED = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(==)?")


@dataclass(frozen=True)
class VenvLock:
    """The file that lists the packages to install; `loose`: its lines without a version; `backend`: the directory where
    pip reads it."""

    path: Path
    backend: Path
    loose: tuple[str, ...]


def venv_of(application: Application) -> Path:
    """The backend's virtual environment.

    Raises:
        OpsError: the backend's python is not in a virtual environment, or in this worker's own.
    """
    python = Path(application.need("python"))
    venv = python.parent.parent
    if python.parent.name != "bin" or ((venv / "bin").is_dir() and not (venv / "pyvenv.cfg").is_file()):
        raise OpsError(f"{python} is not in a virtual environment", "correct [application] python: …/venv/bin/python")
    if venv.exists() and venv.samefile(sys.prefix):
        raise OpsError(
            f"{venv} is the environment that this worker itself runs in, and cannot be replaced",
            "give the application its own environment ([application] python), or do not choose backend",
        )
    return venv


def lock_names(application: Application) -> list[str]:
    """The possible names of the backend's lock file; the first existing one is used."""
    return list(dict.fromkeys(filter(None, (application.requirements_lock, *LOCKS))))


def read_lock(application: Application) -> VenvLock:
    """Read the backend's lock file.

    Raises:
        OpsError: there is none.
    """
    backend = Path(application.need("backend_directory"))
    for name in lock_names(application):
        if (path := backend / name).is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            named = [(line, found) for line in lines if line[:1] not in (" ", "#") and (found := _PINNED.match(line))]
            return VenvLock(
                path, backend, tuple(line.strip() for line, found in named if not found[2] and " @ " not in line)
            )
    raise OpsError(
        f"there is no {' or '.join(lock_names(application))} in {backend}", "create one with pip freeze or pip-compile"
    )


def renamed_venv(application: Application) -> Path | None:
    """The old environment, if a run was killed between its two renames; else None."""
    venv = Path(application.need("python")).parent.parent
    old = venv.with_name(f"{venv.name}-old")
    return old if not venv.exists() and old.is_dir() else None


def _act(application: Application) -> Act:
    return Act(REINSTALL, str(venv_of(application)))


@action(of=_act, idempotent=True)
def settle_venv(application: Application, keep: Path | None = None) -> str:
    """Finish or revert an earlier run, and delete old environments that no process uses, except `keep`. Returns what
    was done."""
    venv = venv_of(application)
    if old := renamed_venv(application):
        venv.unlink(missing_ok=True)
        old.rename(venv)
        return "restored the old environment"
    kept = not venv.is_symlink() or bool(users_of(venv, before=venv.lstat().st_mtime))
    doomed = [path for path in _others(venv) if path != keep and ((path / BUILDING).exists() or not kept)]
    for path in doomed:
        shutil.rmtree(path)
    return f"deleted {', '.join(path.name for path in doomed)}" if doomed else ""


@action(of=_act, staged=True)
def build_venv(application: Application, lock: VenvLock, now: datetime, seconds: float) -> Path:
    """Build it under its final name from the lock file, and check it with pip.

    Raises:
        OpsError: Python or pip refuse or hang, or the index does not answer.
        VerificationFailed: pip finds conflicts.
    """
    venv = venv_of(application)
    built = venv.with_name(f"{venv.name}-{now:%Y%m%d%H%M%S}")
    try:
        built.mkdir()
        (built / BUILDING).touch()
        (built / ".gitignore").write_text("*\n", encoding="utf-8")  # like Python's venv since 3.13
    except OSError as error:
        raise OpsError(
            f"{built} cannot be created: {error.strerror}", "give this user write permission there"
        ) from None
    try:
        answer([_base(venv), "-m", "venv", built], built.parent, seconds=seconds)
        failpoint("reinstall: venv made")
        pip: list[str | Path] = [built / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        answer(
            [*pip, "install", "--quiet", "--requirement", lock.path],
            lock.backend,
            seconds=seconds,
            inherit=PYTHON_VARIABLES,
        )
        problems = conflicts_in(answer([*pip, "check"], lock.backend, seconds=seconds, accepted=(0, 1)))
    except BaseException:
        shutil.rmtree(built, ignore_errors=True)
        raise
    if problems:
        shutil.rmtree(built)
        raise VerificationFailed(
            f"the lock file's packages conflict: {' / '.join(problems[:3])}", f"correct {lock.path.name}"
        )
    return built


@probe
def read_failing_imports(application: Application, python: Path, seconds: float) -> set[str]:
    """The external imports of the backend's sources that fail, with the reason.

    Raises:
        OpsError: Python gave no answer.
    """
    backend = Path(application.need("backend_directory"))
    names = _imported(backend)
    done = answer(
        [python, "-c", _IMPORT, *names], backend, seconds=seconds, environment={"PYTHONDONTWRITEBYTECODE": "1"}
    )
    lines = done.stdout.splitlines()
    if f"imported {len(names)}" not in lines:
        raise OpsError(f"{python} did not report its imports", f"run {python} by hand")
    return {line for line in lines if line.partition(":")[0] in names}


@action(of=_act)
def swap_venv(application: Application, built: Path) -> Path:
    """Point `venv` to the new environment. Returns the path of the old one."""
    venv = venv_of(application)
    (built / BUILDING).unlink(missing_ok=True)
    if venv.is_symlink() or not venv.exists():
        old = venv.resolve() if venv.exists() else built
    else:
        old = venv.with_name(f"{venv.name}-old")
        shutil.rmtree(old, ignore_errors=True)  # of an earlier run; the live environment replaced it
        venv.rename(old)
    failpoint("reinstall: between renames")
    _link(venv, built)
    return old


@action(of=_act, idempotent=True)
def return_venv(application: Application, old: Path) -> None:
    """Point `venv` to the old environment again."""
    venv = venv_of(application)
    if old.name.endswith("-old"):
        venv.unlink()
        old.rename(venv)
    else:
        _link(venv, old)


@action(of=_act, idempotent=True)
def drop_old_venvs(application: Application) -> list[str]:
    """Delete the environments that `venv` does not point to."""
    venv = venv_of(application)
    old = _others(venv) if venv.is_symlink() and venv.exists() else []
    for path in old:
        shutil.rmtree(path)
    return [path.name for path in old]


def _link(venv: Path, to: Path) -> None:
    link = venv.with_name(f"{venv.name}.ops-link")
    link.unlink(missing_ok=True)
    link.symlink_to(to.name if to.parent == venv.parent else to)
    link.replace(venv)


def _others(venv: Path) -> list[Path]:
    """Environments that this runbook built or renamed, without the live one."""
    live = venv.resolve()
    named = re.compile(rf"{re.escape(venv.name)}-(\d{{14}}|old)")
    return sorted(path for path in venv.parent.glob(f"{venv.name}-*") if named.fullmatch(path.name) and path != live)


def _base(venv: Path) -> Path:
    """The Python that built the old environment, else this worker's."""
    settings = dict[str, str]()
    if (venv / "pyvenv.cfg").is_file():
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    named = [settings.get("executable", ""), f"{settings.get('home', '')}/python3"]
    return next(
        (Path(name) for name in named if name and Path(name).is_file()), Path(sys.base_prefix, "bin", "python3")
    )


def _imported(backend: Path) -> Sequence[str]:
    """The top-level packages that its sources import, without the standard library and its own."""
    own = {path.stem for folder in (backend, backend / "src") if folder.is_dir() for path in folder.iterdir()}
    found = set[str]()
    for name in git(backend, "ls-files", "-z", "*.py").split("\0"):
        if name and (backend / name).is_file():
            found |= _imports((backend / name).read_bytes())
    return sorted(found - own - sys.stdlib_module_names)


def _imports(source: bytes) -> set[str]:
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}
