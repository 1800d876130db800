"""Sequences that a restore set back: they would use numbers twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.postgres.content.content import sequence_values
from tasks.postgres.content.pinned_session import read_names
from tasks.postgres.restore.staged_copy import REPLACE


@dataclass(frozen=True)
class Rewound:
    """A sequence with a lower value in the restored database than in the replaced one."""

    sequence: str
    live: int
    copy: int


@probe
def find_rewound(postgres: Postgres, replaced: str, restored: str) -> tuple[Rewound, ...]:
    """Compare the sequences of both; none if the replaced database is unreadable, which may be why it was replaced."""
    with postgres.connect(restored) as connection:
        read_names(connection)
        now = sequence_values(connection)
    try:
        with postgres.connect(replaced) as connection:
            read_names(connection)
            before = sequence_values(connection)
    except OpsError:
        return ()
    return tuple(
        Rewound(name, before[name].last, value.last)
        for name, value in now.items()
        if name in before and before[name].last > value.last
    )


@action(of=lambda postgres: Act(REPLACE, postgres.database), idempotent=True)
def advance_sequences(postgres: Postgres, rewound: Sequence[Rewound]) -> int:
    """Set the restored database's sequences to the replaced one's values; returns their number."""
    with postgres.connect(postgres.database) as connection:
        read_names(connection)
        for item in rewound:
            execute(connection, "SELECT setval(to_regclass(%s), %s)", item.sequence, item.live)
    return len(rewound)
