"""What check-redis-persistence says of files, disk, kernel, configuration file and Sentinels (§2.3)."""

from __future__ import annotations

from pathlib import Path

from flows.redis.persistence_findings import APPLY, SAVE_FLOW
from runbook.report import Report, Status
from runbook.units import size
from tasks.redis.persistence.files import DataFile
from tasks.redis.persistence.place import Place
from tasks.redis.persistence.state import Persistence
from tasks.redis.sentinels import Watch
from tasks.redis.settings.recommended import parse_rules

MOST_ROWS = 50
# Below this part of the host's memory a fork is not refused for its size, whatever overcommit_memory says.
SMALL_RATIO = 0.4


def judge_place(report: Report, server: Persistence, place: Place) -> None:
    """Whether a save and a rewrite can be written where the server stands."""
    if place.problem:
        hint = "run it there, by a worker on that host"
        report.warn("files, disk and kernel: not measured", hint, value=place.problem)
    if place.trouble or not place.problem:
        report.require(
            "the data directory",
            not place.trouble,
            place.remedy,
            value=place.trouble or place.directory,
            expected="there, and the server can write to it",
        )
    if place.problem:
        return
    judge_disk(report, server, place, 2 if server.appendonly else 1)
    _judge_kernel(report, server, place)


def judge_disk(report: Report, server: Persistence, place: Place, copies: int) -> None:
    """The data in memory is the most that one file can need: what stands there stays until the new one is complete."""
    if not place.directory.is_dir():
        return
    once, needed = server.dataset_bytes, server.dataset_bytes * copies
    report.require(
        "free space for a save" + (" and a rewrite" if copies > 1 else ""),
        place.free_bytes > needed,
        f"free {size(needed - place.free_bytes)} at {place.directory}: a save that fails stops writes",
        value=size(place.free_bytes),
        expected=f"more than {size(needed)}",
        worst=Status.WARN if place.free_bytes > once else Status.CRITICAL,
    )


def _judge_kernel(report: Report, server: Persistence, place: Place) -> None:
    if not place.overcommit:
        report.warn("overcommit_memory", "look at /proc/sys/vm/overcommit_memory on its host", value="not measured")
    else:
        small = place.overcommit == "0" and server.used_bytes < SMALL_RATIO * server.system_bytes
        report.prefer(
            "overcommit_memory",
            place.overcommit == "1" or small,
            "sysctl vm.overcommit_memory=1, and in /etc/sysctl.d: a fork may be refused, and every save fails then",
            value=place.overcommit,
            expected=f"1 (or 0 while the data is less than {SMALL_RATIO:.0%} of the memory)",
        )
    if place.huge_pages:
        report.prefer(
            "transparent huge pages",
            place.huge_pages != "always" or server.settings["disable-thp"] == "yes",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: during a save each write copies 2 MB",
            value=place.huge_pages,
            expected="madvise or never, or disable-thp yes",
        )


def judge_files(report: Report, server: Persistence, place: Place, written: dict[str, str]) -> None:
    """The files as the next start would load them: the AOF where it is on then, else the RDB."""
    if place.problem or not place.directory.is_dir():
        return
    rows = [_row(file) for file in (place.rdb, *place.aof, *place.remains)]
    report.table("Files", ("file", "what", "size", "written"), rows[:MOST_ROWS])
    rewrite = f"{SAVE_FLOW} with kind=rewrite, before anything restarts: it writes them anew from memory"
    if server.appendonly:
        gone = ", ".join(file.name for file in place.missing[:3]) or ("all of them" if not place.aof else "")
        report.require(
            "files of the AOF",
            not gone,
            rewrite,
            value=f"missing: {gone}" if gone else f"{len(place.aof)} files",
            expected="every file that the manifest names: the server does not start without",
        )
    else:
        report.require(
            "the RDB",
            not (place.rdb_problem or place.rdb.is_missing)
            or not server.keys
            or bool(server.is_fresh and server.rules and place.rdb.is_missing),
            f"{SAVE_FLOW} with kind=bgsave",
            value=f"{place.rdb.name} is missing" if place.rdb.is_missing else place.rdb_problem or _row(place.rdb)[2],
            expected="there, whole and of the last save: it is all that a start loads",
        )
    if written:
        _judge_next_start(report, server, place, written["appendonly"] == "yes")
    if place.remains:
        names = " ".join(file.name for file in place.remains[:5])
        left = size(sum(file.bytes for file in place.remains))
        report.warn(
            "left by saves that were killed",
            f"rm {names}",
            value=f"{len(place.remains)} files, {left}",
            expected="none",
        )


def _judge_next_start(report: Report, server: Persistence, place: Place, aof_then: bool) -> None:
    """A start goes by the file: the AOF wins where it is on there, and an AOF that is not there loads as nothing."""
    if server.appendonly == aof_then:
        report.passed("the next start", value="as it runs now", expected="loads what runs now")
        return
    keep = f"{APPLY}, or CONFIG REWRITE, keeps what runs now in {server.config_file}"
    if server.appendonly:
        loads = "no file at all" if place.rdb.is_missing else f"the RDB of {_row(place.rdb)[3]}"
        told = f"appendonly is yes now and no in {server.config_file}: it would load {loads}, not the AOF"
    else:
        keep = f"CONFIG SET appendonly yes writes the AOF now; or {keep}"
        loads = f"the AOF of {_row(place.aof[-1])[3]}, which wins over the RDB" if place.aof else "0 keys"
        told = f"appendonly is no now and yes in {server.config_file}: it would load {loads}"
    report.fail("the next start", keep, value=told, expected="loads what runs now")


def judge_written(report: Report, server: Persistence, written: dict[str, str], problem: str) -> None:
    """What runs against the configuration file: the difference is lost with the next start."""
    if problem:
        told = "restart it with one" if not server.config_file else "compare CONFIG GET with the file on its host"
        report.warn("configuration file: not measured", f"what was set at run time may be lost: {told}", value=problem)
        return
    different = [name for name in written if name != "appendonly" and not _same(server, name, written[name])]
    report.prefer(
        "configuration file",
        not different,
        f"CONFIG REWRITE keeps what runs now, {APPLY} brings the manual's values into both",
        value="; ".join(f"{n} {server.settings[n] or 'off'} runs, {written[n] or 'off'} is written" for n in different)
        or server.config_file,
        expected="what runs now",
    )


def _same(server: Persistence, name: str, written: str) -> bool:
    running = server.settings[name]
    if name == "dir" and not running:  # removed: judged with the data directory
        return True
    if name == "save":
        return sorted(parse_rules(running)) == sorted(parse_rules(written))
    if name in ("dir", "logfile"):  # relative to where the server was started: that cannot be told
        return not Path(written).is_absolute() or Path(written).resolve() == Path(running).resolve()
    return running == written


def judge_sentinels(report: Report, name: str, watch: Watch) -> None:
    """Whether all of them watch the master: else nobody fails it over."""
    for view in watch.views:
        told = view.problem or (f"watches {view.master}" if view.master else f"does not watch {name}")
        hint = (
            "start it"
            if view.problem
            else (
                f"SENTINEL MONITOR {name} <master's host> <port> <quorum> and SENTINEL SET {name} auth-pass on it; "
                "after a killed restore: reattach-redis"
            )
        )
        report.prefer(f"Sentinel {view.address}", bool(view.master), hint, value=told, expected=f"watches {name}")


def _row(file: DataFile) -> tuple[str, str, str, str]:
    if file.modified is None:
        return file.name, file.what, "MISSING", ""
    return file.name, file.what, size(file.bytes), f"{file.modified:%Y-%m-%d %H:%M:%S UTC}"
