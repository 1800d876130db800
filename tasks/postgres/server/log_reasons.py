"""Why a PostgreSQL server stopped or does not start, by the last lines of its log."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook.files import inside

MOST_BYTES = 64_000


@dataclass(frozen=True)
class LogReason:
    """A known cause. `what` completes the sentence “the server is down, because …”; `line`: the log's line."""

    kind: str
    what: str
    hint: str
    line: str


_KNOWN = (
    (  # no disk is full: https://www.postgresql.org/docs/current/kernel-resources.html
        "segments",
        r"could not create (?:shared memory segment|semaphores): No space left on device",
        "the host has no shared memory segment left",
        "remove those of killed servers (ipcs -m shows them with nattch 0, ipcrm -m removes one) or raise "
        "kernel.shmmni, then start it",
    ),
    (
        "disk",
        r"No space left on device|could not extend file|ディスク.*(?:空き|領域)",
        "its disk is full",
        "free disk space with free-disk-emergency (never by hand in pg_wal), then start it",
    ),
    (
        "port",
        r"could not bind .*(?:Address already in use|in use)|Is another postmaster already running on port",
        "another process has its port",
        "end that process (ss -ltnp shows it), or correct port, then start it",
    ),
    (
        "lock file",
        r'lock file "[^"]*postmaster\.pid" already exists',
        "another server runs in its data directory",
        "check whether that process is a PostgreSQL of this directory; remove postmaster.pid only if it is not",
    ),
    (
        "configuration",
        r"configuration file .* contains errors|syntax error in file|invalid value for parameter|"
        r"unrecognized configuration parameter",
        "its configuration has an error",
        "correct the line that the log names, or run undo-postgres-settings if ALTER SYSTEM wrote it",
    ),
    (
        "configuration",
        r'could not access file "[^"]+": No such file',
        "a preloaded library is missing",
        "install it, or remove it from shared_preload_libraries (undo-postgres-settings if ALTER SYSTEM wrote it)",
    ),
    (
        "rights",
        r"could not (?:open|access|read|create) .*Permission denied|has invalid permissions",
        "it cannot read its own files",
        "chown the data directory to the server's user, mode 0700",
    ),
    (
        "memory",
        r"could not (?:create shared memory|map anonymous shared memory|fork)|out of memory",
        "it has not enough memory",
        "lower shared_buffers or max_connections, or give the host more memory",
    ),
    (
        "damage",
        r"could not locate a valid checkpoint record|invalid page in block|PANIC: ",
        "its files are damaged",
        "do not restart it repeatedly; run show-recovery-options",
    ),
    (
        "killed",
        r"terminated by signal 9",
        "one of its processes was killed (kill -9, or the kernel's OOM killer)",
        "check dmesg for the OOM killer; it recovers by itself at its next start: start it",
    ),
    (
        "ended",
        r"received (?:fast|smart|immediate) shutdown request",
        "somebody stopped it",
        "find out who stopped it and why, then start it",
    ),
)


def find_reason(log: str) -> LogReason | None:
    """The cause in the newest matching line; none if the server started successfully after it."""
    for line in reversed(log.splitlines()):
        if "database system is ready to accept" in line:
            return None
        for kind, pattern, what, hint in _KNOWN:
            if re.search(pattern, line):
                return LogReason(kind, what, hint, line.strip()[:300])
    return None


# Clients' statements and rows are confidential. The server quotes them in separate lines, and bad values at the end of
# an error. The keywords are those of lc_messages = C and ja_JP.
_STATEMENT = re.compile(r"(\b(?:STATEMENT|QUERY|CONTEXT)|(?:文|クエリー|コンテキスト)):  .*")
_ROW = re.compile(r"((?:\bDETAIL|詳細):  .*?)[(（].*")
_VALUE = re.compile(r"((?:\bERROR|エラー):  .*: )\".*\"")


def without_statements(log: str) -> str:
    """A log without clients' statements and values; names in errors stay."""
    lines = (line for line in log.splitlines() if not line.startswith("\t"))
    lines = (_STATEMENT.sub(r"\1:  (left out)", line) for line in lines)
    return "\n".join(_VALUE.sub(r'\1"…"', _ROW.sub(r"\1(…)", line)) for line in lines)


def own_log(postgres: Postgres) -> str:
    """The end of the log collector's current file; empty if this host does not have it."""
    directory = Path(postgres.data_directory)
    try:
        named = inside.read_text(directory / "current_logfiles").splitlines()
        path = next((directory / line.split(" ", 1)[1] for line in named if line.startswith("stderr ")), None)
        if path is None:
            return ""
        with inside.reading(path) as file:
            found = os.fstat(file.fileno())
            if found.st_uid != directory.stat().st_uid:  # the server's user could name any file as its log
                return ""
            file.seek(max(0, found.st_size - MOST_BYTES))
            return file.read().decode(errors="replace")
    except (OSError, IndexError, UnicodeDecodeError):
        return ""
