"""Why a dump does not restore, said in one sentence, and what to do about it."""

from __future__ import annotations

import re

from runbook.errors import CommandFailed, OpsError

_ABSENT = re.compile(r"(?P<kind>relation|type|function|schema|role|collation|access method)\b.* does not exist")
_HINTS = {
    "role": "create that role first, then launch this again; or take the dump without owners and rights (-O -x) and "
    "restore it with into=…",
    "relation": "the dump needs a table that is not in it: take one of the whole database (without -t); from a dump in "
    "custom format (-F c) foreign keys are left out with into=…",
}
_PART = (
    "the dump is of a part of a database and lacks what its tables are made of: take one of the whole database "
    "(without -t and -n); single tables come back with restore-tables from one of our backups (backup-database)"
)


def does_not_restore(name: str, error: CommandFailed, hint: str) -> OpsError:
    """The first error that psql or pg_restore told; `hint` where nothing better can be said."""
    lines = error.stderr.splitlines()
    first = next((line for line in lines if "ERROR:" in line), "") or next(
        (line for line in lines if "error:" in line), error.message
    )
    said = (first.partition("ERROR:")[2] or first.partition("error:")[2] or first).strip()
    absent = _ABSENT.search(said)
    return OpsError(f"{name} does not restore: {said}", _HINTS.get(absent["kind"], _PART) if absent else hint)
