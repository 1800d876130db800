"""The reason why a dump does not restore, in one sentence, with the next step."""

from __future__ import annotations

import re

from runbook.errors import CommandFailed, OpsError, VerificationFailed

_ABSENT = re.compile(r"(?P<kind>relation|type|function|schema|role|collation|access method)\b.* does not exist")
_HINTS = {
    "role": "create that role, then run this again; or take the dump without owners and rights (-O -x) and "
    "restore it with into=…",
    "relation": "take a dump of the whole database (without -t): this one needs a table that is not in it. With into=… "
    "foreign keys of a dump in custom format (-F c) are left out",
}
_PART = (
    "take a dump of the whole database (without -t and -n): this partial one lacks objects that its tables need. "
    "restore-tables restores single tables from a backup (backup-database)"
)


def does_not_restore(name: str, error: CommandFailed, hint: str) -> OpsError:
    """The first error of psql or pg_restore, with `hint` unless a better one is known; a VerificationFailed if the dump
    is the cause."""
    text = _without_prefix(_first(error))
    absent = _ABSENT.search(text)
    kind = OpsError if blames_server(error) else VerificationFailed
    return kind(f"{name} does not restore: {text}", _HINTS.get(absent["kind"], _PART) if absent else hint)


def blames_server(error: CommandFailed) -> bool:
    """Whether the server, the network or this host made a restore fail, which proves nothing about the dump.

    The program was killed, disk or memory was full (SQLSTATE class 53), the server stopped (57), its files are damaged
    (58), or the connection broke (08). The programs print no SQLSTATE, so the start of the message decides.

    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    return error.exit_code < 0 or bool(_SERVER.search(_first(error)))


def _without_prefix(line: str) -> str:
    """An error without the program's prefix."""
    return (line.partition("ERROR:")[2] or line.partition("error:")[2] or line).strip()


def _first(error: CommandFailed) -> str:
    """The first error line of the server, or else of the program."""
    lines = error.stderr.splitlines()
    return next(filter(_SENT.search, lines), "") or next((line for line in lines if "error:" in line), error.message)


_SENT = re.compile("ERROR:|FATAL:|PANIC:")
# Starts of the server's, libpq's and the programs' messages, also after “could not execute query: ”.
_SERVER = re.compile(
    r'(?:ERROR|FATAL|PANIC): +(?:could not [^"]*\b(?:file|directory|segment)\b|out of (?:shared )?memory|'
    r"sorry, too many clients|remaining connection slots|terminating connection|canceling statement|"
    r'the database system is |extension ".*" is not available)|: (?:server closed the connection unexpectedly|'
    r"connection to server (?:at|on) |no connection to the server|connection not open|could not (?:receive|send) |SSL |"
    r"could not fork|out of memory|a worker process died unexpectedly)|No space left on device$"
)
