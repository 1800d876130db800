"""The steps of apply- and undo-redis-settings: plan, record, set, write the file, report (§2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from blocks.environment import Environment
from flows.redis.settings.changes import SettingsOrder, SettingsUndo
from flows.redis.settings.findings import APPLY, KEEPING, UNDO
from runbook.change import Carrier, Change, Line, State
from runbook.errors import OpsError
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report
from runbook.units import counted, first_of, size
from tasks.redis.persistence.saving import Saved
from tasks.redis.settings.changes import (
    OFF,
    ON,
    RedisSettingChange,
    SettingsChanged,
    rewrite_file,
    set_values,
    switch_aof_on,
)
from tasks.redis.settings.recommended import parse_rules, same, shown
from tasks.redis.settings.running import RedisServerSettings, differences, read_settings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Changed, Record

AOF_BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class Result:
    """The result of an order: how many values run. `complete`: all of them, and they are in the file."""

    address: str
    values: int
    complete: bool


@dataclass(frozen=True)
class OrderLines:
    """An order's lines of the plan; None where it does not need one. `closing`: of an undo's record."""

    order: SettingsOrder
    setting: Change[[], tuple[SettingsChanged, ...]] | None
    switching: Change[[], Saved] | None
    rewriting: Change[[], str] | None
    closing: Change[[], None] | None = None

    @property
    def lines(self) -> list[Line[..., Any]]:
        """In the order in which they are carried out."""
        return [line for line in (self.setting, self.switching, self.rewriting, self.closing) if line]


def plan_order(env: Environment, order: SettingsOrder, again: str) -> OrderLines:
    """Plan the changes with the current values, then the file. `again`: what to do if the run fails in between."""
    block, found = env.redis.at(order.found.address), order.found
    plain = [change for change in order.changes if change != ON]
    begun = State("some values may be set and not yet in the file", again)
    setting = switching = rewriting = None
    if plain:
        first, *others = (_detail(found, change) for change in plain)
        more = [PlannedStep("CONFIG SET", detail) for detail in others]
        setting = Change(set_values.bind(block, found, plain), "CONFIG SET", first, more=more, begun=begun)
    if ON in order.changes:
        data, detail = found.server.dataset_bytes, f"{_detail(found, ON)}; waits until the AOF is complete"
        switching = Change(
            switch_aof_on.bind(block, found),
            "CONFIG SET",
            detail,
            size=data,
            seconds=data / AOF_BYTES_PER_SECOND,
            begun=begun,
        )
    if order.rewrite and order.has_file:
        changed = {change.name for change in order.changes}
        also = differences({name: pair for name, pair in found.unwritten().items() if name not in changed})
        saves = f" (also saves: {'; '.join(also)})" if also else ""
        detail = f"{found.server.config_file} of {found.address}{saves}"
        rewriting = Change(rewrite_file.bind(block, found), "CONFIG REWRITE", detail)
    return OrderLines(order, setting, switching, rewriting)


def plan_undo(env: Environment, each: SettingsUndo) -> OrderLines:
    """Plan to restore a record's old values, and to close it, unless others changed some since."""
    lines = plan_order(env, each.order, "run it again")
    if each.left:
        return lines
    closing = Change(
        partial(records.mark_undone, env.reports_directory, each.record),
        "close",
        f"record {each.record.name}, whose old values are then restored",
        is_optional=True,
    )
    return replace(lines, closing=closing)


def effect(orders: Sequence[SettingsOrder], undo: str) -> Effect:
    """For the plan's headline."""
    names = list(dict.fromkeys(change.name for order in orders for change in order.changes))
    return Effect(f"Redis's settings change: {first_of(names)}" if names else "Redis saves its settings", undo)


def _detail(found: RedisServerSettings, change: RedisSettingChange) -> str:
    running = found.running[change.name]
    now = "prolonged" if same(change.name, running, change.value) else f"now {shown(change.name, running)}"
    return f"{change} on {found.address}; {now}"


def judge_orders(report: Report, orders: Sequence[SettingsOrder]) -> None:
    """Warn of data and of settings that the changes lose or save.

    Raises:
        OpsError: this user may not run a command that is needed.
    """
    for error in (error for order in orders for error in order.found.refused):
        raise error
    for order in orders:
        if order.rewrite:
            _judge_written(report, order.found)
        _judge_kept(report, order)


def _judge_written(report: Report, found: RedisServerSettings) -> None:
    """CONFIG REWRITE saves all running settings, not only these."""
    if not found.server.config_file:
        hint = f"{_file_remedy(found, '', APPLY)}: until then the values are lost at the next restart"
        report.warn(f"saved in the file of {found.address}", hint, value="it was started without a configuration file")
    elif unseen := found.problem or found.others_problem:
        hint = "compare CONFIG GET * with its file first: all settings made at run time are saved too"
        report.warn(f"other settings that CONFIG REWRITE saves on {found.address}: not measured", hint, value=unseen)


def _judge_kept(report: Report, order: SettingsOrder) -> None:
    """Warn if a kill would then lose more data."""
    found, after = order.found, {change.name: change.value for change in order.changes}
    rules = parse_rules(after.get("save", found.running["save"]))
    if after.keys() & set(KEEPING) and not rules and after.get("appendonly", found.running["appendonly"]) != "yes":
        report.warn(
            f"{found.address} saves nothing to disk",
            "keep save or appendonly: otherwise a kill or a restart loses all data",
            value="save off and appendonly no after this change",
            expected="one of them",
        )
    elif OFF in order.changes:
        hint = "take a snapshot immediately after it: then a kill loses every change since the last save"
        report.warn(f"the AOF of {found.address} is switched off", hint, follow=[Next("snapshot-redis", "save now")])


def keep(
    report: Report, env: Environment, orders: Sequence[SettingsOrder], *, hours: float = 0, reason: str = ""
) -> None:
    """Record the old values, a record for each server, before anything is changed."""
    named = []
    for found, changes in ((order.found, order.changes) for order in orders if order.changes):
        pairs = [Changed(each.name, each.old, each.value, each.ended) for each in changes]
        kept = records.keep(env.reports_directory, found.identity, pairs, hours=hours, reason=reason)
        named.append(f"{kept.name} of {found.address}")
        if kept.until:
            report.fact("override until", kept.until)
    if named:
        names = ", ".join(named)
        report.fact("record of the old values", f"{names} (to undo: {UNDO} with record=…)")


def carry_out(carry: Carrier, env: Environment, lines: OrderLines, flow: str) -> Result:
    """Set the values, switch the AOF on, write the file, and report the running values. `flow`: what to run again if
    the file cannot be written. Overrides whose value was replaced are closed."""
    report, order = carry.report, lines.order
    done = carry(lines.setting) if lines.setting else ()
    saved = carry(lines.switching) if lines.switching else None
    if saved:
        report.fact("AOF", f"on; written in {saved.seconds:.1f} s, {size(saved.after.aof_bytes)}")
    problem = carry(lines.rewriting) if lines.rewriting else ""
    after = read_settings.after(problem)(env.redis.at(order.found.address), env.name)
    values = _report_values(report, order, after, done)
    if lines.rewriting:
        _judge_file(report, after, problem, flow)
    records.close_replaced(env.reports_directory, after, at_once=True)
    return Result(after.address, values, values == len(order.changes) and not problem)


def undo(carry: Carrier, env: Environment, each: SettingsUndo, lines: OrderLines) -> Result:
    """Carry it out; the record is closed when all old values are restored. The overrides that it ended are reopened
    first, so that a kill leaves no value without a record."""
    records.reopen(env.reports_directory, each.reopened)
    result = carry_out(carry, env, lines, f"{UNDO} with record={each.record.name}")
    if lines.closing and result.complete:
        carry(lines.closing)
    elif lines.closing:
        carry.skip(lines.closing, "not all old values are restored")
    return result


def _report_values(
    report: Report, order: SettingsOrder, after: RedisServerSettings, done: Sequence[SettingsChanged]
) -> int:
    """A table of the running values; returns how many of the changes are set."""
    rows = [
        (
            name,
            shown(name, order.found.running[name]),
            shown(name, after.running[name]),
            shown(name, after.written.get(name, "not measured")),
        )
        for name in (change.name for change in order.changes)
    ]
    report.table(f"In effect on {after.address}", ("setting", "before", "running", "in the file"), rows)
    refused = {each.change.name: each.refused for each in done if each.refused}
    return sum(_is_set(report, after, change, refused.get(change.name, "")) for change in order.changes)


def _is_set(report: Report, after: RedisServerSettings, change: RedisSettingChange, refused: str) -> bool:
    return report.require(
        f"{change} on {after.address}",
        after.is_written(change.name, change.value),
        _after_refusal(change, refused),
        value=f"the server refuses it: {refused}" if refused else shown(change.name, after.running[change.name]),
        expected=shown(change.name, change.value),
    )


def _judge_file(report: Report, after: RedisServerSettings, problem: str, flow: str) -> None:
    lost = differences(after.unwritten())
    report.prefer(
        f"saved in the file of {after.address}",
        not problem and not lost,
        f"{_file_remedy(after, problem, flow)}: until then the values are lost at the next restart",
        value=problem or "; ".join(lost) or after.server.config_file,
        expected="the running settings",
    )


def _after_refusal(change: RedisSettingChange, why: str) -> str:
    if change.name == "maxclients" and "operating system" in why:
        return "raise LimitNOFILE in its unit (ulimit -n) and restart it: its process cannot open so many files"
    if why:
        return f"run it again with a value of {change.name} that the server accepts; it was not set"
    return "find out who else changed it meanwhile, then run it again"


def _file_remedy(after: RedisServerSettings, problem: str, flow: str) -> str:
    if not after.server.config_file:
        return "start it with a configuration file that has these values"
    if problem:
        folder = after.server.config_file.rpartition("/")[0]
        return f"let the server's user write {after.server.config_file} and its directory {folder}, then {flow} again"
    return f"check the files that {after.server.config_file} includes for another value"


def find_undoable(
    env: Environment, known: Sequence[Record], servers: Sequence[RedisServerSettings], name: str
) -> list[tuple[RedisServerSettings, Record]]:
    """For each server the newest open record, or the record of that name.

    Raises:
        OpsError: there is none; the message names other servers' records.
    """
    pairs: list[tuple[RedisServerSettings, Record]] = []
    for found in servers:
        ours = [r for r in records.open_records(known, found.identity) if not name or r.name == name]
        pairs += [(found, record) for record in ours[-1:]]
    if pairs:
        return pairs
    ours_too = {r.name: r for r in known if r.server.startswith(f"redis {env.name} ")}
    if named := ours_too.get(name):
        if not named.is_open:
            when = f"was undone at {named.undone}" if named.undone else f"was found replaced at {named.replaced}"
            raise OpsError(f"record {name} cannot be undone: it {when}", "check the values now: check-redis-settings")
        where = named.server.rpartition(" ")[2]
        raise OpsError(f"record {name} is of {where}, which does not answer", f"start {where}, then run it again")
    others = [f"{r.name} of {r.server.rpartition(' ')[2]}" for r in ours_too.values() if r.is_open]
    what = f"there is no record {name or 'to undo'} of {', '.join(found.address for found in servers)}"
    hint = f"run it with record=… for one of: {', '.join(others[-5:])}" if others else f"{APPLY} writes one"
    raise OpsError(what, hint)


def report_others(report: Report, orders: Sequence[SettingsOrder], others: Sequence[RedisServerSettings]) -> None:
    """The servers that this run does not change."""
    if others and any(order.changes for order in orders):
        names = ", ".join(f"{found.address} ({found.role})" for found in others)
        report.warn(
            "other servers keep their own values",
            "run it with everywhere: after a promotion their own values apply",
            value=names,
        )


def outcome(results: Sequence[Result], *, undone: bool = False) -> str:
    """The run in one line."""
    values = [(counted(each.values, "value"), each.address) for each in results]
    return ", ".join(f"{what} restored on {where}" if undone else f"{what} set on {where}" for what, where in values)
