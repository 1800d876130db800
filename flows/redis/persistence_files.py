"""Files, disk, kernel, configuration file and Sentinels in check-redis-persistence (§2.3)."""

from __future__ import annotations

from pathlib import Path

from flows.redis.persistence_findings import APPLY, REWRITE, SNAPSHOT
from runbook import clock
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import size
from tasks.redis.persistence.files import DataFile
from tasks.redis.persistence.place import DataDirectory
from tasks.redis.persistence.state import Persistence
from tasks.redis.sentinels import Watch
from tasks.redis.settings.recommended import parse_rules
from tasks.redis.topology.topology import ReplicationTopology

# Below this share of the host's memory, a fork is never refused for its size.
SMALL_RATIO = 0.4


def judge_place(report: Report, server: Persistence, place: DataDirectory) -> None:
    """Whether the server can write a save and a rewrite to its directory."""
    if place.problem:
        hint = "run it with a worker on the server's host"
        report.warn("files, disk and kernel: not measured", hint, value=place.problem)
    if place.trouble or not place.problem:
        report.require(
            "the data directory",
            not place.trouble,
            place.remedy,
            value=place.trouble or place.directory,
            expected="exists, and the server can write to it",
        )
    if place.problem:
        return
    judge_disk(report, server, place, 2 if server.appendonly else 1)
    _judge_kernel(report, server, place)


def judge_disk(report: Report, server: Persistence, place: DataDirectory, copies: int) -> None:
    """One file needs at most as much space as the data in memory; the old file stays until the new one is complete."""
    if not place.directory.is_dir():
        return
    once, needed = server.dataset_bytes, server.dataset_bytes * copies
    report.require(
        "free space for a save and a rewrite" if copies > 1 else "free space for a save",
        place.free_bytes > needed,
        f"free {size(needed - place.free_bytes)} in {place.directory}: after a failed save, writes are refused",
        value=size(place.free_bytes),
        expected=f"more than {size(needed)}",
        worst=Status.WARN if place.free_bytes > once else Status.CRITICAL,
    )


def _judge_kernel(report: Report, server: Persistence, place: DataDirectory) -> None:
    if not place.overcommit:
        report.warn("overcommit_memory", "check /proc/sys/vm/overcommit_memory on its host", value="not measured")
    else:
        small = place.overcommit == "0" and server.used_bytes < SMALL_RATIO * server.system_bytes
        report.prefer(
            "overcommit_memory",
            place.overcommit == "1" or small,
            "set vm.overcommit_memory=1 (sysctl and /etc/sysctl.d): if the kernel refuses a fork, every save fails",
            value=place.overcommit,
            expected=f"1 (or 0 while the data is less than {SMALL_RATIO:.0%} of the memory)",
        )
    if place.huge_pages:
        report.prefer(
            "transparent huge pages",
            place.huge_pages != "always" or server.settings["disable-thp"] == "yes",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: now each write during a save copies 2 MB",
            value=f"[{place.huge_pages}]",  # as the kernel shows it: a bare “never” would be translated
            expected="madvise or never, or disable-thp yes",
        )


def judge_files(report: Report, server: Persistence, place: DataDirectory, written: dict[str, str]) -> None:
    """The files that the next start would load: the AOF if it is on then, otherwise the RDB."""
    if place.problem or not place.directory.is_dir():
        return
    rows = [_row(file) for file in (place.rdb, *place.aof, *place.remains)]
    report.table("Files", ("file", "what", "size", "written"), rows, most=50)
    if server.appendonly:
        missing = ", ".join(file.name for file in place.missing[:3]) or ("all of them" if not place.aof else "")
        report.require(
            "files of the AOF",
            not missing,
            "rewrite the AOF from memory before any restart",
            value=f"missing: {missing}" if missing else f"{len(place.aof)} files",
            expected="every file that the manifest names: the server does not start without them",
            follow=[REWRITE],
        )
    else:
        report.require(
            "the RDB",
            not (place.rdb_problem or place.rdb.is_missing)
            or not server.keys
            or bool(server.is_fresh and server.rules and place.rdb.is_missing),
            "take a snapshot before any restart",
            value=f"{place.rdb.name} is missing" if place.rdb.is_missing else place.rdb_problem or _row(place.rdb)[2],
            expected="complete and of the last save: a start loads nothing else",
            follow=[SNAPSHOT],
        )
    if written:
        _judge_next_start(report, server, place, written["appendonly"] == "yes")
    if place.remains:
        names = " ".join(file.name for file in place.remains[:5])
        left = size(sum(file.bytes for file in place.remains))
        report.warn(
            "files of killed saves",
            f"rm {names}",
            value=f"{len(place.remains)} files, {left}",
            expected="none",
        )


def _judge_next_start(report: Report, server: Persistence, place: DataDirectory, aof_then: bool) -> None:
    """A start follows the configuration file: with appendonly it loads the AOF only, and 0 keys if that is missing."""
    if server.appendonly == aof_then:
        report.passed("the next start", value="same appendonly as now", expected="loads the current data")
        return
    hint = f"save the running settings to {server.config_file}: CONFIG REWRITE"
    if server.appendonly:
        loads = "no file at all" if place.rdb.is_missing else f"the RDB of {_row(place.rdb)[3]}"
        value = f"appendonly is yes now and no in {server.config_file}: it would load {loads}, not the AOF"
    else:
        hint = f"write the AOF now (CONFIG SET appendonly yes), or {hint}"
        loads = f"the AOF of {_row(place.aof[-1])[3]} instead of the RDB" if place.aof else "0 keys"
        value = f"appendonly is no now and yes in {server.config_file}: it would load {loads}"
    report.fail("the next start", hint, value=value, expected="loads the current data", follow=[APPLY])


def judge_written(report: Report, server: Persistence, written: dict[str, str], problem: str) -> None:
    """The running settings against the configuration file: a restart loses the difference."""
    if problem:
        hint = "compare CONFIG GET with the file on its host" if server.config_file else "restart it with such a file"
        hint += ": a restart can lose settings"
        report.warn("configuration file: not measured", hint, value=problem)
        return
    different = [name for name in written if name != "appendonly" and not _same(server, name, written[name])]
    report.prefer(
        "configuration file",
        not different,
        "save the running settings (CONFIG REWRITE), or set the manual's values",
        value="; ".join(f"{n} {server.settings[n] or 'off'} runs, {written[n] or 'off'} is written" for n in different)
        or server.config_file,
        expected="the running settings",
        follow=[APPLY],
    )


def _same(server: Persistence, name: str, written: str) -> bool:
    running = server.settings[name]
    if name == "dir" and not running:  # deleted: judged with the data directory
        return True
    if name == "save":
        return sorted(parse_rules(running)) == sorted(parse_rules(written))
    if name in ("dir", "logfile"):  # relative to the server's start directory, which is unknown
        return not Path(written).is_absolute() or Path(written).resolve() == Path(running).resolve()
    return running == written


def judge_sentinels(report: Report, name: str, watch: Watch) -> None:
    """Every Sentinel watches the master: otherwise there is no failover."""
    for view in watch.views:
        value = view.problem or (f"watches {view.master}" if view.master else f"does not watch {name}")
        hint, follow = "start it", list[Next]()
        if not view.problem:
            hint = f"SENTINEL MONITOR {name} <master's host> <port> <quorum> and SENTINEL SET {name} auth-pass on it"
            follow = [Next("reattach-redis", "after a killed restore")]
        report.prefer(
            f"Sentinel {view.address}", bool(view.master), hint, value=value, expected=f"watches {name}", follow=follow
        )


def judge_detached(report: Report, left: ReplicationTopology | None) -> None:
    """Servers that a restore detached follow the master again: until then no Sentinel promotes them."""
    for address in left.others if left else ():
        report.warn(
            f"replica {address}",
            "fix what keeps it from the master, then run reattach-redis",
            value="detached by a restore, and not promoted by a failover (replica-priority 0)",
            expected="in sync with the master",
            follow=[Next("reattach-redis", "attach it")],
        )


def _row(file: DataFile) -> tuple[str, str, str, str]:
    if file.modified is None:
        return file.name, file.what, "MISSING", ""
    return file.name, file.what, size(file.bytes), f"{clock.text(file.modified)}"
