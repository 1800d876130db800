"""Which lost writes of a drill's ledger the runbooks' stated losses cover."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from flows.recovery.drills.summary import writes_beyond
from runbook.guard.loss import Loss
from tasks.drill.ledger import WriteAttempt

BEGIN = datetime(2026, 11, 1, 3, tzinfo=UTC)


def write(seconds: float) -> WriteAttempt:
    """An acknowledged one."""
    at = BEGIN + timedelta(seconds=seconds)
    return WriteAttempt(str(seconds), "answer", at, "acknowledged", at)


LOST = [write(1), write(2), write(3)]


@pytest.mark.parametrize(
    ("stated", "beyond"),
    [
        ([], 3),
        ([Loss("app")], 3),
        ([Loss("app", 2)], 1),
        ([Loss("app", 2), Loss("app", 1)], 0),
        ([Loss("app", 500)], 0),
        ([Loss.everything_since("app", BEGIN)], 0),
        ([Loss.everything_since("app", BEGIN + timedelta(seconds=2))], 2),
        ([Loss.at_most_since("app", BEGIN + timedelta(seconds=2)), Loss("app", 1)], 1),
        ([Loss.not_known("app", "no WAL"), Loss("app")], 0),
        ([Loss.everything("app")], 0),
    ],
)
def test_writes_beyond(stated: Sequence[Loss], beyond: int) -> None:
    assert writes_beyond(stated, LOST) == beyond
    assert writes_beyond(stated, []) == 0
