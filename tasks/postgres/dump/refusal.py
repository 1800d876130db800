"""Why a dump does not restore, said in one sentence, and what to do about it."""

from __future__ import annotations

import re

from runbook.errors import CommandFailed, OpsError, VerificationFailed

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
    """The first error that psql or pg_restore told; `hint` where nothing better can be said. A VerificationFailed where
    it is the dump's fault."""
    said = _said(error)
    absent = _ABSENT.search(said)
    kind = OpsError if blames_server(error) else VerificationFailed
    return kind(f"{name} does not restore: {said}", _HINTS.get(absent["kind"], _PART) if absent else hint)


def blames_server(error: CommandFailed) -> bool:
    """Whether a restore failed for the server's, the network's or this host's sake, which says nothing of the dump: the
    program was ended, no disk or memory was left (SQLSTATE class 53), the server went down (57), its files are at fault
    (58), the connection broke (08). The programs print no SQLSTATE, so it is told by how messages of these begin.

    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    return error.exit_code < 0 or bool(_SERVER.search(_first(error)))


def _said(error: CommandFailed) -> str:
    """The first error, without what the program says before it."""
    line = _first(error)
    return (line.partition("ERROR:")[2] or line.partition("error:")[2] or line).strip()


def _first(error: CommandFailed) -> str:
    """The first line that the server sent, else the first of the program's own."""
    lines = error.stderr.splitlines()
    return next(filter(_SENT.search, lines), "") or next((line for line in lines if "error:" in line), error.message)


_SENT = re.compile("ERROR:|FATAL:|PANIC:")
# What the server's messages begin with, and libpq's and the program's own, be it behind “could not execute query: ”.
_SERVER = re.compile(
    r'(?:ERROR|FATAL|PANIC): +(?:could not [^"]*\b(?:file|directory|segment)\b|out of (?:shared )?memory|'
    r"sorry, too many clients|remaining connection slots|terminating connection|canceling statement|"
    r'the database system is |extension ".*" is not available)|: (?:server closed the connection unexpectedly|'
    r"connection to server (?:at|on) |no connection to the server|connection not open|could not (?:receive|send) |SSL |"
    r"could not fork|out of memory|a worker process died unexpectedly)|No space left on device$"
)
