"""What snapshot-redis judges before it saves, and tells afterwards (§2.3). Plain functions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flows.redis.persistence_files import judge_disk
from runbook.report import Report
from runbook.units import duration, size
from tasks.redis.persistence.place import Place
from tasks.redis.persistence.saving import Saved
from tasks.redis.persistence.state import Persistence
from tasks.redis.sentinels import Watch

Kind = Literal["bgsave", "save", "rewrite"]
COMMANDS: dict[Kind, str] = {"bgsave": "BGSAVE", "save": "SAVE", "rewrite": "BGREWRITEAOF"}
# An RDB of values that do not compress is written at least so fast on a disk that anybody would use.
BYTES_PER_SECOND = 50e6
# Sentinels that get no answer for so long fail the master over, unless the environment's say otherwise.
USUAL_DOWN_AFTER_MS = 30_000


def judge_save(report: Report, server: Persistence, place: Place, kind: Kind) -> None:
    """What must hold before a save is begun: one that fails makes the server refuse writes."""
    state = server.state
    report.fact("server", f"{server.address} ({state.role}, {server.version})")
    report.fact("kind", COMMANDS[kind])
    if state.role != "master":
        report.warn("role", "its master saves on its own", value=f"a replica of {state.master}", expected="master")
    if kind == "rewrite":
        report.require(
            "appendonly",
            server.appendonly,
            "apply-redis-settings switches it on: that writes the AOF as well",
            value="yes" if server.appendonly else "no: there is no AOF to rewrite",
            expected="yes",
        )
    if not state.save_ok:
        report.warn("the save before this one", "this one tells why, if it fails too", value="failed", expected="ok")
    if place.problem:
        report.warn("disk: not measured", "look at it there before a big save", value=place.problem)
    if place.trouble or not place.problem:
        report.require(
            "the data directory",
            not place.trouble,
            f"{place.remedy}; nothing was begun",
            value=place.trouble or place.directory,
            expected="there, and the server can write to it",
        )
    if place.problem:
        return
    judge_disk(report, server, place, 1)


def seconds_of(server: Persistence) -> float:
    """About how long a save takes: as the last one, and not less than the data's size needs."""
    return max(float(server.state.save_seconds), server.dataset_bytes / BYTES_PER_SECOND, 0.1)


def judge_standstill(report: Report, server: Persistence, watch: Watch) -> None:
    """SAVE answers nobody for that long: Sentinels must not take it for dead."""
    seconds = seconds_of(server)
    answering = [view.settings.get("down-after-milliseconds", USUAL_DOWN_AFTER_MS) for view in watch.answering]
    if answering:
        patience = min(answering) / 1000
        report.require(
            "shorter than the Sentinels' patience",
            seconds < patience / 2,
            "take kind=bgsave: they would fail the master over while it saves",
            value=f"about {duration(seconds)}",
            expected=f"less than half of down-after-milliseconds ({duration(patience)})",
        )
    beside = f"; {server.replicas} replicas wait too" if server.replicas else ""
    report.plan(
        "SAVE",
        f"{server.address}: {server.keys:,} keys; no client is served until it ends{beside}",
        size=server.dataset_bytes,
        seconds=seconds,
    )


def judge_master(report: Report, server: Persistence, watch: Watch) -> None:
    """Afterwards: whether what was saved is still the master's data."""
    others = {view.master for view in watch.answering if view.master} - {server.address}
    if others:
        now = ", ".join(sorted(others))
        report.warn("the master changed meanwhile", "launch it again: it saves the new one's data", value=now)


def tell_saved(report: Report, kind: Kind, saved: Saved, place: Place) -> None:
    """What was written, how long it took, and what it cost."""
    after = saved.after
    cow = after.rewrite_cow_bytes if kind == "rewrite" else after.save_cow_bytes
    report.fact("took", duration(saved.seconds))
    if kind != "save":
        report.fact("fork", f"clients waited {after.fork_seconds * 1000:.1f} ms; {size(cow)} were copied")
    report.fact("changes since", f"{after.changes:,}" if kind != "rewrite" else "in the AOF")
    files = place.aof if kind == "rewrite" else (place.rdb,)
    if not place.problem:
        rows = [
            (Path(file.name).name, file.what, size(file.bytes), f"{file.modified:%H:%M:%S UTC}")
            for file in files
            if file.modified
        ]
        report.table("Files", ("file", "what", "size", "written"), rows)
        report.require(
            "the files are there",
            len(rows) == len(files) > 0,
            "somebody removed them in this moment: launch it again",
            value=", ".join(row[0] for row in rows) or "none",
            expected="as the server wrote them",
        )
    name = COMMANDS[kind]
    total = sum(max(file.bytes, 0) for file in files)
    report.outcome = f"{name} has ended well after {duration(saved.seconds)}" + (f", {size(total)}" if total else "")
