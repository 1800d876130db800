"""Structured logs (manual §6.1) and the audit log (§6.4): JSON lines in ``app.log`` and ``audit.log``."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from pathlib import Path

# What `logging` itself keeps on a record. Everything else was given as `extra=`.
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONFormatter(logging.Formatter):
    """One JSON object per line, with the caller's ``extra=`` fields merged in.

    The manual's formatter reads ``record.extra``, which never exists: `logging` puts the extra fields on the record
    itself, so that token counts would not reach the log. A naive timestamp would be taken for local time: it carries
    its ``+00:00``.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "module": record.module,
            "function": record.funcName,
            "line": record.lineno,
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _OWN_ATTRIBUTES)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(directory: Path) -> None:
    """Log to ``app.log`` and ``audit.log`` in `directory`, which is created; warnings to standard error as well.

    `WatchedFileHandler` opens the file again after logrotate moved it (§6.2): no reload is needed, and nothing else
    rotates. Every record is flushed at once, so that what was acknowledged is in the log when the process is killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING)
    console.setFormatter(JSONFormatter())
    root = logging.getLogger()
    root.handlers = [_file_handler(directory / "app.log"), console]
    root.setLevel(logging.INFO)
    audit = logging.getLogger("audit")
    audit.handlers = [_file_handler(directory / "audit.log")]
    audit.setLevel(logging.INFO)
    audit.propagate = False


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(JSONFormatter())
    return handler
