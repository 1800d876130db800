"""A permit allows what it names, and nothing else."""

from __future__ import annotations

import pytest

from runbook.errors import NotConfirmed
from runbook.guard.permit import Act, Permit

PERMIT = Permit("production", (Act("replace database", "grc_db"), Act("rename", "grc_db_old")))


def test_its_acts_are_allowed() -> None:
    PERMIT.require("replace database", "grc_db")
    PERMIT.require("rename", "grc_db_old")


@pytest.mark.parametrize(
    ("kind", "target"),
    [("replace database", "grc_db_old"), ("rename", "grc_db"), ("drop", "grc_db"), ("", ""), ("rename", "GRC_DB_OLD")],
)
def test_anything_else_is_refused_naming_what_is_allowed(kind: str, target: str) -> None:
    with pytest.raises(NotConfirmed) as error:
        PERMIT.require(kind, target)
    assert f"{kind} {target}" in error.value.message
    assert error.value.hint == "permitted: replace database grc_db, rename grc_db_old"
