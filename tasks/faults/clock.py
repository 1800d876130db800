"""A wrong clock for one service: it is restarted with libfaketime preloaded.

The host's clock, which all processes share, does not change. The library changes the process's time of day; monotonic
clocks, files' times and other processes do not change. https://github.com/wolfcw/libfaketime
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from blocks.environment import Environment
from blocks.services.service import Services
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.wait import until
from tasks.application.health import ROLES, wait_healthy

INSTALL = "install Debian's libfaketime, or the Python package libfaketime, on the worker's host"
LOADED_SECONDS, HEALTH_SECONDS = 30.0, 120.0
_DEBIAN = "lib*/*/faketime/libfaketimeMT.so.1"
_PACKAGE = Path("vendor", "libfaketime", "src", "libfaketime.so.1")


def obstacle(env: Environment, role: str, directory: str) -> str:
    """Why a service's clock cannot be changed here, and the next step; "" if it can."""
    services = env.services
    if not services.is_here:
        return "the service manager is on another host: run the drill on that host"
    if why := services.variables_obstacle(role, directory):
        return why
    if not find_library():
        return f"libfaketime is not installed: {INSTALL}"
    return "" if services.is_running(role) else f"{role} is stopped: start it first"


def set_clock(env: Environment, role: str, directory: str, seconds: float) -> None:
    """Restart a service with its clock `seconds` ahead (negative: behind), and wait until it is healthy.

    Raises:
        OpsError: the service does not start, or does not load the library and was restarted without it.
    """
    services, library = env.services, find_library()
    if not library:
        raise OpsError("libfaketime is not installed", INSTALL)
    variables = {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{seconds:+.3f}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",  # as versions before 0.9.9 call it
        "NO_FAKE_STAT": "1",
    }
    services.set_variables(role, directory, variables)
    failpoint("fault: clock set")
    try:
        until(lambda: _is_loaded(services, role, library), what="the loading of libfaketime", seconds=LOADED_SECONDS)
    except Unreachable:
        reset_clock(env, role, directory)
        raise OpsError(
            f"{role} does not load {library}",
            "its program must be linked dynamically, for this processor, and its user must be able to read that file",
        ) from None
    _wait(env, role)


def reset_clock(env: Environment, role: str, directory: str) -> None:
    """Restart a service with its right clock. Nothing happens if its clock was not changed.

    Raises:
        Unreachable, OpsError: the service manager does not answer, or cannot start it.
    """
    env.services.set_variables(role, directory, {})


def find_library() -> Path | None:
    """Debian's library, which fits this processor, else that of the Python package."""
    if found := next(Path("/usr").glob(_DEBIAN), None):
        return found
    package = importlib.util.find_spec("libfaketime")
    path = Path(package.origin).parent / _PACKAGE if package and package.origin else None
    return path if path and path.is_file() else None


def _is_loaded(services: Services, role: str, library: Path) -> bool:
    pid = services.state(role).pid
    with contextlib.suppress(OSError):
        return bool(pid) and str(library.resolve()) in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    return False


def _wait(env: Environment, role: str) -> None:
    """The restart is not the fault. The sensors notice a service that fails because of its clock."""
    if role in ROLES:
        with contextlib.suppress(OpsError):
            wait_healthy.work(env.application, seconds=HEALTH_SECONDS)
