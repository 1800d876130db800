"""One-time codes of approvers (TOTP, RFC 6238): whose code it is, and that each is used once."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path

import pyotp

from runbook.errors import OpsError
from runbook.target import Approvals

WINDOW = (0, -1, 1)
"""A code of the step before or after is valid too: clocks differ, and typing takes time (RFC 6238, 5.2)."""
KEPT_SECONDS = 86400.0


class CodeRefused(OpsError):
    """A code that approves nothing: the run asks again."""


def approver_of(approvals: Approvals, code: str, at: datetime) -> tuple[str, int]:
    """Whose code it is, and its time step.

    Raises:
        Refused: it is nobody's at that moment.
    """
    digits = "".join(code.split())
    for name, person in approvals.people().items():
        totp = pyotp.TOTP(person.secret.get_secret_value())
        now = totp.timecode(at)
        for step in (now + offset for offset in WINDOW):
            if digits and pyotp.utils.strings_equal(digits, totp.generate_otp(step)):
                return name, step
    raise CodeRefused("the code is wrong or has expired", "type the code that the approver's app shows now")


def claim(reports: Path, name: str, step: int, owner: str) -> None:
    """Use up a code: the first run that creates its file may use it, and only that run.

    Raises:
        Refused: it was used before.
        OpsError: the use cannot be recorded.
    """
    directory = reports / "approvals"
    path = directory / f"{step}-{name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _prune(directory)
        with path.open("x", encoding="utf-8") as file:
            file.write(owner)
    except FileExistsError:
        if path.read_text(encoding="utf-8") != owner:
            raise CodeRefused(f"this code of {name} was used before", "wait for the app's next code") from None
    except OSError as error:
        raise OpsError(
            f"the use of the code cannot be recorded in {directory}: {error.strerror}",
            "free disk space there or correct its owner",
        ) from None


def refuse_launcher(approvals: Approvals, name: str, launcher: str) -> None:
    """Raises Refused where the approver launched the run."""
    own = {one.casefold() for one in (name, *approvals.people()[name].logins)}
    if launcher.strip().casefold() in own:
        raise CodeRefused(f"{name} launched this run and cannot approve it", "ask a second person for a code")


def _prune(directory: Path) -> None:
    for old in directory.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
