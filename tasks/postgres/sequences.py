"""Sequences that a restore set back: they would give out numbers that were already used once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.postgres import Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.postgres.content import sequence_values
from tasks.postgres.copy import REPLACE, Copy


@dataclass(frozen=True)
class Rewound:
    """A sequence that stands lower in the copy than in the database it replaces."""

    sequence: str
    live: int
    copy: int


@probe
def find_rewound(postgres: Postgres, live: str, copy: str) -> tuple[Rewound, ...]:
    """Compare the sequences of both. A live database that cannot be read (it may be the reason) gives none."""
    with postgres.connect(copy) as connection:
        restored = sequence_values(connection)
    try:
        with postgres.connect(live) as connection:
            present = sequence_values(connection)
    except OpsError:
        return ()
    return tuple(
        Rewound(name, present[name].last, value.last)
        for name, value in restored.items()
        if name in present and present[name].last > value.last
    )


@action(idempotent=True)
def advance_sequences(permit: Permit, postgres: Postgres, copy: Copy, rewound: Sequence[Rewound]) -> int:
    """Set the copy's sequences to where the live database's stand; returns how many."""
    permit.require(REPLACE, postgres.database)
    with postgres.connect(copy.database) as connection:
        for item in rewound:
            execute(connection, "SELECT setval(to_regclass(%s), %s)", item.sequence, item.live)
    return len(rewound)
