"""What a report asks before it mints a permit: the environment's lock, its confirmed plan, and a second person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from runbook.report import Report


class Held(Protocol):
    """The environment's lock, as a report needs it."""

    def require(self) -> None:
        """Raises LockLost when it is no longer held."""

    def exclude(self) -> str:
        """Lock what the run is about to change as well, once; returns what, for people. Raises Locked."""


class Excluding(Protocol):
    """Locks that what is changed holds itself (blocks/exclusion.py)."""

    def take(self) -> str:
        """Raises Locked."""

    def require(self) -> None:
        """Raises LockLost."""

    def close(self) -> None:
        """Free them."""


class Approving(Protocol):
    """What asks a second person before a permit is minted (runbook/guard/approval.py)."""

    def describe(self, report: Report) -> None:
        """Note the plan's fingerprint."""

    def require(self, report: Report) -> None:
        """Raises where nobody approved the plan."""


class PinnedPlan(Protocol):
    """What compares a confirmed plan with what is found now (runbook/guard/pins.py)."""

    def planned(self, what: str) -> str:
        """Return what the confirmed plan pinned under this name; "" where it pinned nothing."""

    def describe(self, report: Report) -> None:
        """Pin the plan in the report."""

    def require(self, report: Report) -> None:
        """Raises where the confirmed plan no longer fits."""

    def begin(self, report: Report) -> None:
        """Note what the run is permitted."""
