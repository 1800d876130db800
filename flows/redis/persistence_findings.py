"""The server in check-redis-persistence: settings, saves, failures, and the loss by a kill now (§2.3)."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from runbook import clock, metrics
from runbook.metrics import default_limits
from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.persistence.place import DataDirectory
from tasks.redis.persistence.state import Persistence
from tasks.redis.settings.recommended import MANUAL_RULES, OF_PERSISTENCE, JudgedSetting, judged

# The kernel writes data back after that time (vm.dirty_expire_centisecs).
KERNEL_SECONDS = 30.0
# The server retries a failed save every 5 s. A save that is due for a minute will not start.
DUE_SECONDS = 60.0
APPLY = Next("apply-redis-settings", "set the manual's values")
SNAPSHOT = Next("snapshot-redis", "save now", {"kind": "bgsave"})
REWRITE = Next("snapshot-redis", "rewrite the AOF now", {"kind": "rewrite"})


def judge_server(report: Report, server: Persistence) -> None:
    """The server, its role, and whether it saves anything."""
    state = server.state
    report.fact("server", f"{server.address} ({state.role}, {server.version})")
    report.fact("keys", f"{server.keys:,} ({size(server.dataset_bytes)} in memory)")
    report.prefer(
        "role",
        state.role == "master",
        "name the Sentinels in [redis], or check its master: these are a replica's files",
        value=state.role if state.role == "master" else f"a replica of {state.master}",
        expected="master",
    )
    saves = ", ".join(map(str, server.rules)) or "no automatic save"
    aof = f"AOF, fsync {server.settings['appendfsync']}" if server.appendonly else "no AOF"
    report.require(
        "persistence",
        bool(server.rules) or server.appendonly,
        "set save and appendonly, then take a snapshot: no write would survive a restart",
        value=f"{saves}; {aof}",
        expected="RDB and AOF",
        follow=[APPLY, SNAPSHOT],
    )


def judge_settings(report: Report, server: Persistence) -> None:
    """Compare the settings with the manual's by effect: saving more often, or more safely, is accepted."""
    found = settings_of(server)
    columns = ("setting", "running", "manual (§2.3)", "")
    rows = [(each.name, each.running, each.manual, "accepted" if each.ok else "WARN") for each in found]
    report.table("Settings", columns, rows)
    for each in (each for each in found if not each.ok):
        fixed = each.name == "rdbchecksum"
        hint = f"set it in the configuration file and restart: {each.why}" if fixed else f"set it: {each.why}"
        follow = () if fixed else (APPLY,)
        report.warn(each.name, hint, value=each.running or "off", expected=each.manual, follow=follow)
    report.fact("settings as in the manual", f"{sum(each.ok for each in found)} of {len(found)}")


def settings_of(server: Persistence) -> list[JudgedSetting]:
    """Every setting of §2.3 except names."""
    return [judged(name, server.settings[name], dataset_bytes=server.dataset_bytes) for name in OF_PERSISTENCE]


def judge_failures(report: Report, server: Persistence, place: DataDirectory, *, watched: bool) -> None:
    """Whether clients can write now, and the last save, rewrite and write to the AOF. `watched`: by Sentinels, which
    treat MISCONF as no answer (seen on Valkey 9)."""
    state = server.state
    cause = f"{place.remedy}: {place.trouble}" if place.trouble else "find the cause (disk, memory, the server's log)"
    fails_over = "; Sentinels treat that as no answer and fail over" if watched else ""
    report.require(
        "takes writes",
        not server.refuses_writes,
        f"{cause}; then take a snapshot: a successful save permits writes again. Every write and PING now gets "
        f"MISCONF{fails_over}. To permit writes without saves: CONFIG SET stop-writes-on-bgsave-error no",
        value=f"no: {server.refuses_writes}" if server.refuses_writes else "yes",
        expected="yes",
        follow=[SNAPSHOT],
    )
    hint = f"{cause}; then take a snapshot"
    report.require("last save", state.save_ok, hint, value=_ok(state.save_ok), expected="ok", follow=[SNAPSHOT])
    hint = f"{cause}; then rewrite the AOF, which grows until then"
    report.prefer(
        "last AOF rewrite", state.rewrite_ok, hint, value=_ok(state.rewrite_ok), expected="ok", follow=[REWRITE]
    )
    if server.appendonly:
        report.require("last write to the AOF", state.write_ok, cause, value=_ok(state.write_ok), expected="ok")


def judge_last(report: Report, server: Persistence) -> None:
    """The last save and rewrite, how long they took, and whether one is overdue."""
    state, since = server.state, server.since_save_seconds
    when = "none since its start" if server.never_saved else clock.text(datetime.fromtimestamp(state.last_save, UTC))
    ago = f"{when}, {duration(since)} ago"
    report.fact("last save", f"{ago}; {state.changes:,} changes since" + _took(state.save_seconds))
    due = [rule for rule in server.rules if since > rule.seconds + DUE_SECONDS and state.changes >= rule.changes]
    report.prefer(
        "a save that is due",
        not due or state.saving,
        "take a snapshot, and check the server's log: it should have saved automatically",
        value=f"{due[0]} is overdue by {duration(since - due[0].seconds)}" if due else "none",
        expected="none",
        follow=[SNAPSHOT],
    )
    if server.appendonly:
        grown = (state.aof_bytes / state.aof_base_bytes - 1) if state.aof_base_bytes else 0.0
        took = _took(state.rewrite_seconds)
        report.fact("AOF", f"{size(state.aof_bytes)}, grown by {grown:.0%} since the last rewrite{took}")
        percentage = int(server.settings["auto-aof-rewrite-percentage"])
        least = max(int(server.settings["auto-aof-rewrite-min-size"]), 1)
        report.prefer(
            "growth of the AOF",
            state.rewriting or not percentage or state.aof_bytes < 2 * least or grown * 100 < 2 * percentage,
            "rewrite the AOF, and check the server's log: it should have rewritten it automatically",
            value=f"{grown:.0%}",
            expected=f"a rewrite at {percentage}% beyond {size(least)}",
            follow=[REWRITE],
        )


def judge_cost(report: Report, server: Persistence) -> None:
    """The cost of saves for clients and memory."""
    state = server.state
    report.judge(
        metrics.FORK,
        state.fork_seconds,
        "switch huge pages off, or split the data over several servers: every client waits that long at each save",
        worst=Status.WARN,
    )
    hours = max(server.uptime_seconds / 3600, 1.0)
    report.judge(
        metrics.DELAYED_FSYNCS,
        state.delayed_fsyncs / hours,
        "check what else writes to the disk: it is too slow for the AOF, clients wait, and a crash can lose 2 s",
        of=f"{state.delayed_fsyncs:,} in {duration(server.uptime_seconds)}",
        worst=Status.WARN,
    )
    copied = max(state.save_cow_bytes, state.rewrite_cow_bytes)
    report.prefer(
        "memory for a save",
        0 < server.used_bytes + copied < server.system_bytes,
        "lower maxmemory or add memory: a save copies the pages that clients change meanwhile"
        if server.system_bytes
        else "check the host's memory: the server does not report it",
        value=f"{size(server.used_bytes)} used, {size(copied)} copied at the last save",
        expected=f"less than {size(server.system_bytes)} together",
    )


def judge_loss(report: Report, server: Persistence, place: DataDirectory, rpo_seconds: float) -> None:
    """The writes that a crash of the server or its host would lose now, against the environment's RPO."""
    seconds, described = loss_of(server, place)
    report.limits = {**default_limits(rpo_seconds), **report.limits}
    follow = [REWRITE if server.appendonly else SNAPSHOT]
    hint = place.remedy or "save now; then find the cause in the findings below"
    report.judge(metrics.REDIS_LOSS, seconds, hint, of=described, follow=follow)
    report.fact("a kill now would lose", described)
    worst = min((rule.seconds for rule in server.rules if rule.changes <= 1), default=0)
    if not server.appendonly and server.rules:
        report.prefer(
            "loss at worst",
            0 < worst <= rpo_seconds,
            f"set appendonly yes, or a rule such as {MANUAL_RULES[0]}",
            value=f"{duration(worst)} of changes" if worst else "a few changes are never saved automatically",
            expected=f"≤ {duration(rpo_seconds)}",
            follow=[APPLY],
        )


def loss_of(server: Persistence, place: DataDirectory) -> tuple[float, str]:
    """The loss by a crash now: seconds of writes, and a description."""
    state = server.state
    loads = bool(place.problem) or bool(place.aof and not place.missing)
    if server.appendonly and state.write_ok and loads:
        if server.settings["appendfsync"] == "always":
            return 0.0, "no acknowledged write (AOF, fsync always)"
        if server.settings["appendfsync"] == "everysec":
            return 1.0, "about the last second (AOF, fsync everysec; 2 s while the disk is slow)"
        return KERNEL_SECONDS, "up to 30 s if the host crashes: the kernel decides when it writes the AOF"
    why = "the AOF would not load" if server.appendonly else "no AOF"
    if server.appendonly and not loads and not place.aof and server.keys:
        return math.inf, f"all {server.keys:,} keys: the files of the AOF are missing, and a start loads no other"
    missing = not place.problem and place.rdb.is_missing
    if missing and server.keys and not server.is_fresh:
        return math.inf, f"all {server.keys:,} keys: the RDB is missing too ({why})"
    if place.rdb_problem and server.keys:
        return math.inf, f"up to all {server.keys:,} keys: {place.rdb_problem} ({why})"
    since = "the server's start" if server.never_saved else "the last save"
    if not state.changes:
        return 0.0, f"nothing: no change since {since} ({why})"
    long = server.since_save_seconds
    return long, f"{state.changes:,} changes of the last {duration(long)}, since {since} ({why})"


def _ok(succeeded: bool) -> str:
    return "ok" if succeeded else "failed"


def _took(seconds: int) -> str:
    return f"; it took {seconds} s" if seconds >= 0 else ""
