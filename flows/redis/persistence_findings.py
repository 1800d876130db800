"""What check-redis-persistence says of a server: settings, saves, failures, and what a kill would lose now (§2.3)."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from runbook import metrics
from runbook.metrics import default_limits
from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.persistence.place import Place
from tasks.redis.persistence.state import Persistence
from tasks.redis.settings.recommended import MANUAL_RULES, OF_PERSISTENCE, Judged, judged

SHOWN = "%Y-%m-%d %H:%M:%S UTC"
# What the kernel keeps before it writes by itself (vm.dirty_expire_centisecs).
KERNEL_SECONDS = 30.0
# A save that fails is tried again every 5 s; one that is due and does not come for a minute will not come.
DUE_SECONDS = 60.0
APPLY = "apply-redis-settings"
SAVE_FLOW = "snapshot-redis"


def judge_server(report: Report, server: Persistence) -> None:
    """Which one it is, and whether it keeps anything at all."""
    state = server.state
    report.fact("server", f"{server.address} ({state.role}, {server.version})")
    report.fact("keys", f"{server.keys:,} ({size(server.dataset_bytes)} in memory)")
    report.prefer(
        "role",
        state.role == "master",
        "this is what a replica keeps: name the Sentinels in [redis], or check its master",
        value=state.role if state.role == "master" else f"a replica of {state.master}",
        expected="master",
    )
    saves = ", ".join(map(str, server.rules)) or "no save by itself"
    aof = f"AOF, fsync {server.settings['appendfsync']}" if server.appendonly else "no AOF"
    report.require(
        "persistence",
        bool(server.rules) or server.appendonly,
        f"nothing that clients write is kept: {APPLY} switches save and appendonly on, then {SAVE_FLOW}",
        value=f"{saves}; {aof}",
        expected="RDB and AOF",
    )


def judge_settings(report: Report, server: Persistence) -> None:
    """Against the manual's, by meaning: more often, or more careful, is as well."""
    found = settings_of(server)
    columns = ("setting", "running", "manual (§2.3)", "")
    rows = [(each.name, each.running, each.manual, "as well" if each.ok else "WARN") for each in found]
    report.table("Settings", columns, rows)
    for each in (each for each in found if not each.ok):
        how = "set it in the configuration file: it needs a restart" if each.name == "rdbchecksum" else APPLY
        report.warn(each.name, f"{each.why}: {how}", value=each.running or "off", expected=each.manual)
    report.fact("settings as in the manual", f"{sum(each.ok for each in found)} of {len(found)}")


def settings_of(server: Persistence) -> list[Judged]:
    """Every setting of §2.3 that is not a name."""
    return [judged(name, server.settings[name], dataset_bytes=server.dataset_bytes) for name in OF_PERSISTENCE]


def judge_failures(report: Report, server: Persistence, place: Place, *, watched: bool) -> None:
    """The last save, rewrite and write to the AOF; first of all whether clients can write now. `watched`: by Sentinels,
    which take MISCONF for no answer (seen on Valkey 9)."""
    state = server.state
    cause = f"{place.trouble}: {place.remedy}" if place.trouble else "find the cause (disk, memory, the server's log)"
    fails_over = ": Sentinels take that for no answer, and fail it over" if watched else ""
    report.require(
        "takes writes",
        not server.refuses_writes,
        f"every write, and PING, is answered with MISCONF now{fails_over}. {cause}; then {SAVE_FLOW} with kind=bgsave: "
        "a save that ends well opens it again. To let clients write unsaved: CONFIG SET stop-writes-on-bgsave-error no",
        value=f"no: {server.refuses_writes}" if server.refuses_writes else "yes",
        expected="yes",
    )
    report.require(
        "last save",
        state.save_ok,
        f"{cause}; then {SAVE_FLOW} with kind=bgsave",
        value=_ok(state.save_ok),
        expected="ok",
    )
    report.prefer(
        "last AOF rewrite",
        state.rewrite_ok,
        f"{cause}; then {SAVE_FLOW} with kind=rewrite: the AOF grows until then",
        value=_ok(state.rewrite_ok),
        expected="ok",
    )
    if server.appendonly:
        report.require("last write to the AOF", state.write_ok, cause, value=_ok(state.write_ok), expected="ok")


def judge_last(report: Report, server: Persistence) -> None:
    """When it saved and rewrote last, what that took, and whether a save is overdue."""
    state, since = server.state, server.since_save_seconds
    when = "none since its start" if server.never_saved else f"{datetime.fromtimestamp(state.last_save, UTC):{SHOWN}}"
    ago = f"{when}, {duration(since)} ago"
    report.fact("last save", f"{ago}; {state.changes:,} changes since" + _took(state.save_seconds))
    due = [rule for rule in server.rules if since > rule.seconds + DUE_SECONDS and state.changes >= rule.changes]
    report.prefer(
        "a save that is due",
        not due or state.saving,
        f"{SAVE_FLOW}, and look at the server's log: it should have saved by itself",
        value=f"{due[0]} is overdue by {duration(since - due[0].seconds)}" if due else "none",
        expected="none",
    )
    if server.appendonly:
        grown = (state.aof_bytes / state.aof_base_bytes - 1) if state.aof_base_bytes else 0.0
        told = f"{size(state.aof_bytes)}, grown by {grown:.0%} since the last rewrite{_took(state.rewrite_seconds)}"
        report.fact("AOF", told)
        percentage = int(server.settings["auto-aof-rewrite-percentage"])
        least = max(int(server.settings["auto-aof-rewrite-min-size"]), 1)
        report.prefer(
            "growth of the AOF",
            state.rewriting or not percentage or state.aof_bytes < 2 * least or grown * 100 < 2 * percentage,
            f"{SAVE_FLOW} with kind=rewrite: the server should have rewritten it by itself",
            value=f"{grown:.0%}",
            expected=f"a rewrite at {percentage}% beyond {size(least)}",
        )


def judge_cost(report: Report, server: Persistence) -> None:
    """What saving costs clients and memory."""
    state = server.state
    report.judge(
        metrics.FORK,
        state.fork_seconds,
        "every client waits that long at each save: switch huge pages off, or keep less data in one server",
        worst=Status.WARN,
    )
    hours = max(server.uptime_seconds / 3600, 1.0)
    report.judge(
        metrics.DELAYED_FSYNCS,
        state.delayed_fsyncs / hours,
        "the disk is too slow for the AOF: look at what else writes to it; clients wait, and 2 s may be lost",
        of=f"{state.delayed_fsyncs:,} in {duration(server.uptime_seconds)}",
        worst=Status.WARN,
    )
    copied = max(state.save_cow_bytes, state.rewrite_cow_bytes)
    report.prefer(
        "memory for a save",
        0 < server.used_bytes + copied < server.system_bytes,
        "lower maxmemory or add memory: pages that are written during a save exist twice"
        if server.system_bytes
        else "not measured: the server does not say how much memory its host has",
        value=f"{size(server.used_bytes)} used, {size(copied)} copied at the last save",
        expected=f"less than {size(server.system_bytes)} together",
    )


def judge_loss(report: Report, server: Persistence, place: Place, rpo_seconds: float) -> None:
    """What would be gone if the server, or its host, died now; against the environment's RPO."""
    seconds, told = loss_of(server, place)
    report.limits = {**default_limits(rpo_seconds), **report.limits}
    hint = place.remedy or f"{SAVE_FLOW} now (kind={'rewrite' if server.appendonly else 'bgsave'}); then see below why"
    report.judge(metrics.REDIS_LOSS, seconds, hint, of=told)
    report.fact("a kill now would lose", told)
    worst = min((rule.seconds for rule in server.rules if rule.changes <= 1), default=0)
    if not server.appendonly and server.rules:
        report.prefer(
            "loss at worst",
            0 < worst <= rpo_seconds,
            f"{APPLY}: appendonly yes, or a rule such as {MANUAL_RULES[0]}",
            value=f"{duration(worst)} of changes" if worst else "few changes are never saved by themselves",
            expected=f"≤ {duration(rpo_seconds)}",
        )


def loss_of(server: Persistence, place: Place) -> tuple[float, str]:
    """Seconds of writes, and in words."""
    state = server.state
    loads = bool(place.problem) or bool(place.aof and not place.missing)
    if server.appendonly and state.write_ok and loads:
        if server.settings["appendfsync"] == "always":
            return 0.0, "nothing that was acknowledged (AOF, fsync always)"
        if server.settings["appendfsync"] == "everysec":
            return 1.0, "about the last second (AOF, fsync everysec; 2 s while the disk is slow)"
        return KERNEL_SECONDS, "up to 30 s, when the host dies: the kernel writes the AOF when it likes"
    why = "the AOF would not load" if server.appendonly else "no AOF"
    if server.appendonly and not loads and not place.aof and server.keys:
        return math.inf, f"all {server.keys:,} keys: the files of the AOF are gone, and a start does not look further"
    gone = not place.problem and place.rdb.is_missing
    if gone and server.keys and not server.is_fresh:
        return math.inf, f"all {server.keys:,} keys: there is no RDB either ({why})"
    if place.rdb_problem and server.keys:
        return math.inf, f"up to all {server.keys:,} keys: {place.rdb_problem} ({why})"
    since = "the server's start" if server.never_saved else "the last save"
    if not state.changes:
        return 0.0, f"nothing: no change since {since} ({why})"
    long = server.since_save_seconds
    return long, f"{state.changes:,} changes of the last {duration(long)}, since {since} ({why})"


def _ok(well: bool) -> str:
    return "ok" if well else "failed"


def _took(seconds: int) -> str:
    return f"; it took {seconds} s" if seconds >= 0 else ""
