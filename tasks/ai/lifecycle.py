"""Retirement dates of models and API versions: from the service, and from a table with its sources."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from blocks.ai_providers import AIProviders
from runbook.errors import OpsError
from runbook.kinds import probe

FILE = Path(__file__).parents[2] / "deployments" / "ai_retirements.toml"
SECTIONS = ("azure-api", "azure", "bedrock", "vertex")


@dataclass(frozen=True)
class Lifecycle:
    """`status`: the service's own word, "" for none; `retires`: the first day without answers, if known."""

    status: str = ""
    retires: date | None = None


@dataclass(frozen=True)
class Dates:
    """The dates of one source page, and the day of its last review."""

    source: str
    looked_at: date
    retires: dict[str, date]


@probe
def read_dates(ai: AIProviders) -> dict[str, Dates]:
    """The table by section: azure-api (API versions), azure, bedrock, vertex (models).

    Raises:
        OpsError: the file cannot be read, or a value is no date.
    """
    path = Path(ai.retirements) if ai.retirements else FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _dates(name, section) for name, section in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise OpsError(
            f"{path.name}, the table of retirement dates, cannot be read: {why}",
            "correct it: each section has source, looked_at and retires (name = a date)",
        ) from None


def _dates(name: str, section: dict[str, Any]) -> Dates:
    if name not in SECTIONS:
        raise ValueError(f"there is no section {name}; they are {', '.join(SECTIONS)}")
    for what, day in {"looked_at": section["looked_at"], **section["retires"]}.items():
        if type(day) is not date:
            raise ValueError(f"{name}: {what} is no date")
    return Dates(str(section["source"]), section["looked_at"], dict(section["retires"]))
