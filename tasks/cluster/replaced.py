"""What a data directory has, and the one that replaces it lacks: replication slots. What the restored one brings back:
prepared transactions with their locks, and the settings of databases and roles as of its target.

src/include/replication/slot.h: ReplicationSlotPersistentData
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe

_SLOT = struct.Struct("<64sI")  # name, database's OID (0: a physical slot), after magic, CRC, version and length
_SLOT_AT = 16


@dataclass(frozen=True)
class Slot:
    """A replication slot."""

    name: str
    is_logical: bool


@probe
def read_slots(postgres: Postgres) -> tuple[Slot, ...]:
    """The slots of a server: by the server, or by its data directory if it does not answer.

    Raises:
        OpsError: neither can be read.
    """
    with contextlib.suppress(OpsError), postgres.connect() as connection:
        rows = execute(
            connection, "SELECT slot_name, database IS NOT NULL FROM pg_replication_slots WHERE NOT temporary"
        )
        return tuple(Slot(str(name), bool(logical)) for name, logical in sorted(rows))
    try:
        states = [path.read_bytes() for path in sorted(Path(postgres.data_directory, "pg_replslot").glob("*/state"))]
    except OSError as error:
        raise OpsError(f"{error.filename}: {error.strerror}", "run this as a user that can read it") from None
    found = [_SLOT.unpack_from(state, _SLOT_AT) for state in states if len(state) >= _SLOT_AT + _SLOT.size]
    return tuple(Slot(name.split(b"\0")[0].decode(errors="replace"), bool(database)) for name, database in found)


@probe
def read_role_settings(postgres: Postgres) -> frozenset[str]:
    """The settings of databases and roles (ALTER DATABASE … SET, ALTER ROLE … SET).

    Raises:
        Unreachable: it does not answer.
    """
    with postgres.connect() as connection:
        rows = execute(connection, _ROLE_SETTINGS)
    return frozenset(" ".join(filter(None, map(str, row))) for row in rows)


_ROLE_SETTINGS = """
SELECT coalesce('database ' || d.datname, ''), coalesce('role ' || r.rolname, ''), unnest(s.setconfig)
FROM pg_db_role_setting s LEFT JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole
"""
