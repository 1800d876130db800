"""Set other versions in the backend's requirement and lock files, and build an environment from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError, excerpt
from runbook.kinds import action
from tasks.application.programs import PYTHON_VARIABLES, answer
from tasks.dependencies.advisory import canonical
from tasks.dependencies.python_packages import PATIENCE, conflicts_in, pip
from tasks.dependencies.requirements import out_of_step, pin, read_requirements


def pinned(application: Application, backend: Path) -> tuple[dict[str, str], list[str]]:
    """The required packages with their pinned versions (of the requirement files, else of the lock file), and those
    without a pin.

    Raises:
        OpsError: a file is missing, or is no requirement file.
    """
    wanted = read_requirements([backend / name for name in application.requirements])
    locked = {}
    if application.requirements_lock:
        locked = {one.name: one.exact for one in read_requirements([backend / application.requirements_lock])}
    found = {one.name: one.exact or locked.get(one.name, "") for one in wanted}
    return {name: version for name, version in found.items() if version}, [name for name in found if not found[name]]


@action
def pin_python(
    application: Application, backend: Path, versions: Mapping[str, str], seconds: float, add: bool = False
) -> None:
    """Write these versions into the files of a worktree, and generate the lock file again (`lock_command`). With `add`
    a package that no file names is added to the first file, as a lower bound.

    Raises:
        OpsError: the lock file could not be generated, or does not satisfy the requirement files.
    """
    if not versions:
        return
    files = [backend / name for name in application.requirements]
    lock = backend / application.requirements_lock if application.requirements_lock else None
    for name, version in versions.items():
        found = [pin(file, name, version) for file in [*files, *([lock] if lock else [])]]
        if add and not any(found) and canonical(name) not in {one.name for one in read_requirements(files)}:
            files[0].write_text(
                f"{files[0].read_text(encoding='utf-8').rstrip()}\n{name}>={version}\n", encoding="utf-8"
            )
    if lock and application.lock_command:
        answer(
            application.lock_command,
            backend,
            seconds=seconds,
            environment=PATIENCE,
            inherit=(*PYTHON_VARIABLES, *application.inherit),
        )
    if lock and (problems := out_of_step(read_requirements(files), read_requirements([lock]))):
        raise OpsError(
            f"{lock.name} would not match: {'; '.join(problems[:3])}",
            "check the requirement files, which prevent this version; or set [application] lock_command",
        )


@action
def virtual_environment(application: Application, backend: Path, directory: Path, seconds: float) -> Path:
    """A virtual environment of the application's Python, from the lock file (else the requirement files).

    Raises:
        OpsError: pip failed, or the packages conflict.
    """
    answer([Path(application.need("python")), "-m", "venv", "--without-pip", directory], backend, seconds=seconds)
    names = [application.requirements_lock] if application.requirements_lock else application.requirements
    files = [part for name in names for part in ("--requirement", backend / name)]
    python = directory / "bin" / "python"
    pip(python, "install", "--quiet", *files, seconds=seconds)
    if problems := conflicts_in(pip(python, "check", seconds=seconds, accepted=(0, 1))):
        raise OpsError(f"the new versions conflict: {excerpt('; '.join(problems), 200)}", "choose fewer packages")
    return directory
