"""Why an application does not start, by what it printed: the last thing that says so."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """`what` completes the sentence “the backend does not start: …”; `line` says so."""

    kind: str
    what: str
    line: str


_KNOWN = (
    ("port", re.compile(r"address already in use|Errno 98\b|EADDRINUSE", re.IGNORECASE), "its port is taken"),
    ("import", re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')"), "an import fails: {0}"),
    ("import", re.compile(r"ImportError: (.{1,160})"), "an import fails: {0}"),
    ("import", re.compile(r"Error loading ASGI app\. (.{1,160})"), "an import fails: {0}"),
    ("syntax", re.compile(r"((?:SyntaxError|IndentationError|TabError): .{1,160})"), "its code cannot be read: {0}"),
    ("variable", re.compile(r"missing in \.env and in the environment: ([A-Z0-9_, ]+)"),
     "a variable of its environment is missing: {0}"),
    ("variable", re.compile(r"KeyError: '([A-Z][A-Z0-9_]+)'"), "a variable of its environment is missing: {0}"),
    ("variable", re.compile(r"(?i)environment variable[s]? [`'\"]?(\w+)[`'\"]? (?:is |are )?"
                            r"(?:not set|missing|required|undefined)"),
     "a variable of its environment is missing: {0}"),
    ("variable", re.compile(r"(?i)validation errors? for \w*settings"), "its settings are incomplete or wrong"),
    ("migration", re.compile(r"(?:UndefinedTable|UndefinedColumn|relation \"[\w.]+\" does not exist"
                             r"|column \"?[\w.]+\"? does not exist)"), "the database lacks a migration"),
    ("database", re.compile(r"password authentication failed|InvalidPasswordError"),
     "the database refuses its password"),
    ("database", re.compile(r"(?:OperationalError|CannotConnectNowError|TooManyConnections|ConnectionDoesNotExist)"),
     "the database does not take it"),
    ("redis", re.compile(r"redis\.exceptions\.\w+"), "Redis does not take it"),
    ("rights", re.compile(r"PermissionError: (.{1,160})"), "it may not: {0}"),
    ("disk", re.compile(r"No space left on device"), "the disk is full"),
    ("memory", re.compile(r"MemoryError|Cannot allocate memory"), "there is not enough memory"),
    ("unknown", re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception)\b.{0,160})", re.MULTILINE), "{0}"),
)  # fmt: skip
STARTED = re.compile(r"Application startup complete|Uvicorn running on|Started server process")


def find_reason(text: str) -> Reason | None:
    """The newest line that says why, and nothing where it started well after that."""
    for line in reversed(text.splitlines()):
        for kind, pattern, what in _KNOWN:
            if found := pattern.search(line):
                return Reason(kind, what.format(*found.groups()), line.strip()[:300])
        if STARTED.search(line):
            return None
    return None
