"""Errors of drivers as sentences: the last net under every runbook, for what no step has said in its own words.

This layer knows no driver: an error is told by the package of its class, and by its SQLSTATE. What a driver says in
lines of its own (DETAIL: a row, a statement) stays out: it may be a client's data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from runbook.errors import OpsError, Unreachable, excerpt

SERVICES = {
    "psycopg": "PostgreSQL",
    "psycopg_pool": "PostgreSQL",
    "sqlalchemy": "the database",
    "redis": "Redis",
    "valkey": "Redis",
    "botocore": "the S3 or cloud service",
    "boto3": "the S3 or cloud service",
    "httpx": "an HTTP service",
    "httpcore": "an HTTP service",
    "requests": "an HTTP service",
    "urllib3": "an HTTP service",
    "docker": "Docker",
    "duckdb": "DuckDB",
}
_AWAY = ("Timeout", "Connect", "Connection", "Network", "Endpoint", "Protocol", "ReadError", "WriteError")
# https://www.postgresql.org/docs/current/errcodes-appendix.html: a code, else its class → the next step.
_BY_CODE = {
    "42501": "give the role that this run logs in as that right, then run it again",
    "53100": "launch free-disk-emergency: it shows what uses the disk and what can be deleted",
    "53200": "raise max_locks_per_transaction where the message names it, else give the server's host more memory",
    "53300": "close idle sessions (close-idle-connections), then run it again",
    "55P03": "another session holds a lock: check-connections shows it; then run it again",
    "57014": "somebody cancelled it, or a timeout of the role or database did: run it again",
    "25006": "it is a standby or contained: run it against the primary, or release-containment",
    "08": "start the server where it is down, read its log, then run this again",
    "57": "start the server where it is down, read its log, then run this again",
    "40": "another session was in the way: run it again",
    "42": "something was renamed or dropped meanwhile, or the server lacks it: run it again, then read its log",
    "53": "give the server more of what it lacks, then run it again",
    "58": "check the disk of the server's host (dmesg, the server's log); check-corruption shows what is damaged",
    "XX": "check the disk of the server's host (dmesg, the server's log); check-corruption shows what is damaged",
}
_REST = re.compile(r"\n|\\n|DETAIL: ")
OTHERWISE = "read the log of that service, fix what the message names, then run it again"


def described(error: BaseException) -> OpsError | None:
    """A driver's error as a sentence with its next step; None where it is no driver's."""
    service = next((SERVICES[name] for kind in type(error).__mro__ if (name := _package(kind)) in SERVICES), "")
    if not service:
        return None
    original = getattr(error, "orig", None)  # SQLAlchemy's, around a driver's
    if isinstance(original, BaseException) and (found := described(original)):
        return found
    code = str(getattr(error, "sqlstate", None) or "")
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    said = excerpt(_REST.split(str(primary or _text(error)).strip(), maxsplit=1)[0], 200)
    if code:
        hint = _BY_CODE.get(code) or _BY_CODE.get(code[:2], OTHERWISE)
        kind = Unreachable if code[:2] in ("08", "57") and code != "57014" else OpsError
        return kind(f"{service} refuses: {said} (SQLSTATE {code})", hint)
    if any(word in type(error).__name__ for word in _AWAY):
        return Unreachable(f"{service} does not answer: {said}", "start it where it is down, then run this again")
    return OpsError(f"{service} refuses: {said}", OTHERWISE)


def exit_code(main: Callable[[], int]) -> int:
    """A program's exit code: the error of a driver that it meets outside of any runbook is printed as a sentence."""
    try:
        return main()
    except Exception as error:
        if not (refused := described(error)):
            raise
        print(refused, file=sys.stderr)
        return 1


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # one that was made by half, by another process's pickle for example
        return str(error.args[0]) if error.args else "no message"


def _package(kind: type[object]) -> str:
    return kind.__module__.partition(".")[0]
