"""A target that is no environment: all that a runbook needs, and nothing behind it."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from blocks.exclusion import Exclusion
from runbook.guard.effect import Effect
from runbook.language.say import Language
from runbook.target import Approvals

TOKYO = ZoneInfo("Asia/Tokyo")
EFFECT = Effect("grc_db_old is dropped", "", "its rows are lost", 18.4)


@dataclass(frozen=True)
class System:
    """A `Target` with nothing behind it."""

    reports_directory: Path
    name: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:12]}")
    limits: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"age": (10, 100)})
    unattended: Sequence[str] = ()
    contacts: Sequence[Sequence[str]] = ()
    zone: tzinfo = TOKYO
    language: Language = "en"

    def whom_to_call(self, owners: Collection[str]) -> Sequence[Sequence[str]]:
        return self.contacts

    def exclusion(self, runbook: str) -> Exclusion:
        return Exclusion([])

    def approval_of(self, runbook: str) -> Approvals | None:
        return None

    def has(self, part: str) -> bool:
        return False
