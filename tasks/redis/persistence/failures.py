"""Why a save failed, from INFO, the disk and the server's answer (§2.3)."""

from __future__ import annotations

from dataclasses import replace

from runbook.errors import OpsError
from runbook.log import logger
from tasks.redis.persistence.place import inspect_place
from tasks.redis.persistence.state import Persistence, PersistenceState


def failed(server: Persistence, what: str, now: PersistenceState, said: str = "") -> OpsError:
    """The error with the cause. A save replaces the old file at its end, by rename, so the old file still exists,
    unless the server has saved its empty data after a FLUSHALL.

    `now` is read after the failure, `server` before the save; `said` is the server's refusal.
    """
    reason, remedy = _why(server, what, now, said)
    refuses = replace(server, state=now).refuses_writes
    logger().warning("%s failed; INFO says %s", what, now)
    lead = f"the server now refuses writes ({refuses}): " if refuses else ""
    kept = "" if _is_flushed(server, now) and server.rules else ". The old files are untouched"
    return OpsError(f"{lead}{what} failed: {reason}", f"{remedy}; then run this again{kept}")


def _is_flushed(server: Persistence, now: PersistenceState) -> bool:
    return now.flushes > server.state.flushes


def _why(server: Persistence, what: str, now: PersistenceState, said: str) -> tuple[str, str]:
    place, log = inspect_place(server), server.settings["logfile"]
    look = f"check the server's log{f' {log}' if log else ''}"
    rewrites = what not in ("BGSAVE", "SAVE")
    if place.trouble:
        return place.trouble, place.remedy
    if not place.problem and place.free_bytes < server.dataset_bytes:
        free = f"{place.free_bytes:,} bytes are free on the disk of {place.directory}"
        return f"{free}, the data is {server.dataset_bytes:,}", "free disk space there"
    if rewrites and not now.aof_enabled:
        return "the AOF was switched off meanwhile", "CONFIG SET appendonly yes"
    if _is_flushed(server, now) and not said:
        remedy = "find out which client did that (restore-redis restores the last backup)"
        return "the server aborted it: a client ran FLUSHALL", remedy
    if (now.rewrite_ok if rewrites else now.save_ok) and not said:
        return "the server aborted it (a full synchronisation or a shutdown ends a save)", look
    answer = said.removeprefix("ERR").strip()
    if answer and "log" not in answer:
        return answer, look
    unseen = f" ({place.problem})" if place.problem else ""
    return (
        f"its process was killed or could not be started (out of memory?), or the disk refused it{unseen}",
        f"{look} and dmesg",
    )
