"""What is collected while a report is open: files, and what could not be measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeVar

from runbook.errors import OpsError
from runbook.report import Report

T = TypeVar("T")


@dataclass
class Evidence:
    """Files by name, as an archive will have them; what is missing, and why."""

    report: Report
    secrets: Sequence[str] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: object) -> None:
        """As JSON; dataclasses by their fields."""
        text = json.dumps(content, ensure_ascii=False, indent=1, default=_plain)
        self.files[name] = (text + "\n").encode(errors="backslashreplace")

    def shown(self, text: str) -> str:
        """As the report may have it: somebody may have typed a password where a name belongs."""
        return "(a secret)" if any(secret in text for secret in self.secrets) else text

    def lacks(self, what: str, why: str) -> None:
        """It was not measured."""
        self.missing[what] = why

    def ask(self, what: str, question: Callable[[], T]) -> T | None:
        """The answer; None where there was none, which is kept."""
        try:
            return question()
        except OpsError as error:
            self.lacks(what, error.message)
            return None

    def tell_missing(self) -> None:
        """What is not known is not well."""
        for what, why in self.missing.items():
            self.report.warn(f"not measured: {what}", "see to what it says, and launch this again", value=why)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
