"""How apply- and undo-redis-settings go about it: plan, record, set, write the file, tell (§2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.environment import Environment
from flows.redis.settings.changes import Order, Undo
from flows.redis.settings.findings import APPLY, KEEPING, UNDO, differences
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.report import Report
from runbook.units import size
from tasks.redis.settings.changes import OFF, ON, Change, Done, rewrite_file, set_values, switch_aof_on
from tasks.redis.settings.recommended import parse_rules, same, shown
from tasks.redis.settings.running import ServerSettings, read_settings
from tasks.reports import setting_records as records
from tasks.reports.setting_records import Changed, Record


@dataclass(frozen=True)
class Result:
    """What became of an order: how many of its values run, and whether that is all and in the file too."""

    address: str
    values: int
    complete: bool


def plan(report: Report, orders: Sequence[Order]) -> None:
    """One step for each change, with what it is now; then the file; and what would be kept on disk."""
    for order in orders:
        for change in order.changes:
            _plan_change(report, order.found, change)
        if order.rewrite:
            _plan_file(report, order)
        _judge_kept(report, order)


def _plan_change(report: Report, found: ServerSettings, change: Change) -> None:
    running = found.running[change.name]
    now = "its time begins anew" if same(change.name, running, change.value) else f"now {shown(change.name, running)}"
    data = found.server.dataset_bytes if change == ON else 0
    more = "; waits until the AOF holds everything" if change == ON else ""
    report.plan("CONFIG SET", f"{change} on {found.address}; {now}{more}", size=data, seconds=data / 5e7)


def _plan_file(report: Report, order: Order) -> None:
    """CONFIG REWRITE keeps all that runs, whoever set it."""
    found, changed = order.found, {change.name for change in order.changes}
    if not order.has_file:
        hint = f"{_file_remedy(found, '', APPLY)}: until then the values are lost at the next restart"
        report.warn(f"kept in the file of {found.address}", hint, value="it was started without a configuration file")
        return
    also = differences({name: pair for name, pair in found.unwritten().items() if name not in changed})
    told = f" (also keeps: {'; '.join(also)})" if also else ""
    report.plan("CONFIG REWRITE", f"{found.server.config_file} of {found.address}{told}")
    if unseen := found.problem or found.others_problem:
        hint = "compare CONFIG GET * on it with its file first: whatever was set at run time is kept with the rest"
        report.warn(f"what CONFIG REWRITE keeps besides on {found.address}: not measured", hint, value=unseen)


def _judge_kept(report: Report, order: Order) -> None:
    """What a kill would lose from then on, where this changes it."""
    found, after = order.found, {change.name: change.value for change in order.changes}
    rules = parse_rules(after.get("save", found.running["save"]))
    if after.keys() & set(KEEPING) and not rules and after.get("appendonly", found.running["appendonly"]) != "yes":
        report.warn(
            f"nothing is kept on disk by {found.address}",
            "keep one of save and appendonly: from then on a kill, or a restart, loses all data",
            value="save off and appendonly no, once this is done",
            expected="one of them",
        )
    elif OFF in order.changes:
        hint = "snapshot-redis right after it: from then on a kill loses every change since the last save"
        report.warn(f"the AOF of {found.address} is switched off", hint)


def require_rights(orders: Sequence[Order]) -> None:
    """Raises OpsError where this user may not give a command that it takes: before anything is changed."""
    for error in (error for order in orders for error in order.found.refused):
        raise error


def keep(report: Report, env: Environment, orders: Sequence[Order], *, hours: float = 0, reason: str = "") -> None:
    """Write the old values down, a record for each server, before anything is changed."""
    told = []
    for found, changes in ((order.found, order.changes) for order in orders if order.changes):
        pairs = [Changed(each.name, each.old, each.value, each.ended) for each in changes]
        kept = records.keep(env.reports_directory, found.identity, pairs, hours=hours, reason=reason)
        told.append(f"{kept.name} of {found.address}")
        if kept.until:
            report.fact("override until", kept.until)
    if told:
        names = ", ".join(told)
        report.fact("record of the old values", f"{names} (to undo: {UNDO} with record=…)")
        report.state_is("some values may be set and not yet in the file", f"launch it again, or {UNDO} ({names})")


def carry_out(report: Report, env: Environment, permit: Permit, order: Order, flow: str) -> Result:
    """Set, switch the AOF on, write the file, and tell what runs then and what would be lost; `flow` is what is to be
    launched again where the file could not be written. Overrides whose value is gone by then are closed."""
    block, found = env.redis.at(order.found.address), order.found
    plain = [change for change in order.changes if change != ON]
    done = set_values(permit, block, found, plain) if plain else ()
    saved = switch_aof_on.after(done)(permit, block, found) if ON in order.changes else None
    if saved:
        report.fact("AOF", f"on; written in {saved.seconds:.1f} s, {size(saved.after.aof_bytes)}")
    writes = order.rewrite and order.has_file
    problem = rewrite_file.after(done, saved)(permit, block, found) if writes else ""
    after = read_settings.after(problem)(block, env.name)
    values = _tell_values(report, order, after, done)
    if writes:
        _tell_file(report, after, problem, flow)
    records.close_replaced(env.reports_directory, after, at_once=True)
    return Result(after.address, values, values == len(order.changes) and not problem)


def undo(report: Report, env: Environment, permit: Permit, each: Undo) -> Result:
    """Carry it out; its record is done with when all old values are back. What its record had ended counts again from
    before: where this is killed, no value is left that nobody knows."""
    records.reopen(env.reports_directory, each.reopened)
    result = carry_out(report, env, permit, each.order, f"{UNDO} with record={each.record.name}")
    if result.complete and not each.left:
        records.mark_undone(env.reports_directory, each.record)
    return result


def _tell_values(report: Report, order: Order, after: ServerSettings, done: Sequence[Done]) -> int:
    """What runs now; returns how many of the changes do."""
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


def _is_set(report: Report, after: ServerSettings, change: Change, refused: str) -> bool:
    return report.require(
        f"{change} on {after.address}",
        after.is_written(change.name, change.value),
        _after_refusal(change, refused),
        value=f"the server refuses it: {refused}" if refused else shown(change.name, after.running[change.name]),
        expected=shown(change.name, change.value),
    )


def _tell_file(report: Report, after: ServerSettings, problem: str, flow: str) -> None:
    lost = differences(after.unwritten())
    report.prefer(
        f"kept in the file of {after.address}",
        not problem and not lost,
        f"{_file_remedy(after, problem, flow)}: until then the values are lost at the next restart",
        value=problem or "; ".join(lost) or after.server.config_file,
        expected="what runs now",
    )


def _after_refusal(change: Change, why: str) -> str:
    if change.name == "maxclients" and "operating system" in why:
        return "its process may not open so many files: raise LimitNOFILE in its unit (ulimit -n) and restart it"
    if why:
        return f"nothing of it was set: launch it again with a value of {change.name} that the server takes"
    return "somebody else set it meanwhile: look who does, and launch it again"


def _file_remedy(after: ServerSettings, problem: str, flow: str) -> str:
    if not after.server.config_file:
        return "start it with a configuration file that has them"
    if problem:
        folder = after.server.config_file.rpartition("/")[0]
        return f"let the server's user write {after.server.config_file} and its directory {folder}, then {flow} again"
    return f"look whether a file that {after.server.config_file} includes says otherwise"


def find_undoable(
    env: Environment, known: Sequence[Record], servers: Sequence[ServerSettings], name: str
) -> list[tuple[ServerSettings, Record]]:
    """For each server its newest record that can be undone, or the one of that name.

    Raises:
        OpsError: there is none; which there are of other servers is said.
    """
    pairs: list[tuple[ServerSettings, Record]] = []
    for found in servers:
        ours = [r for r in records.open_records(known, found.identity) if not name or r.name == name]
        pairs += [(found, record) for record in ours[-1:]]
    if pairs:
        return pairs
    ours_too = {r.name: r for r in known if r.server.startswith(f"redis {env.name} ")}
    if named := ours_too.get(name):
        if not named.is_open:
            when = f"undone {named.undone}" if named.undone else f"replaced, as was seen {named.replaced}"
            raise OpsError(f"there is no record {name} that could be undone: it was {when}", "look at the values now")
        where = named.server.rpartition(" ")[2]
        raise OpsError(f"record {name} is of {where}, which cannot be asked", f"start {where}, then launch it again")
    told = [f"{r.name} of {r.server.rpartition(' ')[2]}" for r in ours_too.values() if r.is_open]
    what = f"there is no record {name or 'that could be undone'} of {', '.join(found.address for found in servers)}"
    hint = f"launch it with record=… for one of: {', '.join(told[-5:])}" if told else f"{APPLY} writes one"
    raise OpsError(what, hint)


def tell_left_out(report: Report, orders: Sequence[Order], others: Sequence[ServerSettings]) -> None:
    """Servers that keep what they have."""
    if others and any(order.changes for order in orders):
        names = ", ".join(f"{found.address} ({found.role})" for found in others)
        report.warn(
            "other servers keep their own values",
            "launch it with everywhere: they count once one of them is promoted",
            value=names,
        )


def told_of(results: Sequence[Result], done: str) -> str:
    """The run in one line."""
    told = [f"{each.values} value{'' if each.values == 1 else 's'} {done} on {each.address}" for each in results]
    return ", ".join(told)
