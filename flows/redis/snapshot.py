"""SAVE, and the findings of snapshot-redis before and after a save (§2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from blocks.redis.server import Redis
from flows.redis.persistence_files import judge_disk
from flows.redis.persistence_findings import APPLY
from runbook import clock
from runbook.change import Change
from runbook.report import Report
from runbook.units import duration, size
from tasks.redis.persistence.place import DataDirectory
from tasks.redis.persistence.saving import Saved, save_blocking
from tasks.redis.persistence.state import Persistence
from tasks.redis.sentinels import Watch

Kind = Literal["bgsave", "save", "rewrite"]
COMMANDS: dict[Kind, str] = {"bgsave": "BGSAVE", "save": "SAVE", "rewrite": "BGREWRITEAOF"}
# A usable disk writes an RDB of incompressible values at least this fast.
BYTES_PER_SECOND = 50e6
# Sentinels' default: without an answer for that long they fail over.
USUAL_DOWN_AFTER_MS = 30_000


def judge_save(report: Report, server: Persistence, place: DataDirectory, kind: Kind) -> None:
    """The conditions of a save: after a failed one the server refuses writes."""
    state = server.state
    report.fact("server", f"{server.address} ({state.role}, {server.version})")
    report.fact("kind", COMMANDS[kind])
    if state.role != "master":
        hint = "run it for the master: this saves the replica's data only"
        report.warn("role", hint, value=f"a replica of {state.master}", expected="master")
    if kind == "rewrite":
        report.require(
            "appendonly",
            server.appendonly,
            "switch appendonly on: that writes the AOF too",
            value="yes" if server.appendonly else "no: there is no AOF to rewrite",
            expected="yes",
            follow=[APPLY],
        )
    if not state.save_ok:
        report.warn("the previous save", "if this one fails too, its error is the cause", value="failed", expected="ok")
    if place.problem:
        report.warn("disk: not measured", "check free disk space on the server's host", value=place.problem)
    if place.trouble or not place.problem:
        report.require(
            "the data directory",
            not place.trouble,
            f"{place.remedy}; no save was started",
            value=place.trouble or place.directory,
            expected="exists, and the server can write to it",
        )
    if place.problem:
        return
    judge_disk(report, server, place, 1)


def seconds_of(server: Persistence) -> float:
    """An estimate of a save's seconds: the last save's, and at least what the data's size takes."""
    return max(float(server.state.save_seconds), server.dataset_bytes / BYTES_PER_SECOND, 0.1)


def judge_standstill(report: Report, server: Persistence, watch: Watch) -> None:
    """SAVE blocks all clients: the Sentinels must not fail over meanwhile."""
    seconds = seconds_of(server)
    answering = [view.settings.get("down-after-milliseconds", USUAL_DOWN_AFTER_MS) for view in watch.answering]
    if answering:
        patience = min(answering) / 1000
        report.require(
            "SAVE ends before a failover",
            seconds < patience / 2,
            "use kind=bgsave: the Sentinels would fail over during SAVE",
            value=f"about {duration(seconds)}",
            expected=f"less than half of down-after-milliseconds ({duration(patience)})",
        )


def saving(block: Redis, server: Persistence) -> Change[[], Saved]:
    """SAVE: it blocks every client."""
    replicas = f"; {server.replicas} replicas wait too" if server.replicas else ""
    return Change(
        save_blocking.bind(block, server),
        "SAVE",
        f"{server.address}: {server.keys:,} keys; no client is served until it ends{replicas}",
        size=server.dataset_bytes,
        seconds=seconds_of(server),
    )


def judge_master(report: Report, server: Persistence, watch: Watch) -> None:
    """The saved server is still the master after the save."""
    others = {view.master for view in watch.answering if view.master} - {server.address}
    if others:
        now = ", ".join(sorted(others))
        report.warn("the master changed meanwhile", "run it again to save the new master's data", value=now)


def report_saved(report: Report, kind: Kind, saved: Saved, place: DataDirectory) -> None:
    """The written files, the time and the fork's cost."""
    after = saved.after
    cow = after.rewrite_cow_bytes if kind == "rewrite" else after.save_cow_bytes
    report.fact("took", duration(saved.seconds))
    if kind != "save":
        report.fact("fork", f"clients waited {after.fork_seconds * 1000:.1f} ms; {size(cow)} were copied")
    report.fact("changes since", f"{after.changes:,}" if kind != "rewrite" else "in the AOF")
    files = place.aof if kind == "rewrite" else (place.rdb,)
    if not place.problem:
        rows = [
            (Path(file.name).name, file.what, size(file.bytes), clock.text(file.modified))
            for file in files
            if file.modified
        ]
        report.table("Files", ("file", "what", "size", "written"), rows)
        report.require(
            "the saved files exist",
            len(rows) == len(files) > 0,
            "run it again: the files were deleted after the save",
            value=", ".join(row[0] for row in rows) or "none",
            expected="as the server wrote them",
        )
    name = COMMANDS[kind]
    total = sum(max(file.bytes, 0) for file in files)
    report.outcome = f"{name} succeeded after {duration(saved.seconds)}" + (f", {size(total)}" if total else "")
