"""Errors with one clear sentence and what to do next; a new class only where a caller handles it differently."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from runbook.masking import without_logins

if TYPE_CHECKING:
    from runbook.report import Report


# pg_dump's two lines for a lost server, in any order with those of its other workers: that a call failed, and why.
_CALL = re.compile(r": PQ\w+\(\) failed\.$")
_REASON = "Error message from server: "


def excerpt(text: str, most: int = 80) -> str:
    """What a tool printed, in one line and cut (`most` below 0: its end): half a login is none that could be known."""
    line = " ".join(without_logins(text).split())
    return (line[:most] if most > 0 else line[most:]) or "nothing"


OTHER_BACKUPS = "show-recovery-options lists the other backups, and which of them a restore proved"
"""The next step where a backup is bad and no other one is known to be better."""


class OpsError(Exception):
    """Something an operator can act on: `message` says what is wrong, `hint` what to do next. `ends_run`: no other
    backup is tried, since it would not help, or may lose more."""

    ends_run = False

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message = without_logins(message)
        self.hint = hint = without_logins(hint)
        super().__init__(f"{message} — {hint}" if hint else message)


@contextlib.contextmanager
def ending_the_run() -> Iterator[None]:
    """An error inside ends the run: it has nothing to do with the backup that is tried."""
    try:
        yield
    except OpsError as error:
        error.ends_run = True
        raise


class Unreachable(OpsError):
    """A server did not answer. Transient: probes are retried on it, and on nothing else. A store that does not answer
    may hold a better backup."""

    ends_run = True


class CommandFailed(OpsError):
    """A program exited with something else than 0."""

    def __init__(self, argv: Sequence[str], exit_code: int, stderr: str, hint: str = "", stdout: str = "") -> None:
        self.argv = tuple(argv)
        self.exit_code = exit_code
        self.stderr = stderr
        self.stdout = stdout
        super().__init__(f"{argv[0].rsplit('/', 1)[-1]} exited {exit_code}: {_telling(stderr) or 'no message'}", hint)


def _telling(stderr: str) -> str:
    """The first error that a program printed, with the server's reason where it names none; else its last words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reasons = [line.partition(_REASON)[2] for line in lines if _REASON in line]
    own = [_CALL.sub("", line) for line in lines if _REASON not in line]
    told = [line for line in own if "error" in line.lower() or "fatal" in line.lower()][:1] or own[-3:]
    return " / ".join(told + [reason for reason in reasons[:1] if not any(reason in line for line in told)])


class VerificationFailed(OpsError):
    """A copy is not what its manifest says, or could not be compared (which is never a pass)."""


class NotRestorable(VerificationFailed):
    """An object of a backup does not restore; a person can accept that by its name (`accept`), which may lose less than
    another backup."""

    ends_run = True


class NotConfirmed(OpsError):
    """`confirm` was given and is not the environment's name."""

    ends_run = True


class LossExceeded(OpsError):
    """More would be lost than was confirmed. Nothing live was replaced."""

    ends_run = True


class TimelineUnknown(OpsError):
    """Several timelines may be the one in use: a person chooses."""

    ends_run = True


class Locked(OpsError):
    """Another run holds the environment."""


class LockLost(OpsError):
    """The environment's lock was held by this run and is no longer."""

    ends_run = True


class RunbookFailed(OpsError):
    """The report is CRITICAL. Carries it as `report`. Prefect shows its text, in the language of the environment; its
    `message` is English, since other reports quote it."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.sentence())
        self.args = (report.headline or self.message,)

    def __reduce__(self) -> tuple[type[OpsError], tuple[str]]:
        """Prefect stores what a run raised: the sentence, without the report that it stands in."""
        return OpsError, (self.message,)
