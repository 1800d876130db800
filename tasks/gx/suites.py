"""Suites of expectations: JSON files, one a table, in the order of their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook.errors import OpsError

SUITES = Path(__file__).parents[2] / "deployments" / "expectations"
Suite = list[dict[str, Any]]


def read_suites(directory: Path) -> dict[str, Suite]:
    """Table to its expectations.

    Raises:
        OpsError: a file is not a list of `{"type": …, "kwargs": {…}}`, or there is no file at all.
    """
    suites = {}
    for path in sorted(directory.glob("*.json")):
        try:
            suite = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(item["type"], str) and isinstance(item["kwargs"], dict) for item in suite):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise OpsError(f"{path.name} is not a suite of expectations", "correct it, as its neighbours are") from None
        suites[path.stem] = suite
    if not suites:
        raise OpsError(f"there is no suite of expectations in {directory}", "correct the directory")
    return suites


def name_of(expectation: Mapping[str, Any]) -> str:
    """What an operator reads: the description, or the type in words with its column."""
    if description := expectation.get("description"):
        return str(description)
    words = str(expectation["type"]).removeprefix("expect_").replace("_", " ")
    kwargs = {key: value for key, value in expectation["kwargs"].items() if key not in ("column", "batch_id")}
    column = expectation["kwargs"].get("column", "")
    shown = ", ".join(f"{key.removesuffix('_value')} {value}" for key, value in kwargs.items())
    return " ".join(part for part in (column, words.removeprefix("column "), f"({shown})" if shown else "") if part)
