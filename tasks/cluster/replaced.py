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
from runbook.files import inside
from runbook.kinds import probe
from tasks.host.disk import is_here

_SLOT = struct.Struct("<64sI")  # name, database's OID (0: a physical slot), after magic, CRC, version and length
_SLOT_AT = 16


@dataclass(frozen=True)
class ReplacedSlot:
    """A replication slot."""

    name: str
    is_logical: bool


@probe
def read_slots(postgres: Postgres) -> tuple[ReplacedSlot, ...]:
    """The slots of a server: by the server, or by its data directory if it does not answer.

    Raises:
        OpsError: neither can be read.
    """
    with contextlib.suppress(OpsError), postgres.connect() as connection:
        rows = execute(
            connection, "SELECT slot_name, database IS NOT NULL FROM pg_replication_slots WHERE NOT temporary"
        )
        return tuple(ReplacedSlot(str(name), bool(logical)) for name, logical in sorted(rows))
    if not is_here(postgres.host):
        raise OpsError(f"{postgres.host} does not answer", "compare with its subscribers, once it runs again")
    directory = Path(postgres.data_directory, "pg_replslot")
    try:
        if not directory.exists():
            raise OpsError(f"{directory} is missing", "ask each consumer of changes for the name of its slot")
        states = [inside.read(path) for path in sorted(directory.glob("*/state"))]
    except OSError as error:
        raise OpsError(f"{error.filename}: {error.strerror}", "run this as a user that can read it") from None
    found = [_SLOT.unpack_from(state, _SLOT_AT) for state in states if len(state) >= _SLOT_AT + _SLOT.size]
    return tuple(
        ReplacedSlot(name.split(b"\0")[0].decode(errors="replace"), bool(database)) for name, database in found
    )


@probe
def read_log_in_errors(postgres: Postgres) -> tuple[str, ...]:
    """The lines of a running server's pg_hba.conf and pg_ident.conf with which it would not start again.

    Raises:
        Unreachable: it does not answer.
    """
    with postgres.connect() as connection:
        found = [(row[0], row[1], row[2]) for row in execute(connection, _HBA_ERRORS)]
        if connection.info.server_version >= _IDENT_VERSION:
            found += [(row[0], row[1], row[2]) for row in execute(connection, _IDENT_ERRORS)]
    return tuple(f"{file} line {line}: {error}" for file, line, error in found)


_IDENT_VERSION = 160000
_HBA_ERRORS = "SELECT current_setting('hba_file'), line_number, error FROM pg_hba_file_rules WHERE error IS NOT NULL"
_IDENT_ERRORS = "SELECT file_name, line_number, error FROM pg_ident_file_mappings WHERE error IS NOT NULL"


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
