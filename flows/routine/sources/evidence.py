"""Evidence collected for a report: files, and the measurements that failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, TypeVar

from runbook.errors import OpsError
from runbook.report import Report

T = TypeVar("T")


@dataclass
class EvidenceSource:
    """Files by their name in the archive, and failed measurements with the reason."""

    report: Report
    secrets: Sequence[str] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: object) -> None:
        """Add a JSON file; dataclasses become objects."""
        text = json.dumps(content, ensure_ascii=False, indent=1, default=_plain)
        self.files[name] = (text + "\n").encode(errors="backslashreplace")

    def shown(self, text: str) -> str:
        """The text without secrets: somebody may have typed a password instead of a name."""
        return "(a secret)" if any(secret in text for secret in self.secrets) else text

    def lacks(self, what: str, why: str) -> None:
        """Record that `what` was not measured, and why."""
        self.missing[what] = why

    def ask(self, what: str, question: Callable[[], T]) -> T | None:
        """The answer; None, and a failed measurement, if there is an error."""
        try:
            return question()
        except OpsError as error:
            self.lacks(what, error.message)
            return None

    def report_missing(self) -> None:
        """A WARN for each failed measurement."""
        for what, why in self.missing.items():
            self.report.warn(f"not measured: {what}", "fix the cause, then run this again", value=why)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
