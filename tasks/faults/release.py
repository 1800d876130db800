"""A bad release of the application: a commit whose backend does not start, copied over the live files."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.application.worktree import worktree
from tasks.faults.disposable import BREAK, Fault, require_disposable
from tasks.host.services import stop_services
from tasks.releases.release import Release
from tasks.releases.unpacking import overwrite_live

ROLES = ("backend", "frontend")
DEFECT = "\nfrom . import a_module_that_nobody_committed  # the drill's bad release\n"


def release_of(env: Environment) -> str:
    """Return the target of the act."""
    return f"release of the application in {env.application.directory}"


def spoiled_branch(good: Release, backend: Path, branch: str) -> str:
    """Commit a defect on a branch from a good release: the package does not import. Returns the commit.

    Raises:
        OpsError: the release has no Python package of the backend.
    """
    with worktree(good.repository, branch, good.commit) as tree:
        failpoint("drill: branch made")
        packages = [
            tree.directory / part / "__init__.py" for part in good.parts if Path(part).parent.name == backend.name
        ]
        package = next((path for path in packages if path.is_file()), None)
        if package is None:
            raise OpsError("the release has no Python package of the backend", "correct [application] release")
        package.write_text(package.read_text(encoding="utf-8") + DEFECT, encoding="utf-8")
        return tree.commit("A release that does not start")


@action(of=lambda env: Act(BREAK, release_of(env)))
def break_release(env: Environment, bad: Release) -> Fault:
    """Copy its files over the live ones and restart the services, like somebody without a runbook: no old file is kept.

    Raises:
        OpsError: the environment is not disposable, or its files cannot be written.
    """
    require_disposable(env)
    began, roles = datetime.now(UTC), env.services_in(ROLES)
    overwrite_live(bad)
    stop_services.work(env.services, roles)
    for role in roles:
        with contextlib.suppress(OpsError):  # it does not start
            env.services.start(role)
    what = f"{bad.commit[:12]} copied into {bad.directory}, {', '.join(roles)} restarted"
    return Fault(what, began, datetime.now(UTC))
