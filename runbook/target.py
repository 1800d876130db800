"""What a runbook needs to know of an environment. This layer knows no block: blocks.Environment has this shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import tzinfo
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from runbook.guard.guards import Excluding
from runbook.language.say import Language


class Approver(Protocol):
    """A person who approves runs."""

    @property
    def secret(self) -> SecretStr:
        """Of the person's authenticator app."""

    @property
    def logins(self) -> Sequence[str]:
        """The person's accounts."""


class Approvals(Protocol):
    """What a runbook that needs a second person's approval must know."""

    def people(self) -> Mapping[str, Approver]:
        """By name."""

    @property
    def minutes(self) -> float:
        """For so long a run waits."""


class Target(Protocol):
    """An environment as a runbook sees it."""

    @property
    def name(self) -> str:
        """What the operator types as `confirm`."""

    @property
    def reports_directory(self) -> Path:
        """Where the JSON reports and the host's lock file are kept."""

    def exclusion(self, runbook: str) -> Excluding:
        """The locks of the servers and directories that it describes, not taken yet."""

    @property
    def zone(self) -> tzinfo:
        """The operators' time zone: reports show times in it."""

    @property
    def language(self) -> Language:
        """The operators' language: pages and forms are in it."""

    @property
    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Metric to (warn above, critical above)."""

    @property
    def unattended(self) -> Sequence[str]:
        """Runbooks that may run without a person's `confirm` (reviewed in git)."""

    def whom_to_call(self, owners: Collection[str]) -> Sequence[Sequence[str]]:
        """Names of columns, then a row for each contact, the owners' own first; empty where nobody is named."""

    def approval_of(self, runbook: str) -> Approvals | None:
        """Who must approve a runbook (its name, `full-restore`); None: nobody."""

    def has(self, part: str) -> bool:
        """Whether the environment names such a part, e.g. `alerts`."""
